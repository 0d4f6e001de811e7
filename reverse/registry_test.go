package reverse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// stub is a line that is only leased.
type stub struct{ name string }

func (*stub) RoundTrip(*http.Request) (*http.Response, error) { return nil, errors.New("a stub") }
func (*stub) Close() error                                    { return nil }

// who is a grant of that identity.
type who string

func (w who) Identity() string { return string(w) }

// memory is a store.
type memory struct {
	mu sync.Mutex
	b  []byte
}

func (m *memory) Load() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b, nil
}

func (m *memory) Save(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.b = b
	return nil
}

func newTestRegistry(t *testing.T, store Store, change func(*RegistryConfig)) *Registry {
	t.Helper()
	cfg := RegistryConfig{
		MaxClients: 10, MaxLines: 4, MaxScrapes: 3, ForgetAfter: time.Hour, Settle: 15 * time.Second,
		Store: store, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	r, err := NewRegistry(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const (
	sessionA = "AAAAAAAAAAAAAAAA"
	sessionB = "BBBBBBBBBBBBBBBB"
)

func hello(name, session string, targets ...Target) Hello {
	h := Hello{Name: name, Session: session, Kind: KindPTTH, Remote: "192.0.2.1"}
	if len(targets) > 0 {
		h.Announce = (&Announcement{Instance: name, Labels: map[string]string{"env": "prod"}, Targets: targets}).String()
	}
	return h
}

var nodeTarget = Target{Job: "node", Port: 9100, Path: "/metrics"}

// join adds a free line.
func join(t *testing.T, r *Registry, h Hello) (*Session, *stub) {
	t.Helper()
	s, err := r.Join(h)
	if err != nil {
		t.Fatal(err)
	}
	l := &stub{name: h.Session}
	s.Free(l)
	return s, l
}

func (r *Registry) lease(t *testing.T, name string) Lease {
	t.Helper()
	l, err := r.Lease(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (l Lease) give() {
	l.Done(&url.URL{Host: "x"}, ScrapeStatus{}, false)
	l.Session.Free(l.Line)
}

func leaseFails(t *testing.T, r *Registry, name string, want error, after time.Duration) {
	t.Helper()
	began := time.Now()
	if _, err := r.Lease(t.Context(), name); !errors.Is(err, want) {
		t.Errorf("lease of %s: %v, want %v", name, err, want)
	}
	if took := time.Since(began); took != after {
		t.Errorf("lease of %s failed after %v, want %v", name, took, after)
	}
}

func TestLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		leaseFails(t, r, "web-1", ErrUnknown, 0)
		s, l := join(t, r, hello("web-1", sessionA))
		lease := r.lease(t, "web-1")
		if lease.Line != l {
			t.Fatal("another line")
		}
		leaseFails(t, r, "web-1", ErrNoFreeLine, 500*time.Millisecond)
		// Who waits gets the line that becomes free, the first one first.
		order := make(chan int, 2)
		for i := range 2 {
			go func() {
				got, err := r.Lease(t.Context(), "web-1")
				if err != nil {
					t.Error(err)
				}
				order <- i
				got.give()
			}()
			synctest.Wait()
		}
		// The limit counts those that wait.
		leaseFails(t, r, "web-1", ErrClientLimit, 0)
		lease.give()
		if first, second := <-order, <-order; first != 0 || second != 1 {
			t.Errorf("served in the order %d, %d", first, second)
		}
		// One that gives up leaves the line to others.
		lease = r.lease(t, "web-1")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := r.Lease(ctx, "web-1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		lease.give()
		r.lease(t, "web-1").give()
		if !s.Take(l) {
			t.Error("the line is not free in the end")
		}
	})
}

// TestProgress: a client that hands out lines one by one, as PushProx's does, serves as many
// as wait.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, func(c *RegistryConfig) { c.MaxScrapes = 100 })
		h := hello("web-1", sessionA)
		h.Kind = KindPushProx
		var scrapes sync.WaitGroup
		join(t, r, h)
		for range 20 {
			scrapes.Go(func() {
				lease, err := r.Lease(t.Context(), "web-1")
				if err != nil {
					t.Error(err)
					return
				}
				lease.Session.Leave(lease.Line)
				lease.Done(&url.URL{Host: "x"}, ScrapeStatus{}, false)
			})
		}
		for range 19 {
			time.Sleep(100 * time.Millisecond) //nolint:forbidigo // The round trip, in the bubble.
			if s, l := join(t, r, h); s.Take(l) {
				t.Fatal("nobody waits")
			}
		}
		scrapes.Wait()
	})
}

