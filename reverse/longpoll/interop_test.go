package longpoll_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/pushprox"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/link"
	"github.com/promferry/promferry/reverse/longpoll"
	"github.com/promferry/promferry/reverse/ptth"
)

// The tests of this package put our ends of a long-poll before PushProx's, whose programs
// internal/pushprox has the likes of. Where a comment says "its client" or "its proxy",
// it means those.

// network has servers by host and port: in memory, for use in a synctest bubble, or over TCP.
// Nobody listens at other addresses.
type network struct {
	mu    sync.Mutex
	hosts map[string]func(ctx context.Context, from string) (net.Conn, error)
}

var errRefused = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}

// Dial connects to a server, from an address that is always the same.
func (n *network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.from("192.0.2.1")(ctx, network, address)
}

// from returns what connects from an IP address. Over TCP that is another one.
func (n *network) from(ip string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, _, address string) (net.Conn, error) {
		n.mu.Lock()
		host := n.hosts[address]
		n.mu.Unlock()
		if host == nil {
			return nil, errRefused
		}
		return host(ctx, ip)
	}
}

func (n *network) set(address string, host func(ctx context.Context, from string) (net.Conn, error)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts == nil {
		n.hosts = make(map[string]func(context.Context, string) (net.Conn, error))
	}
	n.hosts[address] = host
}

// memory is a listener for the other ends of pipes.
type memory struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (m *memory) Accept() (net.Conn, error) {
	select {
	case c := <-m.conns:
		return c, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

func (m *memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}

func (*memory) Addr() net.Addr { return &net.TCPAddr{} }

// accepted is a pipe with the address that it comes from.
type accepted struct {
	net.Conn
	remote net.Addr
}

func (a *accepted) RemoteAddr() net.Addr { return a.remote }

// listen listens in memory, in place of whoever did so before.
func (n *network) listen(address string) net.Listener {
	m := &memory{conns: make(chan net.Conn), closed: make(chan struct{})}
	n.set(address, func(ctx context.Context, from string) (net.Conn, error) {
		here, there := net.Pipe()
		select {
		case m.conns <- &accepted{there, &net.TCPAddr{IP: net.ParseIP(from), Port: 40000}}:
			return here, nil
		case <-m.closed:
			return nil, errRefused
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	return m
}

// listenTCP listens on loopback for an address of the network.
func (n *network) listenTCP(t *testing.T, address string) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.set(address, func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
	return l
}

// serve runs a server until the test ends, or the function that it returns is called.
func serve(t *testing.T, l net.Listener, handler http.Handler) (stop func()) {
	t.Helper()
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	stop = sync.OnceFunc(func() {
		_ = server.Close()
		serving.Wait()
		lingers(l)
	})
	t.Cleanup(stop)
	return stop
}

// lingers waits for what a server leaves for some time: net/http half a second for the client to
// close, and TLS five for its goodbye to be read, which a pipe does not hold.
func lingers(l net.Listener) {
	if _, ok := l.(*memory); ok { // In a bubble.
		<-time.After(6 * time.Second)
	}
}

// logs are what was logged.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// lines returns how many there are of a level, or of all.
func (l *logs) lines(level string) int {
	return len(regexp.MustCompile("(?m)^.*level="+level+".*$").FindAllString(l.String(), -1))
}

func (l *logs) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: level}))
}

// heartbeat is our proxy's in all tests.
const heartbeat = 10 * time.Second

// options are how a hub differs from what cmd makes by default.
type options struct {
	tls        *tls.Config
	authorize  func(*http.Request, string) (reverse.Grant, error)
	maxBytes   int64
	maxClients int
	noUpgrade  bool
	level      slog.Level
}

// hub is our proxy, put together as cmd/promferry does it.
type hub struct {
	network  *network
	address  string
	secure   *tls.Config // For who connects to it; nil without TLS.
	registry *reverse.Registry
	polls    *longpoll.Hub
	proxy    *reverse.Proxy
	metrics  *prometheus.Registry
	logs     *logs
	stop     func()
}

// startHub starts a hub that ends with the test.
func startHub(t *testing.T, n *network, address string, l net.Listener, o options) *hub {
	t.Helper()
	h := &hub{network: n, address: address, metrics: prometheus.NewPedanticRegistry(), logs: &logs{}}
	if o.maxBytes == 0 {
		o.maxBytes = 1 << 30
	}
	if o.maxClients == 0 {
		o.maxClients = 10_000
	}
	logger := h.logs.logger(o.level)
	var err error
	h.registry, err = reverse.NewRegistry(reverse.RegistryConfig{
		Authorize: o.authorize, MaxClients: o.maxClients, MaxLines: 64, MaxScrapes: 64, ForgetAfter: time.Hour, Settle: time.Second,
		Logger: logger, Registerer: h.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	lines := ptth.NewHub(ptth.HubConfig{Registry: h.registry, Heartbeat: heartbeat, Logger: logger, Registerer: h.metrics})
	h.polls = longpoll.NewHub(longpoll.HubConfig{Registry: h.registry, Heartbeat: heartbeat, Logger: logger, Registerer: h.metrics})
	h.proxy = reverse.NewProxy(reverse.ProxyConfig{
		Registry: h.registry, MaxTimeout: 5 * time.Minute, DefaultTimeout: 15 * time.Second, TunnelIdle: time.Minute, MaxScrapes: 4096,
		MaxBytes: o.maxBytes, Logger: logger, Registerer: h.metrics,
	})
	mux := http.NewServeMux()
	mux.Handle("/ptth", lines)
	mux.HandleFunc("/poll", h.polls.Poll)
	mux.HandleFunc("/push", h.polls.Push)
	mux.Handle("GET /clients", h.registry.ListClients(5*time.Minute))
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 6 * time.Minute, MaxHeaderBytes: 64 << 10, ConnContext: longpoll.ConnContext,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
		Handler: longpoll.RestoreTLS(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if secure := r.TLS != nil; secure != (o.tls != nil) {
				t.Errorf("%s %s: TLS %v, want %v", r.Method, r.URL.Path, secure, !secure)
			}
			if reverse.IsScrape(r) {
				h.proxy.ServeHTTP(w, r)
				return
			}
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute))
			if o.noUpgrade {
				r.Header.Del("Upgrade")
			}
			mux.ServeHTTP(w, r)
		})),
	}
	inMemory := l
	if o.tls != nil {
		l = tls.NewListener(l, o.tls)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	running.Go(func() { _ = server.Serve(h.polls) })
	for _, run := range []func(context.Context) error{lines.Run, h.polls.Run, h.registry.Run} {
		running.Go(func() {
			if err := run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	h.stop = sync.OnceFunc(func() {
		cancel()
		_ = server.Close()
		running.Wait()
		lingers(inMemory)
	})
	t.Cleanup(h.stop)
	return h
}

// value returns the sum of those series of a metric that have these labels, given as name,
// value, name, value.
func value(t *testing.T, g prometheus.Gatherer, name string, labels ...string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total, found := 0.0, false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := make(map[string]string)
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			matches := true
			for i := 0; i < len(labels); i += 2 {
				matches = matches && have[labels[i]] == labels[i+1]
			}
			if matches {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				found = true
			}
		}
	}
	if !found {
		t.Fatalf("no series %s%v", name, labels)
	}
	return total
}

// results checks what the hub has counted of scrapes: for each result that is not "success",
// and the late responses.
func (h *hub) counts(t *testing.T, late int, results map[string]int) {
	t.Helper()
	for result, want := range results {
		if got := value(t, h.metrics, "promferry_proxy_scrapes_total", "result", result); got != float64(want) {
			t.Errorf("%v scrapes with result %q, want %d", got, result, want)
		}
	}
	total := 0
	for _, n := range results {
		total += n
	}
	if got := value(t, h.metrics, "promferry_proxy_scrapes_total"); got != float64(total) {
		t.Errorf("%v scrapes, want %d", got, total)
	}
	if got := value(t, h.metrics, "promferry_proxy_late_responses_total"); got != float64(late) {
		t.Errorf("%v late responses, want %d", got, late)
	}
	if got := value(t, h.metrics, "promferry_proxy_scrapes_in_flight"); got != 0 {
		t.Errorf("%v scrapes in flight, want none", got)
	}
}

// answer is what a scrape got.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
	after  time.Duration
}

