package pushprox_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/internal/pushprox"
)

// A script is a proxy that says to polls what the test says, and notes everything.
type script struct {
	work chan string // What the next poll gets, as its body.

	mu     sync.Mutex
	polls  []time.Time
	gone   int // Polls whose client went away.
	heads  []string
	pushes []string
}

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	s.mu.Lock()
	user, password, _ := r.BasicAuth()
	s.heads = append(s.heads, r.Method+" "+r.URL.Path+" "+user+" "+password)
	if strings.HasSuffix(r.URL.Path, "/push") {
		got := string(b)
		if err != nil {
			got += " (" + err.Error() + ")"
		}
		s.pushes = append(s.pushes, got)
		s.mu.Unlock()
		w.WriteHeader(http.StatusTeapot) // Which no client looks at.
		return
	}
	s.polls = append(s.polls, time.Now())
	s.mu.Unlock()
	select {
	case body := <-s.work:
		_, _ = io.WriteString(w, body)
	case <-r.Context().Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		s.gone++
	}
}

// seen returns what has come until now.
func (s *script) seen() (polls []time.Time, gone int, heads, pushes []string) {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.polls), s.gone, slices.Clone(s.heads), slices.Clone(s.pushes)
}

// counter notes what the client counts as an error.
type counter struct {
	mu    sync.Mutex
	count map[string]int
}

func (c *counter) failed(operation string, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == nil {
		c.count = make(map[string]int)
	}
	c.count[operation]++
}

func (c *counter) of(operation string) int {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count[operation]
}

// target answers scrapes of node-a:9100: at once, after 3 s below /slow, and with a body that
// breaks off below /torn.
func target(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/slow":
		select {
		case <-time.After(3 * time.Second):
		case <-r.Context().Done():
			return
		}
	case "/torn":
		_, _ = io.WriteString(w, "requests_total 12")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case "/moved":
		http.Redirect(w, r, "http://elsewhere:80/", http.StatusFound)
		return
	}
	_, _ = io.WriteString(w, "up 1\n")
}

// The time in a bubble begins with the year 2000.
const (
	work    = "GET http://node-a:9100/metrics HTTP/1.1\r\nHost: node-a:9100\r\nId: 7\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
	pushed  = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/plain; charset=utf-8\r\nDate: Sat, 01 Jan 2000 00:00:00 GMT\r\nId: 7\r\n"
	in10s   = "X-Prometheus-Scrape-Timeout: 10.000000\r\n"
	refused = "HTTP/0.0 500 Internal Server Error\r\nId: 7\r\n"
)

// scripted returns a client called node-a, a proxy that does what the test says, and what
// the client counts. There are a target and another host.
func scripted(t *testing.T) (network, *script, *pushprox.Client, *counter) {
	t.Helper()
	n := network{}
	s := &script{work: make(chan string)}
	n.serve(t, "hub:80", s)
	n.serve(t, "node-a:9100", http.HandlerFunc(target))
	n.serve(t, "localhost:9100", http.HandlerFunc(target))
	n.serve(t, "elsewhere:80", http.HandlerFunc(target))
	c := &counter{}
	return n, s, &pushprox.Client{FQDN: "node-a", ProxyURL: "http://hub", Dial: n.Dial, Failed: c.failed}, c
}

// TestBackoff has answers that are no request, whatever their reason.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s, client, count := scripted(t)
		run(t, client)
		for _, no := range []string{"", "Error WaitForScrapeInstruction: request is expired\n", "<html>502</html>\n", "", "", "", "", work, "", ""} {
			s.work <- no
		}
		polls, _, _, _ := s.seen()
		if len(polls) != 10 {
			t.Fatalf("%d polls", len(polls))
		}
		// The wait before jitter: half more each time, up to 5 s, and 1 s after a scrape.
		for i, wait := range []time.Duration{1000, 1500, 2250, 3375, 5000, 5000, 5000, 0, 1000} {
			wait *= time.Millisecond
			if d := polls[i+1].Sub(polls[i]); d < wait/2 || d > wait*3/2 {
				t.Errorf("poll %d after %v, want %v, half more or less", i+1, d, wait)
			}
		}
		if got := count.of("poll"); got != 9 {
			t.Errorf("%d polls failed", got)
		}
		<-time.After(2250 * time.Millisecond)
		if polls, _, _, _ = s.seen(); len(polls) != 11 {
			t.Errorf("%d polls, want one that is parked", len(polls))
		}
	})
}

