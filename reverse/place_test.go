package reverse

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

var appTarget = Target{Job: "app", Port: 8080, Path: "/metrics"}

// The host IDs of two hosts.
var (
	hostA = strings.Repeat("a", 32)
	hostB = strings.Repeat("b", 32)
)

// node is a client that has the instance label "web-1".
type node struct {
	t        *testing.T
	r        *Registry
	name     string
	identity string
	host     string
	label    string
	targets  []Target

	session *Session
	line    *stub
}

// connect opens a line, of a new process each time.
func (n *node) connect() {
	n.t.Helper()
	a := &Announcement{Instance: "web-1", Labels: map[string]string{"env": n.label}, Targets: n.targets, HostID: n.host}
	h := Hello{Name: n.name, Session: strings.Repeat("S", 16), Kind: KindPTTH, Remote: "192.0.2.1", Announce: a.String()}
	if n.identity != "" {
		h.Grant = who(n.identity)
	}
	n.session, n.line = join(n.t, n.r, h)
}

// leave ends the line, and waits until the session has ended.
func (n *node) leave() {
	n.session.Leave(n.line)
	n.r.sweepAfter(linger)
}

// restart is over before the session has ended.
func (n *node) restart() {
	n.t.Helper()
	n.session.Leave(n.line)
	n.connect()
}

// listed checks which client service discovery lists for each job; "" is for none.
func listed(t *testing.T, r *Registry, want string) {
	t.Helper()
	_, groups := discover(t, r, "")
	var got []string
	for _, g := range groups {
		host, _, err := net.SplitHostPort(g.Targets[0])
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, g.Labels["job"]+"="+host)
	}
	if s := strings.Join(got, " "); s != want {
		t.Errorf("listed: %s, want %s", s, want)
	}
}

// hidden checks how many targets are in conflict with those of another client.
func hidden(t *testing.T, r *Registry, want int) {
	t.Helper()
	expected := fmt.Sprintf("# HELP promferry_proxy_hidden_targets Targets that are not listed because another client holds their job and instance.\n"+
		"# TYPE promferry_proxy_hidden_targets gauge\npromferry_proxy_hidden_targets %d\n", want)
	if err := testutil.CollectAndCompare(registryCollector{r}, strings.NewReader(expected), "promferry_proxy_hidden_targets"); err != nil {
		t.Error(err)
	}
}

// places runs a test with a registry that keeps what it knows in a store.
func places(t *testing.T, test func(t *testing.T, r *Registry, restarted func() *Registry)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		r := newTestRegistry(t, store, nil)
		test(t, r, func() *Registry {
			r.save()
			return newTestRegistry(t, store, nil)
		})
	})
}

// TestPlaceIsKept: what a client announces anew costs it no place that it still claims,
// whoever waits for it.
func TestPlaceIsKept(t *testing.T) {
	places(t, func(t *testing.T, r *Registry, restarted func() *Registry) {
		victim := &node{t: t, r: r, name: "web-1", identity: "one", targets: []Target{nodeTarget, appTarget}}
		evil := &node{t: t, r: r, name: "evil", identity: "evil", targets: []Target{nodeTarget, appTarget}}
		victim.connect()
		evil.connect()
		victim.label = "prod"
		victim.restart()
		listed(t, r, "node=web-1 app=web-1")
		hidden(t, r, 2)
		// A restart that takes longer, with a target more.
		victim.leave()
		victim.targets = append(victim.targets, Target{Job: "more", Port: 1, Path: "/"})
		victim.connect()
		listed(t, r, "node=web-1 app=web-1 more=web-1")
		// The machine was made anew: the name is what was scraped before.
		victim.host = hostB
		victim.restart()
		listed(t, r, "node=web-1 app=web-1 more=web-1")
		// What it announces no more is free.
		victim.targets = []Target{nodeTarget}
		victim.restart()
		listed(t, r, "app=evil node=web-1")
		hidden(t, r, 1)
		// Who comes back to a place is behind those that have it.
		victim.targets = []Target{nodeTarget, appTarget}
		victim.restart()
		listed(t, r, "app=evil node=web-1")
		r = restarted()
		r.settled = true
		listed(t, r, "app=evil node=web-1")
	})
}