func (a answer) String() string {
	return fmt.Sprintf("%d %q %q, error %v, after %v", a.status, a.header.Get("Promferry-Error"), a.body, a.err, a.after)
}

// is fails the test unless the answer is this one: the status with what Promferry-Error
// says, and the body unless it is "*".
func (a answer) is(t *testing.T, what string, status int, reason, body string) {
	t.Helper()
	if a.err != nil || a.status != status || a.header.Get("Promferry-Error") != reason || body != "*" && a.body != body {
		t.Errorf("%s: %v; want %d %q %q", what, a, status, reason, body)
	}
}

// between fails the test unless the answer took this long.
func (a answer) between(t *testing.T, what string, low, high time.Duration) {
	t.Helper()
	if a.after < low || a.after > high {
		t.Errorf("%s: after %v, want %v to %v", what, a.after, low, high)
	}
}

// begin scrapes a URL through a proxy as Prometheus does, and gives the answer when it
// comes. timeout is the header, "" for none.
func begin(t *testing.T, n *network, proxy string, secure *tls.Config, method, target, timeout string, header http.Header) <-chan answer {
	t.Helper()
	u := &url.URL{Scheme: "http", Host: proxy}
	if secure != nil {
		u.Scheme = "https"
	}
	transport := &http.Transport{
		Proxy: http.ProxyURL(u), DialContext: n.from("198.51.100.1"), TLSClientConfig: secure, DisableKeepAlives: true, DisableCompression: true,
	}
	req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), method, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	if timeout != "" {
		req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", timeout)
	}
	answers := make(chan answer, 1)
	go func() {
		began := time.Now()
		resp, err := transport.RoundTrip(req)
		if err != nil {
			answers <- answer{err: err, after: time.Since(began)}
			return
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		answers <- answer{resp.StatusCode, resp.Header, string(b), err, time.Since(began)}
	}()
	return answers
}

// begin scrapes through the hub.
func (h *hub) begin(t *testing.T, target, timeout string) <-chan answer {
	t.Helper()
	return begin(t, h.network, h.address, h.secure, http.MethodGet, target, timeout, nil)
}

func (h *hub) scrape(t *testing.T, target, timeout string) answer {
	t.Helper()
	return <-h.begin(t, target, timeout)
}

// clients returns what /clients says.
func (h *hub) clients(t *testing.T) string {
	t.Helper()
	r := httptest.NewRecorder()
	h.registry.ListClients(5*time.Minute)(r, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/clients", nil))
	var groups []struct{ Targets []string }
	if err := json.Unmarshal(r.Body.Bytes(), &groups); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, g := range groups {
		names = append(names, g.Targets...)
	}
	return strings.Join(names, " ")
}

// pass lets time pass in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// The target of all tests is web-1:9100.
const (
	name    = "web-1"
	metrics = "requests_total 1027\n"
	site    = "http://web-1:9100"
)

var large = strings.Repeat(metrics, 10_000)

// target answers scrapes.
type target struct {
	heard atomic.Pointer[http.Request] // the last one
}

func (x *target) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x.heard.Store(r)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	flush := func() { _ = http.NewResponseController(w).Flush() }
	switch r.URL.Path {
	case "/slow": // for as many seconds as the query says
		d, err := time.ParseDuration(r.URL.RawQuery)
		if err != nil {
			panic(err)
		}
		select {
		case <-time.After(d):
		case <-r.Context().Done():
			return
		}
	case "/chunked":
		_, _ = io.WriteString(w, metrics[:10])
		flush()
		_, _ = io.WriteString(w, metrics[10:])
		return
	case "/torn": // breaks off in the middle of a number
		_, _ = io.WriteString(w, "requests_total 1")
		flush()
		panic(http.ErrAbortHandler)
	case "/torn/large":
		_, _ = io.WriteString(w, large+"requests_total 1")
		flush()
		panic(http.ErrAbortHandler)
	case "/short": // less than it said
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "requests_total 1")
		flush()
		panic(http.ErrAbortHandler)
	case "/large":
		_, _ = io.WriteString(w, large)
		return
	case "/down":
		w.WriteHeader(http.StatusServiceUnavailable)
	case "/moved":
		http.Redirect(w, r, "http://elsewhere:80/secret", http.StatusFound)
		return
	}
	_, _ = io.WriteString(w, metrics)
}

// serveTarget runs the target.
func serveTarget(t *testing.T, n *network) *target {
	t.Helper()
	x := &target{}
	serve(t, n.listen("web-1:9100"), x)
	return x
}

// run runs one of PushProx's clients until the test ends, or the function that it returns is
// called, which gives Run's error.
func run(t *testing.T, c *pushprox.Client) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

// noted is what one of PushProx's clients counts.
type noted struct {
	mu     sync.Mutex
	failed map[string]int
	pushed []int
}

func (c *noted) hook(client *pushprox.Client) {
	client.Failed = func(operation string, _ error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.failed == nil {
			c.failed = make(map[string]int)
		}
		c.failed[operation]++
	}
	client.Pushed = func(status int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.pushed = append(c.pushed, status)
	}
}

