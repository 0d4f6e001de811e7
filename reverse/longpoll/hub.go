// Package longpoll makes lines out of PushProx's long-poll: a client asks for a scrape by
// POST /poll, which is answered when there is one, and responds by POST /push. Hub is the
// proxy's end, Poller the client's; each works with PushProx's other end as well.
package longpoll

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	p := &poll{hub: h, session: session, ours: kind == reverse.KindLongPoll, began: time.Now()}
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

// Push answers POST /push.
func (h *Hub) Push(w http.ResponseWriter, r *http.Request) {
	if !h.post(w, r) {
		return
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(readTimeout))
	limited := &headerLimit{r: r.Body, left: maxHeader}
	src := readers.Get().(*bufio.Reader)
	src.Reset(limited)
	defer func() {
		src.Reset(nil)
		readers.Put(src)
	}()
	// One of our clients says at once which scrape it responds to, and learns from the answer
	// that nobody waits any more.
	var s *scrape
	var watch func() bool
	gone := false
	if id := r.Header.Get(headerID); id != "" {
		var refusal *reverse.Refusal
		if s, refusal = h.take(r, id); refusal != nil {
			refuse(w, r, refusal)
			return
		}
		defer s.giveUp() // Unless it has its answer.
		_ = control.SetReadDeadline(time.Time{})
		interrupted := make(chan struct{})
		stop := context.AfterFunc(s.ctx, func() {
			defer close(interrupted)
			_ = control.SetReadDeadline(time.Now())
		})
		var stopped atomic.Bool
		watch = func() bool {
			ok := stop()
			stopped.Store(ok)
			return ok
		}
		defer func() {
			if !stopped.Load() && !stop() {
				<-interrupted // Later, it would be the connection's next request that it ends.
				if !gone {    // For what is left of the body.
					_ = control.SetReadDeadline(time.Now().Add(readTimeout))
				}
			}
		}()
	}
	resp, err := http.ReadResponse(asHTTP11(src), nil) //nolint:bodyclose // The body is what the handler reads, and goes with it.
	switch {
	case err != nil && s != nil && s.ctx.Err() != nil:
		gone = true
		h.gone(w, r)
		return
	case err != nil || resp.StatusCode < http.StatusOK:
		http.Error(w, "want an HTTP response as the body", http.StatusBadRequest)
		return
	}
	limited.left = -1
	if s == nil {
		var refusal *reverse.Refusal
		if s, refusal = h.take(r, resp.Header.Get(headerID)); refusal != nil {
			refuse(w, r, refusal)
			return
		}
	}
	if deadline, ok := s.ctx.Deadline(); ok {
		_ = control.SetReadDeadline(deadline)
	}
	if s.method == http.MethodHead {
		resp.Body = http.NoBody
	}
	body := &pushed{ReadCloser: resp.Body, stop: watch, done: make(chan error, 1)}
	resp.Body = body
	if s.method == http.MethodHead {
		body.end(nil)
	}
	s.answer <- resp
	select {
	case err = <-body.done:
	case <-s.done:
		select {
		case err = <-body.done:
		default: // Whoever scraped has gone.
			err = context.Canceled
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		gone = true
		h.gone(w, r)
	case err != nil:
		http.Error(w, "the response broke off", http.StatusBadRequest)
	}
}

// refuse answers a response that is not wanted: one that comes as it is made at once, without
// waiting for the rest of its body.
func refuse(w http.ResponseWriter, r *http.Request, refusal *reverse.Refusal) {
	if r.Header.Get(headerID) != "" {
		w.Header().Set("Connection", "close")
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
	}
	reverse.Refuse(w, refusal)
}

func (h *Hub) gone(w http.ResponseWriter, r *http.Request) {
	h.late.Inc()
	refuse(w, r, &reverse.Refusal{Status: http.StatusGone, Text: "nobody waits for this response any more"})
}

// asHTTP11 returns src with what it says of its version replaced: PushProx's client says 0.0 of
// its own answers, and with 1.0 chunks would not be read.
func asHTTP11(src *bufio.Reader) *bufio.Reader {
	const version = "HTTP/1.1"
	said, err := src.Peek(len(version))
	if err != nil || string(said) == version || string(said[:5]) != version[:5] {
		return src
	}
	_, _ = src.Discard(len(version))
	return bufio.NewReader(io.MultiReader(strings.NewReader(version), src))
}

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 16<<10) }}

