package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// listensOn is a listener that has an address.
type listensOn struct {
	net.Listener
	ip string
}

func (l listensOn) Addr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(l.ip), Port: 9091} }

// protected returns the handler of a server on an address that answers 200 to what it takes.
func protected(t *testing.T, ip, external string) http.Handler {
	t.Helper()
	var u siteURL
	if external != "" {
		setting := externalURL()
		if err := setting.Set(external); err != nil || len(setting.check()) > 0 {
			t.Fatal(err, setting.check())
		}
		u = setting.value
	}
	return newServer(listensOn{ip: ip}, "", u, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), slog.New(slog.DiscardHandler)).http.Handler
}

func send(handler http.Handler, method, host string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequestWithContext(context.Background(), method, "/x", nil)
	r.Host = host
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

const (
	anywhere = "0.0.0.0"
	external = "https://Hub.Example.org:443/promferry"
)

// TestSiteOrigin has requests as browsers send them, of pages that are ours and of others. Each is
// of the same site for the browser unless it says otherwise.
func TestSiteOrigin(t *testing.T) {
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	short, _, _ := strings.Cut(hostname, ".")
	for _, test := range []struct {
		host    string
		headers string // with "; " between two
		allowed bool
	}{
		{"127.0.0.1:9091", "Origin: http://127.0.0.1:9091", true},
		{"192.0.2.1", "Origin: http://192.0.2.1", true},
		{"[::1]:9091", "Origin: http://[::1]:9091", true},
		{"[2001:db8::1]", "Origin: https://[2001:db8::1]", true},
		{"localhost:9091", "Origin: http://localhost:9091", true},
		{"LOCALHOST.:9091", "Origin: http://LOCALHOST.:9091", true},
		{"app.localhost:9091", "Origin: http://app.localhost:9091", true},
		{hostname + ":9091", "Origin: http://" + hostname + ":9091", true},
		{short, "Origin: http://" + strings.ToUpper(short), false}, // Browsers write names in lower case: the two are not one site.
		{strings.ToUpper(short), "Origin: http://" + strings.ToUpper(short), true},
		{short + ".", "Origin: http://" + short + ".", true},
		{"hub.example.org", "Origin: https://hub.example.org", true},
		// What ends TLS in front of us names us by another name, and browsers that do not know
		// Sec-Fetch-Site leave only the Origin to know a site by.
		{"10.0.0.1:9091", "Origin: https://hub.example.org", true},
		{"10.0.0.1:9091", "Origin: http://hub.example.org", false},
		{"10.0.0.1:9091", "Origin: http://hub.example.org:8080; Sec-Fetch-Site: same-origin", true},

		{"evil.example:9091", "Origin: http://evil.example:9091", false},
		{"evil.example:9091", "Origin: http://evil.example:9091; Sec-Fetch-Site: same-origin", false},
		{"evil.example", "Origin: http://evil.example; X-Forwarded-Host: localhost; Forwarded: host=localhost", false},
		{"127.0.0.1.evil.example", "Origin: http://127.0.0.1.evil.example", false},
		{"localhost.evil.example", "Origin: http://localhost.evil.example", false},
		{"notlocalhost", "Origin: http://notlocalhost", false},
		{"evil." + short, "Origin: http://evil." + short, false},
		{short + ".evil.example", "Origin: http://" + short + ".evil.example", false},
		{"evil.hub.example.org", "Origin: https://evil.hub.example.org", false},
		{"127.0.0.1:9091", "Origin: null", false},
		{"127.0.0.1:9091", "Origin: null; Sec-Fetch-Site: same-origin", false},
		{"127.0.0.1:9091", "Origin: http://[::1; Sec-Fetch-Site: same-origin", false},
		{"127.0.0.1:9091", "Origin: file://; Sec-Fetch-Site: same-origin", false},
		{"127.0.0.1:9091", "Origin: http://127.0.0.1:9091; Origin: http://evil.example", false},
		{"127.0.0.1:9091", "Origin: http://127.0.0.1:9091; Sec-Fetch-Site: cross-site", false},
		{"127.0.0.1:9091", "Origin: http://127.0.0.1:3000; Sec-Fetch-Site: same-site", false},
		{"127.0.0.1:9091", "Origin: http://127.0.0.1:3000", false},
		{"127.0.0.1:9091", "Sec-Fetch-Site: cross-site", false},
	} {
		for _, method := range []string{http.MethodPut, http.MethodPost, http.MethodDelete, http.MethodPatch, http.MethodTrace} {
			w := send(protected(t, anywhere, external), method, test.host, strings.Split(test.headers, "; ")...)
			if allowed := w.Code == http.StatusOK; allowed != test.allowed || !allowed && w.Code != http.StatusForbidden {
				t.Errorf("%s to %s with %s: status %d, want allowed %v", method, test.host, test.headers, w.Code, test.allowed)
			}
		}
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodOptions} {
			w := send(protected(t, anywhere, external), method, test.host, strings.Split(test.headers, "; ")...)
			if w.Code != http.StatusOK {
				t.Errorf("%s to %s with %s: status %d", method, test.host, test.headers, w.Code)
			}
			if grants := slices.Sorted(func(yield func(string) bool) {
				for name := range w.Header() {
					if strings.HasPrefix(name, "Access-Control-") && !yield(name) {
						return
					}
				}
			}); len(grants) > 0 {
				t.Errorf("%s to %s with %s: the answer grants %q", method, test.host, test.headers, grants)
			}
		}
	}
}