func (c *noted) failures(operation string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed[operation]
}

// statuses are those of the answers to pushes.
func (c *noted) statuses() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprint(c.pushed)
}

// pair is our hub with one of PushProx's clients and a target, in a bubble.
type pair struct {
	*hub
	target *target
	client *pushprox.Client
	noted  *noted
}

func newPair(t *testing.T, o options) *pair {
	t.Helper()
	n := &network{}
	p := &pair{hub: startHub(t, n, "hub:8080", n.listen("hub:8080"), o), target: serveTarget(t, n), noted: &noted{}}
	p.client = &pushprox.Client{FQDN: name, ProxyURL: "http://hub:8080", Dial: n.Dial}
	p.noted.hook(p.client)
	return p
}

// certificates are a server's and what trusts it.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	client = s.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	client.ServerName = "example.com"
	return &tls.Config{Certificates: s.TLS.Certificates, MinVersion: tls.VersionTLS12}, client
}

// TestPushProxClient has PushProx's client at our proxy, with and without TLS: what it scrapes
// arrives as it is, and a poll is never ended early.
func TestPushProxClient(t *testing.T) {
	server, trusting := certificates(t)
	for name, o := range map[string]options{"plain": {}, "TLS": {tls: server}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, o)
				if o.tls != nil {
					p.client.ProxyURL, p.client.TLS, p.secure = "https://hub:8080", trusting, trusting
				}
				stop := run(t, p.client)
				pass(time.Second)
				if got := p.clients(t); got != "web-1" {
					t.Errorf("/clients has %q", got)
				}
				a := p.scrape(t, site+"/metrics?x=1&y=%20", "10")
				a.is(t, "a scrape", http.StatusOK, "", metrics)
				if got := a.header.Get("Content-Type"); got != "text/plain; version=0.0.4" {
					t.Errorf("Content-Type %q", got)
				}
				if a.after > 0 { // No time passes but by waiting.
					t.Errorf("a scrape waited for %v", a.after)
				}
				if got := p.target.heard.Load().URL.String(); got != "/metrics?x=1&y=%20" {
					t.Errorf("the target was asked for %q", got)
				}
				p.scrape(t, site+"/chunked", "10").is(t, "in chunks", http.StatusOK, "", metrics)
				p.scrape(t, site+"/large", "10").is(t, "a large one", http.StatusOK, "", large)
				p.scrape(t, site+"/down", "10").is(t, "the target's own status", http.StatusServiceUnavailable, "", metrics)
				p.scrape(t, site+"/slow?8s", "10").is(t, "a slow one", http.StatusOK, "", metrics)
				p.scrape(t, site+"/metrics", "").is(t, "without a timeout", http.StatusOK, "", metrics)
				(<-begin(t, p.network, "hub:8080", p.secure, http.MethodHead, site+"/metrics", "10", nil)).is(t, "HEAD", http.StatusOK, "", "")
				p.scrape(t, "http://web-1:9/metrics", "10").is(t, "nothing listens", http.StatusInternalServerError, "",
					`failed to scrape http://web-1:9/metrics: Get "http://web-1:9/metrics": dial tcp: connect: connection refused`)
				synctest.Wait()
				if failed := p.noted.failures("poll") + p.noted.failures("push"); failed != 0 {
					t.Errorf("the client counts %d failures", failed)
				}

				pass(24 * time.Hour) // With one poll, which nobody ends.
				if failed := p.noted.failures("poll"); failed != 0 {
					t.Errorf("%d polls failed within a day", failed)
				}
				if got := p.clients(t); got != "web-1" {
					t.Errorf("after a day /clients has %q", got)
				}
				p.scrape(t, site+"/metrics", "10").is(t, "after a day", http.StatusOK, "", metrics)
				synctest.Wait()
				if got := value(t, p.metrics, "promferry_proxy_lines", "kind", "pushprox"); got != 1 {
					t.Errorf("%v lines, want 1", got)
				}
				if err := stop(); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if got := value(t, p.metrics, "promferry_proxy_lines"); got != 0 {
					t.Errorf("%v lines after the client's end", got)
				}
				p.counts(t, 0, map[string]int{"success": 9})
			})
		})
	}
}

// TestPushProxClientSideBySide: scrapes wait for each other no longer than for polls, and none
// fails, although the client has only one poll at a time.
func TestPushProxClientSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		run(t, p.client)
		pass(time.Second)
		var answers []<-chan answer
		for range 20 {
			answers = append(answers, p.begin(t, site+"/slow?2s", "10"))
		}
		for i, c := range answers {
			a := <-c
			a.is(t, fmt.Sprint("scrape ", i), http.StatusOK, "", metrics)
			a.between(t, fmt.Sprint("scrape ", i), 2*time.Second, 2100*time.Millisecond)
		}
		p.counts(t, 0, map[string]int{"success": 20})
		if failed := p.noted.failures("poll"); failed != 0 {
			t.Errorf("%d polls failed", failed)
		}
	})
}

