package link

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/longpoll"
	"github.com/promferry/promferry/reverse/ptth"
)

// hub is a proxy within a bubble: its network are pipes.
type hub struct {
	registry *reverse.Registry
	lines    *ptth.Hub
	polls    *longpoll.Hub
	proxy    *reverse.Proxy
	conns    chan net.Conn
	closed   chan struct{}
	once     sync.Once
	refuses  atomic.Bool
	dials    atomic.Int64
	// edit changes requests before the hub sees them, as what lies between may; it answers
	// itself when it returns true.
	edit atomic.Pointer[editor]
}

type editor func(http.ResponseWriter, *http.Request) bool

func (h *hub) between(e editor) { h.edit.Store(&e) }

func (h *hub) edits(w http.ResponseWriter, r *http.Request) bool {
	e := h.edit.Load()
	return e != nil && *e != nil && (*e)(w, r)
}

func (h *hub) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *hub) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (*hub) Addr() net.Addr { return &net.UnixAddr{Name: "hub"} }

// dial connects to the hub.
func (h *hub) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	h.dials.Add(1)
	if h.refuses.Load() {
		return nil, errors.New("connection refused")
	}
	ours, theirs := net.Pipe()
	select {
	case h.conns <- theirs:
		return ours, nil
	case <-h.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

const heartbeat = 10 * time.Second

// startHub starts a hub, which ends with the test.
func startHub(t *testing.T) *hub {
	t.Helper()
	logger, registerer := slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	registry, err := reverse.NewRegistry(reverse.RegistryConfig{
		MaxClients: 100, MaxLines: 64, MaxScrapes: 64, ForgetAfter: time.Hour, Settle: time.Second, Logger: logger, Registerer: registerer,
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{
		registry: registry, conns: make(chan net.Conn), closed: make(chan struct{}),
		lines: ptth.NewHub(ptth.HubConfig{Registry: registry, Heartbeat: heartbeat, Logger: logger, Registerer: registerer}),
		polls: longpoll.NewHub(longpoll.HubConfig{Registry: registry, Heartbeat: heartbeat, Logger: logger, Registerer: registerer}),
		proxy: reverse.NewProxy(reverse.ProxyConfig{
			Registry: registry, MaxTimeout: time.Minute, DefaultTimeout: 10 * time.Second, TunnelIdle: time.Minute, MaxScrapes: 100,
			MaxBytes: 1 << 20, Logger: logger, Registerer: registerer,
		}),
	}
	mux := http.NewServeMux()
	mux.Handle("/ptth", h.lines)
	mux.HandleFunc("/poll", h.polls.Poll)
	mux.HandleFunc("/push", h.polls.Push)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case reverse.IsScrape(r):
			h.proxy.ServeHTTP(w, r)
		case !h.edits(w, r):
			mux.ServeHTTP(w, r)
		}
	})}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(h) })
	running.Go(func() { _ = server.Serve(h.polls) })
	running.Go(func() { _ = h.lines.Run(ctx) })
	running.Go(func() { _ = h.polls.Run(ctx) })
	running.Go(func() { _ = registry.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		_ = server.Close()
		running.Wait()
	})
	return h
}

// startLink starts a link of a client called web-1 to the hub.
func startLink(t *testing.T, h *hub, targets int, handler http.HandlerFunc) (l *Link, stop func()) {
	t.Helper()
	header := http.Header{}
	header.Set(reverse.HeaderClient, "web-1")
	header.Set(reverse.HeaderSession, strings.Repeat("S", 16))
	u, err := url.Parse("http://hub:8080/prefix/..")
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/"
	transport := &http.Transport{DialContext: h.dial}
	l = New(Config{
		URL: u, HTTP: &http.Client{Transport: transport}, Header: header, Targets: targets, Handler: handler, Drain: 5 * time.Second,
		Logger: slog.New(slog.DiscardHandler), Metrics: NewMetrics(prometheus.NewRegistry()),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
		transport.CloseIdleConnections()
	})
	t.Cleanup(stop)
	return l, stop
}

func hello(w http.ResponseWriter, r *http.Request) {
	_, _ = io.WriteString(w, "hello from "+r.URL.Path+"\n")
}

// scrape scrapes through the hub, and returns status and body.
func (h *hub) scrape(t *testing.T, path string) string {
	t.Helper()
	conn, err := h.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	go func() {
		_, _ = fmt.Fprintf(conn, "GET http://web-1:9100%s HTTP/1.1\r\nHost: web-1:9100\r\nConnection: close\r\n\r\n", path)
	}()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(resp.StatusCode, " ", strings.TrimSpace(string(b)))
}

