// Package ptth makes lines out of HTTP/1.1 with the roles reversed: the client connects and
// asks for an upgrade, and from then on the proxy sends requests over that connection. Hub
// is the proxy's end, Dialer the client's.
package ptth

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/reverse"
)

// Protocol is what stands in the Upgrade header.
const Protocol = "PTTH/1.0"

// HubConfig is what a Hub works with.
type HubConfig struct {
	// Registry takes the lines.
	Registry *reverse.Registry
	// Heartbeat is how long a line may be silent; see docs/protocol.md.
	Heartbeat time.Duration
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Hub makes lines of connections that clients open. It is safe for concurrent use.
type Hub struct {
	cfg       HubConfig
	heartbeat string // in seconds
	halfOpen  prometheus.Counter
	began     time.Time

	mu      sync.Mutex
	lines   map[*line]struct{}
	closed  bool
	parking sync.WaitGroup
}

// NewHub returns a hub.
func NewHub(cfg HubConfig) *Hub {
	h := &Hub{
		cfg: cfg, heartbeat: strconv.FormatFloat(cfg.Heartbeat.Seconds(), 'f', -1, 64), lines: make(map[*line]struct{}), began: time.Now(),
		halfOpen: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "promferry_proxy_half_open_lines_total", Help: "Lines that were closed because a heartbeat was not answered.",
		}),
	}
	cfg.Registerer.MustRegister(h.halfOpen)
	return h
}

// ServeHTTP makes a line of a GET, and takes the goodbye of a DELETE.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set(reverse.HeaderProxy, "1")
	header.Set(reverse.HeaderHeartbeat, h.heartbeat)
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		header.Set("Allow", "GET, DELETE")
		http.Error(w, "a line is asked for by GET", http.StatusMethodNotAllowed)
		return
	}
	hello, err := h.cfg.Registry.Hello(r, r.Header.Get(reverse.HeaderClient), reverse.KindPTTH)
	switch {
	case err != nil:
		reverse.Refuse(w, err)
		return
	case r.Method == http.MethodDelete:
		h.cfg.Registry.Goodbye(hello)
		w.WriteHeader(http.StatusNoContent)
		return
	case !strings.EqualFold(r.Header.Get("Upgrade"), Protocol) || r.ProtoMajor != 1:
		header.Set("Upgrade", Protocol)
		header.Set("Connection", "Upgrade")
		http.Error(w, "a line needs Upgrade: "+Protocol, http.StatusUpgradeRequired)
		return
	}
	session, err := h.cfg.Registry.Join(hello)
	if err != nil {
		reverse.Refuse(w, err)
		return
	}
	l := &line{hub: h, session: session, grant: hello.Grant, phase: uint8(rand.N(256))} //nolint:gosec // Spreads load; nothing depends on it being secret.
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		session.Leave(l)
		http.Error(w, "the connection cannot be upgraded", http.StatusUpgradeRequired)
		return
	}
	if buffered.Reader.Buffered() > 0 { // It must wait until it is asked.
		session.Leave(l)
		_ = conn.Close()
		return
	}
	l.conn = reverse.Uncorked(conn)
	h.start(l)
}

// start answers the upgrade, and asks for the first sign of life.
func (h *Hub) start(l *line) {
	h.mu.Lock()
	h.lines[l] = struct{}{}
	h.mu.Unlock()
	l.mu.Lock()
	l.owed = h.now()
	l.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n" +
		reverse.HeaderProxy + ": 1\r\n" + reverse.HeaderHeartbeat + ": " + h.heartbeat + "\r\n\r\n" + heartbeat)
	l.mu.Unlock()
	h.park(l)
}

// now returns the time since the hub's start, never zero.
func (h *Hub) now() time.Duration { return time.Since(h.began) + 1 }

// park lets the line wait for what comes.
func (h *Hub) park(l *line) {
	h.mu.Lock()
	closed := h.closed
	if !closed {
		h.parking.Go(l.park)
	}
	h.mu.Unlock()
	if closed { // What closed the lines does not wait for this one.
		l.end()
	}
}

// The requests that are signs of life.
const (
	heartbeat = "OPTIONS * HTTP/1.1\r\nHost: promferry\r\n\r\n"
	move      = "OPTIONS * HTTP/1.1\r\nHost: promferry\r\nConnection: close\r\n\r\n"
)

// Run sends heartbeats until ctx ends. Then it closes all lines, and waits for their end.
func (h *Hub) Run(ctx context.Context) error {
	// With this, a heartbeat goes out before seven eighths of its time, and a line whose other
	// end is gone is found before twice of it.
	tick := time.NewTicker(max(h.cfg.Heartbeat/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, l := range h.all() {
				l.beat()
			}
		case <-ctx.Done():
			h.mu.Lock()
			h.closed = true
			h.mu.Unlock()
			for _, l := range h.all() {
				_ = l.Close()
			}
			h.parking.Wait()
			return nil
		}
	}
}

func (h *Hub) all() []*line {
	h.mu.Lock()
	defer h.mu.Unlock()
	lines := make([]*line, 0, len(h.lines))
	for l := range h.lines {
		lines = append(lines, l)
	}
	return lines
}

// Move tells all clients to open their lines anew, elsewhere: the proxy is about to stop. What
// is in use by a scrape stays until that is done.
func (h *Hub) Move() {
	for _, l := range h.all() {
		l.move()
	}
}

// Revoke closes the lines of clients that are not valid any more.
func (h *Hub) Revoke(valid func(g reverse.Grant, name string) bool) {
	for _, l := range h.all() {
		if l.grant != nil && (l.session.Revoked() || !valid(l.grant, l.session.Name())) {
			h.cfg.Logger.Warn("Line of a client revoked", "client", l.session.Name(), "identity", l.grant.Identity())
			_ = l.Close()
		}
	}
}