// TestPushProxClientFaults has a client that misbehaves: what the scraper gets, when, what the
// client is told, and what is counted.
func TestPushProxClientFaults(t *testing.T) {
	const timeout = "10"
	// The scrape's time, less what it takes to tell of it.
	atTheEnd := [2]time.Duration{9 * time.Second, 10*time.Second - time.Millisecond}
	atOnce := [2]time.Duration{0, 100 * time.Millisecond}
	for what, tc := range map[string]struct {
		faults       pushprox.Faults
		path         string
		status       int
		reason, body string
		after        [2]time.Duration
		pushes       string
		late         int
		result       string
	}{
		"none":           {pushprox.Faults{}, "/metrics", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"late push":      {pushprox.Faults{LatePush: 3 * time.Second}, "/metrics", 200, "", metrics, [2]time.Duration{3 * time.Second, 3100 * time.Millisecond}, "[200]", 0, "success"},
		"too late":       {pushprox.Faults{LatePush: 11 * time.Second}, "/metrics", 504, "timeout", "*", atTheEnd, "[410]", 1, "timeout"},
		"two pushes":     {pushprox.Faults{DoublePush: true}, "/metrics", 200, "", metrics, atOnce, "[200 410]", 1, "success"},
		"lost push":      {pushprox.Faults{LosePush: true}, "/metrics", 504, "timeout", "*", atTheEnd, "[]", 0, "timeout"},
		"no deadline":    {pushprox.Faults{NoDeadline: true}, "/metrics", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"no response":    {pushprox.Faults{GarbageResponse: true}, "/metrics", 504, "timeout", "*", atTheEnd, "[400]", 0, "timeout"},
		"unknown Id":     {pushprox.Faults{WrongID: true}, "/metrics", 504, "timeout", "*", atTheEnd, "[410]", 1, "timeout"},
		"HTTP/0.0":       {pushprox.Faults{HTTPVersion: "HTTP/0.0"}, "/metrics", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"HTTP/1.0":       {pushprox.Faults{HTTPVersion: "HTTP/1.0"}, "/metrics", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"HTTP/9.9":       {pushprox.Faults{HTTPVersion: "HTTP/9.9"}, "/metrics", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"0.0 in chunks":  {pushprox.Faults{HTTPVersion: "HTTP/0.0"}, "/chunked", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"9.9 in chunks":  {pushprox.Faults{HTTPVersion: "HTTP/9.9"}, "/chunked", 200, "", metrics, atOnce, "[200]", 0, "success"},
		"too slow":       {pushprox.Faults{}, "/slow?20s", 504, "timeout", "*", atTheEnd, "[]", 0, "timeout"},
		"slow, and late": {pushprox.Faults{LatePush: time.Second}, "/slow?9900ms", 504, "timeout", "*", atTheEnd, "[410]", 1, "timeout"},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{})
				p.client.Faults = tc.faults
				run(t, p.client)
				pass(time.Second)
				a := p.scrape(t, site+tc.path, timeout)
				a.is(t, "the scrape", tc.status, tc.reason, tc.body)
				a.between(t, "the scrape", tc.after[0], tc.after[1])
				pass(20 * time.Second)
				if got := p.noted.statuses(); got != tc.pushes {
					t.Errorf("the pushes were answered %s, want %s", got, tc.pushes)
				}
				p.counts(t, tc.late, map[string]int{tc.result: 1})
				if failed := p.noted.failures("poll"); failed != 0 {
					t.Errorf("%d polls failed", failed)
				}

				// It harms nobody else: the next client of this name is served.
				if tc.faults != (pushprox.Faults{}) {
					other := &pushprox.Client{FQDN: "web-1", ProxyURL: "http://hub:8080", Dial: p.network.from("192.0.2.99")}
					run(t, other)
					pass(time.Second)
					p.scrape(t, site+"/metrics", timeout).is(t, "another client's", http.StatusOK, "", metrics)
				}
			})
		})
	}
}

// TestPushProxClientChunksOfHTTP10: there are none in HTTP/1.0. Taken for 1.1 or refused, the
// sizes of the chunks are no metrics.
func TestPushProxClientChunksOfHTTP10(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		p.client.Faults.HTTPVersion = "HTTP/1.0"
		run(t, p.client)
		pass(time.Second)
		if a := p.scrape(t, site+"/chunked", "10"); a.err == nil && a.status == http.StatusOK && a.body != metrics {
			t.Errorf("chunks in HTTP/1.0: %v", a)
		}
	})
}

// TestPushProxClientTruncatedPush: half a response is no success, with either kind of length.
func TestPushProxClientTruncatedPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		p.client.Faults.TruncatedPush = true
		run(t, p.client)
		pass(time.Second)
		a := p.scrape(t, site+"/large", "10")
		if a.err == nil {
			t.Errorf("half a response: %d and %d bytes as if they were all", a.status, len(a.body))
		}
		a.between(t, "half a response", 0, 100*time.Millisecond)
		synctest.Wait()
		// It was not late: somebody waited for it.
		p.counts(t, 0, map[string]int{"broken_off": 1})
	})
}

// TestPushProxClientSecondPoller: two polls of one client at a time cost no scrape.
func TestPushProxClientSecondPoller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		p.client.Faults.SecondPoller = true
		run(t, p.client)
		pass(time.Second)
		for range 5 {
			first, second := p.begin(t, site+"/slow?1s", "10"), p.begin(t, site+"/slow?1s", "10")
			for range 3 {
				p.scrape(t, site+"/metrics", "10").is(t, "one by one", http.StatusOK, "", metrics)
			}
			(<-first).is(t, "a slow one", http.StatusOK, "", metrics)
			(<-second).is(t, "another slow one", http.StatusOK, "", metrics)
			pass(time.Minute)
		}
		p.counts(t, 0, map[string]int{"success": 25})
	})
}

// TestPushProxClientDies: with a scrape in hand, or while it waits for one. Whoever scrapes
// gets an answer in time, and the client that starts again is scraped.
func TestPushProxClientDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		p.client.Faults.DieAfterPoll = true
		died := make(chan error, 1)
		go func() { died <- p.client.Run(context.WithoutCancel(t.Context())) }()
		pass(time.Second)
		a := p.scrape(t, site+"/metrics", "10")
		if err := <-died; !errors.Is(err, pushprox.ErrDied) {
			t.Errorf("Run: %v", err)
		}
		if a.err != nil || a.status != http.StatusServiceUnavailable && a.status != http.StatusGatewayTimeout || a.header.Get(reverse.HeaderError) == "" {
			t.Errorf("a client that died with the scrape in hand: %v", a)
		}
		a.between(t, "a client that died with the scrape in hand", 0, 10*time.Second-time.Millisecond)
		pass(10 * time.Second)
		a = p.scrape(t, site+"/metrics", "10")
		a.is(t, "a dead client", http.StatusServiceUnavailable, "client_away", "*")
		a.between(t, "a dead client", 0, 10*time.Millisecond)
		if got := value(t, p.metrics, "promferry_proxy_clients", "state", "away"); got != 1 {
			t.Errorf("%v clients away", got)
		}

		p.client.Faults.DieAfterPoll = false
		stop := run(t, p.client)
		pass(time.Second)
		p.scrape(t, site+"/metrics", "10").is(t, "started again", http.StatusOK, "", metrics)
		if err := stop(); err != nil {
			t.Error(err)
		}
		pass(time.Second)
		p.scrape(t, site+"/metrics", "10").is(t, "killed while it polled", http.StatusServiceUnavailable, "client_away", "*")
	})
}

// TestPushProxClientDrops: its connections break, with a scrape on its way. That one fails at
// once; when the client is back, after the pause that it makes, it is scraped.
func TestPushProxClientDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		drop := make(chan struct{})
		p.client.Faults.Drop = drop
		run(t, p.client)
		pass(time.Second)
		slow := p.begin(t, site+"/slow?8s", "10")
		pass(time.Second)
		drop <- struct{}{}
		a := <-slow
		a.is(t, "what was on its way", http.StatusServiceUnavailable, "client_gone", "*")
		a.between(t, "what was on its way", time.Second, 1100*time.Millisecond)
		pass(1500 * time.Millisecond) // The longest first pause.
		p.scrape(t, site+"/metrics", "10").is(t, "afterwards", http.StatusOK, "", metrics)
		if got := value(t, p.metrics, "promferry_proxy_clients", "state", "connected"); got != 1 {
			t.Errorf("%v clients connected", got)
		}
	})
}

