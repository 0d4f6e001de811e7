package page

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/promferry/promferry/internal/page/pagetest"
)

// small is a page with nothing but what all have.
var small = New(fstest.MapFS{
	"style.css":  {Data: []byte("p { margin: 0; }")},
	"small.html": {Data: []byte(`{{template "head" .}}<body>{{template "header" .}}</body></html>`)},
}).Handler("small.html", Parameters{States: []string{"away", "near"}, Sorts: []string{"size", "age"}}, func(q Query) any {
	return NewHead("promferry small", "1.2.3", time.Unix(1e9, 0), q)
})

func TestMethods(t *testing.T) {
	server := httptest.NewServer(small)
	defer server.Close()
	do := func(method string) (status int, allow string, length int64) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, server.URL+"/?q=web", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode, resp.Header.Get("Allow"), resp.ContentLength
	}
	_, _, whole := do(http.MethodGet)
	if status, _, length := do(http.MethodHead); status != http.StatusOK || length < 100 || length != whole {
		t.Errorf("HEAD: %d, %d bytes; GET: %d bytes", status, length, whole)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, http.MethodConnect} {
		if status, allow, _ := do(method); status != http.StatusMethodNotAllowed || allow != "GET, HEAD" {
			t.Errorf("%s: %d, Allow %q", method, status, allow)
		}
	}
}

func TestQueryLimits(t *testing.T) {
	for query, want := range map[string]int{
		"q=" + strings.Repeat("%C3%A4", 200):  http.StatusOK,
		"q=" + strings.Repeat("a", 201):       http.StatusBadRequest,
		"other=" + strings.Repeat("a", 4<<10): http.StatusBadRequest,
		"q=%ff":                               http.StatusBadRequest,
		"q=%zz":                               http.StatusBadRequest,
		"q=a;b":                               http.StatusBadRequest,
		"other=1":                             http.StatusOK,
		"state=":                              http.StatusOK,
		"state=away":                          http.StatusOK,
		"state=asleep":                        http.StatusBadRequest,
		"sort=":                               http.StatusOK,
		"sort=age":                            http.StatusOK,
		"sort=name":                           http.StatusBadRequest,
		"refresh=":                            http.StatusOK,
		"refresh=5":                           http.StatusOK,
		"refresh=3600":                        http.StatusOK,
		"refresh=4":                           http.StatusBadRequest,
		"refresh=3601":                        http.StatusBadRequest,
		"refresh=-15":                         http.StatusBadRequest,
		"refresh=15;url=//evil.example":       http.StatusBadRequest,
		"refresh=15%3Burl%3D%2F%2Fevil":       http.StatusBadRequest,
	} {
		w := pagetest.Get(t, small, "/?"+query)
		if w.Code != want {
			t.Errorf("%.40s: %d, want %d", query, w.Code, want)
		}
		if w.Code != http.StatusOK && w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%.40s: refused as %s", query, w.Header().Get("Content-Type"))
		}
	}
}

func TestText(t *testing.T) {
	long := strings.Repeat("x", 81)
	endless := strings.Repeat("\u4e16", 1001)
	for value, want := range map[string]Text{
		"":                                 {},
		"web-1":                            {Short: "web-1"},
		strings.Repeat("x", 80):            {Short: strings.Repeat("x", 80)},
		long:                               {Short: long[:80] + "…", Full: long},
		endless:                            {Short: endless[:3*80] + "…", Full: endless[:3*1000] + "…"},
		"a\u202eb\u2066\u200b":             {Short: `a\u202eb\u2066\u200b`},
		"a\x00\n\x1b[31m\x7f":              {Short: `a\u0000\u000a\u001b[31m\u007f`},
		"\U000e0041":                       {Short: `\U000e0041`},
		"gr\u00fc\u00df \u4e16 \U0001f600": {Short: "gr\u00fc\u00df \u4e16 \U0001f600"},
		"a\xffb":                           {Short: "a\ufffdb"},
	} {
		if got := Short(value); got != want {
			t.Errorf("%.40q: %+v, want %+v", value, got, want)
		}
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour:                   "now",
		999 * time.Millisecond:       "now",
		time.Second:                  "1 s ago",
		59*time.Second + 999e6:       "59 s ago",
		time.Minute:                  "1 min ago",
		time.Hour - 1:                "59 min ago",
		time.Hour:                    "1 h ago",
		48*time.Hour - 1:             "47 h ago",
		48 * time.Hour:               "2 d ago",
		400*24*time.Hour + time.Hour: "400 d ago",
	} {
		if got := ago(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if got := age(-time.Second); got != "0 s" {
		t.Errorf("an age ahead: %q, want 0 s", got)
	}
}

func TestSize(t *testing.T) {
	for bytes, want := range map[int]string{
		0:                   "0 B",
		1023:                "1023 B",
		1 << 10:             "1.0 KiB",
		10178:               "9.9 KiB",
		10199:               "10 KiB",
		999 << 10:           "999 KiB",
		1000 << 10:          "1.0 MiB",
		226 << 20:           "226 MiB",
		1717986918:          "1.6 GiB",
		5 << 40:             "5.0 TiB",
		123_456 * (1 << 40): "123456 TiB",
	} {
		if got := Size(bytes); got != want {
			t.Errorf("%d: %q, want %q", bytes, got, want)
		}
	}
}

func TestLink(t *testing.T) {
	q := Query{Search: "a b&c", State: "away", Sort: "age", Refresh: 15}
	if got := q.Link(); got != "?q=a+b%26c&refresh=15&sort=age&state=away" {
		t.Errorf("link %s", got)
	}
	if got := q.With("near").Link(); got != "?q=a+b%26c&refresh=15&sort=age&state=near" {
		t.Errorf("link to another state %s", got)
	}
	if got := q.All().Link(); got != "?refresh=15&sort=age" {
		t.Errorf("link to everything %s", got)
	}
}