func TestAwayAndGoodbye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		s, l := join(t, r, hello("web-1", sessionA))
		s.Leave(l)
		// A reconnect within the patience costs no scrape.
		time.AfterFunc(300*time.Millisecond, func() { join(t, r, hello("web-1", sessionA)) })
		lease := r.lease(t, "web-1")
		lease.Done(&url.URL{Host: "x"}, ScrapeStatus{}, false)
		lease.Session.Leave(lease.Line)
		leaseFails(t, r, "web-1", ErrAway, 500*time.Millisecond)
		leaseFails(t, r, "web-1", ErrAway, 0)
		if r.Status().Clients[0].Connected {
			t.Error("connected without a line")
		}

		s, l = join(t, r, hello("web-1", sessionB))
		r.Goodbye(hello("web-1", sessionA)) // Another process: nothing to do with it.
		r.lease(t, "web-1").give()
		held := r.lease(t, "web-1")
		waits := make(chan error)
		go func() {
			_, err := r.Lease(t.Context(), "web-1")
			waits <- err
		}()
		synctest.Wait()
		r.Goodbye(hello("web-1", sessionB))
		if err := <-waits; !errors.Is(err, ErrAway) {
			t.Errorf("who waited: %v", err)
		}
		leaseFails(t, r, "web-1", ErrAway, 0)
		held.give()
		leaseFails(t, r, "web-1", ErrAway, 0)
		s.Leave(l)
		if c := r.Status().Clients[0]; !c.Goodbye || c.Connected || c.Lines != 0 || c.Sessions != 0 {
			t.Errorf("after the goodbye: %+v", c)
		}
	})
}

// TestTwoSessions: the newest is scraped, and the older one when that is gone.
func TestTwoSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		older, _ := join(t, r, hello("web-1", sessionA, nodeTarget))
		newer, err := r.Join(hello("web-1", sessionB, nodeTarget))
		if err != nil {
			t.Fatal(err)
		}
		// Until its line has shown that it works, the older one does.
		if lease := r.lease(t, "web-1"); lease.Session != older {
			t.Error("the new session is scraped before it works")
		} else {
			lease.give()
		}
		line := &stub{}
		newer.Free(line)
		for range 3 {
			lease := r.lease(t, "web-1")
			if lease.Session != newer {
				t.Error("the older session is scraped")
			}
			lease.give()
		}
		if got := testutil.ToFloat64(r.metrics.duplicateSessions); got != 1 || r.Status().Clients[0].Sessions != 2 {
			t.Errorf("counted %v, status %+v", got, r.Status().Clients[0])
		}
		newer.Leave(line)
		r.sweepAfter(3 * time.Second)
		if lease := r.lease(t, "web-1"); lease.Session != older {
			t.Error("the older session is not scraped after the end of the newer")
		}
	})
}

// sweepAfter lets time pass in the bubble.
func (r *Registry) sweepAfter(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // In a bubble.
	r.sweep()
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, func(c *RegistryConfig) { c.MaxClients = 2 })
		status := func(h Hello, want int) {
			t.Helper()
			_, err := r.Join(h)
			if refusal, ok := errors.AsType[*Refusal](err); !ok || refusal.Status != want {
				t.Errorf("join %+v: %v, want status %d", h, err, want)
			}
		}
		h := hello("web-1", sessionA)
		h.Grant = who("web")
		for range 4 {
			if _, err := r.Join(h); err != nil {
				t.Fatal(err)
			}
		}
		status(h, http.StatusTooManyRequests)
		h.Session, h.Grant = sessionB, who("db")
		status(h, http.StatusConflict)
		h = hello("web-2", sessionA)
		h.Announce = `{"instance":""}`
		status(h, http.StatusBadRequest)
		if len(r.Status().Clients) != 1 {
			t.Errorf("a client that was refused is kept: %+v", r.Status().Clients)
		}
		join(t, r, hello("web-2", sessionA))
		status(hello("web-3", sessionA), http.StatusServiceUnavailable)
		r.Stopping()
		status(hello("web-2", sessionA), http.StatusServiceUnavailable)
	})
}