// TestOneByOne: none of many scrapes is lost between our client and our proxy, whose requests and
// responses share connections.
func TestOneByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{noUpgrade: true})
		node := startNode(t, p.network, "http://hub:8080", 1)
		pass(3 * time.Second)
		const scrapes = 1000
		for i := range scrapes {
			a := p.scrape(t, site+"/metrics", "10")
			if a.is(t, fmt.Sprint("scrape ", i), http.StatusOK, "", metrics); t.Failed() {
				break
			}
		}
		synctest.Wait()
		p.counts(t, 0, map[string]int{"success": scrapes})
		if got := node.failed(t); got != 0 {
			t.Errorf("%v failures", got)
		}
	})
}

// TestPollsOfOurs: a poll of a client that says its session is ended before the heartbeat is
// up, and the connection serves the next one.
func TestPollsOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		conn, r := p.connect(t)
		for range 5 {
			began := time.Now()
			conn.send(t, "POST /poll HTTP/1.1\r\nHost: hub\r\nPromferry-Session: 0123456789abcdef\r\nContent-Length: 5\r\n\r\nweb-1")
			resp := r.response(t)
			if took := time.Since(began); resp.status != http.StatusNoContent || took <= heartbeat/2 || took > heartbeat {
				t.Errorf("a poll was answered %d after %v, want 204 within %v", resp.status, took, heartbeat)
			}
			if resp.header.Get(reverse.HeaderProxy) != "1" || resp.header.Get(reverse.HeaderHeartbeat) != "10" {
				t.Errorf("the answer has %v", resp.header)
			}
		}
	})
}

// raw is a connection that speaks by hand, and what comes over it.
type raw struct{ net.Conn }

type reader struct{ *bufio.Reader }

// connect opens a raw connection to the hub, which ends with the test.
func (h *hub) connect(t *testing.T) (raw, reader) {
	t.Helper()
	conn, err := h.network.Dial(t.Context(), "tcp", h.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return raw{conn}, reader{bufio.NewReader(conn)}
}

func (c raw) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// response is one that was read to its end.
type response struct {
	status int
	header http.Header
	body   string
}

// response reads the next response.
func (r reader) response(t *testing.T) response {
	t.Helper()
	resp, err := http.ReadResponse(r.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{resp.StatusCode, resp.Header, string(b)}
}

// pollOf is what PushProx's client sends.
func pollOf(name string) string {
	return fmt.Sprintf("POST /poll HTTP/1.1\r\nHost: hub:8080\r\nContent-Length: %d\r\n\r\n%s", len(name), name)
}

// pushOf is a response as PushProx's client pushes it.
func pushOf(response string) string {
	return fmt.Sprintf("POST /push HTTP/1.1\r\nHost: hub:8080\r\nContent-Length: %d\r\n\r\n%s", len(response), response)
}

// scraped reads the scrape that a poll was answered with, and returns its Id.
func (r reader) scraped(t *testing.T) (*http.Request, string) {
	t.Helper()
	resp := r.response(t)
	if resp.status != http.StatusOK {
		t.Fatalf("a poll was answered %d %q", resp.status, resp.body)
	}
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(resp.body)))
	if err != nil {
		t.Fatal(err)
	}
	return req, req.Header.Get("Id")
}

// recorded returns a file of what PushProx's programs said.
func recorded(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "internal", "pushprox", "testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestRecordings plays what PushProx's client and the scrapers of its proxy sent to ours, which
// answers as that did where docs/protocol.md does not say otherwise.
func TestRecordings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		h := startHub(t, n, "hub:8080", n.listen("hub:8080"), options{})
		parse := func(text string) response {
			t.Helper()
			return reader{bufio.NewReader(strings.NewReader(text))}.response(t)
		}
		polls := strings.SplitAfter(recorded(t, "client-1-to-proxy.bin"), "\r\n\r\nlocalhost")
		_, second, _ := strings.Cut(recorded(t, "client-2-to-proxy.bin"), "POST /push")
		first, second, ok := strings.Cut(second, "POST /push")
		if len(polls) != 4 || !ok {
			t.Fatal("the recordings are not as they were")
		}
		pushes := []string{first, second}
		poller, answers := h.connect(t)
		poller.send(t, polls[0])
		synctest.Wait()

		id := regexp.MustCompile(`Id: (\S+)`)
		for i, name := range []string{"scraper-1", "scraper-4"} {
			scraper, got := h.connect(t)
			scraper.send(t, recorded(t, name+"-to-proxy.bin"))
			req, issued := answers.scraped(t)
			_, text1, _ := strings.Cut(recorded(t, "client-1-from-proxy.bin"), "\r\n\r\n")
			if i == 1 {
				_, text1, _ = strings.Cut(text1, "HTTP/1.1 200 OK")
				_, text1, _ = strings.Cut(text1, "\r\n\r\n")
			}
			want, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text1)))
			if err != nil {
				t.Fatal(err)
			}
			if req.Method != want.Method || req.RequestURI != want.RequestURI || req.Host != want.Host {
				t.Errorf("%s: the client gets %s %s of %s, recorded %s %s of %s", name, req.Method, req.RequestURI, req.Host, want.Method, want.RequestURI, want.Host)
			}
			want.Header.Del("Proxy-Connection")
			for _, differs := range []string{"Id", "X-Prometheus-Scrape-Timeout-Seconds"} {
				if req.Header.Get(differs) == "" {
					t.Errorf("%s: the client gets no %s", name, differs)
				}
				req.Header.Del(differs)
				want.Header.Del(differs)
			}
			if !maps.EqualFunc(req.Header, want.Header, func(a, b []string) bool { return strings.Join(a, ";") == strings.Join(b, ";") }) {
				t.Errorf("%s: the client gets %v, recorded %v", name, req.Header, want.Header)
			}
			poller.send(t, polls[i+1])

			pusher, told := h.connect(t)
			_, pushed, _ := strings.Cut(pushes[i], "\r\n\r\n")
			pusher.send(t, pushOf(strings.Replace(pushed, id.FindStringSubmatch(pushed)[1], issued, 1)))
			if resp := told.response(t); resp.status != http.StatusOK || resp.body != "" {
				t.Errorf("%s: the push was answered %v", name, resp)
			}
			has, shows := got.response(t), parse(recorded(t, name+"-from-proxy.bin"))
			if has.status != shows.status || has.body != shows.body {
				t.Errorf("%s: got %v, recorded %v", name, has, shows)
			}
			for header := range shows.header {
				switch header {
				case "Connection", "X-Prometheus-Scrape-Timeout", "Content-Length": // Not the scraper's business; framing.
				case "Date", "Content-Type": // The recorded proxy's own, where the client said none.
					if i == 1 {
						continue
					}
					fallthrough
				default:
					if has.header.Get(header) != shows.header.Get(header) {
						t.Errorf("%s: %s is %q, recorded %q", name, header, has.header.Get(header), shows.header.Get(header))
					}
				}
			}
			for _, header := range []string{"Id", "X-Prometheus-Scrape-Timeout"} {
				if has.header.Get(header) != "" {
					t.Errorf("%s: the scraper gets %s: %q", name, header, has.header.Get(header))
				}
			}
		}

		scraper, got := h.connect(t)
		scraper.send(t, recorded(t, "scraper-3-to-proxy.bin"))
		has, shows := got.response(t), parse(recorded(t, "scraper-3-from-proxy.bin"))
		if a, b := has.body, shows.body; has.status != shows.status || a != b || has.header.Get("Content-Type") != shows.header.Get("Content-Type") {
			t.Errorf("/clients: %d %q %q, recorded %d %q %q", has.status, has.header.Get("Content-Type"), a, shows.status, shows.header.Get("Content-Type"), b)
		}

		scraper, got = h.connect(t)
		began := time.Now()
		scraper.send(t, recorded(t, "scraper-2-to-proxy.bin"))
		has = got.response(t)
		if has.status != http.StatusNotFound || has.header.Get(reverse.HeaderError) != "unknown_client" || !time.Now().Equal(began) {
			t.Errorf("a name that nobody has: %v after %v", has, time.Since(began))
		}
	})
}