// TestSiteAlias shows that on a port that others can reach no name is wrong for programs: they send
// no Origin.
func TestSiteAlias(t *testing.T) {
	for _, ip := range []string{anywhere, "::", "192.0.2.1", "2001:db8::1"} {
		for _, host := range []string{"metrics.internal.example:9091", "promferry.monitoring.svc", "evil.example", "upstream_name", ""} {
			for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
				if w := send(protected(t, ip, ""), method, host); w.Code != http.StatusOK {
					t.Errorf("%s to %q on %s: status %d: %s", method, host, ip, w.Code, w.Body)
				}
			}
		}
	}
}

// TestSiteHost shows by which names a port can be called that listens on loopback only.
func TestSiteHost(t *testing.T) {
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	short, _, _ := strings.Cut(hostname, ".")
	for host, allowed := range map[string]bool{
		"127.0.0.1:9099": true, "127.0.0.1": true, "127.0.0.2:1": true, "[::1]:9099": true, "[::1]": true, "[0:0:0:0:0:0:0:1]": true,
		"192.0.2.1:80": true, "localhost": true, "localhost:9099": true, "LocalHost.:9099": true, "app.localhost": true,
		hostname: true, short + ":9099": true, strings.ToUpper(short) + ".:9099": true,
		"hub.example.org": true, "HUB.example.org.:8443": true,
		"":                                    true, // HTTP/1.0 has none; browsers always send one.
		"evil.example":                        false,
		"evil.example:9099":                   false,
		"127.0.0.1.evil.example":              false,
		"localhost.evil.example":              false,
		"localhost..":                         false,
		".":                                   false,
		":9099":                               false,
		"[::1].evil.example":                  false,
		short + ".evil.example":               false,
		"evil.example.org":                    false,
		"org":                                 false,
		strings.Repeat("a", 50000) + ".com":   false,
		"user@localhost.evil.example:9099/\\": false,
	} {
		for _, ip := range []string{"127.0.0.1", "127.1.2.3", "::1"} {
			for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPost} {
				w := send(protected(t, ip, external), method, host, "X-Forwarded-Host: localhost")
				if got := w.Code == http.StatusOK; got != allowed || !got && w.Code != http.StatusForbidden {
					t.Errorf("%s to %.100q on %s: status %d, want allowed %v", method, host, ip, w.Code, allowed)
				}
				if w.Body.Len() > 500 {
					t.Errorf("the answer to %.100q has %d bytes", host, w.Body.Len())
				}
			}
		}
	}
}

// TestSiteRefusal shows what is said of refused requests: to the browser each time, in the log not.
func TestSiteRefusal(t *testing.T) {
	var log bytes.Buffer
	handler := newServer(listensOn{ip: "127.0.0.1"}, "", siteURL{}, nil, slog.New(slog.NewTextHandler(&log, nil))).http.Handler
	for _, test := range []struct{ host, origin, want string }{
		{"evil.example:9091", "http://evil.example:9091", `Host "evil.example:9091" is unknown to this server`},
		{"127.0.0.1:9091", "http://evil.example", `another site, Origin "http://evil.example"`},
		{"127.0.0.1:9091", "null", `another site, Origin "null"`},
	} {
		w := send(handler, http.MethodPost, test.host, "Origin: "+test.origin)
		if body := w.Body.String(); w.Code != http.StatusForbidden || !strings.Contains(body, test.want) || !strings.Contains(body, "--web.external-url") || strings.Count(body, "\n") != 1 {
			t.Errorf("status %d: %q, want %q", w.Code, body, test.want)
		}
	}
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "level=WARN") || !strings.Contains(got, "evil.example:9091") {
		t.Errorf("the log is %q", got)
	}
	// The name of the root of DNS lets no page without an origin in.
	if w := send(protected(t, anywhere, "http://./"), http.MethodPost, "hub", "Origin: null", "Sec-Fetch-Site: same-origin"); w.Code != http.StatusForbidden {
		t.Errorf("Origin: null: status %d", w.Code)
	}
	w := send(protected(t, anywhere, ""), http.MethodPost, "evil.example", "Origin: http://evil.example")
	if body := w.Body.String(); !strings.Contains(body, `Origin "http://evil.example" is unknown to this server`) || !strings.Contains(body, "--web.external-url") {
		t.Errorf("the answer is %q", body)
	}
}

