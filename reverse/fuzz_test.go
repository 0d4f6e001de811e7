package reverse_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/reverse"
)

// FuzzAnnouncement: what is taken is written and read again as the same, and can be listed.
func FuzzAnnouncement(f *testing.F) {
	f.Add(`{"instance":"web-1","labels":{"env":"prod"},"targets":[{"job":"node","port":9100,"path":"/metrics"}]}`)
	f.Add(`{"instance":"\u00fc","targets":[{"job":"app","scheme":"https","port":8443,"path":"/a%20b","query":"module=a&x=%ff"}]}`)
	f.Add(`{"instance":"x","targets":null,"more":[[[[]]]]}`)
	f.Fuzz(func(t *testing.T, s string) {
		a, err := reverse.ParseAnnouncement(s)
		if err != nil {
			return
		}
		written := a.String()
		for _, r := range written {
			if r < ' ' || r > '~' {
				t.Fatalf("%q is written with %q, which no header may hold", s, r)
			}
		}
		if len(written) <= reverse.MaxAnnouncement {
			again, err := reverse.ParseAnnouncement(written)
			if err != nil || again.String() != written {
				t.Fatalf("%q is written as %q, which is %v %v", s, written, again, err)
			}
		}
		for name := range a.Labels {
			if strings.HasPrefix(name, "__") || name == "job" || name == "instance" {
				t.Fatalf("%q sets the label %q", s, name)
			}
		}
		for _, target := range a.Targets {
			if _, err := url.Parse(target.URL("web-1")); err != nil {
				t.Fatalf("%q makes no URL: %v", s, err)
			}
		}
	})
}