// TestScrapesPushed has what the client makes of single scrapes, at once.
func TestScrapesPushed(t *testing.T) {
	asked := func(old, replacement string) string { return strings.Replace(work, old, replacement, 1) }
	const torn = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain; charset=utf-8\r\nDate: Sat, 01 Jan 2000 00:00:00 GMT\r\nId: 7\r\n"
	for name, tc := range map[string]struct{ work, want string }{
		"good":           {work, pushed + in10s + "\r\nup 1\n"},
		"redirected":     {asked("/metrics", "/moved"), pushed + in10s + "\r\nup 1\n"},
		"breaks off":     {asked("/metrics", "/torn"), torn + in10s + "\r\n11\r\nrequests_total 12\r\n"},
		"no timeout":     {asked("X-Prometheus-Scrape-Timeout-Seconds: 10\r\n", ""), refused + "X-Prometheus-Scrape-Timeout: -9223372036.854776\r\n\r\n" + `strconv.ParseFloat: parsing "": invalid syntax`},
		"another name":   {asked("http://node-a", "http://127.0.0.1"), refused + in10s + "\r\nscrape target doesn't match client fqdn"},
		"case of a name": {asked("http://node-a", "http://Node-A"), refused + in10s + "\r\nscrape target doesn't match client fqdn"},
		"refused":        {asked(":9100/metrics", ":1/"), refused + in10s + "\r\n" + `failed to scrape http://node-a:1/: Get "http://node-a:1/": dial tcp: connect: connection refused`},
		"https":          {asked(":9100/metrics", ":1/?z=1&_scheme=https&a=2"), refused + in10s + "\r\n" + `failed to scrape https://node-a:1/?a=2&z=1: Get "https://node-a:1/?a=2&z=1": dial tcp: connect: connection refused`},
		"no https":       {asked(":9100/metrics", ":1/?z=1&_scheme=x&a=2"), refused + in10s + "\r\n" + `failed to scrape http://node-a:1/?z=1&_scheme=x&a=2: Get "http://node-a:1/?z=1&_scheme=x&a=2": dial tcp: connect: connection refused`},
		"CONNECT":        {asked("GET http://node-a:9100/metrics", "CONNECT node-a:9100"), refused + in10s + "\r\n" + `failed to scrape //node-a:9100: Connect "//node-a:9100": unsupported protocol scheme ""`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, s, client, count := scripted(t)
				run(t, client)
				s.work <- tc.work
				_, _, _, pushes := s.seen()
				if len(pushes) != 1 || pushes[0] != tc.want {
					t.Errorf("pushed %q, want %q", pushes, tc.want)
				}
				want := 0
				if strings.HasPrefix(tc.want, refused) {
					want = 1
				}
				if got := count.of("scrape"); got != want {
					t.Errorf("%d scrapes failed, want %d", got, want)
				}
			})
		})
	}
}

// TestPollsWhileItScrapes has a slow target: polls and scrapes go on, and when the time is
// up nothing is pushed.
func TestPollsWhileItScrapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s, client, count := scripted(t)
		run(t, client)
		slow := strings.Replace(work, "/metrics", "/slow", 1)
		s.work <- slow
		s.work <- strings.Replace(slow, "Seconds: 10", "Seconds: 2.5", 1)
		s.work <- work
		polls, _, _, pushes := s.seen()
		if len(polls) != 4 || polls[3] != polls[0] {
			t.Errorf("polls at %v, want four at once", polls)
		}
		if want := pushed + in10s + "\r\nup 1\n"; len(pushes) != 1 || pushes[0] != want {
			t.Errorf("pushed %q, want %q", pushes, want)
		}
		<-time.After(2500 * time.Millisecond)
		if scrapes, pushes := count.of("scrape"), count.of("push"); scrapes != 1 || pushes != 1 {
			t.Errorf("%d scrapes and %d pushes failed, want 1 and 1", scrapes, pushes)
		}
		<-time.After(500 * time.Millisecond)
		if _, _, _, pushes = s.seen(); len(pushes) != 2 || !strings.Contains(pushes[1], "X-Prometheus-Scrape-Timeout: 7.000000\r\n") {
			t.Errorf("pushed %q, want a second with 7 s left", pushes)
		}
	})
}

func TestURLOfTheProxy(t *testing.T) {
	for url, want := range map[string][2]string{
		"http://hub":                       {"POST /poll  ", "POST /push  "},
		"http://hub:80//":                  {"POST /poll  ", "POST /push  "},
		"http://me:secret@hub/pre/fix///":  {"POST /pre/fix/poll me secret", "POST /pre/fix/push me secret"},
		"http://me:s%2Fecret@hub/pre%20x/": {"POST /pre x/poll me s/ecret", "POST /pre x/push me s/ecret"},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, s, client, _ := scripted(t)
			client.ProxyURL = url
			run(t, client)
			s.work <- work
			_, _, heads, _ := s.seen()
			slices.Sort(heads)
			if !slices.Equal(heads, []string{want[0], want[0], want[1]}) {
				t.Errorf("%s: %q", url, heads)
			}
		})
	}
	err := (&pushprox.Client{ProxyURL: "http://me:secret@%zz/"}).Run(t.Context())
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("Run with no URL: %v", err)
	}
}

