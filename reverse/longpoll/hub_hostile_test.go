package longpoll_test

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
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/longpoll"
)

const session = "K7QX2B5C6J4Z3N7M5R2T6W4Y3A"

// end is a hub behind a server on pipes.
type end struct {
	hub      *longpoll.Hub
	registry *reverse.Registry
	conns    chan net.Conn
	closed   chan struct{}
	stop     func()
}

func (e *end) Accept() (net.Conn, error) {
	select {
	case c := <-e.conns:
		return c, nil
	case <-e.closed:
		return nil, net.ErrClosed
	}
}

func (e *end) Close() error { return nil }

func (*end) Addr() net.Addr { return &net.UnixAddr{Name: "proxy"} }

func newEnd(tb testing.TB) *end {
	tb.Helper()
	e := &end{conns: make(chan net.Conn), closed: make(chan struct{})}
	logger := slog.New(slog.DiscardHandler)
	var err error
	e.registry, err = reverse.NewRegistry(reverse.RegistryConfig{
		MaxClients: 10, MaxLines: 10, MaxScrapes: 10, ForgetAfter: time.Hour, Settle: time.Second, Logger: logger, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	e.hub = longpoll.NewHub(longpoll.HubConfig{Registry: e.registry, Heartbeat: 15 * time.Second, Logger: logger, Registerer: prometheus.NewRegistry()})
	mux := http.NewServeMux()
	mux.HandleFunc("/poll", e.hub.Poll)
	mux.HandleFunc("/push", e.hub.Push)
	server := &http.Server{Handler: mux, ConnContext: longpoll.ConnContext, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(e) })
	running.Go(func() { _ = server.Serve(e.hub) })
	running.Go(func() { _ = e.hub.Run(ctx) })
	e.stop = sync.OnceFunc(func() {
		cancel()
		close(e.closed)
		_ = server.Close()
		running.Wait()
	})
	tb.Cleanup(e.stop)
	return e
}

func (e *end) dial(tb testing.TB) (net.Conn, *bufio.Reader) {
	tb.Helper()
	ours, theirs := net.Pipe()
	tb.Cleanup(func() { _ = ours.Close() })
	e.conns <- theirs
	return ours, bufio.NewReader(ours)
}

func poll(name string) string {
	return fmt.Sprintf("POST /poll HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", reverse.HeaderSession, session, len(name), name)
}

func push(body string) string {
	return fmt.Sprintf("POST /push HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", reverse.HeaderSession, session, len(body), body)
}

// scrape leases a poll and sends a scrape, and returns what comes of it.
func (e *end) scrape(ctx context.Context, method string) (string, error) {
	lease, err := e.registry.Lease(ctx, "web-1")
	if err != nil {
		return "", err
	}
	req := httptest.NewRequestWithContext(ctx, method, "http://web-1:9100/metrics", nil)
	defer func() { lease.Done(req.URL, reverse.ScrapeStatus{}, false) }()
	resp, err := lease.Line.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// TestHostilePolls: a poll that is none is refused or ends, and leaves no line.
func TestHostilePolls(t *testing.T) {
	for name, said := range map[string]string{
		"garbage":             "POST /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\x00\x01\x02\x03",
		"a name beyond all":   "POST /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("a", 100000),
		"a name in chunks":    "POST /poll HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1000\r\n"+strings.Repeat("a", 4096)+"\r\n", 100) + "0\r\n\r\n",
		"two polls at a time": poll("web-1") + poll("web-1"),
		"a byte more":         poll("web-1") + "x",
		"GET":                 "GET /poll HTTP/1.1\r\nHost: x\r\n\r\n",
		"a session of one":    "POST /poll HTTP/1.1\r\nHost: x\r\nPromferry-Session: x\r\nContent-Length: 5\r\n\r\nweb-1",
		"half a name":         "POST /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nwe",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEnd(t)
				c, r := e.dial(t)
				go func() { _, _ = io.WriteString(c, said) }()
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					if resp, err := http.ReadResponse(r, nil); err == nil {
						_ = resp.Body.Close()
						if resp.StatusCode == http.StatusOK {
							t.Errorf("got %s", resp.Status)
						}
					}
				}()
				select {
				case <-ended:
				case <-time.After(12 * time.Second):
					t.Error("no end within 12 s")
				}
				_ = c.Close()
				<-time.After(time.Second) // The server waits that long for what it does not read.
				for _, s := range e.registry.Status().Clients {
					if s.Lines != 0 || s.Busy != 0 {
						t.Errorf("%d lines, %d in use", s.Lines, s.Busy)
					}
				}
			})
		})
	}
}