// TestPlaceOfAnotherOwner: it stays with its holder until that is forgotten, and the conflict
// can be seen.
func TestPlaceOfAnotherOwner(t *testing.T) {
	for name, tc := range map[string]struct{ holder, other node }{
		"other identity":                 {node{identity: "one"}, node{identity: "evil"}},
		"other identity, host ID forged": {node{identity: "one", host: hostA}, node{identity: "evil", host: hostA}},
		"no identity any more":           {node{identity: "one", host: hostA}, node{host: hostA}},
		"other host":                     {node{host: hostA}, node{host: hostB}},
		"host not known":                 {node{host: hostA}, node{}},
		"old agents":                     {node{}, node{}},
		"other host of a fleet that shares an identity": {node{identity: "fleet", host: hostA}, node{identity: "fleet", host: hostB}},
	} {
		t.Run(name, func(t *testing.T) {
			places(t, func(t *testing.T, r *Registry, restarted func() *Registry) {
				var log bytes.Buffer
				r.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
				holder, other := tc.holder, tc.other
				holder.t, holder.r, holder.name, holder.targets = t, r, "web-1", []Target{nodeTarget, appTarget}
				other.t, other.r, other.name, other.targets = t, r, "other", []Target{nodeTarget}
				holder.connect()
				other.connect()
				check := func(r *Registry) {
					t.Helper()
					listed(t, r, "node=web-1 app=web-1")
					hidden(t, r, 1)
					if got := r.Status().Clients[0].Targets[0]; got.Holder != "web-1" || !got.Duplicate {
						t.Errorf("status of the other: %+v", got)
					}
				}
				check(r)
				if got := testutil.ToFloat64(r.metrics.duplicateTargets); got != 1 {
					t.Errorf("counted %v", got)
				}
				if got := log.String(); !strings.Contains(got, "client=other ") || !strings.Contains(got, "holder=web-1 ") || strings.Contains(got, hostA) {
					t.Error(got)
				}
				holder.leave()
				check(r)
				other.restart()
				check(r)
				// Across a restart of the proxy, after which the other is there first.
				r = restarted()
				r.settled = true
				check(r)
				other.r = r
				other.connect()
				check(r)
				r.sweepAfter(59 * time.Minute)
				check(r)
				r.sweepAfter(2 * time.Minute)
				listed(t, r, "node=other")
				hidden(t, r, 0)
			})
		})
	}
}

// TestPlaceUnderAnotherName: a node that has got another name is listed under that at once.
func TestPlaceUnderAnotherName(t *testing.T) {
	for name, tc := range map[string]struct{ before, after node }{
		"host":                    {node{host: hostA}, node{host: hostA}},
		"identity":                {node{identity: "one"}, node{identity: "one"}},
		"both":                    {node{identity: "one", host: hostA}, node{identity: "one", host: hostA}},
		"identity, agent upgrade": {node{identity: "one"}, node{identity: "one", host: hostA}},
	} {
		setUp := func(t *testing.T, r *Registry) (before, after *node) {
			b, a := tc.before, tc.after
			b.t, b.r, b.name, b.targets = t, r, "web-1", []Target{nodeTarget, appTarget}
			a.t, a.r, a.name, a.targets = t, r, "web-1.example.org", b.targets
			return &b, &a
		}
		const former, now = "node=web-1 app=web-1", "node=web-1.example.org app=web-1.example.org"
		t.Run(name, func(t *testing.T) {
			places(t, func(t *testing.T, r *Registry, restarted func() *Registry) {
				before, after := setUp(t, r)
				before.connect()
				before.leave()
				listed(t, r, former)
				after.connect()
				listed(t, r, now)
				hidden(t, r, 0)
				if got := r.Status().Clients[0].Targets[0]; got.Holder != "web-1.example.org" || got.Duplicate {
					t.Errorf("status of the former name: %+v", got)
				}
				// Away, it is the one that is missed; so after a restart of the proxy, and when the
				// former name is forgotten.
				r.sweepAfter(50 * time.Minute)
				after.leave()
				listed(t, r, now)
				r = restarted()
				r.settled = true
				listed(t, r, now)
				r.sweepAfter(15 * time.Minute)
				listed(t, r, now)
			})
		})
		t.Run(name+", connected first", func(t *testing.T) {
			places(t, func(t *testing.T, r *Registry, _ func() *Registry) {
				before, after := setUp(t, r)
				before.connect()
				evil := &node{t: t, r: r, name: "evil", identity: "evil", targets: []Target{nodeTarget}}
				evil.connect()
				after.connect()
				listed(t, r, former)
				hidden(t, r, 3)
				before.leave()
				listed(t, r, now)
				hidden(t, r, 1)
				// A former name that is forgotten leaves the place to its owner.
				r.sweepAfter(2 * time.Hour)
				listed(t, r, now)
			})
		})
		t.Run(name+", restart of the proxy between", func(t *testing.T) {
			places(t, func(t *testing.T, r *Registry, restarted func() *Registry) {
				before, after := setUp(t, r)
				before.connect()
				r = restarted()
				r.settled = true
				after.r = r
				after.connect()
				listed(t, r, now)
			})
		})
	}
}