// FuzzHello: no header of a client breaks the registry, and what joins can be listed and leaves.
func FuzzHello(f *testing.F) {
	f.Add("web-1", anySession, `{"instance":"web-1","targets":[{"job":"node","port":9100,"path":"/metrics"}]}`, "1.0")
	f.Add("[::1]", "192.0.2.1", "", "")
	f.Fuzz(func(t *testing.T, name, session, announcement, version string) {
		r, err := reverse.NewRegistry(reverse.RegistryConfig{
			MaxClients: 2, MaxLines: 2, MaxScrapes: 2, ForgetAfter: time.Hour, Settle: time.Second, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		if err != nil {
			t.Fatal(err)
		}
		req := httptest.NewRequest(http.MethodGet, "/ptth", nil)
		req.Header.Set(reverse.HeaderSession, session)
		req.Header.Set(reverse.HeaderAnnounce, announcement)
		req.Header.Set(reverse.HeaderVersion, version)
		h, err := r.Hello(req, name, reverse.KindPTTH)
		if err == nil {
			var s *reverse.Session
			if s, err = r.Join(h); err == nil {
				s.Leave(nil)
				r.Goodbye(h)
			}
		}
		if _, ok := errors.AsType[*reverse.Refusal](err); err != nil && !ok {
			t.Fatalf("refused with %v", err)
		}
		if n := len(r.Status().Clients); (n == 1) != (err == nil) {
			t.Fatalf("%d clients are known, and %v", n, err)
		}
		rec := httptest.NewRecorder()
		r.Discovery(rec, httptest.NewRequest(http.MethodGet, "/sd", nil))
		var groups []struct {
			Targets []string          `json:"targets"`
			Labels  map[string]string `json:"labels"`
		}
		if rec.Code == http.StatusOK {
			if err := json.Unmarshal(rec.Body.Bytes(), &groups); err != nil {
				t.Fatal(err)
			}
		}
		for _, g := range groups {
			if host, _, err := net.SplitHostPort(g.Targets[0]); err != nil || host != name {
				t.Fatalf("client %q lists %q", name, g.Targets[0])
			}
		}
	})
}

// FuzzScrapeAtClient: whatever a proxy asks, a client reaches what is configured and nothing else.
func FuzzScrapeAtClient(f *testing.F) {
	for _, seed := range []string{
		"GET http://web-1:9100/metrics HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n",
		"GET http://web-1:9115/probe?module=a&_scheme=https HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 1e-9\r\nConnection: a, Host\r\n\r\n",
		"CONNECT web-1:8443 HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n",
		"GET http://web-1:9200/x/../y HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\nContent-Length: 3\r\n\r\nabc",
		"GET http://web-1:9200/a%2fb HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		f.Add(seed)
	}
	// What is sent to each, and whether any query may follow.
	allowed := map[string]bool{
		"127.0.0.1:9100/metrics": true, "127.0.0.1:9115/probe?module=a": false, "10.0.0.1:8443/m": true, "web-1:9200/health": true, "web-1:9200/a/b": true,
	}
	f.Fuzz(func(t *testing.T, request string) {
		check := doer(func(r *http.Request) (*http.Response, error) {
			sent := r.URL.Host + r.URL.RequestURI()
			_, whole := allowed[sent]
			path, _, _ := strings.Cut(sent, "?")
			if !whole && !allowed[path] || r.URL.User != nil || r.Body != nil || r.Method != http.MethodGet && r.Method != http.MethodHead {
				t.Errorf("%q reaches %s %s", request, r.Method, r.URL)
			}
			if _, ok := r.Context().Deadline(); !ok {
				t.Error("no deadline")
			}
			return plain("x"), nil
		})
		dial := func(_ context.Context, _, address string) (net.Conn, error) {
			if address != "10.0.0.1:8443" {
				t.Errorf("%q reaches %s", request, address)
			}
			return nil, errors.New("refused")
		}
		c := reverse.NewClient(reverse.ClientConfig{
			Name: "web-1", HTTP: check, OwnHTTP: check, Dial: dial, DialOwn: dial, MaxBytes: 100, TunnelIdle: time.Second,
			Targets: []reverse.PullTarget{
				{Job: "node", URL: mustParse("http://127.0.0.1:9100/metrics")},
				{Job: "probe", URL: mustParse("http://127.0.0.1:9115/probe?module=a")},
				{Job: "tls", URL: mustParse("https://10.0.0.1:8443/m")},
			},
			Allow: []reverse.Allowance{{Port: 9200, Path: "/health"}, {Port: 9200, Path: "/a/b"}}, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
		if err != nil {
			return
		}
		c.ServeHTTP(httptest.NewRecorder(), req.WithContext(t.Context()))
	})
}

// FuzzScrapeAtProxy: no request of a scraper breaks the proxy, or is more than one on the line.
func FuzzScrapeAtProxy(f *testing.F) {
	for _, seed := range []string{
		"GET http://web-1:9100/metrics HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n",
		"CONNECT web-1:9100 HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://web-1/a%0d%0ab HTTP/1.1\r\nHost: x\r\nConnection: close, Host\r\nA: b\r\n c\r\n\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, request string) {
		logger := slog.New(slog.DiscardHandler)
		reg, err := reverse.NewRegistry(reverse.RegistryConfig{MaxClients: 2, MaxLines: 2, MaxScrapes: 2, ForgetAfter: time.Hour, Logger: logger, Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		p := reverse.NewProxy(reverse.ProxyConfig{Registry: reg, MaxTimeout: time.Second, DefaultTimeout: time.Second, TunnelIdle: time.Second, MaxScrapes: 2, MaxBytes: 100, Logger: logger, Registerer: prometheus.NewRegistry()})
		s, err := reg.Join(reverse.Hello{Name: "web-1", Session: anySession, Kind: reverse.KindPTTH})
		if err != nil {
			t.Fatal(err)
		}
		s.Free(&fakeLine{t, s})
		req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
		if err != nil || !reverse.IsScrape(req) {
			return
		}
		rec := httptest.NewRecorder()
		p.ServeHTTP(rec, req.WithContext(t.Context()))
		if rec.Code == http.StatusOK && req.URL.Hostname() != "web-1" {
			t.Errorf("%q is answered by web-1", request)
		}
		if p.InFlight() != 0 {
			t.Error("a scrape is left in flight")
		}
	})
}

// fakeLine answers what it is asked, if that is one request.
type fakeLine struct {
	t       *testing.T
	session *reverse.Session
}

func (l *fakeLine) RoundTrip(r *http.Request) (*http.Response, error) {
	for name, values := range r.Header {
		if strings.EqualFold(name, "Connection") || strings.EqualFold(name, "Proxy-Authorization") || strings.EqualFold(name, "Transfer-Encoding") || strings.EqualFold(name, "Content-Length") {
			l.t.Errorf("%s: %q goes over the line", name, values)
		}
	}
	if strings.ContainsAny(r.RequestURI+r.Host, " \r\n") {
		l.t.Errorf("%q of %q goes over the line", r.RequestURI, r.Host)
	}
	l.session.Free(l)
	return plain("x"), nil
}

func (*fakeLine) Close() error { return nil }

func mustParse(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}
