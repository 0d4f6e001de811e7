package reverse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/safeurl"
)

// schemeParam is the parameter by which PushProx is told to scrape over TLS.
const schemeParam = "_scheme"

// ProxyConfig is what a Proxy works with. All fields are needed but those that say what
// their zero value means.
type ProxyConfig struct {
	// Registry knows the lines.
	Registry *Registry
	// Authorize tells whether a request may scrape, and returns a *Refusal when not; nil means
	// that all may.
	Authorize func(r *http.Request) (Grant, error)
	// MaxTimeout clamps what a scrape says it may take; DefaultTimeout is for one that says
	// nothing.
	MaxTimeout, DefaultTimeout time.Duration
	// TunnelIdle is how long a CONNECT may pass no byte.
	TunnelIdle time.Duration
	// MaxScrapes is how many scrapes there are at a time, tunnels included.
	MaxScrapes int
	// MaxBytes is how large an answer's body may be.
	MaxBytes int64
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Proxy scrapes targets for Prometheus, which has it as its proxy_url. It is safe for
// concurrent use.
type Proxy struct {
	cfg      ProxyConfig
	metrics  *proxyMetrics
	scrapes  atomic.Int64
	stopping atomic.Bool

	mu      sync.Mutex
	tunnels map[net.Conn]Grant
}

// failureTimeout is how long a scraper may take to read that its scrape has failed.
const failureTimeout = 10 * time.Second

// NewProxy returns a proxy.
func NewProxy(cfg ProxyConfig) *Proxy {
	p := &Proxy{cfg: cfg, tunnels: make(map[net.Conn]Grant)}
	p.metrics = newProxyMetrics(cfg.Registerer, &p.scrapes)
	return p
}

// IsScrape tells whether a request is one to a proxy: for a URL with a host, or CONNECT.
func IsScrape(r *http.Request) bool { return r.URL.Host != "" || r.Method == http.MethodConnect }

// Stopping makes the proxy answer 503 to further scrapes.
func (p *Proxy) Stopping() { p.stopping.Store(true) }

// InFlight is how many scrapes there are, without tunnels, which are there for as long as
// Prometheus likes.
func (p *Proxy) InFlight() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int(p.scrapes.Load()) - len(p.tunnels)
}

// Revoke closes the tunnels of scrapers that are not valid any more.
func (p *Proxy) Revoke(valid func(Grant) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn, g := range p.tunnels {
		if g != nil && !valid(g) {
			p.cfg.Logger.Warn("Tunnel of a scraper revoked", "identity", g.Identity(), "remote", conn.RemoteAddr().String())
			_ = conn.Close()
		}
	}
}

// failure is what came of a scrape that was not a success.
type failure struct {
	// status is what Prometheus is to be told; zero when a status is out already.
	status int
	// result is one of results.
	result string
	text   string
	// retry tells Prometheus to come again.
	retry bool
	// whole tells that the answer is out, to its end.
	whole bool
}

// ServeHTTP answers a scrape.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	inFlight := p.scrapes.Add(1)
	defer p.scrapes.Add(-1)
	f := p.serve(w, r, began, inFlight)
	if f == nil {
		p.metrics.done("success", time.Since(began))
		return
	}
	p.metrics.done(f.result, time.Since(began))
	if p.cfg.Logger.Enabled(r.Context(), slog.LevelDebug) {
		p.cfg.Logger.Debug("Scrape failed", "client", r.URL.Hostname(), "port", r.URL.Port(), "result", f.result, "err", f.text)
	}
	if f.whole {
		return
	}
	if f.status == 0 {
		panic(http.ErrAbortHandler) // Prometheus must not take what it has for the whole.
	}
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(failureTimeout))
	if r.ContentLength != 0 {
		_ = control.SetReadDeadline(time.Now().Add(failureTimeout)) // Of the body that nobody wants.
	}
	h := w.Header()
	clear(h)
	h.Set(HeaderError, f.result)
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	if f.status == http.StatusProxyAuthRequired {
		h.Set("Proxy-Authenticate", `Basic realm="promferry"`)
	}
	if f.retry {
		h.Set("Retry-After", "1")
	}
	w.WriteHeader(f.status)
	_, _ = io.WriteString(w, f.text+"\n")
}

