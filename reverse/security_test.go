package reverse_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/link"
	"github.com/promferry/promferry/reverse/longpoll"
	"github.com/promferry/promferry/reverse/ptth"
)

// These tests play whoever may be hostile or broken: a scraper, a client, a proxy, a target, the
// network between. Their names are those of docs/security.md.

const (
	clientName  = "web-1"
	anySession  = "K7QX2B5C6J4Z3N7M5R2T6W4Y3A"
	nextSession = "L7QX2B5C6J4Z3N7M5R2T6W4Y3A"
)

// kinds are the kinds of lines that each property is asked of.
var kinds = []string{reverse.KindPTTH, reverse.KindLongPoll}

// who is a grant of that identity.
type who string

func (w who) Identity() string { return string(w) }

// network is where a proxy listens: pipes within a bubble, or the loopback interface.
type network interface {
	net.Listener
	dial(ctx context.Context, network, address string) (net.Conn, error)
}

type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (*pipes) Addr() net.Addr { return &net.UnixAddr{Name: "proxy"} }

// pipeConn has an address that looks like one, for what reads it.
type pipeConn struct{ net.Conn }

func (pipeConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- pipeConn{theirs}:
		return ours, nil
	case <-p.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type loopback struct{ net.Listener }

func newLoopback(t *testing.T) loopback {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return loopback{l}
}

func (l loopback) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, network, l.Addr().String())
}

// world is a proxy with all that makes lines.
type world struct {
	t        *testing.T
	net      network
	registry *reverse.Registry
	lines    *ptth.Hub
	polls    *longpoll.Hub
	proxy    *reverse.Proxy
	metrics  *prometheus.Registry
	stop     func()
	noPTTH   bool
	stopOnce sync.Once
}

type options struct {
	registry func(*reverse.RegistryConfig)
	proxy    func(*reverse.ProxyConfig)
	beat     time.Duration
	noPTTH   bool
}

func newWorld(t *testing.T, n network, o options) *world {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	w := &world{t: t, net: n, metrics: prometheus.NewRegistry(), noPTTH: o.noPTTH}
	rc := reverse.RegistryConfig{
		MaxClients: 100, MaxLines: 8, MaxScrapes: 8, ForgetAfter: time.Hour, Settle: 15 * time.Second, Logger: logger, Registerer: w.metrics,
	}
	if o.registry != nil {
		o.registry(&rc)
	}
	var err error
	if w.registry, err = reverse.NewRegistry(rc); err != nil {
		t.Fatal(err)
	}
	if o.beat == 0 {
		o.beat = 15 * time.Second
	}
	pc := reverse.ProxyConfig{
		Registry: w.registry, MaxTimeout: time.Minute, DefaultTimeout: 10 * time.Second, TunnelIdle: time.Minute, MaxScrapes: 50, MaxBytes: 1 << 20,
		Logger: logger, Registerer: w.metrics,
	}
	if o.proxy != nil {
		o.proxy(&pc)
	}
	w.lines = ptth.NewHub(ptth.HubConfig{Registry: w.registry, Heartbeat: o.beat, Logger: logger, Registerer: w.metrics})
	w.polls = longpoll.NewHub(longpoll.HubConfig{Registry: w.registry, Heartbeat: o.beat, Logger: logger, Registerer: w.metrics})
	w.proxy = reverse.NewProxy(pc)
	mux := http.NewServeMux()
	mux.HandleFunc("/ptth", func(rw http.ResponseWriter, r *http.Request) {
		if w.noPTTH && r.Method == http.MethodGet { // As something in between that knows no upgrade.
			http.NotFound(rw, r)
			return
		}
		w.lines.ServeHTTP(rw, r)
	})
	mux.HandleFunc("/poll", w.polls.Poll)
	mux.HandleFunc("/push", w.polls.Push)
	mux.HandleFunc("/sd", w.registry.Discovery)
	mux.Handle("/clients", w.registry.ListClients(time.Minute))
	server := &http.Server{
		Handler: longpoll.RestoreTLS(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if reverse.IsScrape(r) {
				w.proxy.ServeHTTP(rw, r)
				return
			}
			// As cmd has it for all that is no scrape.
			control := http.NewResponseController(rw)
			_ = control.SetWriteDeadline(time.Now().Add(time.Minute))
			if r.ContentLength != 0 {
				_ = control.SetReadDeadline(time.Now().Add(30 * time.Second))
			}
			mux.ServeHTTP(rw, r)
		})),
		// As cmd has it.
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 6 * time.Minute, MaxHeaderBytes: 64 << 10,
		ConnContext: longpoll.ConnContext, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(n) })
	running.Go(func() { _ = server.Serve(w.polls) })
	running.Go(func() { _ = w.lines.Run(ctx) })
	running.Go(func() { _ = w.polls.Run(ctx) })
	running.Go(func() { _ = w.registry.Run(ctx) })
	w.stop = func() {
		w.stopOnce.Do(func() {
			cancel()
			_ = server.Close()
			running.Wait()
		})
	}
	t.Cleanup(w.stop)
	return w
}