// TestConnectLeavesThePoll: CONNECT over a poll gets its error, and the poll is as it was; when it
// has ended meanwhile it is not free.
func TestConnectLeavesThePoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnd(t)
		c, _ := e.dial(t)
		_, _ = io.WriteString(c, poll("web-1"))
		synctest.Wait()
		lease, err := e.registry.Lease(t.Context(), "web-1")
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close() // The client goes while the scrape has its poll.
		synctest.Wait()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodConnect, "http://web-1:9100/", nil)
		if _, err := lease.Line.RoundTrip(req); !errors.Is(err, reverse.ErrNoTunnel) && !errors.Is(err, reverse.ErrNotSent) { //nolint:bodyclose // There is none.
			t.Error(err)
		}
		lease.Done(req.URL, reverse.ScrapeStatus{}, false)
		if s := e.registry.Status().Clients[0]; s.Lines != 0 || s.Busy != 0 {
			t.Errorf("%d lines, %d in use", s.Lines, s.Busy)
		}
	})
}

// TestHostileResponses: a response that is none fails its scrape at once, if it is known whose it is:
// by the ID in the request, which our clients send, or in the response's own head.
func TestHostileResponses(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nId: ID\r\n"
	for name, tt := range map[string]struct{ body, ours, pushProx string }{
		"nothing":                      {"", "malformed", "timeout"},
		"garbage":                      {"\x00\x01\x02\r\n\r\n", "malformed", "timeout"},
		"no ID":                        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", "timeout"},
		"an ID after much else":        {"HTTP/1.1 20 OK\r\nA: " + strings.Repeat("b", 20_000) + "\r\nId: ID\r\n\r\n", "malformed", "timeout"},
		"the ID in the body":           {"HTTP/1.1 20 OK\r\n\r\nId: ID\r\n", "malformed", "timeout"},
		"no status line":               {"Id: ID\r\nContent-Length: 2\r\n\r\nok", "malformed", "malformed"},
		"another protocol":             {"ICY 200 OK\r\nid:ID\r\n\r\nok", "malformed", "malformed"},
		"a status of two digits":       {"HTTP/1.1 20 OK\r\nId: ID\r\n\r\nok", "malformed", "malformed"},
		"a status below 100":           {"HTTP/1.1 099 OK\r\nId: ID\r\nContent-Length: 2\r\n\r\nok", "malformed", "malformed"},
		"an interim status":            {"HTTP/1.1 100 OK\r\nId: ID\r\n\r\n" + head + "\r\nok", "malformed", "malformed"},
		"a header without a colon":     {head + "A\r\n\r\nok", "malformed", "malformed"},
		"headers that break off":       {head + "A: b\r\nB", "malformed", "malformed"},
		"two lengths":                  {head + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nok!", "malformed", "malformed"},
		"a length that is no number":   {head + "Content-Length: two\r\n\r\nok", "malformed", "malformed"},
		"unknown encoding":             {head + "Transfer-Encoding: gzip\r\n\r\nok", "malformed", "malformed"},
		"an endless header":            {head + "A: " + strings.Repeat("b", 1_000_000), "malformed", "malformed"},
		"headers without end":          {head + strings.Repeat("A: b\r\n", 100_000), "malformed", "malformed"},
		"a length too short":           {head + "Content-Length: 2\r\n\r\nok!", "malformed", "malformed"},
		"a length much too short":      {head + "Content-Length: 2\r\n\r\nok" + strings.Repeat("!", 1_000_000), "malformed", "malformed"},
		"two responses":                {head + "Content-Length: 2\r\n\r\nok" + head + "Content-Length: 2\r\n\r\nok", "malformed", "malformed"},
		"two in chunks":                {head + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + head + "\r\n", "malformed", "malformed"},
		"a body where there is none":   {"HTTP/1.1 204 No Content\r\nId: ID\r\n\r\nok", "malformed", "malformed"},
		"a version of PushProx's, two": {"HTTP/0.0 200 OK\r\nId: ID\r\nContent-Length: 2\r\n\r\nok!", "malformed", "malformed"},
		"a length too long":            {head + "Content-Length: 4\r\n\r\nok", "broken", "broken"},
		"chunks without end":           {head + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "broken", "broken"},
		"a chunk of no size":           {head + "Transfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n", "broken", "broken"},
		"one":                          {head + "Content-Length: 2\r\n\r\nok", "ok", "ok"},
		"one in chunks":                {head + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "ok", "ok"},
		"one without a length":         {"HTTP/0.0 200 OK\r\nId: ID\r\n\r\nok", "ok", "ok"},
	} {
		for kind, want := range map[string]string{"ours": tt.ours, "PushProx": tt.pushProx} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newEnd(t)
					c, r := e.dial(t)
					_, _ = io.WriteString(c, poll("web-1"))
					synctest.Wait()
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
					defer cancel()
					type result struct {
						body string
						err  error
					}
					done := make(chan result)
					go func() {
						body, err := e.scrape(ctx, http.MethodGet)
						done <- result{body, err}
					}()
					resp, err := http.ReadResponse(r, nil) //nolint:bodyclose // It goes with its connection.
					if err != nil {
						t.Fatal(err)
					}
					scrape, err := http.ReadRequest(bufio.NewReader(resp.Body))
					if err != nil {
						t.Fatal(err)
					}
					id := scrape.Header.Get("Id")
					said := push(strings.ReplaceAll(tt.body, "ID", id))
					if kind == "ours" {
						said = strings.Replace(said, "\r\n", "\r\nId: "+id+"\r\n", 1)
					}
					c2, r2 := e.dial(t)
					go func() { _, _ = io.WriteString(c2, said) }()
					go func() { _, _ = io.Copy(io.Discard, r2) }()
					began := time.Now()
					got := <-done
					came := "broken"
					switch {
					case got.err == nil:
						came = got.body
					case errors.Is(got.err, reverse.ErrMalformed):
						came = "malformed"
					case errors.Is(got.err, context.DeadlineExceeded):
						came = "timeout"
					}
					if came != want {
						t.Errorf("got %s (%v), want %s", came, got.err, want)
					}
					if took := time.Since(began); took != 0 && want != "timeout" {
						t.Errorf("only after %v", took)
					}
					_ = c2.Close()
					<-time.After(time.Second) // The server waits that long for what it does not read.
				})
			})
		}
	}
}