// node is our client: a link with the handler of scrapes.
type node struct {
	link    *link.Link
	metrics *prometheus.Registry
	logs    *logs
	stop    func()
}

// pulls are the pull targets of a node that has n of them.
func pulls(t *testing.T, n int) []reverse.PullTarget {
	t.Helper()
	var targets []reverse.PullTarget
	for i := range n {
		path := ""
		if i > 0 {
			path = fmt.Sprint("/", i)
		}
		u, err := url.Parse(site + path)
		if err != nil {
			t.Fatal(err)
		}
		targets = append(targets, reverse.PullTarget{Job: fmt.Sprint("job", i), URL: u})
	}
	return targets
}

// startNode starts a node that ends with the test. It lets everything on web-1 be scraped.
func startNode(t *testing.T, n *network, proxy string, targets int, allow ...reverse.Allowance) *node {
	t.Helper()
	base, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	if allow == nil {
		allow = []reverse.Allowance{{}}
	}
	x := &node{metrics: prometheus.NewPedanticRegistry(), logs: &logs{}}
	toProxy, toTarget := &http.Transport{DialContext: n.Dial}, &http.Transport{DialContext: n.Dial, DisableCompression: true}
	doer := func(transport *http.Transport) *http.Client {
		return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	logger := x.logs.logger(slog.LevelDebug)
	all := pulls(t, targets)
	client := reverse.NewClient(reverse.ClientConfig{
		Name: name, Targets: all, Allow: allow, HTTP: doer(toTarget), OwnHTTP: doer(toTarget), Dial: n.Dial, DialOwn: n.Dial,
		MaxBytes: 1 << 30, TunnelIdle: time.Minute, Logger: logger, Registerer: x.metrics,
	})
	header := http.Header{}
	header.Set(reverse.HeaderClient, name)
	header.Set(reverse.HeaderSession, "K7QX2B5C6J4Z3N7M")
	header.Set(reverse.HeaderAnnounce, reverse.Announce(name, nil, all).String())
	x.link = link.New(link.Config{
		URL: base, HTTP: doer(toProxy), Header: header, Targets: targets, Handler: client, Drain: 5 * time.Second, Logger: logger,
		Metrics: link.NewMetrics(x.metrics),
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- x.link.Run(ctx) }()
	x.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		toProxy.CloseIdleConnections()
		toTarget.CloseIdleConnections()
	})
	t.Cleanup(x.stop)
	return x
}

// kind returns the kind and number of a node's lines.
func (x *node) kind() string {
	s := x.link.Status()
	return fmt.Sprint(s.Kind, " ", s.Lines)
}

func (x *node) failed(t *testing.T) float64 {
	t.Helper()
	return value(t, x.metrics, "promferry_client_connect_failures_total")
}

// theirs is PushProx's proxy with a node of ours and a target, in a bubble.
type theirs struct {
	network *network
	target  *target
}

func startTheirs(t *testing.T) *theirs {
	t.Helper()
	x := &theirs{network: &network{}}
	x.target = serveTarget(t, x.network)
	x.serve(t, "", "")
	return x
}

// serve starts PushProx's proxy, under a path and behind what asks clients for a password, as a
// reverse proxy does; "" for neither.
func (x *theirs) serve(t *testing.T, prefix, password string) (stop func()) {
	t.Helper()
	proxy := pushprox.NewProxy(pushprox.ProxyConfig{})
	below := http.StripPrefix(prefix, proxy)
	stopServer := serve(t, x.network.listen("hub:8080"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host != "" {
			proxy.ServeHTTP(w, r)
			return
		}
		if _, said, _ := r.BasicAuth(); said != password {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		below.ServeHTTP(w, r)
	}))
	stop = func() {
		proxy.Close()
		stopServer()
	}
	t.Cleanup(stop)
	return stop
}

func (x *theirs) begin(t *testing.T, target, timeout string, header http.Header) <-chan answer {
	t.Helper()
	return begin(t, x.network, "hub:8080", nil, http.MethodGet, target, timeout, header)
}

func (x *theirs) scrape(t *testing.T, target, timeout string) answer {
	t.Helper()
	return <-x.begin(t, target, timeout, nil)
}

