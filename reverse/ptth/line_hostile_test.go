package ptth_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/ptth"
)

const (
	beat    = 15 * time.Second
	session = "K7QX2B5C6J4Z3N7M5R2T6W4Y3A"
	// alive answers a heartbeat.
	alive = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
)

// end is a hub, with the hostile end of its lines.
type end struct {
	hub      *ptth.Hub
	registry *reverse.Registry
	metrics  *prometheus.Registry
	stop     func()
	serving  sync.WaitGroup // the handlers
}

func newEnd(tb testing.TB) *end {
	tb.Helper()
	e := &end{metrics: prometheus.NewRegistry()}
	logger := slog.New(slog.DiscardHandler)
	var err error
	e.registry, err = reverse.NewRegistry(reverse.RegistryConfig{
		MaxClients: 10, MaxLines: 10, MaxScrapes: 10, ForgetAfter: time.Hour, Settle: time.Second, Logger: logger, Registerer: e.metrics,
	})
	if err != nil {
		tb.Fatal(err)
	}
	e.hub = ptth.NewHub(ptth.HubConfig{Registry: e.registry, Heartbeat: beat, Logger: logger, Registerer: e.metrics})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = e.hub.Run(ctx) })
	e.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		e.serving.Wait()
	})
	tb.Cleanup(e.stop)
	return e
}

// upgraded is the answer to a request that may be upgraded.
type upgraded struct {
	*httptest.ResponseRecorder
	conn net.Conn
	r    io.Reader
}

func (u upgraded) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return u.conn, bufio.NewReadWriter(bufio.NewReader(u.r), bufio.NewWriter(u.conn)), nil
}

// open returns the client's end of a line whose first heartbeat is to be answered.
func (e *end) open(tb testing.TB) (net.Conn, *bufio.Reader) {
	tb.Helper()
	ours, theirs := net.Pipe()
	return e.upgrade(tb, ours, theirs)
}

// upgrade makes a line of a connection, as open does.
func (e *end) upgrade(tb testing.TB, ours, theirs net.Conn) (net.Conn, *bufio.Reader) {
	tb.Helper()
	tb.Cleanup(func() { _ = ours.Close() })
	req := httptest.NewRequest(http.MethodGet, "/ptth", nil)
	req.Header.Set("Upgrade", ptth.Protocol)
	req.Header.Set(reverse.HeaderClient, "web-1")
	req.Header.Set(reverse.HeaderSession, session)
	e.serving.Go(func() { e.hub.ServeHTTP(upgraded{httptest.NewRecorder(), theirs, strings.NewReader("")}, req) })
	r := bufio.NewReader(ours)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		tb.Fatalf("%v %v", resp, err)
	}
	_ = resp.Body.Close()
	if _, err := http.ReadRequest(r); err != nil {
		tb.Fatal(err)
	}
	return ours, r
}

// wait waits until a client is as it should be, for some seconds.
func (e *end) wait(ok func(reverse.ClientStatus) bool) reverse.ClientStatus {
	for limit := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		s := e.registry.Status().Clients[0]
		if ok(s) || time.Now().After(limit) {
			return s
		}
	}
}

