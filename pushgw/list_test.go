package pushgw_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/pushgw"
)

// listing has groups as a Pushgateway 1.5.1 lists them.
const listing = `{"status":"success","data":[
{"labels":{"job":"batch"},"last_push_successful":true,
 "push_time_seconds":{"time_stamp":"2026-11-21T14:23:43.189573279Z","type":"GAUGE","help":"Last \"Unix\" time.","metrics":[{"labels":{"instance":"","job":"batch"},"value":"1.795271295618e+09"}]}},
{"a{b}":{"time_stamp":"","type":"GAUGE","help":"} ] \\","metrics":[{"labels":{"x":"\\\"}]"},"value":"NaN"}]},
 "labels":{"instance":"web-1","job":"node","path":"/\u00fc\"{"},"last_push_successful":true,
 "promferry_expires_after_seconds":{"type":"GAUGE","metrics":[{"labels":{"job":"node"},"value":"40.5"}]},
 "promferry_silent_since_timestamp_seconds":{"type":"GAUGE","metrics":[{"value":"1.7e+09"}]},
 "push_failure_time_seconds":{"type":"GAUGE","metrics":[{"value":"0"}]},
 "push_time_seconds":{"type":"GAUGE","metrics":[{"value":"1.7000000005e+09"}]},
 "s":{"type":"SUMMARY","metrics":[{"count":"0","quantiles":{"0.5":"NaN"},"sum":"0"}]}},
{"labels":{"time_stamp":"","type":"GAUGE","help":"","metrics":[{"labels":{"job":"x"},"value":"1"}]}},
{"labels":{"job":"odd"},
 "promferry_expires_after_seconds":{"metrics":[{"value":"1"},{"value":"2"}]},
 "push_time_seconds":{"metrics":[{"value":"0"}]}}
]}
`

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(req *http.Request) (*http.Response, error) { return d(req) }

// serveListing answers without a server: a thousand of them would take all ports.
func serveListing(t *testing.T, body string) *pushgw.Client {
	t.Helper()
	base, err := url.Parse("http://pgw/prefix/?token=canary")
	if err != nil {
		t.Fatal(err)
	}
	return pushgw.New(base, doer(func(r *http.Request) (*http.Response, error) {
		if r.Method != http.MethodGet || r.URL.Path != "/prefix/api/v1/metrics" {
			t.Errorf("asked for %s %s", r.Method, r.URL)
		}
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	}))
}

func collect(t *testing.T, c *pushgw.Client) ([]pushgw.Group, error) {
	t.Helper()
	var all []pushgw.Group
	for g, err := range c.Groups(t.Context()) {
		if err != nil {
			return all, err
		}
		all = append(all, g)
	}
	return all, nil
}

func TestGroups(t *testing.T) {
	got, err := collect(t, serveListing(t, listing))
	if err != nil {
		t.Fatal(err)
	}
	want := []pushgw.Group{
		{
			Key:      pushgw.GroupingKey{Job: "batch", Labels: map[string]string{}},
			Families: 1, Pushed: time.Unix(1795271295, 618e6),
		},
		{
			Key:      pushgw.GroupingKey{Job: "node", Labels: map[string]string{"instance": "web-1", "path": `/ü"{`}},
			Families: 6, Pushed: time.Unix(1700000000, 5e8), ExpiresAfter: 40.5, SilentSince: time.Unix(1700000000, 0),
		},
		{},
		{Key: pushgw.GroupingKey{Job: "odd", Labels: map[string]string{}}, Families: 2},
	}
	for i := range got { // A time of a float is not exact to the nanosecond.
		got[i].Pushed = got[i].Pushed.Round(time.Microsecond)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if got, err := collect(t, serveListing(t, `{"status":"success","data":[]}`)); got != nil || err != nil {
		t.Errorf("no group: %v, %v", got, err)
	}
	for _, err := range serveListing(t, listing).Groups(t.Context()) {
		if err != nil {
			t.Error(err)
		}
		break // One is enough: it must not be called again.
	}
}

// TestExpiresAfter has values that are no finite number above zero, and one that is.
func TestExpiresAfter(t *testing.T) {
	for value, want := range map[string]float64{
		`"40"`: 40, `"1e-9"`: 1e-9, `"0"`: 0, `"-40"`: 0, `"NaN"`: 0, `"+Inf"`: 0, `"1e999"`: 0, `"forty"`: 0, `""`: 0, `40`: 0, `null`: 0, `{"a":1}`: 0,
	} {
		got, err := collect(t, serveListing(t, `{"status":"success","data":[{"labels":{"job":"j"},"promferry_expires_after_seconds":{"metrics":[{"value":`+value+`}]}}]}`))
		if err != nil || len(got) != 1 || got[0].ExpiresAfter != want {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
	}
}

// TestBrokenListing has answers that are no listing, or not all of one.
func TestBrokenListing(t *testing.T) {
	for body, want := range map[string]string{
		"":                                                    "it ends in the middle",
		"<html><body>Hello</body>":                            `want '{', got '<'`,
		`{"status":"success"}`:                                "it has no groups",
		`{"status":"error","data":[]}`:                        `its status is "error"`,
		`{"status":"success","data":3}`:                       `want '[', got '3'`,
		`{"status":"success","data":[3]}`:                     `want '{', got '3'`,
		`{"status":"success","data":[]}{}`:                    `want its end, got '{'`,
		`{"status":"success","data":[{"labels":}]}`:           `want a value, got '}'`,
		`{"status":"success","data":[{"labels":{"job":"x"}]}`: `want ',' or '}', got ']'`,
		`{"status":"success","data":[{3:4}]}`:                 `want a name, got '3'`,
		`{"status" "success"}`:                                `want ':', got '"'`,
	} {
		_, err := collect(t, serveListing(t, body))
		if _, ok := errors.AsType[*pushgw.FormatError](err); !ok || !strings.HasSuffix(err.Error(), "/prefix/api/v1/metrics?...: the answer is not a Pushgateway's: "+want) {
			t.Errorf("%s: %v, want %s", body, err, want)
		}
	}
	for end := range len(strings.TrimSpace(listing)) {
		if _, err := collect(t, serveListing(t, listing[:end])); err == nil {
			t.Fatalf("no error for %s", listing[:end])
		}
	}
}

// TestListingCutOff has a connection that breaks in the middle of a group, and one that
// hangs there.
func TestListingCutOff(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for name, how := range map[string]func(){"cut": func() { panic(http.ErrAbortHandler) }, "hangs": func() { <-release }} {
		c := client(t, server(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, listing[:600])
			_ = http.NewResponseController(w).Flush()
			how()
		}))
		ctx, cancel := context.WithCancel(t.Context())
		groups := 0
		var last error
		for _, err := range c.Groups(ctx) {
			if last = err; err == nil {
				groups++
			}
			if name == "hangs" {
				cancel() // As the end of its time would.
			}
		}
		cancel()
		if _, ok := errors.AsType[*pushgw.FormatError](last); groups != 1 || last == nil || ok || pushgw.IsTimeout(last) != (name == "hangs") {
			t.Errorf("%s: %d groups, then %v", name, groups, last)
		}
	}
}