// serve answers a scrape, as far as it can.
func (p *Proxy) serve(w http.ResponseWriter, r *http.Request, began time.Time, inFlight int64) *failure {
	var grant Grant
	if p.cfg.Authorize != nil {
		var err error
		if grant, err = p.cfg.Authorize(r); err != nil {
			f := &failure{status: http.StatusProxyAuthRequired, result: "unauthorized", text: err.Error()}
			if refusal, ok := errors.AsType[*Refusal](err); ok {
				f.status = refusal.Status
			}
			return f
		}
	}
	timeout, f := p.check(r)
	switch {
	case f != nil:
		return f
	case p.stopping.Load():
		return &failure{status: http.StatusServiceUnavailable, result: "stopping", text: "the proxy is about to stop", retry: true}
	case inFlight > int64(p.cfg.MaxScrapes):
		return &failure{status: http.StatusServiceUnavailable, result: "proxy_limit", text: fmt.Sprintf("the proxy has its %d scrapes", p.cfg.MaxScrapes), retry: true}
	}
	// A scraper that does not read must not hold the line.
	_ = http.NewResponseController(w).SetWriteDeadline(began.Add(timeout + time.Second))
	// A while before Prometheus gives up: it is to hear what was wrong.
	ctx, cancel := context.WithDeadline(r.Context(), began.Add(timeout-reserve(timeout)))
	defer cancel()

	for {
		lease, err := p.cfg.Registry.Lease(ctx, r.URL.Hostname())
		if err != nil {
			return p.explain(ctx, r, err)
		}
		if f, err = p.scrape(ctx, w, r, lease, began, grant); !errors.Is(err, ErrNotSent) {
			return f
		}
		// On another line: the client cannot have done it.
	}
}

// reserve is what is left of a timeout for telling that it was reached.
func reserve(timeout time.Duration) time.Duration { return min(timeout/20, 500*time.Millisecond) }