// TestSiteExternalURL shows which URLs are taken.
func TestSiteExternalURL(t *testing.T) {
	for typed, origin := range map[string]string{
		"https://hub.example.org":               "https://hub.example.org",
		"https://Hub.example.org:443/promferry": "https://hub.example.org",
		"http://hub:80/":                        "http://hub",
		"http://hub:443":                        "http://hub:443",
		"https://[2001:DB8::1]:8443":            "https://[2001:db8::1]:8443",
		"hub.example.org":                       "",
		"ftp://hub":                             "",
		"https://":                              "",
		"https://hub/?a=b":                      "",
		"https://hub/#a":                        "",
		"https://me:canary@hub":                 "",
	} {
		setting := externalURL()
		_ = setting.Set(typed)
		switch errs := setting.check(); {
		case origin == "" && len(errs) != 1:
			t.Errorf("%s is taken", typed)
		case origin == "" && strings.Contains(errs[0].Error(), "canary"):
			t.Errorf("%s: %v", typed, errs)
		case origin != "" && (len(errs) > 0 || setting.value.origin() != origin):
			t.Errorf("%s: the origin is %s, %v; want %s", typed, setting.value.origin(), errs, origin)
		}
	}
}

// TestSiteCostsNothing shows that the check makes nothing on the heap for what programs send.
func TestSiteCostsNothing(t *testing.T) {
	handler := protected(t, anywhere, external)
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		r := httptest.NewRequestWithContext(t.Context(), method, "/metrics/job/node", nil)
		r.Host = "hub.internal:9091"
		w := httptest.NewRecorder()
		if n := testing.AllocsPerRun(100, func() { handler.ServeHTTP(w, r) }); n > 0 || w.Code != http.StatusOK {
			t.Errorf("%s: %v allocations, status %d", method, n, w.Code)
		}
	}
}

// TestSiteNames shows that the names of this host are found without a DNS server.
func TestSiteNames(t *testing.T) {
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	short, _, _ := strings.Cut(hostname, ".")
	names := hostNames()
	if !slices.Contains(names, hostname) || !slices.Contains(names, short) || slices.Contains(names, "") {
		t.Errorf("the names are %q", names)
	}
	for _, name := range names {
		if name != short && !strings.HasPrefix(name, short+".") {
			t.Errorf("the name %q is that of another host", name)
		}
	}
}

// piped is a listener of one connection.
type piped struct {
	conn   chan net.Conn
	closed chan struct{}
}

func (p piped) Accept() (net.Conn, error) {
	select {
	case c := <-p.conn:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p piped) Close() error { close(p.closed); return nil }

func (piped) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4zero} }

// TestSiteReadsNoBody shows that a refused request is answered at once and its connection ends,
// though its body does not come.
func TestSiteReadsNoBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped{make(chan net.Conn, 1), make(chan struct{})}
		server := newServer(p, "", siteURL{}, nil, slog.New(slog.DiscardHandler))
		done := make(chan error, 1)
		go func() { done <- server.http.Serve(p) }()
		ours, theirs := net.Pipe()
		p.conn <- theirs
		start := time.Now()
		if _, err := fmt.Fprint(ours, "PUT /metrics/job/x HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\nContent-Length: 1000\r\n\r\na"); err != nil {
			t.Fatal(err)
		}
		buffered := bufio.NewReader(ours)
		resp, err := http.ReadResponse(buffered, nil)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); resp.StatusCode != http.StatusForbidden || took > 0 {
			t.Errorf("status %d after %v", resp.StatusCode, took)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		_ = resp.Body.Close()
		if _, err := buffered.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("the connection goes on: %v", err)
		}
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("the connection ended after %v", took)
		}
		if err := server.http.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}