func TestNoListing(t *testing.T) {
	c := client(t, server(t, http.NotFound)+"?token=canary")
	_, err := collect(t, c)
	if se, ok := errors.AsType[*pushgw.StatusError](err); !ok || se.Code != 404 || !strings.HasSuffix(err.Error(), "/api/v1/metrics?...: unexpected status 404: 404 page not found; is that the Pushgateway's own URL?") {
		t.Errorf("got %v", err)
	}
}

func TestStatus(t *testing.T) {
	const good = `{"status":"success","data":{"build_information":{"version":"1.5.1"},"flags":{"a":"b"},"start_time":"2026-11-21T14:19:51.442905681Z"}}`
	for _, tc := range []struct{ date, body, want string }{
		{"Sat, 21 Nov 2026 14:19:52 GMT", good, ""},
		{"", good, "it has no Date header"},
		{"now", good, "it has no Date header"},
		{"Sat, 21 Nov 2026 14:19:52 GMT", `{"status":"success","data":{}}`, "it has no start_time"},
		{"Sat, 21 Nov 2026 14:19:52 GMT", `<html>`, "invalid character '<' looking for beginning of value"},
	} {
		c := client(t, server(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/api/v1/status" {
				t.Errorf("asked for %s", r.URL)
			}
			w.Header()["Date"] = []string{tc.date}
			_, _ = io.WriteString(w, tc.body)
		}))
		got, err := c.Status(t.Context())
		if tc.want != "" {
			if _, ok := errors.AsType[*pushgw.FormatError](err); !ok || !strings.HasSuffix(err.Error(), "/api/v1/status: the answer is not a Pushgateway's: "+tc.want) {
				t.Errorf("%s %s: %v", tc.date, tc.body, err)
			}
			continue
		}
		want := pushgw.Status{Now: time.Date(2026, 11, 21, 14, 19, 52, 0, time.UTC), Started: time.Date(2026, 11, 21, 14, 19, 51, 442905681, time.UTC)}
		if err != nil || !got.Now.Equal(want.Now) || !got.Started.Equal(want.Started) {
			t.Errorf("got %v, %v", got, err)
		}
	}
}

// TestErrorsAreCut has answers that an error would quote at length.
func TestErrorsAreCut(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	c := client(t, server(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut: // No HTTP.
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, long+"\r\n")
			_ = conn.Close()
		case r.URL.Path == "/api/v1/status":
			w.Header().Set("Date", "Sat, 21 Nov 2026 14:19:52 GMT")
			_, _ = io.WriteString(w, `{"data":{"start_time":"`+long+`"}}`)
		default:
			_, _ = io.WriteString(w, `{"status":"`+long+`","data":[]}`)
		}
	}))
	_, status := c.Status(t.Context())
	_, listing := collect(t, c)
	for what, err := range map[string]error{"status": status, "listing": listing, "put": c.Put(t.Context(), key, pushgw.Body{})} {
		if err == nil || len(err.Error()) > 500 {
			t.Errorf("%s: %.600v", what, err)
		}
	}
}

// TestGroupsMemory lists two thousand groups, the first with a label of 20 MB.
func TestGroupsMemory(t *testing.T) {
	node := `{"f":{"help":"` + strings.Repeat("x", 8000) + `"},"labels":{"job":"j"}},`
	c := client(t, server(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"status":"success","data":[{"labels":{"job":"long","l":"`)
		long := strings.Repeat("l", 1<<20)
		for range 20 {
			_, _ = io.WriteString(w, long)
		}
		_, _ = io.WriteString(w, `"}},`)
		for range 2000 {
			_, _ = io.WriteString(w, node)
		}
		_, _ = io.WriteString(w, `{"labels":{"job":"last"}}]}`)
	}))
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	n, most, last := 0, uint64(0), ""
	for g, err := range c.Groups(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 && g.Key.Job != "" {
			t.Errorf("the key of 20 MB is kept: job %s", g.Key.Job)
		}
		if n%200 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc)
		}
		n, last = n+1, g.Key.Job
	}
	if n != 2002 || last != "last" {
		t.Errorf("%d groups, the last %s", n, last)
	}
	if grown := int64(most) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("%d bytes more were in use", grown)
	}
}