// take returns the scrape with this ID, for once, to the client that it was issued to.
func (h *Hub) take(r *http.Request, id string) (*scrape, *reverse.Refusal) {
	gone := &reverse.Refusal{Status: http.StatusGone, Text: "nobody waits for this response"}
	h.mu.Lock()
	s := h.scrapes[id]
	h.mu.Unlock()
	if s == nil {
		h.late.Inc()
		return nil, gone
	}
	name := s.session.Name()
	if said := r.Header.Get(reverse.HeaderClient); said != "" && said != name {
		return nil, &reverse.Refusal{Status: http.StatusForbidden, Text: "this scrape was another client's"}
	}
	hello, err := h.cfg.Registry.Hello(r, name, reverse.KindPushProx)
	if err != nil {
		refusal, _ := errors.AsType[*reverse.Refusal](err)
		return nil, refusal
	}
	if g := s.session.Grant(); g != nil && (hello.Grant == nil || g.Identity() != hello.Grant.Identity()) {
		return nil, &reverse.Refusal{Status: http.StatusForbidden, Text: "this scrape was another client's"}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.scrapes[id] != s {
		h.late.Inc()
		return nil, gone
	}
	delete(h.scrapes, id)
	return s, nil
}

// headerLimit bounds what is read as a header.
type headerLimit struct {
	r    io.Reader
	left int // below zero: no limit any more
}

func (l *headerLimit) Read(b []byte) (int, error) {
	if l.left == 0 {
		return 0, errors.New("the header is too large")
	}
	if l.left > 0 && len(b) > l.left {
		b = b[:l.left]
	}
	n, err := l.r.Read(b)
	if l.left > 0 {
		l.left -= n
	}
	return n, err
}

// pushed is the body of a response, which tells when it has been read.
type pushed struct {
	io.ReadCloser
	once sync.Once
	stop func() bool // ends the watch over the scrape; nil: there is none
	done chan error
}

func (p *pushed) Read(b []byte) (int, error) {
	n, err := p.ReadCloser.Read(b)
	if err != nil {
		p.end(err)
	}
	return n, err
}

func (p *pushed) end(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	p.once.Do(func() {
		if p.stop != nil && err == nil {
			p.stop() // Before who scrapes can know that it is done.
		}
		p.done <- err
	})
}

// Close is not the body's own: that belongs to the handler that has the connection.
func (p *pushed) Close() error {
	p.end(context.Canceled)
	return nil
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

// Revoke closes the polls of clients that are not valid any more.
func (h *Hub) Revoke(valid func(g reverse.Grant, name string) bool) {
	for _, p := range h.all() {
		if g := p.session.Grant(); g != nil && !valid(g, p.session.Name()) {
			h.cfg.Logger.Warn("Poll of a client revoked", "client", p.session.Name(), "identity", g.Identity())
			_ = p.conn.Close()
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

// Accept returns connections that an HTTP server is to serve again.
func (h *Hub) Accept() (net.Conn, error) {
	select {
	case c := <-h.back:
		return c, nil
	case <-h.closing:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *Hub) Close() error {
	h.closeOnce.Do(func() { close(h.closing) })
	return nil
}

// Addr is for net.Listener.
func (h *Hub) Addr() net.Addr { return &net.TCPAddr{} }

// returned is a connection that is served again, with the byte that was read of the next request.
type returned struct {
	net.Conn
	first []byte
}

func (c *returned) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

type tlsKey struct{}

// ConnContext is for the http.Server: it keeps what the server cannot see of a connection that
// is served again.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if r, ok := c.(*returned); ok {
		if t, ok := r.Conn.(*tls.Conn); ok {
			state := t.ConnectionState()
			return context.WithValue(ctx, tlsKey{}, &state)
		}
	}
	return ctx
}

// RestoreTLS lets next see the TLS state of connections that are served again.
func RestoreTLS(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			if state, ok := r.Context().Value(tlsKey{}).(*tls.ConnectionState); ok {
				r.TLS = state
			}
		}
		next.ServeHTTP(w, r)
	})
}

// poll is a client that waits for a scrape: a line for one.
type poll struct {
	hub     *Hub
	session *reverse.Session
	conn    net.Conn
	ours    bool
	began   time.Time
	older   *poll // of the same session, where it is not ours
	gone    bool

	mu       sync.Mutex
	answered bool
}

// park waits for the next request on the connection, or its end.
func (p *poll) park() {
	var b [1]byte
	_, err := p.conn.Read(b[:])
	p.hub.mu.Lock()
	delete(p.hub.polls, p)
	next := p.hub.ended(p)
	p.hub.mu.Unlock()
	p.mu.Lock()
	answered := p.answered
	p.answered = true
	p.mu.Unlock()
	if !answered {
		// The client went away, or spoke without waiting.
		_ = p.conn.Close()
		p.session.Leave(p)
		if next != nil {
			next.giveBack()
		} else {
			p.hub.lost(p.session)
		}
		return
	}
	if err != nil {
		_ = p.conn.Close()
		return
	}
	_ = p.conn.SetDeadline(time.Time{})
	conn := p.conn
	if _, ok := conn.(*returned); ok {
		conn = conn.(*returned).Conn // It has given its byte long ago.
	}
	select {
	case p.hub.back <- &returned{Conn: conn, first: []byte{b[0]}}:
	case <-p.hub.closing:
		_ = p.conn.Close()
	}
}

// ended takes a poll out of the chain of those of its session, and returns the one that is the
// newest now, if it was that. The hub's lock is held.
func (h *Hub) ended(p *poll) *poll {
	p.gone = true
	if h.newest[p.session] != p {
		return nil
	}
	next := p.older
	for next != nil && next.gone {
		next = next.older
	}
	p.older = nil
	if next == nil {
		delete(h.newest, p.session)
		return nil
	}
	h.newest[p.session] = next
	return next
}

// answer makes the poll's answer ours to write; false means that it is too late.
func (p *poll) answer() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.answered {
		return false
	}
	p.answered = true
	_ = p.conn.SetReadDeadline(time.Now().Add(idleTimeout))
	_ = p.conn.SetWriteDeadline(time.Now().Add(time.Second)) // It is some bytes, for which there is room.
	return true
}