// metric returns the sum of the series of a metric that have the labels, name and value in turn.
func (w *world) metric(name string, labels ...string) float64 {
	return metric(w.t, w.metrics, name, labels...)
}

func metric(t *testing.T, g prometheus.Gatherer, name string, labels ...string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if hasLabels(m, labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func hasLabels(m *dto.Metric, labels []string) bool {
	for i := 0; i < len(labels); i += 2 {
		found := false
		for _, l := range m.GetLabel() {
			found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
		}
		if !found {
			return false
		}
	}
	return true
}

// scraper returns what Prometheus has: an HTTP client with the proxy as its proxy_url.
func (w *world) scraper() *http.Client {
	tr := &http.Transport{
		Proxy:       func(*http.Request) (*url.URL, error) { return &url.URL{Scheme: "http", Host: "proxy.example:1"}, nil },
		DialContext: w.net.dial, DisableCompression: true,
	}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// answer is what a scraper gets.
type answer struct {
	status int
	header http.Header
	body   []byte
	// broken tells that the body broke off, or that there was no answer at all.
	broken error
}

func (a answer) String() string {
	return fmt.Sprintf("%d %s %.60q %v", a.status, a.header.Get(reverse.HeaderError), a.body, a.broken)
}

// scrape scrapes as Prometheus does, with a timeout of its own.
func (w *world) scrape(target string, timeout time.Duration) answer {
	return scrape(w.t, w.scraper(), target, timeout)
}

func scrape(t *testing.T, c *http.Client, target string, timeout time.Duration) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		t.Error(err)
		return answer{broken: err}
	}
	req.Header.Set(reverse.HeaderTimeout, strconv.FormatFloat(timeout.Seconds(), 'f', -1, 64))
	resp, err := c.Do(req)
	if err != nil {
		return answer{broken: err}
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, b, err}
}

// node is a client with all that keeps it connected.
type node struct {
	client *reverse.Client
	link   *link.Link
	doer   *http.Client
	stop   func()
}

func noRedirects(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// join connects a client that has these targets.
func (w *world) join(name string, session string, targets ...reverse.PullTarget) *node {
	return w.joinWith(name, session, func(*reverse.ClientConfig) {}, targets...)
}

func (w *world) joinWith(name, session string, change func(*reverse.ClientConfig), targets ...reverse.PullTarget) *node {
	w.t.Helper()
	logger := slog.New(slog.DiscardHandler)
	toTarget := &http.Transport{DisableCompression: true}
	n := &node{}
	cfg := reverse.ClientConfig{
		Name: name, Targets: targets, HTTP: &http.Client{Transport: toTarget, CheckRedirect: noRedirects},
		OwnHTTP: &http.Client{Transport: toTarget, CheckRedirect: noRedirects},
		Dial:    (&net.Dialer{}).DialContext, DialOwn: (&net.Dialer{}).DialContext,
		MaxBytes: 1 << 20, TunnelIdle: time.Minute, Logger: logger, Registerer: prometheus.NewRegistry(),
	}
	change(&cfg)
	n.client = reverse.NewClient(cfg)
	header := http.Header{}
	header.Set(reverse.HeaderClient, name)
	header.Set(reverse.HeaderSession, session)
	header.Set(reverse.HeaderAnnounce, reverse.Announce(name, nil, targets).String())
	transport := &http.Transport{DialContext: w.net.dial}
	n.doer = &http.Client{Transport: transport, CheckRedirect: noRedirects}
	n.link = link.New(link.Config{
		URL: &url.URL{Scheme: "http", Host: "proxy.example:1"}, HTTP: n.doer, Header: header, Targets: len(targets), Handler: n.client,
		Drain: 5 * time.Second, Logger: logger, Metrics: link.NewMetrics(prometheus.NewRegistry()),
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = n.link.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		transport.CloseIdleConnections()
		toTarget.CloseIdleConnections()
	})
	w.t.Cleanup(n.stop)
	return n
}

// connected waits until a client has so many free lines.
func (w *world) connected(name string, lines int) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for {
		for _, c := range w.registry.Status().Clients {
			if c.Name == name && c.Lines-c.Busy >= lines {
				return
			}
		}
		select {
		case <-tick.C:
		case <-limit:
			w.t.Fatalf("client %s has not %d free lines: %+v", name, lines, w.registry.Status().Clients)
		}
	}
}

// target serves a target over loopback, and returns it as one of a client's.
func target(t *testing.T, h http.HandlerFunc) (reverse.PullTarget, *httptest.Server) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	return reverse.PullTarget{Job: "node", URL: u}, s
}