// TestPushProxProxy has our client at PushProx's proxy.
func TestPushProxProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		// The target by TLS: ?_scheme=https.
		node := startNode(t, x.network, "http://hub:8080", 3)
		pass(2 * time.Second)
		if got := node.kind(); got != "pushprox 1" {
			t.Fatalf("lines %q, want one: a second would displace it", got)
		}
		a := x.scrape(t, site+"/metrics?x=1&y=%20", "10")
		a.is(t, "a scrape", http.StatusOK, "", metrics)
		if got := a.header.Get("Content-Type"); got != "text/plain; version=0.0.4" {
			t.Errorf("Content-Type %q", got)
		}
		if got := x.target.heard.Load().URL.String(); got != "/metrics?x=1&y=%20" {
			t.Errorf("the target was asked for %q", got)
		}
		x.scrape(t, site+"/chunked", "10").is(t, "in chunks", http.StatusOK, "", metrics)
		x.scrape(t, site+"/large", "10").is(t, "a large one", http.StatusOK, "", large)
		x.scrape(t, site+"/down", "10").is(t, "the target's own status", http.StatusServiceUnavailable, "", metrics)
		x.scrape(t, site+"/slow?8s", "10").is(t, "a slow one", http.StatusOK, "", metrics)
		(<-begin(t, x.network, "hub:8080", nil, http.MethodHead, site+"/metrics", "10", nil)).is(t, "HEAD", http.StatusOK, "", "")
		x.scrape(t, "http://web-1:9/metrics", "10").is(t, "nothing listens", http.StatusBadGateway, "target_down", "*")
		a = x.scrape(t, site+"/slow?20s", "10")
		a.is(t, "too slow", http.StatusGatewayTimeout, "timeout", "*") // which PushProx's client never says
		a.between(t, "too slow", 8*time.Second, 10*time.Second-time.Millisecond)

		var answers []<-chan answer
		for range 20 {
			answers = append(answers, x.begin(t, site+"/slow?2s", "10", nil))
		}
		for i, c := range answers {
			a := <-c
			a.is(t, fmt.Sprint("scrape ", i), http.StatusOK, "", metrics)
			a.between(t, fmt.Sprint("scrape ", i), 2*time.Second, 2100*time.Millisecond)
		}
		if got := node.failed(t); got != 0 {
			t.Errorf("%v failures", got)
		}
		pass(24 * time.Hour)
		if got := node.kind(); got != "pushprox 1" {
			t.Errorf("lines after a day %q", got)
		}
		x.scrape(t, site+"/metrics", "10").is(t, "after a day", http.StatusOK, "", metrics)
		// PTTH is tried again every ten minutes, which is no failure.
		if got := node.failed(t); got != 0 {
			t.Errorf("%v failures", got)
		}
	})
}

// TestPushProxProxyWithoutTimeout: PushProx's client cannot scrape without it, ours can.
func TestPushProxProxyWithoutTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		startNode(t, x.network, "http://hub:8080", 1)
		pass(2 * time.Second)
		x.scrape(t, site+"/metrics", "").is(t, "without a timeout", http.StatusOK, "", metrics)
		x.scrape(t, site+"/slow?10s", "").is(t, "without a timeout, slow", http.StatusOK, "", metrics)
		// Its proxy waits for five minutes at most, and tells the client what the scraper said.
		x.scrape(t, site+"/slow?20s", "600").is(t, "a long timeout", http.StatusOK, "", metrics)
		x.scrape(t, site+"/slow?20s", "300").is(t, "the longest timeout", http.StatusOK, "", metrics)
	})
}

// TestPushProxProxyScrapersID: its proxy adds its Id to one that the scraper sent, after it.
func TestPushProxProxyScrapersID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		startNode(t, x.network, "http://hub:8080", 1)
		pass(2 * time.Second)
		(<-x.begin(t, site+"/metrics", "10", http.Header{"Id": {"mine"}})).is(t, "with an Id", http.StatusOK, "", metrics)
	})
}

// TestPushProxProxyHTTPS: ?_scheme=https has the target scraped by TLS.
func TestPushProxProxyHTTPS(t *testing.T) {
	server, trusting := certificates(t)
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		serve(t, tls.NewListener(x.network.listen("web-1:9100"), server), x.target)
		transport := &http.Transport{DialContext: x.network.Dial, TLSClientConfig: trusting}
		defer transport.CloseIdleConnections()
		handler := reverse.NewClient(reverse.ClientConfig{
			Name: name, Allow: []reverse.Allowance{{}}, HTTP: &http.Client{Transport: transport}, OwnHTTP: &http.Client{Transport: transport},
			MaxBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		base := &url.URL{Scheme: "http", Host: "hub:8080"}
		toProxy := &http.Transport{DialContext: x.network.Dial}
		defer toProxy.CloseIdleConnections()
		p := &longpoll.Poller{
			URL: base, HTTP: &http.Client{Transport: toProxy}, Name: name, Handler: handler, Logger: slog.New(slog.DiscardHandler),
			Responded: func(err error) {
				if err != nil {
					t.Error(err)
				}
			},
		}
		got := x.begin(t, site+"/metrics?z=1&_scheme=https&a=2", "10", nil)
		a, err := p.Poll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		p.Start(t.Context(), a)
		p.Wait()
		(<-got).is(t, "by TLS", http.StatusOK, "", metrics)
		if r := x.target.heard.Load(); r.TLS == nil || r.URL.RawQuery != "z=1&a=2" {
			t.Errorf("the target was asked for %q, TLS %v", r.URL, r.TLS != nil)
		}
	})
}

// TestPushProxProxyBehind has its proxy behind a reverse proxy, which has it under a path and
// asks for a password.
func TestPushProxProxyBehind(t *testing.T) {
	for what, tc := range map[string]struct {
		url  string
		good bool
	}{
		"good":     {"http://me:s3cret@hub:8080/pre/fix//", true},
		"wrong":    {"http://me:canary@hub:8080/pre/fix", false},
		"none":     {"http://hub:8080/pre/fix", false},
		"no path":  {"http://me:s3cret@hub:8080", false},
		"one path": {"http://me:s3cret@hub:8080/pre/", false},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := &theirs{network: &network{}}
				x.target = serveTarget(t, x.network)
				x.serve(t, "/pre/fix", "s3cret")
				node := startNode(t, x.network, tc.url, 1)
				pass(30 * time.Second)
				if !tc.good {
					s := node.link.Status()
					if s.Lines != 0 || s.Err == "" || node.failed(t) == 0 {
						t.Errorf("status %+v, %v failures", s, node.failed(t))
					}
					want, reason := "404", "refused"
					if what == "wrong" || what == "none" {
						want, reason = "401", "unauthorized"
					}
					if !strings.Contains(s.Err, want) {
						t.Errorf("the fault is %q, want the status %s", s.Err, want)
					}
					if n := value(t, node.metrics, "promferry_client_connect_failures_total", "reason", reason); n == 0 {
						t.Errorf("no failure %q", reason)
					}
				} else {
					x.scrape(t, site+"/metrics", "10").is(t, "the scrape", http.StatusOK, "", metrics)
				}
				if l := node.logs.String(); strings.Contains(l, "s3cret") || strings.Contains(l, "canary") {
					t.Errorf("the password is in the log: %s", l)
				}
			})
		})
	}
}

// TestPushProxProxyDisplaced: another client of the same name polls as well, and each poll of
// either ends the other's. Scrapes go on.
func TestPushProxProxyDisplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		node := startNode(t, x.network, "http://hub:8080", 1)
		run(t, &pushprox.Client{FQDN: name, ProxyURL: "http://hub:8080", Dial: x.network.Dial})
		pass(2 * time.Second)
		for range 20 {
			x.scrape(t, site+"/metrics", "10").is(t, "a scrape", http.StatusOK, "", metrics)
			pass(3 * time.Second)
		}
		if !strings.HasPrefix(node.kind(), "pushprox ") && node.link.Status().Err == "" {
			t.Errorf("status %+v", node.link.Status())
		}
	})
}

