package ptth

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/reverse"
)

// MaxHeartbeat bounds what a proxy may say: a line that is dead for longer is of no use.
const MaxHeartbeat = 10 * time.Minute

// minHeartbeat is as short as it can be, in seconds.
const minHeartbeat = 0.01

// ErrNoPTTH means that the proxy, or what lies between, does not let a line be made.
var ErrNoPTTH = errors.New("no PTTH there")

// ErrNoUpgrade is ErrNoPTTH where it is what lies between that does not let it through: the
// proxy is promferry's.
var ErrNoUpgrade = fmt.Errorf("%w: the upgrade does not get through", ErrNoPTTH)

// Doer sends HTTP requests.
type Doer interface {
	Do(req *http.Request) (*http.Response, error)
}

// Dialer opens lines to one proxy. It is safe for concurrent use.
type Dialer struct {
	// URL is the proxy's.
	URL *url.URL
	// HTTP sends the requests for lines.
	HTTP Doer
	// Header says who the client is, see docs/protocol.md.
	Header http.Header
	// Handler answers the scrapes.
	Handler http.Handler
	// HandshakeTimeout is how long it may take until a line is in use.
	HandshakeTimeout time.Duration
	// Logger is logged to.
	Logger *slog.Logger
}

// Line is an open line: requests come over it, which are answered until it ends.
type Line struct {
	dialer    *Dialer
	conn      *conn
	heartbeat time.Duration
	server    *http.Server

	served   chan struct{} // closed when nothing serves the line any more
	hijacked bool

	mu    sync.Mutex
	moved bool
	alive bool
	up    func()
	busy  func(bool)
}

// Endpoint returns the URL of a path under a proxy's own.
func Endpoint(base *url.URL, path string) string {
	u := *base
	u.Path, u.RawPath, u.RawQuery = strings.TrimRight(u.Path, "/")+path, "", ""
	return u.String()
}

// Open opens a line. It returns an error that wraps ErrNoPTTH when it cannot be had, and a
// *reverse.Refusal when the proxy says that it does not want to.
func (d *Dialer) Open(ctx context.Context) (*Line, error) {
	// The context is for the way to the 101 only: the line outlives it.
	dialCtx, cancel := context.WithTimeout(ctx, d.HandshakeTimeout)
	defer cancel()
	var raw net.Conn
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { raw = info.Conn }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(dialCtx, trace), http.MethodGet, Endpoint(d.URL, "/ptth"), nil)
	if err != nil {
		return nil, errors.New("the URL makes no request")
	}
	maps.Copy(req.Header, d.Header)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", Protocol)
	resp, err := d.HTTP.Do(req)
	if err != nil {
		if dialCtx.Err() != nil && ctx.Err() == nil {
			return nil, fmt.Errorf("no answer within %v", d.HandshakeTimeout)
		}
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer func() { _ = resp.Body.Close() }()
		return nil, Refused(resp)
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if !ok || raw == nil || !strings.EqualFold(resp.Header.Get("Upgrade"), Protocol) {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%w: the upgrade is to %.40q", ErrNoPTTH, httpclient.Shown(resp, resp.Header.Get("Upgrade")))
	}
	heartbeat, err := Heartbeat(resp)
	if err != nil {
		_ = rw.Close()
		return nil, err
	}
	return &Line{dialer: d, conn: &conn{Conn: raw, rw: rw, closed: make(chan struct{})}, heartbeat: heartbeat, served: make(chan struct{})}, nil
}