// at returns the URL by which a client's target is scraped.
func at(name string, p reverse.PullTarget) string {
	return "http://" + name + ":" + p.URL.Port() + p.URL.Path
}

// raw is a connection to the proxy that is written and read by hand.
type raw struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func (w *world) raw() *raw {
	w.t.Helper()
	c, err := w.net.dial(w.t.Context(), "tcp", "")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return &raw{w.t, c, bufio.NewReader(c)}
}

func (c *raw) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// reply is the head of an answer.
type reply struct {
	StatusCode int
	Status     string
	Header     http.Header
}

// response reads an answer with its body.
func (c *raw) response() (reply, string, error) {
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return reply{}, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Status, resp.Header}, string(b), err
}

// request reads what the proxy asks.
func (c *raw) request() *http.Request {
	c.t.Helper()
	r, err := http.ReadRequest(c.r)
	if err != nil {
		c.t.Fatalf("no request over the line: %v", err)
	}
	return r
}

const noContent = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// line opens a PTTH line by hand, up to the answer to its first heartbeat.
func (w *world) line(name, session, more string) *raw {
	w.t.Helper()
	c := w.raw()
	c.send("GET /ptth HTTP/1.1\r\nHost: proxy\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" +
		reverse.HeaderClient + ": " + name + "\r\n" + reverse.HeaderSession + ": " + session + "\r\n" + more + "\r\n")
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		w.t.Fatalf("no line: %s", resp.Status)
	}
	c.beat()
	return c
}

func (c *raw) beat() {
	c.t.Helper()
	if r := c.request(); r.Method != http.MethodOptions || r.RequestURI != "*" {
		c.t.Fatalf("got %s %s, want a heartbeat", r.Method, r.RequestURI)
	}
	c.send(noContent)
}

// poll asks for a scrape by hand, as a client of ours.
func (c *raw) poll(name, session string) {
	c.t.Helper()
	c.send(fmt.Sprintf("POST /poll HTTP/1.1\r\nHost: proxy\r\n%s: %s\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s",
		reverse.HeaderClient, name, reverse.HeaderSession, session, len(name), name))
}

// polled reads the scrape that a poll was answered with.
func (c *raw) polled() *http.Request {
	c.t.Helper()
	resp, body, err := c.response()
	if err != nil || resp.StatusCode != http.StatusOK {
		c.t.Fatalf("poll: %v %v", resp, err)
	}
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(body)))
	if err != nil {
		c.t.Fatalf("poll: %v: %q", err, body)
	}
	return r
}

// push responds by hand.
func (c *raw) push(body, more string) {
	c.t.Helper()
	c.send(fmt.Sprintf("POST /push HTTP/1.1\r\nHost: proxy\r\n%sContent-Length: %d\r\n\r\n%s", more, len(body), body))
}

// settle waits until there are no more goroutines, or files, than there were.
func settle(t *testing.T, what string, count func() int, atMost int) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for count() > atMost {
		select {
		case <-tick.C:
		case <-limit:
			if what == "goroutines" {
				b := make([]byte, 1<<20)
				t.Logf("%s", b[:runtime.Stack(b, true)])
			}
			t.Fatalf("%d %s are left, of %d", count(), what, atMost)
		}
	}
}

func files() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(entries)
}

func mustURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// response makes an answer of its text.
func response(text string, r *http.Request) (*http.Response, error) {
	return http.ReadResponse(bufio.NewReader(strings.NewReader(text)), r)
}

// newHandMadeLink starts a link whose requests are answered by d, and returns what stops it.
func newHandMadeLink(t *testing.T, d ptth.Doer) func() {
	t.Helper()
	header := http.Header{}
	header.Set(reverse.HeaderClient, clientName)
	header.Set(reverse.HeaderSession, anySession)
	l := link.New(link.Config{
		URL: mustURL(t, "http://proxy.example:1"), HTTP: d, Header: header, Targets: 1,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "m 1\n") }),
		Drain:   time.Second, Logger: slog.New(slog.DiscardHandler), Metrics: link.NewMetrics(prometheus.NewRegistry()),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = l.Run(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}