// TestPushProxProxyDead: its proxy dies, with a scrape on its way, and comes back. Polls go on
// as soon as they can, and no faster.
func TestPushProxProxyDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := &theirs{network: &network{}}
		x.target = serveTarget(t, x.network)
		stop := x.serve(t, "", "")
		node := startNode(t, x.network, "http://hub:8080", 1)
		pass(2 * time.Second)
		slow := x.begin(t, site+"/slow?5s", "10", nil)
		pass(time.Second)
		stop()
		if a := <-slow; a.err == nil {
			t.Errorf("the scrape that was on its way: %v", a)
		}
		pass(10 * time.Minute)
		if s := node.link.Status(); s.Lines != 0 || !strings.Contains(s.Err, "connection refused") {
			t.Errorf("status %+v", s)
		}
		// Five seconds on average, once the wait is at its limit of ten.
		if n := node.failed(t); n < 60 || n > 250 {
			t.Errorf("%v failures in ten minutes", n)
		}
		x.serve(t, "", "")
		pass(11 * time.Second)
		if got := node.kind(); got != "pushprox 1" {
			t.Errorf("lines %q", got)
		}
		x.scrape(t, site+"/metrics", "10").is(t, "afterwards", http.StatusOK, "", metrics)
	})
}

// TestReplacedProxy puts our proxy in the place of PushProx's at the same address, and back.
// The node finds out, and is scraped through whichever is there.
func TestReplacedProxy(t *testing.T) {
	for _, noUpgrade := range []bool{false, true} {
		t.Run(fmt.Sprint("upgrades ", !noUpgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := &theirs{network: &network{}}
				x.target = serveTarget(t, x.network)
				stop := x.serve(t, "", "")
				node := startNode(t, x.network, "http://hub:8080", 3)
				pass(2 * time.Second)
				x.scrape(t, site+"/metrics", "10").is(t, "through theirs", http.StatusOK, "", metrics)

				stop()
				h := startHub(t, x.network, "hub:8080", x.network.listen("hub:8080"), options{noUpgrade: noUpgrade})
				pass(11 * time.Second)
				h.scrape(t, site+"/metrics", "10").is(t, "through ours", http.StatusOK, "", metrics)
				synctest.Wait()
				if got := value(t, h.metrics, "promferry_proxy_lines"); got != 3 {
					t.Errorf("%v lines to ours, want 3", got)
				}
				pass(20 * time.Minute)
				want := "ptth 3"
				if noUpgrade {
					want = "longpoll 3"
				}
				if got := node.kind(); got != want {
					t.Errorf("lines %q, want %q", got, want)
				}

				h.stop()
				x.serve(t, "", "")
				pass(11 * time.Second)
				failures := node.failed(t)
				for range 10 {
					x.scrape(t, site+"/metrics", "10").is(t, "back through theirs", http.StatusOK, "", metrics)
					pass(30 * time.Second)
				}
				// More than one poll at a time, and they displace each other for ever.
				if got := node.failed(t) - failures; got > 2 {
					t.Errorf("%v failures in five minutes at theirs", got)
				}
			})
		})
	}
}

// TestReplacedClient puts a node of ours in the place of PushProx's client, and back, while it is
// scraped: by its name, as the scraper finds it in /clients.
func TestReplacedClient(t *testing.T) {
	for _, noUpgrade := range []bool{false, true} {
		t.Run(fmt.Sprint("upgrades ", !noUpgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{noUpgrade: noUpgrade})
				stop := run(t, p.client)
				pass(time.Second)
				listed := func(what string) {
					t.Helper()
					if got := p.clients(t); got != "web-1" {
						t.Errorf("%s: /clients has %q", what, got)
					}
				}
				good := func(what string) {
					t.Helper()
					p.scrape(t, site+"/metrics", "10").is(t, what, http.StatusOK, "", metrics)
					listed(what)
				}
				good("its client")
				if err := stop(); err != nil {
					t.Error(err)
				}
				listed("its client, stopped")
				node := startNode(t, p.network, "http://hub:8080", 1)
				pass(3 * time.Second)
				good("ours")
				pass(10 * time.Minute)
				good("ours after a while")
				node.stop()
				listed("ours, stopped")
				run(t, p.client)
				pass(3 * time.Second)
				good("its client again")
				// Both at a time: none of the scrapes is lost.
				startNode(t, p.network, "http://hub:8080", 1)
				for range 20 {
					pass(200 * time.Millisecond)
					good("both")
				}
			})
		})
	}
}

// TestChurn: neither file descriptors nor goroutines are left of clients that come, are
// scraped, and go, in any way that they may.
func TestChurn(t *testing.T) {
	n := &network{}
	h := startHub(t, n, "hub:8080", n.listenTCP(t, "hub:8080"), options{level: slog.LevelError})
	serve(t, n.listenTCP(t, "web-1:9100"), &target{})
	cycle := func(faults pushprox.Faults, timeout string) {
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer func() {
			cancel()
			running.Wait()
		}()
		c := &pushprox.Client{FQDN: name, ProxyURL: "http://hub:8080", Dial: n.Dial, Faults: faults, InitialWait: 10 * time.Millisecond}
		running.Go(func() { _ = c.Run(ctx) })
		until(t, "the client is connected", func() bool { return value(t, h.metrics, "promferry_proxy_lines", "state", "free") > 0 })
		_ = h.scrape(t, site+"/large", timeout)
	}
	churn := func() {
		for _, f := range []pushprox.Faults{{}, {DoublePush: true}, {SecondPoller: true}, {TruncatedPush: true}} {
			cycle(f, "5")
		}
		for _, f := range []pushprox.Faults{{LosePush: true}, {WrongID: true}, {GarbageResponse: true}, {DieAfterPoll: true}} {
			cycle(f, "0.05")
		}
	}
	churn()
	settled := func() (fds, goroutines int) {
		until(t, "no lines are left", func() bool { return value(t, h.metrics, "promferry_proxy_lines") == 0 })
		return openFiles(t), runtime.NumGoroutine()
	}
	fds, goroutines := settled()
	for range 10 {
		churn()
	}
	until(t, "no more file descriptors and goroutines than before", func() bool {
		f, g := settled()
		return f <= fds+2 && g <= goroutines+2
	})
}

// until waits for something that happens soon. Only a test that fails waits for long.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for !is() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// openFiles returns how many file descriptors this process has.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