// scrape leases a line and sends a scrape, and returns what comes of it.
func (e *end) scrape(ctx context.Context) (string, error) {
	lease, err := e.registry.Lease(ctx, "web-1")
	if err != nil {
		return "", err
	}
	req := httptest.NewRequestWithContext(ctx, http.MethodGet, "http://web-1:9100/metrics", nil)
	defer func() { lease.Done(req.URL, reverse.ScrapeStatus{}, false) }()
	resp, err := lease.Line.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// lines returns how many lines the metrics have, free and in use.
func (e *end) lines(tb testing.TB) (free, busy int) {
	tb.Helper()
	families, err := e.metrics.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "promferry_proxy_lines" {
			continue
		}
		for _, m := range f.GetMetric() {
			if label(m, "state") == "free" {
				free += int(m.GetGauge().GetValue())
			} else {
				busy += int(m.GetGauge().GetValue())
			}
		}
	}
	return free, busy
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// TestHostileAnswers: whatever a client answers, a scrape ends with an error or the answer, within
// its time, and a line whose end is unclear is not used again.
func TestHostileAnswers(t *testing.T) {
	flood := strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 10000)
	for name, tt := range map[string]struct {
		answer string
		want   string // of the body; "" for an error
		reuse  bool
	}{
		"an answer":               {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", true},
		"in chunks":               {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "ok", true},
		"after early hints":       {"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", true},
		"says that it closes":     {"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", "ok", false},
		"and another one":         {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", "ok", false},
		"more after chunks":       {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n", "ok", false},
		"a body where none is":    {"HTTP/1.1 204 No Content\r\n\r\nevil", "", false},
		"garbage":                 {"\x16\x03\x01\x02\x00\x01\x00", "", false},
		"garbage lines":           {"hello\r\nthere\r\n\r\n", "", false},
		"a request":               {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "", false},
		"endless header":          {"HTTP/1.1 200 OK\r\n" + strings.Repeat("A: "+strings.Repeat("b", 1000)+"\r\n", 1000), "", false},
		"endless line":            {"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", 1_000_000), "", false},
		"endless status":          {"HTTP/1.1 200 " + strings.Repeat("b", 1_000_000), "", false},
		"1xx without end":         {flood, "", false},
		"switches protocols":      {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "", false},
		"two lengths":             {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!", "", false},
		"a length below zero":     {"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok", "", false},
		"a length beyond all":     {"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nok", "", false},
		"a status of no number":   {"HTTP/1.1 2x0 OK\r\nContent-Length: 2\r\n\r\nok", "", false},
		"a chunk beyond all":      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\nok", "", false},
		"a chunk of no number":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n", "", false},
		"a chunk too long":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nok\r\n0\r\n\r\n", "", false},
		"unknown encoding":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok", "", false},
		"a chunk line of 1 MB":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;" + strings.Repeat("a", 1_000_000) + "\r\nok\r\n0\r\n\r\n", "", false},
		"trailers of 1 MB":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA: " + strings.Repeat("a", 1_000_000) + "\r\n\r\n", "", false},
		"nothing, and it is gone": {"|", "", false},
		"half, and it is gone":    {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nok|", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEnd(t)
				c, r := e.open(t)
				if _, err := io.WriteString(c, alive); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				go func() {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					answer, gone := strings.CutSuffix(tt.answer, "|")
					_, _ = io.WriteString(c, answer)
					if gone {
						_ = c.Close()
					}
				}()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				body, err := e.scrape(ctx)
				if name == "a body where none is" {
					if body != "" || err != nil {
						t.Errorf("%q %v", body, err)
					}
				} else if body != tt.want && err == nil || (err == nil) != (tt.want != "") {
					t.Errorf("%q %v", body, err)
				}
				synctest.Wait()
				<-time.After(time.Second)
				free, busy := e.lines(t)
				want := 0
				if tt.reuse {
					want = 1
				}
				if free != want || busy != 0 {
					t.Errorf("%d lines are free and %d in use, want %d free", free, busy, want)
				}
			})
		})
	}
}

// TestHostileHeartbeats: an answer to a heartbeat that is none ends the line.
func TestHostileHeartbeats(t *testing.T) {
	for name, answer := range map[string]string{
		"garbage":                "xxxx\r\n\r\n",
		"an error":               "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
		"a body":                 "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"chunks":                 "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"no length":              "HTTP/1.1 200 OK\r\n\r\n",
		"1xx":                    "HTTP/1.1 100 Continue\r\n\r\n",
		"it closes":              "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
		"two answers":            alive + alive,
		"a scrape's answer":      alive + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
		"half a scrape's answer": alive + "HTTP/1.1 200 OK\r\nContent-Le",
		"an endless header":      "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", 1_000_000),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEnd(t)
				c, r := e.open(t)
				_, _ = io.WriteString(c, answer)
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					_, _ = io.Copy(io.Discard, r)
				}()
				select {
				case <-gone:
				case <-time.After(time.Second):
					t.Error("the line is kept")
				}
				synctest.Wait() // The hub has closed it, and is about to count it out.
				if free, busy := e.lines(t); free != 0 || busy != 0 {
					t.Errorf("%d lines are free and %d in use", free, busy)
				}
			})
		})
	}
}

// TestLineThatEndsWithItsAnswer: a client that hangs up right after its answer leaves no line that
// is free, nor fewer than none in use.
func TestLineThatEndsWithItsAnswer(t *testing.T) {
	e := newEnd(t)
	for i := range 3000 {
		c, r := e.open(t)
		if _, err := io.WriteString(c, alive); err != nil {
			t.Fatal(err)
		}
		e.wait(func(s reverse.ClientStatus) bool { return s.Lines > s.Busy })
		go func() {
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
			_ = c.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if body, err := e.scrape(ctx); err != nil || body != "ok" {
			t.Fatalf("round %d: %q %v", i, body, err)
		}
		cancel()
		if s := e.wait(func(s reverse.ClientStatus) bool { return s.Lines == 0 }); s.Lines != 0 || s.Busy != 0 {
			t.Fatalf("round %d: %d lines, %d in use", i, s.Lines, s.Busy)
		}
	}
}

// TestHubStopsWithAnswersOnTheirWay: when Run has returned nothing of the hub runs any more.
func TestHubStopsWithAnswersOnTheirWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnd(t)
		c, r := e.open(t)
		if _, err := io.WriteString(c, alive); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		lease, err := e.registry.Lease(t.Context(), "web-1")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		}()
		resp, err := lease.Line.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://web-1:9100/metrics", nil)) //nolint:bodyclose // It is, below.
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // The whole answer is in the buffer.
		done := make(chan struct{})
		go func() {
			_, _ = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			close(done)
		}()
		e.stop()
		<-done
		synctest.Wait()
		if free, busy := e.lines(t); free != 0 || busy != 0 {
			t.Errorf("%d lines are free and %d in use after the end", free, busy)
		}
	})
}