// TestFlagsOfRanchersFork has what the proxy sees of them.
func TestFlagsOfRanchersFork(t *testing.T) {
	port1 := strings.Replace(work, ":9100/metrics", ":1/", 1)
	for _, tc := range []struct{ allow, work, want string }{
		{"9100", work, pushed + in10s + "\r\nup 1\n"},
		{"9100", port1, refused + in10s + "\r\nclient does not have permissions to scrape port 1"},
		{"1", port1, refused + in10s + "\r\n" + `failed to scrape http://localhost:1/: Get "http://localhost:1/": dial tcp: connect: connection refused`},
	} {
		synctest.Test(t, func(t *testing.T) {
			n, s, client, _ := scripted(t)
			delete(n, "node-a:9100")
			client.UseLocalhost, client.AllowPort = true, tc.allow
			run(t, client)
			s.work <- tc.work
			if _, _, _, pushes := s.seen(); len(pushes) != 1 || pushes[0] != tc.want {
				t.Errorf("pushed %q, want %q", pushes, tc.want)
			}
		})
	}
}

// TestFaultsInPushes has what comes of one scrape, and when.
func TestFaultsInPushes(t *testing.T) {
	const good = pushed + in10s + "\r\nup 1\n"
	for name, tc := range map[string]struct {
		faults pushprox.Faults
		want   []string
		after  time.Duration
	}{
		"none":            {want: []string{good}},
		"LatePush":        {faults: pushprox.Faults{LatePush: 11 * time.Second}, after: 11 * time.Second, want: []string{pushed + "X-Prometheus-Scrape-Timeout: -1.000000\r\n\r\nup 1\n"}},
		"DoublePush":      {faults: pushprox.Faults{DoublePush: true}, want: []string{good, good}},
		"LosePush":        {faults: pushprox.Faults{LosePush: true}},
		"NoDeadline":      {faults: pushprox.Faults{NoDeadline: true}, want: []string{pushed + "\r\nup 1\n"}},
		"GarbageResponse": {faults: pushprox.Faults{GarbageResponse: true}, want: []string{"no HTTP response\n"}},
		"WrongID":         {faults: pushprox.Faults{WrongID: true}, want: []string{strings.Replace(good, "Id: 7\r", "(masked)\r", 1)}},
		"TruncatedPush":   {faults: pushprox.Faults{TruncatedPush: true}, want: []string{good[:(len(good)+1)/2] + " (unexpected EOF)"}},
		"HTTPVersion":     {faults: pushprox.Faults{HTTPVersion: "HTTP/9.9"}, want: []string{"HTTP/9.9" + strings.TrimPrefix(good, "HTTP/1.1")}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, s, client, _ := scripted(t)
				client.Faults = tc.faults
				run(t, client)
				s.work <- work
				if tc.after > 0 {
					<-time.After(tc.after - 1)
					if _, _, _, pushes := s.seen(); len(pushes) > 0 {
						t.Errorf("pushed %q too early", pushes)
					}
					<-time.After(1)
				}
				_, _, _, pushes := s.seen()
				for i := range pushes {
					pushes[i] = masked([]byte(pushes[i]), id)
				}
				if !slices.Equal(pushes, tc.want) {
					t.Errorf("pushed %q, want %q", pushes, tc.want)
				}
			})
		})
	}
}

func TestDieAfterPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, client, _ := scripted(t)
		client.Faults.DieAfterPoll = true
		done := make(chan error, 1)
		go func() { done <- client.Run(t.Context()) }()
		s.work <- work
		if err := <-done; !errors.Is(err, pushprox.ErrDied) {
			t.Errorf("Run: %v", err)
		}
		polls, _, _, pushes := s.seen()
		if open := n["hub:80"].open.Load(); len(polls) != 1 || len(pushes) != 0 || open != 0 {
			t.Errorf("%d polls, pushed %q, %d open connections", len(polls), pushes, open)
		}
	})
}

// TestDrop drops a parked poll; the client is back after its pause. Then it ends with a parked poll.
func TestDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, s, client, count := scripted(t)
		drop := make(chan struct{})
		client.Faults.Drop = drop
		stop := run(t, client)
		synctest.Wait()
		drop <- struct{}{}
		polls, gone, _, _ := s.seen()
		if open := n["hub:80"].open.Load(); len(polls) != 1 || gone != 1 || open != 0 || count.of("poll") != 1 {
			t.Errorf("%d polls, %d gone, %d connections, %d failed", len(polls), gone, open, count.of("poll"))
		}
		<-time.After(1500 * time.Millisecond)
		if polls, gone, _, _ = s.seen(); len(polls) != 2 || gone != 1 {
			t.Errorf("%d polls, %d gone", len(polls), gone)
		}
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, gone, _, _ = s.seen(); gone != 2 || count.of("poll") != 1 {
			t.Errorf("%d polls gone, %d failed", gone, count.of("poll"))
		}
	})
}