// Heartbeat reads the header of that name.
func Heartbeat(resp *http.Response) (time.Duration, error) {
	text := resp.Header.Get(reverse.HeaderHeartbeat)
	seconds, err := strconv.ParseFloat(text, 64)
	if err != nil || !(seconds >= minHeartbeat && seconds <= MaxHeartbeat.Seconds()) {
		return 0, fmt.Errorf("%s: %.40q: want seconds from %v to %v", reverse.HeaderHeartbeat, httpclient.Shown(resp, text), minHeartbeat, MaxHeartbeat.Seconds())
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// NewRefusal makes an error of an answer that is not what was asked for.
func NewRefusal(resp *http.Response, asked string) *reverse.Refusal {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	refusal := &reverse.Refusal{
		Status: resp.StatusCode,
		Text:   fmt.Sprintf("asked for %s: unexpected status %d: %s", asked, resp.StatusCode, httpclient.Shown(resp, string(text))),
	}
	if resp.Header.Get(reverse.HeaderProxy) == "" && resp.StatusCode < http.StatusInternalServerError {
		refusal.Text += " (is there a proxy's address for clients at this URL?)"
	}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		refusal.RetryAfter = min(time.Duration(seconds)*time.Second, time.Minute)
	}
	return refusal
}

// maxRefusal is how much of a refusal's text is shown, in bytes.
const maxRefusal = 200

// Refused makes an error of an answer that is not what was asked for: one that wraps
// ErrNoPTTH where trying again is of no use.
func Refused(resp *http.Response) error {
	refusal := NewRefusal(resp, "a line")
	ours := resp.Header.Get(reverse.HeaderProxy) != ""
	switch {
	case resp.StatusCode == http.StatusUpgradeRequired && ours:
		return fmt.Errorf("%w: %w", ErrNoUpgrade, refusal)
	case resp.StatusCode == http.StatusUpgradeRequired,
		!ours && (resp.StatusCode < 500 &&
			resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden &&
			resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusProxyAuthRequired),
		!ours && resp.StatusCode == http.StatusNotImplemented:
		return fmt.Errorf("%w: %w", ErrNoPTTH, refusal)
	}
	return refusal
}

// Close ends a line that is not served.
func (l *Line) Close() { _ = l.conn.Close() }

// Serve answers what comes over the line until it ends, or ctx does: then the requests in
// flight are answered first, for at most drain. Up is called when the line is in use, busy when
// a scrape begins, and when it ends. The error says why the line ended, ErrSilent when nothing came.
func (l *Line) Serve(ctx context.Context, drain time.Duration, up func(), busy func(bool)) error {
	l.up, l.busy = up, busy
	first := time.AfterFunc(l.dialer.HandshakeTimeout, func() {
		if !l.isAlive() {
			_ = l.conn.Close()
		}
	})
	defer first.Stop()
	l.server = &http.Server{
		Handler:                      http.HandlerFunc(l.serve),
		DisableGeneralOptionsHandler: true,
		// The first is for the first request, the other one for those after it.
		ReadHeaderTimeout: 2 * l.heartbeat,
		IdleTimeout:       2 * l.heartbeat,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(l.dialer.Logger.Handler(), slog.LevelDebug),
		Protocols:         &http.Protocols{},
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateClosed:
				close(l.served)
			case http.StateHijacked:
				l.hijacked = true // Its handler is what serves it.
			}
		},
	}
	l.server.Protocols.SetHTTP1(true)
	listener := &oneConn{conn: l.conn, closed: make(chan struct{})}
	done := make(chan struct{})
	go func() { // Waited for below.
		defer close(done)
		_ = l.server.Serve(listener)
	}()
	select {
	case <-l.conn.closed:
	case <-ctx.Done():
		drainCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		_ = l.server.Shutdown(drainCtx)
		cancel()
	}
	_ = l.server.Close()
	_ = l.conn.Close()
	<-done
	if listener.given { // Else ctx had ended before.
		<-l.served
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return nil
	case l.moved:
		return ErrMoved
	case !l.alive:
		return ErrSilent
	default:
		return errors.New("the line ended")
	}
}

// ErrSilent means that the upgrade went through, and nothing after it.
var ErrSilent = errors.New("nothing came after the upgrade")

// ErrMoved means that the proxy asked the client to open the line anew.
var ErrMoved = errors.New("the proxy is about to stop")

func (l *Line) isAlive() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alive
}

func (l *Line) serve(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if l.hijacked {
			close(l.served)
		}
	}()
	l.mu.Lock()
	fresh := !l.alive
	l.alive = true
	if r.Close {
		l.moved = true
	}
	l.mu.Unlock()
	if fresh {
		l.up()
	}
	if r.Method == http.MethodOptions && r.RequestURI == "*" {
		w.Header().Set("Content-Length", "0")
		return
	}
	if r.ContentLength != 0 { // Nobody waits for what no scrape has.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
		w.Header().Set("Connection", "close")
		http.Error(w, "a scrape has no body", http.StatusBadRequest)
		return
	}
	l.busy(true)
	defer l.busy(false)
	l.dialer.Handler.ServeHTTP(w, r)
}

// conn is the connection of a line, of which some may have been read with the 101.
type conn struct {
	net.Conn
	rw     io.ReadWriteCloser
	once   sync.Once
	closed chan struct{}
}

func (c *conn) Read(b []byte) (int, error) { return c.rw.Read(b) }

// recordSize is how much goes into a TLS record, in bytes. The proxy keeps a buffer for each
// line that is as large as the largest it brought: of 16 KiB, they are more than half of its memory.
const recordSize = 4 << 10

func (c *conn) Write(b []byte) (n int, err error) {
	if _, ok := c.Conn.(*tls.Conn); !ok {
		return c.Conn.Write(b)
	}
	for {
		m, err := c.Conn.Write(b[:min(len(b), recordSize)])
		n += m
		if b = b[m:]; err != nil || len(b) == 0 {
			return n, err
		}
	}
}

func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = c.rw.Close()
		close(c.closed)
	})
	return err
}

// oneConn is a listener for one connection.
type oneConn struct {
	conn   *conn
	once   sync.Once
	given  bool
	closed chan struct{}
}

func (o *oneConn) Accept() (net.Conn, error) {
	if !o.given {
		o.given = true
		return o.conn, nil
	}
	<-o.closed
	return nil, net.ErrClosed
}

func (o *oneConn) Close() error {
	o.once.Do(func() { close(o.closed) })
	return nil
}

func (o *oneConn) Addr() net.Addr { return o.conn.LocalAddr() }

// Goodbye tells the proxy that this client is about to stop.
func (d *Dialer) Goodbye(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, Endpoint(d.URL, "/ptth"), nil)
	if err != nil {
		return errors.New("the URL makes no request")
	}
	maps.Copy(req.Header, d.Header)
	resp, err := d.HTTP.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}