// giveBack frees a poll that a scrape has and does not need.
func (p *poll) giveBack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.answered {
		p.session.Free(p)
	}
}

// finish answers a poll that no scrape has.
func (p *poll) finish(text string) {
	if !p.session.Take(p) || !p.answer() {
		return
	}
	p.session.Leave(p)
	if _, err := io.WriteString(p.conn, text); err != nil {
		_ = p.conn.Close()
	}
}

// Close ends the poll.
func (p *poll) Close() error { return p.conn.Close() }

// scrape is one that a client has taken.
type scrape struct {
	session *reverse.Session
	method  string
	ctx     context.Context //nolint:containedctx // That of the request that it is.
	answer  chan *http.Response
	done    chan struct{}
	lost    chan struct{}
	once    sync.Once
}

// lost ends the scrapes of a session that has no poll any more: the client is gone. One that
// has said goodbye still responds.
func (h *Hub) lost(s *reverse.Session) {
	if s.Lines() > 0 || s.Leaving() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, scrape := range h.scrapes {
		if scrape.session == s {
			scrape.giveUp()
		}
	}
}

// giveUp tells who waits for the answer that none will come.
func (s *scrape) giveUp() { s.once.Do(func() { close(s.lost) }) }

var buffers = sync.Pool{New: func() any { return &bytes.Buffer{} }}

// RoundTrip answers the poll with a scrape, and waits for the response.
func (p *poll) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method == http.MethodConnect {
		p.giveBack()
		return nil, reverse.ErrNoTunnel
	}
	if !p.answer() {
		return nil, reverse.ErrNotSent
	}
	id := rand.Text()
	s := &scrape{
		session: p.session, method: req.Method, ctx: req.Context(), answer: make(chan *http.Response, 1), done: make(chan struct{}),
		lost: make(chan struct{}),
	}
	h := p.hub
	h.mu.Lock()
	h.scrapes[id] = s
	h.mu.Unlock()
	end := func() {
		h.mu.Lock()
		delete(h.scrapes, id)
		h.mu.Unlock()
	}
	err := p.send(req, id)
	p.session.Leave(p)
	if err != nil {
		end()
		close(s.done)
		_ = p.conn.Close()
		return nil, reverse.ErrNotSent // Half an answer holds no scrape.
	}
	select {
	case resp := <-s.answer:
		passed := *resp // The other one is the handler's that got it.
		passed.Body = &answered{ReadCloser: resp.Body, s: s}
		return &passed, nil
	case <-s.lost:
		err = reverse.ErrGone
	case <-req.Context().Done():
		err = req.Context().Err()
	}
	end()
	close(s.done)
	return nil, err
}

// answered is a response's body, after which nobody waits.
type answered struct {
	io.ReadCloser
	s    *scrape
	once sync.Once
}

func (a *answered) Close() error {
	err := a.ReadCloser.Close()
	a.once.Do(func() { close(a.s.done) })
	return err
}

// send writes the answer to the poll: the scrape's request.
func (p *poll) send(req *http.Request, id string) error {
	buf := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buf)
	buf.Reset()
	uri := req.RequestURI
	fmt.Fprintf(buf, "%s %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n", req.Method, uri, req.Host, headerID, id)
	if err := req.Header.Write(buf); err != nil {
		return err
	}
	buf.WriteString("\r\n")
	extra := ""
	if p.ours {
		extra = p.hub.headers()
	}
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n%s\r\n", buf.Len(), extra)
	// One write, one packet.
	whole := append([]byte(head), buf.Bytes()...)
	_, err := p.conn.Write(whole)
	return err
}