func discover(t *testing.T, r *Registry, query string) (status int, groups []targetGroup) {
	t.Helper()
	w := httptest.NewRecorder()
	r.Discovery(w, httptest.NewRequest(http.MethodGet, "/sd"+query, nil))
	if w.Code == http.StatusOK {
		if err := json.Unmarshal(w.Body.Bytes(), &groups); err != nil || groups == nil {
			t.Fatalf("%v: %s", err, w.Body)
		}
	}
	return w.Code, groups
}

func TestDiscovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		if status, groups := discover(t, r, ""); status != http.StatusOK || len(groups) != 0 {
			t.Errorf("without clients: %d %v", status, groups)
		}
		s, l := join(t, r, hello("web-1.example.org", sessionA, nodeTarget,
			Target{Job: "app", Scheme: "https", Port: 8443, Path: "/a%20b", Query: "module=x&b=c%26d"}))
		join(t, r, hello("old-client", sessionA)) // It announces nothing.
		_, groups := discover(t, r, "")
		got, err := json.Marshal(groups)
		if err != nil {
			t.Fatal(err)
		}
		want := `[{"targets":["web-1.example.org:9100"],"labels":{"__metrics_path__":"/metrics","env":"prod","instance":"web-1.example.org","job":"node"}},` +
			`{"targets":["web-1.example.org:8443"],"labels":{"__metrics_path__":"/a b","__param__scheme":"https","__param_b":"c&d","__param_module":"x",` +
			`"env":"prod","instance":"web-1.example.org","job":"app"}}]`
		if s := strings.ReplaceAll(string(got), `\u0026`, "&"); s != want {
			t.Errorf("got  %s\nwant %s", s, want)
		}
		if _, groups := discover(t, r, "?job=app"); len(groups) != 1 || groups[0].Labels["job"] != "app" {
			t.Errorf("?job=app: %v", groups)
		}
		if _, groups := discover(t, r, "?job=none"); len(groups) != 0 {
			t.Errorf("?job=none: %v", groups)
		}
		// Away, it stays; after an hour it is forgotten, by /clients after five minutes.
		s.Leave(l)
		r.sweepAfter(59 * time.Minute)
		if _, groups := discover(t, r, ""); len(groups) != 2 {
			t.Errorf("after 59 minutes away: %v", groups)
		}
		r.sweepAfter(2 * time.Minute)
		if _, groups := discover(t, r, ""); len(groups) != 0 {
			t.Errorf("after 61 minutes away: %v", groups)
		}
	})
}

// TestListClients: by the age of the end of the last line, not of its begin.
func TestListClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		list := func() string {
			w := httptest.NewRecorder()
			r.ListClients(5*time.Minute)(w, httptest.NewRequest(http.MethodGet, "/clients", nil))
			return w.Body.String()
		}
		if got := list(); got != "[]\n" {
			t.Errorf("without clients: %q", got)
		}
		s, l := join(t, r, hello("b", sessionA))
		join(t, r, hello("a", sessionA))
		both := `[{"targets":["a"],"labels":null},{"targets":["b"],"labels":null}]` + "\n"
		r.sweepAfter(10 * time.Minute)
		if got := list(); got != both {
			t.Errorf("after ten minutes: %q", got)
		}
		s.Leave(l)
		r.sweepAfter(4 * time.Minute)
		if got := list(); got != both {
			t.Errorf("four minutes away: %q", got)
		}
		r.sweepAfter(2 * time.Minute)
		if got := list(); got != `[{"targets":["a"],"labels":null}]`+"\n" {
			t.Errorf("six minutes away: %q", got)
		}
	})
}

// TestDuplicateTargets: of two clients that announce one job and instance the first stays.
func TestDuplicateTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, nil)
		first := hello("web-1", sessionA, nodeTarget)
		s, l := join(t, r, first)
		second := first
		second.Name, second.Session = "web-2", sessionB
		join(t, r, second)
		if _, groups := discover(t, r, ""); len(groups) != 1 || groups[0].Targets[0] != "web-1:9100" {
			t.Errorf("listed: %v", groups)
		}
		if got := testutil.ToFloat64(r.metrics.duplicateTargets); got != 1 || !r.Status().Clients[1].Targets[0].Duplicate {
			t.Errorf("counted %v, status %+v", got, r.Status().Clients[1])
		}
		s.Leave(l)
		time.Sleep(time.Hour) //nolint:forbidigo // In a bubble.
		r.sweep()             // Ends the session,
		r.sweepAfter(time.Second)
		if _, groups := discover(t, r, ""); len(groups) != 1 || groups[0].Targets[0] != "web-2:9100" {
			t.Errorf("listed after the first was forgotten: %v", groups)
		}
	})
}