// TestBothEnds has our two fixtures with each other.
func TestBothEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		faults pushprox.Faults
		path   string
		status int
		body   string
		after  time.Duration
	}{
		"good": {path: "/metrics", status: http.StatusOK, body: "up 1\n"},
		// The worst that PushProx does: a part of an exposition, as if it were whole.
		"torn target": {path: "/torn", status: http.StatusOK, body: "requests_total 12"},
		"slow target": {path: "/slow", status: http.StatusOK, body: "up 1\n", after: 3 * time.Second},
		"double push": {path: "/metrics", status: http.StatusOK, body: "up 1\n", faults: pushprox.Faults{DoublePush: true}},
		"version 0.0": {path: "/metrics", status: http.StatusOK, body: "up 1\n", faults: pushprox.Faults{HTTPVersion: "HTTP/0.0"}},
		"lost push": {
			path: "/metrics", status: http.StatusInternalServerError, faults: pushprox.Faults{LosePush: true},
			body: `Error scraping "http://node-a:9100/metrics": context deadline exceeded` + "\n", after: 4 * time.Second,
		},
		"wrong id": {
			path: "/metrics", status: http.StatusInternalServerError, faults: pushprox.Faults{WrongID: true},
			body: `Error scraping "http://node-a:9100/metrics": context deadline exceeded` + "\n", after: 4 * time.Second,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := network{}
				n.serveProxy(t, pushprox.ProxyConfig{})
				n.serve(t, "node-a:9100", http.HandlerFunc(target))
				run(t, &pushprox.Client{FQDN: "node-a", ProxyURL: "http://hub", Dial: n.Dial, Faults: tc.faults})
				a := <-send(t, n.client(t), "GET", "http://node-a:9100"+tc.path, "", timeout("4"))
				if a.status != tc.status || a.body != tc.body || a.err != nil || a.after != tc.after {
					t.Errorf("%d %q, %v after %v", a.status, a.body, a.err, a.after)
				}
			})
		})
	}
}

// TestTwoPollersFlap shows what a second poller of the same name does: each throws the other
// out, again and again, and scrapes work all the same.
func TestTwoPollersFlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{})
		n.serve(t, "node-a:9100", http.HandlerFunc(target))
		count := &counter{}
		run(t, &pushprox.Client{
			FQDN: "node-a", ProxyURL: "http://hub", Dial: n.Dial, Failed: count.failed,
			Faults: pushprox.Faults{SecondPoller: true},
		})
		<-time.After(time.Minute)
		// One of the two always waits, for 7.5 s at most.
		if got := count.of("poll"); got < 8 {
			t.Errorf("%d polls failed in a minute", got)
		}
		expect(t, "scrape", send(t, n.client(t), "GET", nodeA, "", timeout("4")), http.StatusOK, "up 1\n")
	})
}

// TestTLS has one TLS configuration for proxy and target, and a push that breaks off: the
// proxy passes on what came of it.
func TestTLS(t *testing.T) {
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "3000")
		_, _ = w.Write(bytes.Repeat([]byte("x"), 3000))
	}))
	t.Cleanup(secure.Close)
	for name, tc := range map[string]struct {
		faults pushprox.Faults
		whole  bool
	}{
		"whole":     {pushprox.Faults{}, true},
		"truncated": {pushprox.Faults{TruncatedPush: true}, false},
	} {
		t.Run(name, func(t *testing.T) {
			proxy := pushprox.NewProxy(pushprox.ProxyConfig{})
			hub := httptest.NewTLSServer(proxy)
			t.Cleanup(hub.Close)
			t.Cleanup(proxy.Close)
			trust := hub.Client().Transport.(*http.Transport).TLSClientConfig
			run(t, &pushprox.Client{FQDN: "127.0.0.1", ProxyURL: hub.URL, TLS: trust, Faults: tc.faults})
			hubURL, err := url.Parse(hub.URL)
			if err != nil {
				t.Fatal(err)
			}
			transport := &http.Transport{TLSClientConfig: trust, Proxy: http.ProxyURL(hubURL)}
			t.Cleanup(transport.CloseIdleConnections)
			scrape := "http://" + secure.Listener.Addr().String() + "/?_scheme=https"
			a := receive(t, send(t, &http.Client{Transport: transport}, "GET", scrape, "", timeout("20")))
			if whole := a.err == nil && len(a.body) == 3000; a.status != http.StatusOK || whole != tc.whole || len(a.body) == 0 {
				t.Errorf("%d, %d bytes, %v", a.status, len(a.body), a.err)
			}
		})
	}
}