// TestOwnerChanges: a client gets another credential. What it announces is the same.
func TestOwnerChanges(t *testing.T) {
	places(t, func(t *testing.T, r *Registry, _ func() *Registry) {
		holder := &node{t: t, r: r, name: "web-1", identity: "one", targets: []Target{nodeTarget}}
		evil := &node{t: t, r: r, name: "evil", identity: "evil", targets: []Target{nodeTarget}}
		renamed := &node{t: t, r: r, name: "web-1.example.org", identity: "old", targets: []Target{nodeTarget}}
		for _, n := range []*node{holder, evil, renamed} {
			n.connect()
		}
		holder.leave()
		holder.identity = "two"
		holder.connect()
		listed(t, r, "node=web-1")
		renamed.leave()
		renamed.identity = "two"
		renamed.connect()
		listed(t, r, "node=web-1")
		holder.leave()
		listed(t, r, "node=web-1.example.org")
		r.sweepAfter(2 * time.Hour) // The first is forgotten.
		listed(t, r, "node=web-1.example.org")
	})
}

// TestPlaceGoesBack: nodes without host IDs that share an identity cannot be told from one
// node under two names. The one that had the place first has it whenever it is there.
func TestPlaceGoesBack(t *testing.T) {
	places(t, func(t *testing.T, r *Registry, restarted func() *Registry) {
		first := &node{t: t, r: r, name: "web-1", identity: "fleet", targets: []Target{nodeTarget}}
		second := &node{t: t, r: r, name: "web-2", identity: "fleet", targets: []Target{nodeTarget}}
		first.connect()
		second.connect()
		first.restart()
		listed(t, r, "node=web-1")
		first.leave()
		listed(t, r, "node=web-2")
		first.connect()
		listed(t, r, "node=web-1")
		r = restarted()
		r.settled = true
		first.r, second.r = r, r
		second.connect()
		first.connect()
		listed(t, r, "node=web-1")
	})
}

// TestTwoNamesAreConnected: the one that is listed stays so, while it is there and claims
// the place.
func TestTwoNamesAreConnected(t *testing.T) {
	places(t, func(t *testing.T, r *Registry, _ func() *Registry) {
		former := &node{t: t, r: r, name: "web-1", host: hostA, targets: []Target{nodeTarget}}
		second := &node{t: t, r: r, name: "web-2", host: hostA, targets: []Target{nodeTarget}}
		third := &node{t: t, r: r, name: "web-3", host: hostA, targets: []Target{nodeTarget}}
		former.connect()
		former.leave()
		second.connect()
		third.connect()
		listed(t, r, "node=web-2")
		second.targets = []Target{appTarget}
		second.restart()
		listed(t, r, "app=web-2 node=web-3")
	})
}

// TestPlacesOfManyNames: however many names there are of an owner, the newest that is
// connected has the place of one that is away.
func TestPlacesOfManyNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRegistry(t, nil, func(c *RegistryConfig) { c.MaxClients = 1000 })
		for i := range 200 {
			n := &node{t: t, r: r, name: fmt.Sprint("pod-", i), host: hostA, targets: []Target{nodeTarget}}
			n.connect()
			listed(t, r, "node="+n.name)
			n.leave()
		}
	})
}

// TestKnownBefore: what a proxy saved that knew no owners.
func TestKnownBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		since := time.Now().Format(time.RFC3339)
		r := newTestRegistry(t, &memory{b: []byte(`{"clients":[` +
			`{"name":"web-1","kind":"ptth","version":"0.1.0","remote":"192.0.2.1","since":"` + since + `","announcement":{"instance":"web-1","targets":[{"job":"node","port":9100,"path":"/metrics"}]}},` +
			`{"name":"other","kind":"ptth","remote":"192.0.2.2","since":"` + since + `","goodbye":true,"announcement":{"instance":"web-1","labels":{"a":"b"},"targets":[{"job":"node","port":9100,"path":"/metrics"}]}}]}`)}, nil)
		r.settled = true
		listed(t, r, "node=web-1")
		other := &node{t: t, r: r, name: "other", identity: "evil", host: hostB, targets: []Target{nodeTarget}}
		other.connect()
		listed(t, r, "node=web-1")
		holder := &node{t: t, r: r, name: "web-1", identity: "one", host: hostA, targets: []Target{nodeTarget}}
		holder.connect()
		listed(t, r, "node=web-1")
	})
}