// hostile is a proxy that says what it likes over a line.
func serveLine(ctx context.Context, t *testing.T, said string) error {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { _ = ours.Close() })
	d := &ptth.Dialer{
		URL: mustURL(t), HTTP: &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return theirs, nil }}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") }), Header: http.Header{},
		HandshakeTimeout: 10 * time.Second, Logger: slog.New(slog.DiscardHandler),
	}
	var proxy sync.WaitGroup
	defer proxy.Wait()
	proxy.Go(func() {
		r := bufio.NewReader(ours)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(ours, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\nPromferry-Proxy: 1\r\nPromferry-Heartbeat: 15\r\n\r\n")
		proxy.Go(func() { _, _ = io.WriteString(ours, said) })
		_, _ = io.Copy(io.Discard, r)
	})
	line, err := d.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return line.Serve(ctx, time.Second, func() {}, func(bool) {})
}

// TestLineOfAnEndedContext: Serve returns, be it that ctx had ended before.
func TestLineOfAnEndedContext(t *testing.T) {
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = serveLine(ctx, t, "")
		}()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("Serve does not return")
		}
	}
}

// TestHostileProxy: whatever a proxy says over a line, Serve returns when it is time to.
func TestHostileProxy(t *testing.T) {
	const beatRequest = "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"
	for name, said := range map[string]string{
		"nothing":            "",
		"garbage":            "\x00\x01\x02\r\n\r\n",
		"a beat, no more":    beatRequest,
		"half a request":     beatRequest + "GET http://web-1:9100/me",
		"endless header":     beatRequest + "GET / HTTP/1.1\r\nA: " + strings.Repeat("b", 1_000_000),
		"a body that stalls": beatRequest + "GET http://web-1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
		"an upgrade":         beatRequest + "GET http://web-1/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"HTTP/2":             "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"a beat to close":    "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				err := serveLine(t.Context(), t, said)
				if took := time.Since(began); err == nil || took > 4*beat {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

// TestRefusalShowsNoToken has a proxy that answers with the token that it was sent, also cut by the
// limit of what is shown of a header or of a text.
func TestRefusalShowsNoToken(t *testing.T) {
	const token = "canary-0123456789-0123456789-0123456789"
	file := filepath.Join(t.TempDir(), "http.yml")
	if err := os.WriteFile(file, []byte("authorization: {credentials: "+token+"}"), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := httpclient.New("proxy", file)
	if err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string]func(w http.ResponseWriter, sent string){
		"text": func(w http.ResponseWriter, sent string) { http.Error(w, "who is "+sent, http.StatusForbidden) },
		"long text": func(w http.ResponseWriter, sent string) {
			http.Error(w, strings.Repeat("x", 190)+sent, http.StatusForbidden)
		},
		"upgrade": func(w http.ResponseWriter, sent string) {
			w.Header().Set("Upgrade", strings.Repeat("x", 30)+sent)
			w.Header().Set("Connection", "Upgrade")
			w.WriteHeader(http.StatusSwitchingProtocols)
		},
		"heartbeat": func(w http.ResponseWriter, sent string) {
			w.Header().Set("Upgrade", ptth.Protocol)
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set(reverse.HeaderHeartbeat, strings.Repeat("x", 30)+sent)
			w.WriteHeader(http.StatusSwitchingProtocols)
		},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answer(w, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		}))
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_, err = (&ptth.Dialer{URL: u, HTTP: client, HandshakeTimeout: time.Minute}).Open(t.Context())
		server.Close()
		if err == nil || strings.Contains(err.Error(), "canary") || !strings.Contains(err.Error(), "...") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// TestHostileHeartbeatHeader: a heartbeat that is none, or of a length that makes no sense, is refused.
func TestHostileHeartbeatHeader(t *testing.T) {
	for _, value := range []string{"", "0", "-1", "NaN", "Inf", "+Inf", "1e9", "601", "x", "0x1p-2000", "15s"} {
		if d, err := ptth.Heartbeat(&http.Response{Header: http.Header{reverse.HeaderHeartbeat: {value}}}); err == nil {
			t.Errorf("%q is taken for %v", value, d)
		}
	}
	for _, value := range []string{"1", "15", "0.05", "600"} {
		if d, err := ptth.Heartbeat(&http.Response{Header: http.Header{reverse.HeaderHeartbeat: {value}}}); err != nil || fmt.Sprint(d.Seconds()) != value {
			t.Errorf("%q: %v %v", value, d, err)
		}
	}
}
