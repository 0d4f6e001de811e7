package reverse

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
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// recorder notes what is scraped, and answers.
type recorder struct {
	requests []*http.Request
	answer   func(*http.Request) (*http.Response, error)
}

func (r *recorder) Do(req *http.Request) (*http.Response, error) {
	r.requests = append(r.requests, req)
	if r.answer != nil {
		return r.answer(req)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: 2, Body: io.NopCloser(strings.NewReader("x\n"))}, nil
}

func pullTarget(t *testing.T, job, address string) PullTarget {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return PullTarget{Job: job, URL: u}
}

func newTestClient(t *testing.T, targets []PullTarget, allow ...string) (c *Client, configured, own *recorder) {
	t.Helper()
	configured, own = &recorder{}, &recorder{}
	cfg := ClientConfig{
		Name: "web-1", Targets: targets, HTTP: configured, OwnHTTP: own, MaxBytes: 100, TunnelIdle: time.Minute,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	for _, s := range allow {
		a, err := ParseAllowance(s)
		if err != nil {
			t.Fatal(err)
		}
		if a.String() != s {
			t.Errorf("%q is written as %q", s, a)
		}
		cfg.Allow = append(cfg.Allow, a)
	}
	return NewClient(cfg), configured, own
}

// ask sends a request as a line would.
func ask(t *testing.T, c http.Handler, raw string) *httptest.ResponseRecorder {
	t.Helper()
	head, rest, _ := strings.Cut(raw, "\n")
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head + " HTTP/1.1\r\nHost: other\r\n" + HeaderTimeout + ": 5\r\n" + rest + "\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	c.ServeHTTP(w, req)
	return w
}

func TestRoutes(t *testing.T) {
	targets := []PullTarget{
		pullTarget(t, "node", "http://127.0.0.1:9100/metrics"),
		pullTarget(t, "plain", "http://10.1.2.3/"),
		pullTarget(t, "tls", "https://127.0.0.1:8443/m"),
		pullTarget(t, "probe-a", "http://127.0.0.1:9115/probe?module=a"),
		pullTarget(t, "probe-b", "http://127.0.0.1:9115/probe?module=b&target=x"),
		pullTarget(t, "probe-any", "http://127.0.0.1:9115/probe"),
		pullTarget(t, "space", "http://127.0.0.1:9116/a%20b"),
		pullTarget(t, "slash", "http://127.0.0.1:9117/a%2fb"),
		pullTarget(t, "dots", "http://127.0.0.1:9118/x/../y"),
		pullTarget(t, "exact", "http://127.0.0.1:9119/probe?module=a&target=x%2Fy&empty"),
	}
	c, configured, own := newTestClient(t, targets, "9200", "/health", "9300/only", "9400/a/b", "9401/a%2fb", "9402/a%20b")
	for _, tt := range []struct{ request, want string }{
		{"GET http://web-1:9100/metrics", "http://127.0.0.1:9100/metrics"},
		{"HEAD http://web-1:9100/metrics", "http://127.0.0.1:9100/metrics"},
		{"GET http://web-1:9100/metrics?match[]=up&match[]=a%7Bb%3D%22c%22%7D", "http://127.0.0.1:9100/metrics?match[]=up&match[]=a%7Bb%3D%22c%22%7D"},
		{"GET http://web-1/", "http://10.1.2.3/"},
		{"GET http://web-1", "http://10.1.2.3/"},
		{"GET http://web-1:80/", "http://10.1.2.3/"},
		{"GET http://web-1:8443/m?_scheme=https", "https://127.0.0.1:8443/m"},
		{"GET http://web-1:8443/m?a=1&_scheme=https&b=2", "https://127.0.0.1:8443/m?a=1&b=2"},
		{"GET http://web-1:8443/m", "https://127.0.0.1:8443/m"},
		{"GET http://web-1:9115/probe?module=a", "http://127.0.0.1:9115/probe?module=a"},
		{"GET http://web-1:9115/probe?target=x&module=b&z=1", "http://127.0.0.1:9115/probe?target=x&module=b&z=1"},
		{"GET http://web-1:9115/probe?module=c", "http://127.0.0.1:9115/probe?module=c"},
		{"GET http://web-1:9116/a%20b", "http://127.0.0.1:9116/a%20b"},
		{"GET http://web-1:9200/whatever?x=1", "own http://web-1:9200/whatever?x=1"},
		{"GET http://web-1:9200/whatever?_scheme=https", "own https://web-1:9200/whatever"},
		{"GET http://web-1:1234/health", "own http://web-1:1234/health"},
		{"GET http://web-1:9300/only", "own http://web-1:9300/only"},
		// What is sent is what is configured, however it is asked for: Prometheus escapes as it likes,
		// and knows of service discovery a path without escapes.
		{"GET http://web-1:9117/a%2fb", "http://127.0.0.1:9117/a%2fb"},
		{"GET http://web-1:9117/a/b", "http://127.0.0.1:9117/a%2fb"},
		{"GET http://web-1:9118/x/../y", "http://127.0.0.1:9118/x/../y"},
		{"GET http://web-1:9118/%78/../y", "http://127.0.0.1:9118/x/../y"},
		{"GET http://web-1:9119/probe?module=a&target=x%2Fy&empty", "http://127.0.0.1:9119/probe?module=a&target=x%2Fy&empty"},
		{"GET http://web-1:9119/probe?empty=&target=x/y&_scheme=http&mod%75le=a", "http://127.0.0.1:9119/probe?module=a&target=x%2Fy&empty"},
		{"GET http://web-1:9400/a/b?x=1", "own http://web-1:9400/a/b?x=1"},
		{"GET http://web-1:9400/%61/b", "own http://web-1:9400/a/b"},
		{"GET http://web-1:9401/a%2Fb", "own http://web-1:9401/a%2fb"},
		{"GET http://web-1:9402/a%20b", "own http://web-1:9402/a%20b"},
		{"GET http://web-1:9200/a%2fb/../c//d", "own http://web-1:9200/a%2fb/../c//d"},
		{"GET http://web-1:8443/m?%5fscheme=https&a=1", "https://127.0.0.1:8443/m?a=1"},

		{"GET http://web-1:9117/a//b", "403 not_allowed"},
		{"GET http://web-1:9118/y", "403 not_allowed"},
		{"GET http://web-1:9118//x/../y", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&target=x%2Fy&empty&z=1", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&target=x%2Fy&empty&=", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&module=a&target=x%2Fy&empty", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&target=x%2Fy&target=evil&empty", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=b&target=x%2Fy&empty", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&target=x%252Fy&empty", "403 not_allowed"},
		{"GET http://web-1:9119/probe?Module=a&target=x%2Fy&empty", "403 not_allowed"},
		{"GET http://web-1:9119/probe?module=a&target=x%2Fy", "403 not_allowed"},
		{"GET http://web-1:9119/probe", "403 not_allowed"},
		{"GET http://web-1:9400/a%2fb", "403 not_allowed"},
		{"GET http://web-1:9400/a%2Fb", "403 not_allowed"},
		{"GET http://web-1:9400/a//b", "403 not_allowed"},
		{"GET http://web-1:9400//a/b", "403 not_allowed"},
		{"GET http://web-1:9400/a/b/", "403 not_allowed"},
		{"GET http://web-1:9400/a/./b", "403 not_allowed"},
		{"GET http://web-1:9400/a/%2e/b", "403 not_allowed"},
		{"GET http://web-1:9400/x/../a/b", "403 not_allowed"},
		{"GET http://web-1:9400/a%252fb", "403 not_allowed"},
		{"GET http://web-1:9401/a/b", "403 not_allowed"},
		{"CONNECT web-1:9400", "403 not_allowed"},
		{"GET http://web-1:9300/other", "403 not_allowed"},
		{"GET http://web-1:9100/", "403 not_allowed"},
		{"GET http://web-1:9100/metrics/", "403 not_allowed"},
		{"GET http://web-1:9100/metrics?_scheme=https", "403 not_allowed"},
		{"GET http://web-1:9101/metrics", "403 not_allowed"},
		{"GET http://web-1:99999/metrics", "403 not_allowed"},
		{"GET http://WEB-1:9100/metrics", "403 not_allowed"},
		{"GET http://web-2:9100/metrics", "403 not_allowed"},
		{"GET http://127.0.0.1:9100/metrics", "403 not_allowed"},
		{"GET http://web-1@evil:9100/metrics", "403 not_allowed"},
		{"GET http://user@web-1:9100/metrics", "403 not_allowed"},
		{"GET /metrics", "400 bad_request"},
		{"GET https://web-1:8443/m", "400 bad_request"},
		{"GET ftp://web-1:8443/m", "400 bad_request"},
		{"GET http://web-1:9100/metrics?%zz", "400 bad_request"},
		{"GET http://web-1:9100/metrics\nContent-Length: 1", "400 bad_request"},
		{"POST http://web-1:9100/metrics", "405 bad_request"},
		{"DELETE http://web-1:9100/metrics", "405 bad_request"},
		{"CONNECT web-1:9100", "403 not_allowed"},
		{"CONNECT web-2:8443", "403 not_allowed"},
		{"CONNECT web-1:9300", "403 not_allowed"},
	} {
		configured.requests, own.requests = nil, nil
		w := ask(t, c, tt.request)
		got := ""
		switch {
		case len(configured.requests)+len(own.requests) > 1:
			got = "scraped twice"
		case len(configured.requests) == 1:
			got = configured.requests[0].URL.String()
		case len(own.requests) == 1:
			got = "own " + own.requests[0].URL.String()
		default:
			got = fmt.Sprint(w.Code, " ", w.Header().Get(HeaderError))
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s", tt.request, got, tt.want)
		}
	}
	// The refusal says what is wrong, and not the query, which may hold a secret.
	if text := ask(t, c, "GET http://web-1:9119/probe?module=canary").Body.String(); !strings.Contains(text, "query") || strings.Contains(text, "canary") {
		t.Errorf("refused with %q", text)
	}
	for _, bad := range []string{"", "0", "70000", "x", "9100x", "any/x", "/a?b", "-1", "/%zz", "9100/a%2"} {
		if a, err := ParseAllowance(bad); err == nil {
			t.Errorf("allowance %q is taken as %+v", bad, a)
		}
	}
	anything, _, own := newTestClient(t, nil, "any")
	if ask(t, anything, "GET http://web-1:22/x"); len(own.requests) != 1 {
		t.Error("any does not allow all")
	}
}

// TestTargetOfTheQuery: a scrape counts for the target with its query, before one that takes any.
func TestTargetOfTheQuery(t *testing.T) {
	c, _, _ := newTestClient(t, []PullTarget{
		pullTarget(t, "any", "http://127.0.0.1:9115/probe"), pullTarget(t, "a", "http://127.0.0.1:9115/probe?module=a"),
	})
	ask(t, c, "GET http://web-1:9115/probe?module=a")
	for _, s := range c.Status() {
		if scraped := !s.Last.At.IsZero(); scraped != (s.Job == "a") {
			t.Errorf("%s: scraped %v", s.Job, scraped)
		}
	}
}

// TestAnswers: each fault at the target has its status and its name.
func TestAnswers(t *testing.T) {
	targets := []PullTarget{pullTarget(t, "node", "http://127.0.0.1:9100/metrics?token=canary")}
	c, target, _ := newTestClient(t, targets)
	const request = "GET http://web-1:9100/metrics?token=canary\nAuthorization: Bearer of-the-target\nProxy-Authorization: Basic canary\nX-A: b\nConnection: X-Hop\nX-Hop: 1"
	body := func(s string, length int64) (*http.Response, error) {
		return &http.Response{
			StatusCode: http.StatusTeapot, Header: http.Header{"Content-Type": {"text/x"}, "Set-Cookie": {"a=b"}, HeaderError: {"timeout"}},
			ContentLength: length, Body: io.NopCloser(strings.NewReader(s)),
		}, nil
	}
	target.answer = func(*http.Request) (*http.Response, error) { return body("short and stout", -1) }
	w := ask(t, c, request)
	if w.Code != http.StatusTeapot || w.Body.String() != "short and stout" || w.Header().Get("Content-Type") != "text/x" {
		t.Errorf("passed on: %d %q %v", w.Code, w.Body, w.Header())
	}
	for _, name := range []string{"Set-Cookie", HeaderError} {
		if w.Header().Get(name) != "" {
			t.Errorf("the target's %s is passed on", name)
		}
	}
	sent := target.requests[0].Header
	for name, want := range map[string]string{"Authorization": "Bearer of-the-target", "X-A": "b", "Proxy-Authorization": "", "Connection": "", "X-Hop": ""} {
		if got := sent.Get(name); got != want {
			t.Errorf("%s arrives as %q, want %q", name, got, want)
		}
	}

	for name, tt := range map[string]struct {
		answer func(*http.Request) (*http.Response, error)
		want   string
	}{
		"refused": {func(*http.Request) (*http.Response, error) {
			return nil, &net.OpError{Op: "dial", Err: fmt.Errorf("connection refused")}
		}, "502 target_down"},
		"slow": {func(*http.Request) (*http.Response, error) {
			return nil, context.DeadlineExceeded
		}, "504 timeout"},
		"breaks off at once": {func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: -1, Body: io.NopCloser(io.MultiReader(strings.NewReader("half"), brokenReader{}))}, nil
		}, "502 broken_off"},
		"too large without saying so": {func(*http.Request) (*http.Response, error) { return body(strings.Repeat("x", 101), -1) }, "413 too_large"},
		"large":                       {func(*http.Request) (*http.Response, error) { return body("", 101) }, "413 too_large"},
	} {
		target.answer = tt.answer
		w := ask(t, c, request)
		if got := fmt.Sprint(w.Code, " ", w.Header().Get(HeaderError)); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
		if strings.Contains(w.Body.String(), "canary") {
			t.Errorf("%s: the answer shows the query: %s", name, w.Body)
		}
	}
	// When the status is out already.
	c.cfg.MaxBytes = 200_000
	for name, r := range map[string]io.Reader{
		"breaks off": io.MultiReader(strings.NewReader(strings.Repeat("x", 100_000)), brokenReader{}),
		"too large":  strings.NewReader(strings.Repeat("x", 200_001)),
	} {
		target.answer = func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: -1, Body: io.NopCloser(r)}, nil
		}
		func() {
			defer func() {
				if recover() != http.ErrAbortHandler { //nolint:errorlint // What the server takes for it.
					t.Errorf("%s: the answer ends cleanly", name)
				}
			}()
			ask(t, c, request)
		}()
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
