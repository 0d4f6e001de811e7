// Package longpoll makes lines out of PushProx's long-poll: a client asks for a scrape by
// POST /poll, which is answered when there is one, and responds by POST /push. Hub is the
// proxy's end, Poller the client's; each works with PushProx's other end as well.
package longpoll

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/reverse"
)

const (
	// headerID tells which scrape a response is for.
	headerID = "Id"
	// maxName is how large the body of a poll is at most, in bytes: a name and spaces.
	maxName = 1 << 10
	// maxHeader is how large the header of a response may be, in bytes.
	maxHeader = 64 << 10
	// idleTimeout is how long a connection is kept after a poll was answered: the next poll
	// comes at once.
	idleTimeout = time.Minute
	// readTimeout is how long reading a poll may take.
	readTimeout = 10 * time.Second
)

// HubConfig is what a Hub works with.
type HubConfig struct {
	// Registry takes the lines.
	Registry *reverse.Registry
	// Heartbeat is how long a poll of a promferry client is held. PushProx's are held
	// without limit: they take any other answer than a scrape for an error.
	Heartbeat time.Duration
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Hub makes lines of polls. It is safe for concurrent use.
//
// A connection with a poll is taken from its HTTP server, since that keeps some 20 KiB for each,
// and given back when the poll was answered and the next request begins: Accept returns
// such connections, so a server for them must be running.
type Hub struct {
	cfg       HubConfig
	heartbeat string // in seconds
	late      prometheus.Counter
	back      chan net.Conn
	closing   chan struct{}
	closeOnce sync.Once

	mu      sync.Mutex
	closed  bool
	newest  map[*reverse.Session]*poll
	polls   map[*poll]struct{}
	scrapes map[string]*scrape
	parking sync.WaitGroup
}

// NewHub returns a hub.
func NewHub(cfg HubConfig) *Hub {
	h := &Hub{
		cfg: cfg, heartbeat: strconv.FormatFloat(cfg.Heartbeat.Seconds(), 'f', -1, 64),
		back: make(chan net.Conn), closing: make(chan struct{}),
		polls: make(map[*poll]struct{}), newest: make(map[*reverse.Session]*poll), scrapes: make(map[string]*scrape),
		late: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "promferry_proxy_late_responses_total", Help: "Responses of long-poll clients that nobody waited for any more.",
		}),
	}
	cfg.Registerer.MustRegister(h.late)
	return h
}

// Poll answers POST /poll.
func (h *Hub) Poll(w http.ResponseWriter, r *http.Request) {
	if !h.post(w, r) {
		return
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxName))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			http.Error(w, "the body is the client's name, and this is too long for one", http.StatusRequestEntityTooLarge)
			return
		}
		http.Error(w, "the body does not come to its end", http.StatusBadRequest)
		return
	}
	kind := reverse.KindPushProx
	if r.Header.Get(reverse.HeaderSession) != "" {
		kind = reverse.KindLongPoll
	}
	hello, err := h.cfg.Registry.Hello(r, strings.TrimSpace(string(body)), kind)
	if err == nil && r.ProtoMajor != 1 {
		err = &reverse.Refusal{Status: http.StatusHTTPVersionNotSupported, Text: "a poll needs HTTP/1.1"}
	}
	if err != nil {
		reverse.Refuse(w, err)
		return
	}
	session, err := h.cfg.Registry.Join(hello)
	if err != nil {
		reverse.Refuse(w, err)
		return
	}
	p := &poll{hub: h, session: session, grant: hello.Grant, ours: kind == reverse.KindLongPoll, began: time.Now()}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil || buffered.Reader.Buffered() > 0 { // It must wait for its answer.
		session.Leave(p)
		if err == nil {
			_ = conn.Close()
		}
		return
	}
	p.conn = reverse.Uncorked(conn)
	h.park(p)
}

// post checks what polls and responses have in common.
func (h *Hub) post(w http.ResponseWriter, r *http.Request) bool {
	w.Header().Set(reverse.HeaderProxy, "1")
	w.Header().Set(reverse.HeaderHeartbeat, h.heartbeat)
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "want POST", http.StatusMethodNotAllowed)
		return false
	}
	return true
}

func (h *Hub) park(p *poll) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		_ = p.conn.Close()
	}
	h.polls[p] = struct{}{}
	if !p.ours {
		// PushProx's client has one poll at a time: an older one is a dead connection's, or that of
		// another client of this name, and is not used while there is this one.
		if p.older = h.newest[p.session]; p.older != nil {
			p.session.Take(p.older)
		}
		h.newest[p.session] = p
	}
	p.session.Free(p) // Before anybody can see that it ends.
	h.parking.Go(p.park)
}

// Run ends polls of promferry clients when it is time to, until ctx ends. Then it closes all, and
// waits for their end.
func (h *Hub) Run(ctx context.Context) error {
	tick := time.NewTicker(max(h.cfg.Heartbeat/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, p := range h.all() {
				if p.ours && time.Since(p.began) >= h.cfg.Heartbeat*7/8 {
					h.parking.Go(func() { p.finish("HTTP/1.1 204 No Content\r\n" + h.headers() + "\r\n") })
				}
			}
		case <-ctx.Done():
			h.mu.Lock()
			h.closed = true
			h.mu.Unlock()
			h.closeOnce.Do(func() { close(h.closing) })
			for _, p := range h.all() {
				_ = p.conn.Close()
			}
			h.parking.Wait()
			return nil
		}
	}
}

func (h *Hub) headers() string {
	return reverse.HeaderProxy + ": 1\r\n" + reverse.HeaderHeartbeat + ": " + h.heartbeat + "\r\n"
}

// Move tells clients to poll elsewhere: the proxy is about to stop.
func (h *Hub) Move() {
	const text = "the proxy is about to stop\n"
	for _, p := range h.all() {
		p.finish(fmt.Sprintf("HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n"+
			"Retry-After: 1\r\n%s\r\n%s", len(text), h.headers(), text))
	}
}

// Revoke closes the polls of clients that are not valid any more, and ends the scrapes that they
// have taken.
func (h *Hub) Revoke(valid func(g reverse.Grant, name string) bool) {
	revoked := func(s *reverse.Session, g reverse.Grant) bool {
		return g != nil && (s.Revoked() || !valid(g, s.Name()))
	}
	for _, p := range h.all() {
		if revoked(p.session, p.grant) {
			h.cfg.Logger.Warn("Poll of a client revoked", "client", p.session.Name(), "identity", p.grant.Identity())
			_ = p.conn.Close()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.scrapes {
		if revoked(s.session, s.grant) {
			s.giveUp(reverse.ErrGone)
		}
	}
}

func (h *Hub) all() []*poll {
	h.mu.Lock()
	defer h.mu.Unlock()
	polls := make([]*poll, 0, len(h.polls))
	for p := range h.polls {
		polls = append(polls, p)
	}
	return polls
}