// TestSettling: after a start /sd answers when all known clients are back, or the time is up.
func TestSettling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		run := func(r *Registry) (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = r.Run(ctx)
			}()
			return func() {
				cancel()
				<-done
			}
		}
		r := newTestRegistry(t, store, nil)
		stop := run(r)
		if status, _ := discover(t, r, ""); status != http.StatusOK {
			t.Errorf("without known clients: status %d", status)
		}
		for i := range 3 {
			join(t, r, hello(fmt.Sprint("web-", i), sessionA, nodeTarget))
		}
		s, l := join(t, r, hello("left", sessionA, nodeTarget))
		r.Goodbye(hello("left", sessionA))
		s.Leave(l)
		stop()

		r = newTestRegistry(t, store, nil)
		stop = run(r)
		if status, _ := discover(t, r, ""); status != http.StatusServiceUnavailable {
			t.Errorf("after the start: status %d", status)
		}
		leaseFails(t, r, "web-0", ErrAway, 0) // Known: not 404.
		for i := range 3 {
			join(t, r, hello(fmt.Sprint("web-", i), sessionB, nodeTarget))
		}
		if status, groups := discover(t, r, ""); status != http.StatusOK || len(groups) != 4 {
			t.Errorf("with all back: status %d, %v", status, groups)
		}
		stop()

		r = newTestRegistry(t, store, nil)
		stop = run(r)
		join(t, r, hello("web-0", sessionB, nodeTarget))
		time.Sleep(14 * time.Second) //nolint:forbidigo // In a bubble.
		if status, _ := discover(t, r, ""); status != http.StatusServiceUnavailable {
			t.Errorf("14 s after the start: status %d", status)
		}
		time.Sleep(2 * time.Second) //nolint:forbidigo // In a bubble.
		if status, groups := discover(t, r, ""); status != http.StatusOK || len(groups) != 4 {
			t.Errorf("16 s after the start: status %d, %v", status, groups)
		}
		stop()
	})
}

func TestAnnouncement(t *testing.T) {
	a := &Announcement{
		Instance: "größe-1 🚢", Labels: map[string]string{"env": "\u202e\x7f\t"},
		Targets: []Target{{Job: "a \"b\"", Scheme: "https", Port: 1, Path: "/x%2Fy", Query: "a=b&c=%26"}},
	}
	text := a.String()
	for _, b := range []byte(text) {
		if b < 0x20 || b >= 0x7f {
			t.Fatalf("%q holds the byte %#x", text, b)
		}
	}
	got, err := ParseAnnouncement(text)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != text || got.Instance != a.Instance || got.Labels["env"] != a.Labels["env"] || got.Targets[0] != a.Targets[0] {
		t.Errorf("got %+v", got)
	}
	for _, bad := range []string{
		``, `[]`, `{"instance":""}`, `{"instance":"\ud800"}x`,
		`{"instance":"x","labels":{"__address__":"y"}}`, `{"instance":"x","labels":{"job":"y"}}`, `{"instance":"x","labels":{"a-b":"y"}}`,
		`{"instance":"x","targets":[{"job":"","port":1,"path":"/"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":0,"path":"/"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":70000,"path":"/"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"x"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/a b"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/?a=b"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/","scheme":"ftp"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/","query":"a=1&a=2"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/","query":"match[]=up"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/","query":"_scheme=https"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/"},{"job":"a","port":2,"path":"/"}]}`,
		`{"instance":"x","targets":[{"job":"a","port":1,"path":"/"},{"job":"b","port":1,"path":"/","scheme":"https"}]}`,
		`{"instance":"x","host_id":"x"}`, `{"instance":"x","host_id":"` + strings.Repeat("A", 32) + `"}`, `{"instance":"x","host_id":"` + strings.Repeat("a", 33) + `"}`,
		`{"instance":"x","labels":{"a":"` + strings.Repeat("x", MaxAnnouncement) + `"}}`,
	} {
		if a, err := ParseAnnouncement(bad); err == nil {
			t.Errorf("%.80s: taken as %+v", bad, a)
		}
	}
}