// check returns how long a scrape may take, or what is wrong with its request.
func (p *Proxy) check(r *http.Request) (time.Duration, *failure) {
	bad := func(status int, text string) (time.Duration, *failure) {
		return 0, &failure{status: status, result: "bad_request", text: text}
	}
	switch {
	case r.Method == http.MethodConnect:
		if r.URL.Port() == "" {
			return bad(http.StatusBadRequest, "CONNECT names no port")
		}
		// It carries no scrape timeout: this is for the answer to CONNECT only.
		return p.cfg.DefaultTimeout, nil
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return bad(http.StatusMethodNotAllowed, "a scrape is a GET or HEAD")
	case r.URL.Scheme != "http":
		return bad(http.StatusBadRequest, "want a URL that begins with http://; for https use CONNECT or ?_scheme=https")
	case r.URL.User != nil:
		return bad(http.StatusBadRequest, "a user and password do not belong in the URL of a scrape")
	case r.ContentLength != 0 || len(r.TransferEncoding) > 0:
		return bad(http.StatusBadRequest, "a scrape has no body")
	}
	value := r.Header.Get(HeaderTimeout)
	if value == "" {
		return p.cfg.DefaultTimeout, nil
	}
	seconds, err := strconv.ParseFloat(value, 64)
	if err != nil || math.IsNaN(seconds) || math.IsInf(seconds, 0) || seconds <= 0 {
		return bad(http.StatusBadRequest, fmt.Sprintf("%s: %.40q: want seconds above zero", HeaderTimeout, value))
	}
	if seconds > p.cfg.MaxTimeout.Seconds() {
		return p.cfg.MaxTimeout, nil
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// explain says what an error of a lease or a line means to Prometheus.
func (p *Proxy) explain(ctx context.Context, r *http.Request, err error) *failure {
	name := r.URL.Hostname()
	if len(name) > maxName {
		name = strings.ToValidUTF8(name[:maxName], "")
	}
	f := &failure{status: http.StatusServiceUnavailable, text: fmt.Sprintf("client %q: %v", name, err)}
	switch {
	case errors.Is(r.Context().Err(), context.Canceled):
		f.result = "canceled" // Nobody reads this.
	case ctx.Err() != nil:
		f.status, f.result, f.text = http.StatusGatewayTimeout, "timeout", fmt.Sprintf("client %q: no answer within the scrape's time", name)
	case errors.Is(err, ErrUnknown):
		f.status, f.result = http.StatusNotFound, "unknown_client"
	case errors.Is(err, ErrAway):
		f.result, f.retry = "client_away", true
	case errors.Is(err, ErrNoFreeLine):
		f.result, f.retry = "no_free_line", true
	case errors.Is(err, ErrClientLimit):
		f.status, f.result = http.StatusTooManyRequests, "client_limit"
	case errors.Is(err, ErrNoTunnel):
		f.status, f.result = http.StatusNotImplemented, "no_tunnel"
	case errors.Is(err, ErrGone):
		f.result = "client_gone"
	default:
		f.status, f.result = http.StatusBadGateway, "bad_answer"
		f.text = fmt.Sprintf("client %q: %.300s", name, safeurl.Line(err.Error())) // It quotes the answer.
	}
	return f
}

// scrape sends a request over a line and copies the answer. The error is ErrNotSent or nil.
func (p *Proxy) scrape(ctx context.Context, w http.ResponseWriter, r *http.Request, lease Lease, began time.Time, grant Grant) (f *failure, err error) {
	status := 0
	defer func() {
		result := ScrapeStatus{At: time.Now(), Duration: time.Since(began), Status: status, Result: "success"}
		if f != nil {
			result.Status, result.Result = cmp.Or(f.status, status), f.result
		}
		lease.Done(r.URL, result, errors.Is(err, ErrNotSent))
	}()
	resp, err := lease.Line.RoundTrip(outgoing(ctx, r))
	if err != nil {
		if errors.Is(err, ErrNotSent) {
			return nil, err
		}
		return p.explain(ctx, r, err), nil
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode < http.StatusOK || resp.StatusCode > 999 {
		return &failure{status: http.StatusBadGateway, result: "bad_answer", text: fmt.Sprintf("the answer has the status %d", resp.StatusCode)}, nil
	}
	status = resp.StatusCode
	if r.Method == http.MethodConnect && status == http.StatusOK {
		return p.tunnel(w, resp, grant), nil
	}
	if f := redirected(r.URL, resp); f != nil {
		return f, nil
	}
	header := w.Header()
	copyAllowed(header, resp.Header)
	said := resp.Header.Get(HeaderError)
	if said != "" {
		if !clientErrors[said] {
			said = "bad_answer"
		}
		header[HeaderError] = []string{said}
	}
	uncork := cork(r)
	n, sent, err := passOn(w, r, resp, p.cfg.MaxBytes)
	uncork()
	p.metrics.bytes.Add(float64(n))
	switch {
	case err != nil:
		return p.explainBody(ctx, r, err, sent), nil
	case said != "":
		return &failure{result: said, text: "the client says so", whole: true}, nil
	}
	return nil, nil
}

// clientErrors are what a client may say in HeaderError.
var clientErrors = map[string]bool{
	"not_allowed": true, "target_down": true, "broken_off": true, "too_large": true, "timeout": true, "redirect": true,
}

// explainBody says what an error of a body means, whose status may have been sent already.
func (p *Proxy) explainBody(ctx context.Context, r *http.Request, err error, sent bool) *failure {
	f := &failure{status: http.StatusBadGateway, result: "broken_off", text: "the answer broke off: " + err.Error()}
	switch {
	case errors.Is(err, errTooLarge):
		f.status, f.result, f.text = http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("the answer is larger than %d bytes", p.cfg.MaxBytes)
	case errors.Is(r.Context().Err(), context.Canceled):
		f.result = "canceled"
	case errors.Is(err, ErrMalformed):
		f.result, f.text = "bad_answer", err.Error()
	case ctx.Err() != nil:
		f.status, f.result, f.text = http.StatusGatewayTimeout, "timeout", "the answer did not come to its end within the scrape's time"
	}
	if sent {
		f.status = 0
	}
	return f
}

// outgoing returns the request as it goes to the client.
func outgoing(ctx context.Context, r *http.Request) *http.Request {
	header := make(http.Header, len(r.Header)+1)
	for name, values := range r.Header {
		if !dropped[name] {
			header[name] = values
		}
	}
	for _, value := range r.Header["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			header.Del(strings.TrimSpace(name))
		}
	}
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		left -= reserve(left)
		header[HeaderTimeout] = []string{strconv.FormatFloat(max(left.Seconds(), 0.001), 'f', 3, 64)}
	}
	out := r.WithContext(ctx)
	out.Header = header
	return out
}

// dropped are request headers that end at a proxy: those of RFC 9110, section 7.6.1, what was
// said to the proxy itself, and what only we say.
var dropped = map[string]bool{
	"Connection": true, "Proxy-Connection": true, "Keep-Alive": true, "Te": true, "Trailer": true, "Transfer-Encoding": true,
	"Upgrade": true, "Proxy-Authenticate": true, "Proxy-Authorization": true, "Content-Length": true, "Expect": true,
	"Id": true, HeaderTimeout: true, HeaderClient: true, HeaderSession: true, HeaderAnnounce: true, HeaderVersion: true,
	HeaderProxy: true, HeaderHeartbeat: true, HeaderError: true, "Cookie": true,
}

// copyAllowed copies the headers of a target's answer that are for Prometheus.
func copyAllowed(to, from http.Header) {
	for name, values := range from {
		if allowed[name] {
			to[name] = values
		}
	}
	to["X-Content-Type-Options"] = nosniff
}

var nosniff = []string{"nosniff"}

var allowed = map[string]bool{
	"Content-Type": true, "Content-Encoding": true, "Content-Language": true, "Content-Length": true, "Date": true, "Etag": true,
	"Last-Modified": true, "Expires": true, "Cache-Control": true, "Vary": true, "Age": true, "Allow": true, "Location": true,
	"Retry-After": true, "Server": true, "Www-Authenticate": true, "Warning": true,
}

// tunnel passes bytes both ways until either end stops, or none has come for a while.
func (p *Proxy) tunnel(w http.ResponseWriter, resp *http.Response, grant Grant) *failure {
	line, ok := resp.Body.(io.ReadWriteCloser)
	if !ok {
		return &failure{status: http.StatusBadGateway, result: "bad_answer", text: "the line makes no tunnel"}
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return &failure{status: http.StatusBadGateway, result: "bad_request", text: "CONNECT needs HTTP/1.1"}
	}
	conn = Uncorked(conn)
	if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		_ = conn.Close()
		return &failure{result: "canceled", whole: true}
	}
	p.mu.Lock()
	p.tunnels[conn] = grant
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.tunnels, conn)
		p.mu.Unlock()
	}()
	Tunnel(conn, Rest(buffered.Reader, conn), line, line, p.cfg.TunnelIdle)
	return nil
}
