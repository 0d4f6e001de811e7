package reverse

import (
	"net/http"
	"net/url"
	"testing"
)

// TestRedirects: a redirect passes if, however it is read, it leads to the client and port that
// were asked.
func TestRedirects(t *testing.T) {
	const (
		node = "http://web-1:9100/metrics"
		web  = "http://web-1/metrics"
		tls  = "http://web-1/metrics?_scheme=https"
		ip   = "http://[2001:db8::1]:9100/metrics"
	)
	for _, tt := range []struct {
		asked, location string
		stays           bool
	}{
		{node, "/login", true},
		{node, "login?x=1", true},
		{node, "../x", true},
		{node, "?x=1", true},
		{node, "?x=http://victim/", true},
		{node, "#victim", true},
		{node, "", true},
		{node, "/a b", true},
		{node, "/\u00fc", true},
		{node, "/x?_scheme=https", true},
		{node, "/x//victim:9100/", true},
		{node, "//web-1:9100/x", true},
		{node, "http://web-1:9100/x", true},
		{node, "HTTP://web-1:9100/x", true},
		{node, "https://web-1:9100/x", true},
		{node, "http://web-1:09100/x", true},
		{web, "/x", true},
		{web, "http://web-1/x", true},
		{web, "http://web-1:80/x", true},
		{web, "http://web-1:/x", true},
		{tls, "https://web-1/x", true},
		{tls, "https://web-1:443/x", true},
		{tls, "http://web-1:443/x", true},
		{tls, "/x?_scheme=https", true},
		{ip, "/x", true},
		{ip, "http://[2001:db8::1]:9100/x", true},

		{node, "http://victim:9100/metrics", false},
		{node, "//victim:9100/metrics", false},
		{node, "///victim:9100/metrics", false},
		{node, "////victim:9100/metrics", false},
		{node, "http:///victim:9100/metrics", false},
		{node, "http:/victim:9100/metrics", false},
		{node, "http:victim:9100/metrics", false},
		{node, "http:/metrics", false},
		{node, "http:", false},
		{node, `http:\\victim:9100\metrics`, false},
		{node, `\\victim:9100/metrics`, false},
		{node, `/\victim:9100/metrics`, false},
		{node, `http://web-1:9100\@victim:9100/`, false},
		{node, "http://web-1:9101/metrics", false},
		{node, "http://web-1/metrics", false},
		{node, "https://web-1/metrics", false},
		{node, "//web-1/metrics", false},
		{node, "http://WEB-1:9100/metrics", false}, // Names of clients are compared byte for byte.
		{node, "http://web-1.:9100/metrics", false},
		{node, "http://web-1.victim:9100/metrics", false},
		{node, "http://web-1%2evictim:9100/metrics", false},
		{node, "http://\uff57eb-1:9100/metrics", false},
		{node, "http://127.0.0.1:9100/metrics", false},
		{node, "http://:9100/metrics", false},
		{node, "http://me@web-1:9100/metrics", false},
		{node, "http://@web-1:9100/metrics", false},
		{node, "http://web-1:9100@victim:9100/metrics", false},
		{node, "http://web-1:9100:9100/metrics", false},
		{node, "http://web-1:x/metrics", false},
		{node, "http://web-1:74636/metrics", false},
		{node, "http://web-1 :9100/metrics", false},
		{node, "/%zz", false},
		{node, "/a\tb", false},
		{node, "/a\x00b", false},
		{node, "ftp://web-1:9100/metrics", false},
		{node, "file:///etc/passwd", false},
		{node, "javascript:alert(1)", false},
		{node, "://web-1:9100/", false},
		{web, "https://web-1/x", false},
		{web, "/x?_scheme=https", false},
		{tls, "/x", false}, // Prometheus would ask port 80.
		{tls, "http://web-1/x", false},
		{ip, "http://[2001:db8::2]:9100/x", false},
		{ip, "http://[2001:db8:0::1]:9100/x", false},
	} {
		asked, err := url.Parse(tt.asked)
		if err != nil {
			t.Fatal(err)
		}
		for _, status := range []int{300, 301, 302, 303, 304, 307, 308} {
			f := redirected(asked, &http.Response{StatusCode: status, Header: http.Header{"Location": {tt.location}}})
			if (f == nil) != tt.stays {
				t.Errorf("%s, %d to %q: %+v", tt.asked, status, tt.location, f)
			}
		}
		for _, status := range []int{200, 201, 404, 503} {
			if f := redirected(asked, &http.Response{StatusCode: status, Header: http.Header{"Location": {tt.location}}}); f != nil {
				t.Errorf("%s, %d to %q is a redirect: %+v", tt.asked, status, tt.location, f)
			}
		}
	}
}

// FuzzRedirect: what passes leads where it does for Go's HTTP client, which Prometheus has.
func FuzzRedirect(f *testing.F) {
	for _, seed := range []string{"/login", "//victim", "http://web-1:9100/x", `\\victim`, "http://web-1:9100@victim/", "?_scheme=https"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, location string) {
		asked, err := url.Parse("http://web-1:9100/metrics")
		if err != nil {
			t.Fatal(err)
		}
		if redirected(asked, &http.Response{StatusCode: http.StatusFound, Header: http.Header{"Location": {location}}}) != nil {
			return
		}
		c := &http.Client{Transport: stop{}, CheckRedirect: func(req *http.Request, _ []*http.Request) error {
			if req.URL.Hostname() != "web-1" || portOf(req.URL) != 9100 || req.URL.User != nil {
				t.Errorf("%q leads to %s", location, req.URL)
			}
			return http.ErrUseLastResponse
		}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, asked.String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Location", location) // For stop.
		if resp, err := c.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	})
}

// stop redirects to where the request says.
type stop struct{}

func (stop) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusFound, Header: http.Header{"Location": {r.Header.Get("Location")}}, Body: http.NoBody, Request: r}, nil
}