// TestResponseThatBreaksOff: when the connection with a response breaks in its head the client is
// gone, which is no malformed response.
func TestResponseThatBreaksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnd(t)
		c, r := e.dial(t)
		_, _ = io.WriteString(c, poll("web-1"))
		synctest.Wait()
		done := make(chan error)
		go func() {
			_, err := e.scrape(t.Context(), http.MethodGet)
			done <- err
		}()
		resp, err := http.ReadResponse(r, nil) //nolint:bodyclose // It goes with its connection.
		if err != nil {
			t.Fatal(err)
		}
		scrape, err := http.ReadRequest(bufio.NewReader(resp.Body))
		if err != nil {
			t.Fatal(err)
		}
		whole := push("HTTP/1.1 200 OK\r\nId: " + scrape.Header.Get("Id") + "\r\nContent-Length: 2\r\n\r\nok")
		c2, _ := e.dial(t)
		_, _ = io.WriteString(c2, whole[:len(whole)-10])
		_ = c2.Close()
		if err := <-done; !errors.Is(err, reverse.ErrGone) {
			t.Errorf("got %v", err)
		}
	})
}

// TestResponseWithMoreToCome: a push that is longer than its response is malformed before all of it has
// come.
func TestResponseWithMoreToCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnd(t)
		c, r := e.dial(t)
		_, _ = io.WriteString(c, poll("web-1"))
		synctest.Wait()
		done := make(chan error)
		go func() {
			_, err := e.scrape(t.Context(), http.MethodGet)
			done <- err
		}()
		resp, err := http.ReadResponse(r, nil) //nolint:bodyclose // It goes with its connection.
		if err != nil {
			t.Fatal(err)
		}
		scrape, err := http.ReadRequest(bufio.NewReader(resp.Body))
		if err != nil {
			t.Fatal(err)
		}
		longer := push("HTTP/1.1 200 OK\r\nId: " + scrape.Header.Get("Id") + "\r\nContent-Length: 2\r\n\r\nok!")
		c2, _ := e.dial(t)
		_, _ = io.WriteString(c2, longer[:len(longer)-1])
		if err := <-done; !errors.Is(err, reverse.ErrMalformed) {
			t.Errorf("got %v", err)
		}
		_ = c2.Close()
		<-time.After(time.Second) // The server waits that long for what it does not read.
	})
}

// TestHostileProxyFloods: a proxy cannot make a client do any number of scrapes at a time.
func TestHostileProxyFloods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now, most := 0, 0
		release := make(chan struct{})
		p := &longpoll.Poller{
			URL: &url.URL{Scheme: "http", Host: "proxy"}, Name: "web-1", Header: http.Header{}, Logger: slog.New(slog.DiscardHandler), Responded: func(error) {},
			HTTP: doer(func(r *http.Request) (*http.Response, error) {
				if strings.HasSuffix(r.URL.Path, "/push") {
					_, _ = io.Copy(io.Discard, r.Body)
					return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody}, nil
				}
				return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("GET http://web-1:9100/m HTTP/1.1\r\nHost: x\r\nId: a\r\n\r\n"))}, nil
			}),
			Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				mu.Lock()
				now++
				most = max(most, now)
				mu.Unlock()
				<-release
				mu.Lock()
				now--
				mu.Unlock()
			}),
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		polled := make(chan struct{})
		go func() {
			defer close(polled)
			for range 2000 {
				a, err := p.Poll(ctx)
				if err != nil {
					return
				}
				p.Start(t.Context(), a)
			}
		}()
		<-ctx.Done()
		synctest.Wait()
		mu.Lock()
		if most > 256 {
			t.Errorf("%d scrapes at a time", most)
		}
		mu.Unlock()
		close(release)
		<-polled
		p.Wait()
	})
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }
