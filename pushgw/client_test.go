package pushgw_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/pushgw"
)

var key = pushgw.GroupingKey{Job: "node", Labels: map[string]string{"instance": "web-1"}}

func client(t *testing.T, base string) *pushgw.Client {
	t.Helper()
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	c, err := httpclient.New("push", "")
	if err != nil {
		t.Fatal(err)
	}
	return pushgw.New(u, c)
}

// echoing returns a client with credentials, of a server that answers each request with status,
// header and body, in which TOKEN stands for the credentials that it was sent.
func echoing(t *testing.T, status int, header http.Header, body string) *pushgw.Client {
	t.Helper()
	u, err := url.Parse(server(t, func(w http.ResponseWriter, r *http.Request) {
		replace := func(s string) string {
			return strings.ReplaceAll(s, "TOKEN", strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		}
		for name := range header {
			w.Header().Set(name, replace(header.Get(name)))
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, replace(body))
	}))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "http.yml")
	if err := os.WriteFile(file, []byte("authorization: {credentials: node_load1}"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	return pushgw.New(u, c)
}

// TestRefusalShowsNoCredential has credentials that are the name of a family: an error does not
// show them, and what it says of the push is still read from it.
func TestRefusalShowsNoCredential(t *testing.T) {
	const says = `pushed metrics are invalid: collected metric "TOKEN" { gauge:<value:1 > } is not a COUNTER`
	err := echoing(t, http.StatusBadRequest, nil, says).Delete(t.Context(), key)
	se, ok := errors.AsType[*pushgw.StatusError](err)
	if !ok || !se.Final() || !slices.Equal(se.Families(), []string{"node_load1"}) {
		t.Fatalf("got %v", err)
	}
	for _, text := range []string{err.Error(), se.Message} {
		if !strings.HasSuffix(text, `collected metric "..." { gauge:<value:1 > } is not a COUNTER`) {
			t.Errorf("got %s", text)
		}
	}
	// More than is read: the token is cut.
	for cut := range 12 {
		err := echoing(t, http.StatusBadRequest, nil, strings.Repeat(" ", 64<<10-cut)+"TOKEN"+strings.Repeat("x", 1000)).Delete(t.Context(), key)
		if strings.Contains(err.Error(), "node_") && !strings.Contains(err.Error(), "/node_") {
			t.Errorf("cut after %d bytes: %v", cut, err)
		}
	}
}

// TestListingShowsNoCredential has listings that are none.
func TestListingShowsNoCredential(t *testing.T) {
	date := http.Header{"Date": {"Sat, 21 Nov 2026 14:19:52 GMT"}}
	for _, body := range []string{
		`{"data":{"start_time":"TOKEN"}}`, `{"data":{"start_time":"TOKEN` + strings.Repeat("x", 1<<20), `{"status":"TOKEN","data":[]}`, `TOKEN`, `{"status":"success","data":["TOKEN"]}`,
		`{"status":"error TOKEN"}`, `{"TOKEN`, `{"status":TOKEN}`,
	} {
		c := echoing(t, http.StatusOK, date, body)
		_, err := c.Status(t.Context())
		for _, groupErr := range c.Groups(t.Context()) {
			err = errors.Join(err, groupErr)
		}
		if err == nil || strings.Contains(err.Error(), "node") || strings.Contains(err.Error(), "load1") {
			t.Errorf("%.60s: got %v", body, err)
		}
	}
}

func server(t *testing.T, handle http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	return s.URL
}

func TestPutAddAndDelete(t *testing.T) {
	var got []string
	base := server(t, func(w http.ResponseWriter, r *http.Request) {
		line := r.Method + " " + r.URL.RequestURI() + " " + r.Header.Get("Content-Type") + " " + r.Header.Get("Content-Encoding")
		if r.Method != http.MethodDelete {
			gz, err := gzip.NewReader(r.Body)
			if err != nil {
				t.Error(err)
				return
			}
			b, err := io.ReadAll(gz)
			if err != nil {
				t.Error(err)
			}
			line += " " + string(b)
		}
		got = append(got, line)
		w.WriteHeader(http.StatusAccepted)
	})
	var b strings.Builder
	gz := gzip.NewWriter(&b)
	_, _ = gz.Write([]byte("up 1"))
	_ = gz.Close()
	c := client(t, base+"/prefix/?token=canary")
	if err := c.Put(t.Context(), key, pushgw.Body{ContentType: "text/plain", Gzipped: []byte(b.String())}); err != nil {
		t.Fatal(err)
	}
	if err := c.Add(t.Context(), key, pushgw.Body{ContentType: "text/plain", Gzipped: []byte(b.String())}); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"PUT /prefix/metrics/job/node/instance/web-1?token=canary text/plain gzip up 1",
		"POST /prefix/metrics/job/node/instance/web-1?token=canary text/plain gzip up 1",
		"DELETE /prefix/metrics/job/node/instance/web-1?token=canary  ",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStatuses(t *testing.T) {
	for _, tc := range []struct {
		status             int
		ok, temporary, bad bool
	}{
		{200, true, false, false},
		{202, true, false, false},
		{204, true, false, false},
		{307, false, false, false},
		{400, false, false, true},
		{401, false, false, false},
		{404, false, false, false},
		{429, false, false, false},
		{500, false, true, false},
		{503, false, true, false},
	} {
		followed := false
		base := server(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/elsewhere") {
				followed = true
				return
			}
			w.Header().Set("Location", "/elsewhere")
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(tc.status)
			_, _ = io.WriteString(w, "because\nof this")
		})
		err := client(t, base+"?token=canary").Put(t.Context(), key, pushgw.Body{})
		if followed {
			t.Errorf("%d: the redirect was followed", tc.status)
		}
		if tc.ok {
			if err != nil {
				t.Errorf("%d: %v", tc.status, err)
			}
			continue
		}
		if tc.status == 204 {
			continue
		}
		se, ok := errors.AsType[*pushgw.StatusError](err)
		if !ok {
			t.Errorf("%d: got %v, want a StatusError", tc.status, err)
			continue
		}
		if se.Temporary() != tc.temporary || se.Refused() != tc.bad || se.RetryAfter != 7*time.Second {
			t.Errorf("%d: temporary %v, refused %v, retry after %v", tc.status, se.Temporary(), se.Refused(), se.RetryAfter)
		}
		if s := se.Error(); !strings.HasSuffix(s, "because of this") || strings.Contains(s, "canary") {
			t.Errorf("%d: error %q", tc.status, s)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	for header, want := range map[string][2]time.Duration{
		"":              {0, 0},
		"soon":          {0, 0},
		"-5":            {0, 0},
		"120":           {120 * time.Second, 120 * time.Second},
		"9999999999999": {365 * 24 * time.Hour, 365 * 24 * time.Hour},
		time.Now().Add(time.Minute).UTC().Format(http.TimeFormat): {57 * time.Second, time.Minute},
		time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat):  {0, 0},
	} {
		base := server(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", header)
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		err := client(t, base).Put(t.Context(), key, pushgw.Body{})
		se, ok := errors.AsType[*pushgw.StatusError](err)
		if !ok || se.RetryAfter < want[0] || se.RetryAfter > want[1] {
			t.Errorf("%q: got %v, want %v", header, err, want)
		}
	}
}

// TestFamilies has messages as real Pushgateways (1.5.1 and 1.11) give them.
func TestFamilies(t *testing.T) {
	const prefix = "pushed metrics are invalid or inconsistent with existing metrics: "
	for _, tc := range []struct {
		message string
		want    []string
	}{
		{prefix + `collected metric "m" { label:<name:"instance" value:"" > label:<name:"job" value:"b" > untyped:<value:1 > } is not a GAUGE`, []string{"m"}},
		{prefix + `collected metric "m" { label:<name:"x" value:"a } b is collected metric named \"zzz" > gauge:<value:1 > } is not a COUNTER`, []string{"m"}},
		{prefix + `collected metric named "s_count" collides with previously collected summary named "s"`, []string{"s_count", "s"}},
		{prefix + `collected metric named "h_bucket" collides with previously collected histogram named "h"`, []string{"h_bucket", "h"}},
		{prefix + `collected histogram or summary named "x" collides with previously collected metric named "x_sum"`, []string{"x", "x_sum"}},
		{prefix + `gathered metric family go_goroutines has type UNTYPED but should have GAUGE`, []string{"go_goroutines"}},
		{prefix + "2 error(s) occurred:\n* collected metric \"a\" { label:<name:\"job\" value:\"b\" > gauge:<value:2 > } is not a COUNTER\n* collected metric \"b:c\" { gauge:<value:1 > } was collected before with the same name and label values", []string{"a", "b:c"}},
		{prefix + "pushed metrics must not have timestamps", nil},
		{`text format parsing error in line 1: invalid metric name`, nil},
		{"", nil},
	} {
		if got := (&pushgw.StatusError{Message: tc.message}).Families(); !slices.Equal(got, tc.want) {
			t.Errorf("%s\ngot %q, want %q", tc.message, got, tc.want)
		}
	}
}

func TestNoAnswer(t *testing.T) {
	release := make(chan struct{})
	hanging := server(t, func(http.ResponseWriter, *http.Request) { <-release })
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := client(t, hanging).Put(ctx, key, pushgw.Body{})
	if !pushgw.IsTimeout(err) || pushgw.IsRefused(err) {
		t.Errorf("hanging: %v", err)
	}

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	err = client(t, "http://"+l.Addr().String()).Put(t.Context(), key, pushgw.Body{})
	if !pushgw.IsRefused(err) || pushgw.IsTimeout(err) {
		t.Errorf("closed: %v", err)
	}
}

func TestInvalidKeyIsNotSent(t *testing.T) {
	base := server(t, func(http.ResponseWriter, *http.Request) { t.Error("it was sent") })
	if err := client(t, base).Put(t.Context(), pushgw.GroupingKey{Job: "j", Labels: map[string]string{"l": "\xff"}}, pushgw.Body{}); err == nil {
		t.Error("no error")
	}
}

func TestFinal(t *testing.T) {
	for code, want := range map[int]bool{
		301: false, 400: true, 401: false, 403: false, 404: false, 408: false, 413: true, 415: true, 422: true, 429: false, 500: false, 503: false,
	} {
		if got := (&pushgw.StatusError{Code: code}).Final(); got != want {
			t.Errorf("%d: %v", code, got)
		}
	}
	if (&pushgw.StatusError{Code: 400, Message: "Client sent an HTTP request to an HTTPS server."}).Final() {
		t.Error("a URL with http:// for a port with TLS counts as a fault of the push")
	}
}