// TestAnnouncementBounds: what one client can make service discovery say is bounded, and
// what the documentation promises is within that.
func TestAnnouncementBounds(t *testing.T) {
	announcement := func(labels, labelSize, targets int) *Announcement {
		a := &Announcement{Instance: "web-1", Labels: make(map[string]string)}
		for i := range labels {
			name := fmt.Sprint("label_", i)
			a.Labels[name] = strings.Repeat("x", labelSize-len(name))
		}
		for i := range targets {
			a.Targets = append(a.Targets, Target{Job: fmt.Sprint("job-", i), Port: uint16(1 + i), Path: "/metrics"})
		}
		return a
	}
	for name, tc := range map[string]struct {
		a    *Announcement
		want string
	}{
		"200 targets, 1 KiB of labels": {announcement(20, 50, 200), ""},
		"32 KiB of short targets":      {announcement(6, 20, 680), ""},
		"one target, 20 KiB of labels": {announcement(10, 2000, 1), ""},
		"64 labels":                    {announcement(64, 20, 10), ""},
		"65 labels":                    {announcement(65, 20, 10), "65 labels, at most 64"},
		"1001 targets":                 {&Announcement{Instance: "x", Targets: make([]Target, 1001)}, "1001 targets, at most 1000"},
		"much of both":                 {announcement(10, 1500, 100), "bytes at each of 100 targets, together at most 262144: shorten the labels or announce fewer targets"},
		"a long instance": {
			&Announcement{Instance: strings.Repeat("x", 20<<10), Targets: announcement(0, 0, 100).Targets},
			"take 20486 bytes at each of 100 targets, together at most 262144",
		},
	} {
		text := tc.a.String()
		if name != "1001 targets" && len(text) > MaxAnnouncement {
			t.Fatalf("%s: %d bytes", name, len(text))
		}
		err := tc.a.Validate()
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// sink takes an answer, as long as it is left to. It knows the largest write.
type sink struct {
	header                     http.Header
	largest, writes, failAfter int
}

func (s *sink) Header() http.Header { return s.header }
func (*sink) WriteHeader(int)       {}

func (s *sink) Write(b []byte) (int, error) {
	s.largest = max(s.largest, len(b))
	if s.writes++; s.writes > s.failAfter {
		return 0, errors.New("the deadline is over")
	}
	return len(b), nil
}

// TestListsAreStreamed: they are never in memory as a whole, and end with the connection.
func TestListsAreStreamed(t *testing.T) {
	r := newTestRegistry(t, nil, func(c *RegistryConfig) { c.MaxClients = 1000 })
	h := hello("", sessionA)
	for i := range 200 {
		h.Name = fmt.Sprintf("web-%03d", i)
		h.Announce = (&Announcement{Instance: h.Name, Labels: map[string]string{"long": strings.Repeat("<", 300)}, Targets: []Target{nodeTarget, appTarget}}).String()
		join(t, r, h)
	}
	for path, handler := range map[string]http.HandlerFunc{"/sd": r.Discovery, "/clients": r.ListClients(time.Minute)} {
		ask := func(w http.ResponseWriter) {
			handler(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		}
		whole := &sink{header: http.Header{}, failAfter: 1000}
		if ask(whole); whole.largest > 600 || whole.writes < 200 {
			t.Errorf("%s: %d bytes at once in %d writes", path, whole.largest, whole.writes)
		}
		broken := &sink{header: http.Header{}, failAfter: 3}
		if ask(broken); broken.writes != 4 {
			t.Errorf("%s: %d writes, want an end after the first that fails", path, broken.writes)
		}
	}
}

// TestConflictsInTheLog: an announcement makes one line, of bounded size.
func TestConflictsInTheLog(t *testing.T) {
	var log bytes.Buffer
	r := newTestRegistry(t, nil, func(c *RegistryConfig) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	a := &Announcement{Instance: strings.Repeat("i", 1000)}
	for i := range 100 {
		a.Targets = append(a.Targets, Target{Job: fmt.Sprint("job-", i), Port: uint16(1 + i), Path: "/"})
	}
	for _, name := range []string{"web-1", "web-2"} {
		h := hello(name, sessionA)
		h.Announce = a.String()
		join(t, r, h)
	}
	if got := log.String(); len(got) > 2000 || strings.Count(got, "not listed") != 1 || !strings.Contains(got, "targets=100 ") {
		t.Error(got)
	}
}