func wants(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func sleep(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // In a bubble.
	synctest.Wait()
}

func lines(l *Link) string {
	s := l.Status()
	return fmt.Sprint(s.Kind, " ", s.Lines)
}

func TestPTTH(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := startHub(t)
		l, stop := startLink(t, h, 3, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				<-time.After(2 * time.Second)
			}
			hello(w, r)
		})
		sleep(time.Second)
		wants(t, "lines", lines(l), "ptth 3")
		wants(t, "a scrape", h.scrape(t, "/a"), "200 hello from /a")
		sleep(time.Hour) // Heartbeats keep it.
		wants(t, "lines after an hour", lines(l), "ptth 3")
		var slow sync.WaitGroup
		for range 3 {
			slow.Go(func() { wants(t, "a slow scrape", h.scrape(t, "/slow"), "200 hello from /slow") })
		}
		sleep(10 * time.Millisecond)
		began := time.Now()
		wants(t, "a scrape beside three slow ones", h.scrape(t, "/a"), "200 hello from /a")
		if waited := time.Since(began); waited > 100*time.Millisecond {
			t.Errorf("it waited for %v", waited)
		}
		wants(t, "lines after that", lines(l), "ptth 4")
		slow.Wait()
		if n := h.dials.Load(); n != 4+5 {
			t.Errorf("%d dials, want 4 for lines and 5 for scrapes", n)
		}
		stop()
		wants(t, "after the goodbye", h.scrape(t, "/a"), `503 client "web-1": the client is not connected`)
	})
}

// TestLongPoll: where no upgrade gets through, polls do; several at a time at our own proxy.
func TestLongPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := startHub(t)
		h.between(func(_ http.ResponseWriter, r *http.Request) bool {
			r.Header.Del("Upgrade")
			return false
		})
		l, stop := startLink(t, h, 3, hello)
		sleep(2 * time.Second)
		wants(t, "lines", lines(l), "longpoll 3")
		for i := range 5 {
			wants(t, "a scrape", h.scrape(t, fmt.Sprint("/", i)), fmt.Sprint("200 hello from /", i))
		}
		sleep(time.Minute)
		wants(t, "lines after a minute", lines(l), "longpoll 3")
		wants(t, "a scrape after a minute", h.scrape(t, "/x"), "200 hello from /x")
		h.between(nil) // Whatever was in the way is gone.
		sleep(11 * time.Minute)
		wants(t, "lines in the end", lines(l), "ptth 3")
		stop()
		wants(t, "after the goodbye", h.scrape(t, "/a"), `503 client "web-1": the client is not connected`)
	})
}

// TestPushProx: a proxy without our header gets one poll at a time.
func TestPushProx(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := startHub(t)
		var polls, open atomic.Int64
		h.between(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/poll" {
				http.NotFound(w, r)
				return true
			}
			polls.Add(1)
			defer open.Add(-1)
			if open.Add(1) > 1 {
				t.Error("two polls at a time")
			}
			_, _ = io.ReadAll(r.Body)
			select {
			case <-time.After(45 * time.Second):
				w.WriteHeader(http.StatusRequestTimeout)
			case <-r.Context().Done():
			}
			return true
		})
		l, _ := startLink(t, h, 3, hello)
		sleep(20 * time.Second)
		wants(t, "lines", lines(l), "pushprox 1")
		sleep(100 * time.Second)
		if n := polls.Load(); n != 3 {
			t.Errorf("%d polls in two minutes, want one each 45 s", n)
		}
	})
}

// TestReconnect: the first try comes before who waits at the proxy gives up, the others spread
// out, and what the proxy asks for is honoured.
func TestReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := startHub(t)
		l, _ := startLink(t, h, 1, hello)
		sleep(time.Second)
		h.lines.Move()
		synctest.Wait()
		wants(t, "during the reconnect", h.scrape(t, "/a"), "200 hello from /a")
		wants(t, "lines", lines(l), "ptth 1")

		h.refuses.Store(true)
		h.lines.Move()
		before := h.dials.Load()
		sleep(10 * time.Minute)
		// On average five seconds lie between two tries, once the wait is at its limit.
		if n := h.dials.Load() - before; n < 60 || n > 240 {
			t.Errorf("%d tries in ten minutes", n)
		}
		if s := l.Status(); s.Lines != 0 || !strings.Contains(s.Err, "connection refused") {
			t.Errorf("status: %+v", s)
		}
		h.refuses.Store(false)
		sleep(maxDelay)
		wants(t, "lines", lines(l), "ptth 1")

		var asked []time.Time
		h.between(func(w http.ResponseWriter, _ *http.Request) bool {
			asked = append(asked, time.Now())
			w.Header().Set(reverse.HeaderProxy, "1")
			w.Header().Set("Retry-After", "30")
			http.Error(w, "full", http.StatusServiceUnavailable)
			return true
		})
		h.lines.Move()
		sleep(5 * time.Minute)
		for i := range len(asked) - 1 {
			if gap := asked[i+1].Sub(asked[i]); gap < 30*time.Second {
				t.Errorf("asked again after %v, the proxy said 30 s", gap)
			}
		}
		if len(asked) < 7 {
			t.Errorf("asked %d times in five minutes", len(asked))
		}
	})
}

// TestS23Storm: clients whose proxy is away spread their tries, and all come back within the
// time that a proxy waits for them.
func TestS23Storm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clients, down = 2_000, time.Minute
		var mu sync.Mutex
		perSecond := make(map[int]int)
		back := make(map[int]time.Duration)
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		metrics := NewMetrics(prometheus.NewRegistry())
		var running sync.WaitGroup
		for i := range clients {
			l := New(Config{
				URL: &url.URL{Scheme: "http", Host: "hub"}, Header: http.Header{}, Targets: 1, Handler: http.NotFoundHandler(),
				Logger: slog.New(slog.DiscardHandler), Metrics: metrics,
				HTTP: doer(func(*http.Request) (*http.Response, error) {
					mu.Lock()
					defer mu.Unlock()
					at := time.Since(began)
					perSecond[int(at/time.Second)]++
					if _, ok := back[i]; !ok && at >= down {
						back[i] = at - down
					}
					return nil, errors.New("connection refused")
				}),
			})
			running.Go(func() { _ = l.Run(ctx) })
		}
		sleep(down + maxDelay)
		cancel()
		running.Wait()
		if len(back) != clients {
			t.Errorf("%d of %d clients are back within %v", len(back), clients, maxDelay)
		}
		for second := 30; second < int(down/time.Second); second++ {
			// Evenly spread, it would be a fifth of them: the average wait is five seconds.
			if n := perSecond[second]; n > clients/5*3/2 {
				t.Errorf("%d tries in second %d", n, second)
			}
		}
	})
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }

// TestDrain: who stops answers what it has begun.
func TestDrain(t *testing.T) {
	for _, upgrade := range []bool{true, false} {
		t.Run(fmt.Sprint("upgrade=", upgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := startHub(t)
				h.between(func(_ http.ResponseWriter, r *http.Request) bool {
					if !upgrade {
						r.Header.Del("Upgrade")
					}
					return false
				})
				_, stop := startLink(t, h, 2, func(w http.ResponseWriter, r *http.Request) {
					<-time.After(3 * time.Second)
					hello(w, r)
				})
				sleep(2 * time.Second)
				got := make(chan string)
				go func() { got <- h.scrape(t, "/slow") }()
				sleep(time.Second)
				stopped := make(chan struct{})
				go func() {
					defer close(stopped)
					stop()
				}()
				sleep(100 * time.Millisecond)
				wants(t, "after the goodbye", h.scrape(t, "/a"), `503 client "web-1": the client is not connected`)
				wants(t, "what was in flight", <-got, "200 hello from /slow")
				<-stopped
			})
		})
	}
}

// TestS20GivenUp: when Prometheus gives up, the scrape at the node is cancelled.
func TestS20GivenUp(t *testing.T) {
	for _, upgrade := range []bool{true, false} {
		t.Run(fmt.Sprint("upgrade=", upgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := startHub(t)
				h.between(func(_ http.ResponseWriter, r *http.Request) bool {
					if !upgrade {
						r.Header.Del("Upgrade")
					}
					return false
				})
				var ended atomic.Int64
				startLink(t, h, 1, func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/a" {
						hello(w, r)
						return
					}
					began := time.Now()
					<-r.Context().Done()
					ended.Store(int64(time.Since(began)))
				})
				sleep(2 * time.Second)
				conn, err := h.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(conn, "GET http://web-1:9100/slow HTTP/1.1\r\nHost: web-1:9100\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				sleep(time.Second)
				_ = conn.Close()
				sleep(time.Millisecond)
				if d := time.Duration(ended.Load()); d != time.Second {
					t.Errorf("the scrape at the node ended after %v, want 1s", d)
				}
				sleep(time.Second)
				wants(t, "the next scrape", h.scrape(t, "/a"), "200 hello from /a")
			})
		})
	}
}
