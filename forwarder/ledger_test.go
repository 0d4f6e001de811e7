package forwarder_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/forwarder"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/target"
)

// hubs are Pushgateways in memory, by URL, with the groups that they have.
type hubs struct {
	mu sync.Mutex
	// groups are, as URL and group.
	groups map[string]bool
	// asked is each request, its time in seconds since begin, as it came.
	begin time.Time
	asked []string
	// answer says what becomes of a request; nil means that all is well.
	answer func(ctx context.Context, method, url string) error
	// same are other URLs of a hub.
	same map[string]string
}

func newHubs() *hubs { return &hubs{groups: make(map[string]bool), begin: time.Now()} }

// at returns the Pushgateway at a URL.
func (h *hubs) at(u *url.URL) forwarder.Gateway {
	return hub{h, strings.TrimSuffix(u.String(), "/")}
}

func (h *hubs) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.groups))
}

// requests returns those that begin with prefix, with the seconds when they came.
func (h *hubs) requests(prefix string) (requests []string, seconds []float64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range h.asked {
		var at float64
		if _, err := fmt.Sscan(a, &at); err != nil {
			panic(err)
		}
		if _, request, _ := strings.Cut(a, " "); strings.HasPrefix(request, prefix) {
			requests, seconds = append(requests, request), append(seconds, at)
		}
	}
	return requests, seconds
}

type hub struct {
	*hubs
	url string
}

func (h hub) String() string { return h.url }

func (h hub) Put(ctx context.Context, key pushgw.GroupingKey, _ pushgw.Body) error {
	return h.do(ctx, "PUT", key)
}

func (h hub) Delete(ctx context.Context, key pushgw.GroupingKey) error {
	return h.do(ctx, "DELETE", key)
}

func (h hub) do(ctx context.Context, method string, key pushgw.GroupingKey) error {
	h.mu.Lock()
	h.asked = append(h.asked, fmt.Sprintf("%.3f %s %s %s", time.Since(h.begin).Seconds(), method, h.url, key))
	answer := h.answer
	h.mu.Unlock()
	if answer != nil {
		if err := answer(ctx, method, h.url); err != nil {
			return err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	at := h.url
	if other, ok := h.same[at]; ok {
		at = other
	}
	if method == "PUT" {
		h.groups[at+" "+key.String()] = true
	} else {
		delete(h.groups, at+" "+key.String())
	}
	return nil
}

// machine is a machine ID.
const machine = "0123456789abcdef0123456789abcdef\n"

// owned returns a setup with a ledger in dir that puts jobs, by default node, to the
// Pushgateways at urls.
func owned(t *testing.T, h *hubs, dir string, urls ...string) setup {
	t.Helper()
	s := config(&scraper{})
	ledger, err := forwarder.NewLedger(dir, filepath.Join(dir, "agent.pid"), machine)
	if err != nil {
		t.Fatal(err)
	}
	s.Ledger, s.GatewayAt, s.OnStop = ledger, h.at, forwarder.Keep
	for _, u := range urls {
		s.Gateways = append(s.Gateways, hub{h, u})
	}
	return s
}

func (s *setup) jobs(jobs ...string) {
	u := s.Targets[0].URL
	s.Targets = nil
	for _, job := range jobs {
		s.Targets = append(s.Targets, target.Target{Job: job, URL: u})
	}
}

// TestLedgerLeavesNothingBehind changes the configuration between two runs, and between a
// run and one with --once.
func TestLedgerLeavesNothingBehind(t *testing.T) {
	const a, b = "http://a", "http://b/path"
	for name, tc := range map[string]struct {
		change func(s *setup, h *hubs)
		want   []string
	}{
		"nothing changed": {func(*setup, *hubs) {}, []string{
			a + ` {job="app",instance="web-1"}`, a + ` {job="node",instance="web-1"}`,
			b + ` {job="app",instance="web-1"}`, b + ` {job="node",instance="web-1"}`,
		}},
		"instance renamed": {func(s *setup, _ *hubs) { s.Instance = "web-2" }, []string{
			a + ` {job="app",instance="web-2"}`, a + ` {job="node",instance="web-2"}`,
			b + ` {job="app",instance="web-2"}`, b + ` {job="node",instance="web-2"}`,
		}},
		"label added": {func(s *setup, _ *hubs) { s.Labels = map[string]string{"env": "prod"} }, []string{
			a + ` {job="app",env="prod",instance="web-1"}`, a + ` {job="node",env="prod",instance="web-1"}`,
			b + ` {job="app",env="prod",instance="web-1"}`, b + ` {job="node",env="prod",instance="web-1"}`,
		}},
		"target removed": {func(s *setup, _ *hubs) { s.jobs("node") }, []string{
			a + ` {job="node",instance="web-1"}`, b + ` {job="node",instance="web-1"}`,
		}},
		"targets moved to pull":   {func(s *setup, _ *hubs) { s.Targets = nil }, nil},
		"neither targets nor URL": {func(s *setup, _ *hubs) { s.Targets, s.Gateways = nil, nil }, nil},
		"no URL any more":         {func(s *setup, _ *hubs) { s.Gateways = nil }, nil},
		"other URLs": {func(s *setup, h *hubs) { s.Gateways = []forwarder.Gateway{hub{h, b}, hub{h, "http://c"}} }, []string{
			b + ` {job="app",instance="web-1"}`, b + ` {job="node",instance="web-1"}`,
			"http://c" + ` {job="app",instance="web-1"}`, "http://c" + ` {job="node",instance="web-1"}`,
		}},
	} {
		for _, how := range []string{"run", "once"} {
			t.Run(name+"/"+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					dir, h := t.TempDir(), newHubs()
					h.groups[a+` {job="node",instance="other"}`] = true
					s := owned(t, h, dir, a, b)
					s.jobs("node", "app")
					forward(t, s, time.Minute)
					if len(h.all()) != 5 {
						t.Fatalf("groups %q", h.all())
					}
					s = owned(t, h, dir, a, b)
					s.jobs("node", "app")
					tc.change(&s, h)
					if how == "run" {
						forward(t, s, time.Second)
					} else if f, err := forwarder.New(s.Config); err != nil || f.Once(t.Context()) != nil {
						t.Fatal(err, s.log)
					}
					want := append([]string{a + ` {job="node",instance="other"}`}, tc.want...)
					slices.Sort(want)
					if got := h.all(); !slices.Equal(got, want) {
						t.Errorf("groups\n%s\nwant\n%s\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"), s.log)
					}
					if n := s.metric(t, "promferry_forwarder_abandoned_groups"); n != 0 {
						t.Errorf("%v groups abandoned", n)
					}
					deletes, _ := h.requests("DELETE ")
					if n := s.metric(t, "promferry_forwarder_abandoned_group_deletions_total", "outcome=success"); int(n) != len(deletes) {
						t.Errorf("%v deletions counted, of %d", n, len(deletes))
					}
					if n := strings.Count(s.log.String(), "level=INFO msg=\"Abandoned group deleted"); n != len(deletes) {
						t.Errorf("%d deletions logged, of %d: %s", n, len(deletes), s.log)
					}
					// Done once and for all.
					tc.change(&s, h)
					again := owned(t, h, dir, a, b)
					again.jobs("node", "app")
					tc.change(&again, h)
					forward(t, again, time.Second)
					if more, _ := h.requests("DELETE "); len(more) != len(deletes) {
						t.Errorf("deleted again: %q", more)
					}
				})
			})
		}
	}
}

// TestLedgerIsWrittenWhenSomethingChanges has three runs of the same configuration, the
// last of which puts to one more Pushgateway.
func TestLedgerIsWrittenWhenSomethingChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		for run, want := range []int{1, 0, 1} {
			s := owned(t, h, dir, "http://a")
			s.jobs("node", "app", "db")
			if run == 2 {
				s.Gateways = append(s.Gateways, hub{h, "http://b"})
			}
			writes := 0
			s.Ledger.OnStep(func(step string) {
				if step == "write" {
					writes++
				}
			})
			forward(t, s, 5*time.Minute)
			if writes != want {
				t.Errorf("run %d: %d writes, want %d", run, writes, want)
			}
		}
	})
}

// TestNotedBeforePut checks at each put that the file names its group.
func TestNotedBeforePut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		h.answer = func(_ context.Context, _, u string) error {
			b, err := os.ReadFile(filepath.Join(dir, "groups.json"))
			if err != nil || !strings.Contains(string(b), `"url": "`+u+`"`) || !strings.Contains(string(b), `"job": "node"`) {
				t.Errorf("put to %s before the ledger says so: %v\n%s", u, err, b)
			}
			return syscall.ECONNREFUSED
		}
		forward(t, owned(t, h, dir, "http://a", "http://b"), time.Minute)
		if puts, _ := h.requests("PUT "); len(puts) < 8 {
			t.Errorf("%d puts", len(puts))
		}
	})
}

// TestAbandonedOnAPushgatewayThatIsAway has one that fails for hours, through a restart of
// the agent, in one way and then in another.
func TestAbandonedOnAPushgatewayThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		forward(t, owned(t, h, dir, "http://old"), time.Second)
		fault := error(syscall.ECONNREFUSED)
		h.answer = func(_ context.Context, _, u string) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			if u == "http://old" {
				return fault
			}
			return nil
		}
		fail := func(err error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			fault = err
		}
		forward(t, owned(t, h, dir, "http://new"), time.Hour)

		fail(&pushgw.StatusError{Code: 500})
		restarted := time.Now()
		s := owned(t, h, dir, "http://new")
		f, err := forwarder.New(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		<-time.After(time.Hour)
		if n := s.metric(t, "promferry_forwarder_abandoned_groups"); n != 1 {
			t.Errorf("%v groups abandoned while the Pushgateway is away", n)
		}
		fail(&pushgw.StatusError{Code: 503})
		<-time.After(time.Hour)
		if got := h.all(); len(got) != 2 {
			t.Errorf("groups %q", got)
		}
		fail(nil)
		<-time.After(5 * time.Minute)
		if got := h.all(); len(got) != 1 || !strings.HasPrefix(got[0], "http://new ") {
			t.Errorf("groups %q five minutes after the Pushgateway was back", got)
		}
		if n := s.metric(t, "promferry_forwarder_abandoned_groups"); n != 0 {
			t.Errorf("%v groups abandoned in the end", n)
		}
		cancel()
		running.Wait()
		deletes, at := h.requests("DELETE ")
		// At least one each 5 minutes in three hours; with full jitter some 2.5 minutes apart.
		if n := len(deletes); n < 36 || n > 200 {
			t.Errorf("%d tries", n)
		}
		for i := 1; i < len(at); i++ {
			if at[i]-at[i-1] > 300.1 {
				t.Errorf("%v s between two tries", at[i]-at[i-1])
			}
		}
		if !slices.Contains(at, restarted.Sub(h.begin).Seconds()) {
			t.Errorf("no try at the restart: %v", at)
		}
		// 500 and 503 are one reason.
		if n := strings.Count(s.log.String(), "Abandoned group not deleted"); n != 1 {
			t.Errorf("%d lines of log for one fault that went on: %s", n, s.log)
		}
		if !strings.Contains(s.log.String(), filepath.Join(dir, "groups.json")) {
			t.Errorf("the log does not say how to end it: %s", s.log)
		}
		// The puts to the other one came when they were due.
		if puts, _ := h.requests("PUT http://new"); len(puts) < 3*240 {
			t.Errorf("%d puts in three hours", len(puts))
		}
	})
}

// TestPushgatewayThatWasNeverReached is one whose URL was wrong: no group can be there. When
// one was put there earlier, or a put may have arrived, that is not so.
func TestPushgatewayThatWasNeverReached(t *testing.T) {
	noHost := &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "old", IsNotFound: true}}
	for _, tc := range []struct {
		name    string
		earlier bool
		faults  []error
		left    bool
	}{
		{"refused", false, []error{syscall.ECONNREFUSED}, false},
		{"no such host", false, []error{fmt.Errorf("put: %w", noHost)}, false},
		{"put earlier", true, []error{syscall.ECONNREFUSED}, true},
		{"cut off", false, []error{syscall.ECONNREFUSED, &net.OpError{Op: "read", Err: syscall.ECONNRESET}, syscall.ECONNREFUSED}, true},
		{"timed out", false, []error{context.DeadlineExceeded, syscall.ECONNREFUSED}, true},
		{"status", false, []error{&pushgw.StatusError{Code: 400}, syscall.ECONNREFUSED}, true},
	} {
		for _, once := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				dir, h := t.TempDir(), newHubs()
				if tc.earlier {
					forward(t, owned(t, h, dir, "http://old"), time.Second)
				}
				n := 0
				h.answer = func(context.Context, string, string) error {
					n++
					return tc.faults[min(n, len(tc.faults))-1]
				}
				s := owned(t, h, dir, "http://old")
				s.OnStop = forwarder.Down
				if once {
					f, err := forwarder.New(s.Config)
					if err != nil || f.Once(t.Context()) == nil {
						t.Fatal(err)
					}
				} else {
					forward(t, s, time.Minute)
				}
				b, err := os.ReadFile(filepath.Join(dir, "groups.json"))
				if err != nil || strings.Contains(string(b), "http://old") != tc.left {
					t.Errorf("%s, once %v: %v\n%s", tc.name, once, err, b)
				}
			})
		}
	}
}

// TestFormerPushgatewayThatWantsCredentials is away for an hour, and then refuses: what to do is
// told once, and the group stays in the ledger.
func TestFormerPushgatewayThatWantsCredentials(t *testing.T) {
	for _, code := range []int{401, 403} {
		synctest.Test(t, func(t *testing.T) {
			dir, h := t.TempDir(), newHubs()
			forward(t, owned(t, h, dir, "http://old"), time.Second)
			begin := time.Now()
			h.answer = func(_ context.Context, _, u string) error {
				switch {
				case u != "http://old":
					return nil
				case time.Since(begin) < time.Hour:
					return &pushgw.StatusError{Code: 503}
				}
				return &pushgw.StatusError{Code: code}
			}
			s := owned(t, h, dir, "http://new")
			forward(t, s, 3*time.Hour)
			log := s.log.String()
			if n := strings.Count(log, "Abandoned group not deleted"); n != 2 {
				t.Errorf("%d: %d lines of log, want one for each fault: %s", code, n, log)
			}
			if n := strings.Count(log, "run the agent once with this one as --push.url and with --push.on-stop=delete"); n != 1 {
				t.Errorf("%d: told %d times what to do: %s", code, n, log)
			}
			if n := s.metric(t, "promferry_forwarder_abandoned_groups"); n != 1 {
				t.Errorf("%d: %v groups are left to be deleted", code, n)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "groups.json")); err != nil || !strings.Contains(string(b), "http://old") {
				t.Errorf("%d: the ledger has %s, %v", code, b, err)
			}
		})
	}
}

// TestAbandonedRetryAfter has a Pushgateway that asks to be left alone.
func TestAbandonedRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		forward(t, owned(t, h, dir, "http://old"), time.Second)
		asked := false
		h.answer = func(context.Context, string, string) error {
			if !asked {
				asked = true
				return &pushgw.StatusError{Code: 503, RetryAfter: 10 * time.Minute}
			}
			return nil
		}
		s := owned(t, h, dir)
		s.Targets = nil
		forward(t, s, time.Hour)
		if _, at := h.requests("DELETE "); len(at) != 2 || at[1]-at[0] < 599.9 || at[1]-at[0] > 600.1 {
			t.Errorf("deletes at %v", at)
		}
	})
}

// TestHangingAbandonedPushgateway costs neither puts, nor the other Pushgateway's cleaning,
// nor the stop anything.
func TestHangingAbandonedPushgateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		s := owned(t, h, dir, "http://hanging", "http://old")
		forward(t, s, time.Second)
		h.answer = func(ctx context.Context, _, u string) error {
			if u == "http://hanging" {
				return hang(ctx, 0)
			}
			return nil
		}
		begin := time.Now()
		h.begin, h.asked = begin, nil
		s = owned(t, h, dir, "http://new")
		forward(t, s, 10*time.Minute+time.Second)
		if took := time.Since(begin); took > 10*time.Minute+time.Second {
			t.Errorf("stopped after %v", took)
		}
		begins := s.Scraper.(*scraper).begins
		_, at := h.requests("PUT http://new")
		if len(at) != len(begins) || len(at) < 40 {
			t.Errorf("%d puts for %d cycles", len(at), len(begins))
		}
		for i := range at {
			if at[i]-begins[i].Sub(begin).Seconds() > 0.001 {
				t.Errorf("put %d came at %v s, its scrape at %v", i, at[i], begins[i].Sub(begin))
			}
		}
		if _, at := h.requests("DELETE http://old"); len(at) != 1 || at[0] != 0 {
			t.Errorf("deletes on the other at %v", at)
		}
	})
}

// TestAnotherURLOfTheSamePushgateway must not take away what is put there now.
func TestAnotherURLOfTheSamePushgateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, slow := range []string{"PUT", "DELETE", ""} {
			dir, h := t.TempDir(), newHubs()
			h.same = map[string]string{"http://10.0.0.1": "http://hub"}
			forward(t, owned(t, h, dir, "http://hub"), time.Second)
			h.answer = func(_ context.Context, method, _ string) error {
				if method == slow {
					<-time.After(5 * time.Second)
				}
				return nil
			}
			s := owned(t, h, dir, "http://10.0.0.1")
			s.Schedule = forwarder.Every(24 * time.Hour)
			forward(t, s, 20*time.Second)
			if got := h.all(); len(got) != 1 {
				t.Errorf("slow %s: groups %q: %q", slow, got, h.asked)
			}
			s = owned(t, h, dir, "http://hub")
			s.Schedule = forwarder.Every(24 * time.Hour)
			f, err := forwarder.New(s.Config)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Once(t.Context()); err != nil {
				t.Error(err)
			}
			if got := h.all(); len(got) != 1 {
				t.Errorf("slow %s, once: groups %q: %q", slow, got, h.asked)
			}
		}
	})
}

func TestLedgerOnStop(t *testing.T) {
	for _, tc := range []struct {
		onStop forwarder.OnStop
		fault  error
		left   bool
	}{
		{forwarder.Down, nil, true},
		{forwarder.Keep, nil, true},
		{forwarder.Delete, nil, false},
		{forwarder.Delete, syscall.ECONNREFUSED, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir, h := t.TempDir(), newHubs()
			s := owned(t, h, dir, "http://a")
			s.OnStop = tc.onStop
			h.answer = func(_ context.Context, method, _ string) error {
				if method == "DELETE" {
					return tc.fault
				}
				return nil
			}
			forward(t, s, time.Second)
			b, err := os.ReadFile(filepath.Join(dir, "groups.json"))
			if err != nil || strings.Contains(string(b), "web-1") != tc.left {
				t.Errorf("%s, %v: %v\n%s", tc.onStop, tc.fault, err, b)
			}
		})
	}
}

// TestOnceReportsWhatIsLeft has one Pushgateway that hangs and one that refuses, and is slow:
// all is tried once, within the push timeout, and what is configured is put.
func TestOnceReportsWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		s := owned(t, h, dir, "http://hanging", "http://refusing")
		s.jobs("node", "app")
		forward(t, s, time.Second)
		h.answer = func(ctx context.Context, _, u string) error {
			switch u {
			case "http://hanging":
				return hang(ctx, 0)
			case "http://refusing":
				select {
				case <-time.After(6 * time.Second):
				case <-ctx.Done():
					return ctx.Err()
				}
				return &pushgw.StatusError{Op: "delete", URL: u, Code: 403}
			}
			return nil
		}
		s = owned(t, h, dir, "http://new")
		f, err := forwarder.New(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		err = f.Once(t.Context())
		if err == nil || !strings.Contains(err.Error(), "delete http://refusing: unexpected status 403") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(begin); took > s.PushTimeout {
			t.Errorf("took %v", took)
		}
		refused, _ := h.requests("DELETE http://refusing")
		hung, _ := h.requests("DELETE http://hanging")
		if len(refused) != 2 || len(hung) != 1 {
			t.Errorf("%d and %d tries, want each group where there is an answer, and one where there is none", len(refused), len(hung))
		}
		if puts, _ := h.requests("PUT http://new"); len(puts) != 1 {
			t.Errorf("puts %q", puts)
		}
		if n := s.metric(t, "promferry_forwarder_abandoned_group_deletions_total", "outcome=failure"); n != 3 {
			t.Errorf("%v failures counted", n)
		}
	})
}

// TestLedgerThatCannotBeWritten has a directory in the file's place for five minutes.
func TestLedgerThatCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		s := owned(t, h, dir, "http://a")
		path := filepath.Join(dir, "groups.json")
		var once sync.Once
		s.Scraper = &scraper{answer: func(context.Context, string) (string, error) {
			once.Do(func() {
				if err := os.Mkdir(path, 0o700); err != nil {
					t.Error(err)
				}
			})
			return "m 1\n", nil
		}}
		f, err := forwarder.New(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		<-time.After(5 * time.Minute)
		puts, _ := h.requests("PUT ")
		if n := s.metric(t, "promferry_forwarder_ledger_failures_total"); len(puts) < 20 || int(n) != len(puts) {
			t.Errorf("%d puts, %v failures", len(puts), n)
		}
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
		<-time.After(15 * time.Second)
		if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), "web-1") {
			t.Errorf("%v\n%s", err, b)
		}
		cancel()
		running.Wait()
		if n := strings.Count(s.log.String(), "Ledger of groups not written"); n < 5 || n > 6 {
			t.Errorf("%d lines of log in five minutes: %s", n, s.log)
		}
		if !strings.Contains(s.log.String(), "Ledger of groups written again") {
			t.Errorf("log %s", s.log)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 2 || entries[0].Name() != "groups.json" || entries[1].Name() != "version" {
			t.Errorf("left in the directory: %v, %v", entries, err)
		}
	})
}

// TestBrokenLedger stops nothing, and is kept aside.
func TestBrokenLedger(t *testing.T) {
	good := func(dir string) string {
		b, err := os.ReadFile(filepath.Join(dir, "groups.json"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write := func(dir, text string) {
		if err := os.WriteFile(filepath.Join(dir, "groups.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, breakIt := range map[string]func(dir string){
		"empty":         func(dir string) { write(dir, "") },
		"cut":           func(dir string) { write(dir, good(dir)[:40]) },
		"no URL":        func(dir string) { write(dir, strings.Replace(good(dir), "http://old", "old", 1)) },
		"no job":        func(dir string) { write(dir, strings.Replace(good(dir), `"node"`, `""`, 1)) },
		"bad label":     func(dir string) { write(dir, strings.Replace(good(dir), `"instance"`, `"__name__"`, 1)) },
		"symbolic link": func(dir string) { write(dir, ""); linkAway(t, dir) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir, h := t.TempDir(), newHubs()
				forward(t, owned(t, h, dir, "http://old"), time.Second)
				breakIt(dir)
				s := owned(t, h, dir, "http://new")
				forward(t, s, time.Second)
				if deletes, _ := h.requests("DELETE "); len(deletes) > 0 {
					t.Errorf("deleted: %q", deletes)
				}
				if !slices.Contains(h.all(), `http://new {job="node",instance="web-1"}`) {
					t.Errorf("groups %q", h.all())
				}
				if n := s.metric(t, "promferry_forwarder_ledger_failures_total"); n != 1 {
					t.Errorf("%v failures counted", n)
				}
				if log := s.log.String(); !strings.Contains(log, "level=ERROR") || !strings.Contains(log, filepath.Join(dir, "groups.json.broken")) {
					t.Errorf("log %s", log)
				}
				if _, err := os.Lstat(filepath.Join(dir, "groups.json.broken")); err != nil {
					t.Error(err)
				}
				if !strings.Contains(good(dir), "http://new") {
					t.Errorf("new ledger %s", good(dir))
				}
			})
		})
	}
}

// TestBrokenLedgerThatCannotBeMoved is left as it is, for a person to look at.
func TestBrokenLedgerThatCannotBeMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		path := filepath.Join(dir, "groups.json")
		if err := errors.Join(os.WriteFile(path, []byte("broken"), 0o600), os.MkdirAll(path+".broken/in the way", 0o700)); err != nil {
			t.Fatal(err)
		}
		s := owned(t, h, dir, "http://new")
		forward(t, s, time.Minute)
		if b, err := os.ReadFile(path); err != nil || string(b) != "broken" {
			t.Errorf("%v: %q", err, b)
		}
		if puts, _ := h.requests("PUT "); len(puts) < 4 {
			t.Errorf("puts %q", puts)
		}
		if n := s.metric(t, "promferry_forwarder_ledger_failures_total"); n != 1 {
			t.Errorf("%v failures counted", n)
		}
		if log := s.log.String(); strings.Count(log, "level=ERROR") != 1 || !strings.Contains(log, path) || !strings.Contains(log, "move the file away") {
			t.Errorf("log %s", log)
		}
	})
}

// linkAway makes the ledger a symbolic link to a file elsewhere.
func linkAway(t *testing.T, dir string) {
	t.Helper()
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	path := filepath.Join(dir, "groups.json")
	if err := errors.Join(os.Rename(path, elsewhere), os.Symlink(elsewhere, path)); err != nil {
		t.Fatal(err)
	}
}

// TestOwnerOfTheLedger checks whose ledger is acted on.
func TestOwnerOfTheLedger(t *testing.T) {
	for name, tc := range map[string]struct {
		lock, machine string
		move, acts    bool
	}{
		"the same":       {"agent.pid", machine, false, true},
		"moved":          {"agent.pid", machine, true, true},
		"another host":   {"agent.pid", "f" + machine[1:], false, false},
		"another lock":   {"other.pid", machine, false, false},
		"lock elsewhere": {"/run/agent.pid", machine, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir, h := t.TempDir(), newHubs()
				forward(t, owned(t, h, dir, "http://a"), time.Second)
				if tc.move {
					moved := filepath.Join(t.TempDir(), "moved")
					if err := os.Rename(dir, moved); err != nil {
						t.Fatal(err)
					}
					dir = moved
				}
				lock := tc.lock
				if !filepath.IsAbs(lock) {
					lock = filepath.Join(dir, lock)
				}
				s := owned(t, h, dir, "http://a")
				ledger, err := forwarder.NewLedger(dir, lock, tc.machine)
				if err != nil {
					t.Fatal(err)
				}
				s.Ledger, s.Instance = ledger, "web-2"
				forward(t, s, time.Second)
				deletes, _ := h.requests("DELETE ")
				if (len(deletes) > 0) != tc.acts {
					t.Errorf("deletes %q", deletes)
				}
				if told := strings.Contains(s.log.String(), "not acted on and begins anew"); told == tc.acts {
					t.Errorf("log %s", s.log)
				}
				b, err := os.ReadFile(filepath.Join(dir, "groups.json"))
				if err != nil || !strings.Contains(string(b), "web-2") || strings.Contains(string(b), "web-1") || strings.Contains(string(b), strings.TrimSpace(tc.machine)) {
					t.Errorf("%v\n%s", err, b)
				}
			})
		})
	}
}

func TestNewLedgerWantsAMachineID(t *testing.T) {
	for _, id := range []string{"", "\n", "uninitialized\n", machine[1:], "G" + machine[1:], machine + machine} {
		if _, err := forwarder.NewLedger(t.TempDir(), "agent.pid", id); err == nil {
			t.Errorf("%q: no error", id)
		}
	}
}

// TestDryRunDeletesNothing also checks that no file is touched.
func TestDryRunDeletesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, h := t.TempDir(), newHubs()
		forward(t, owned(t, h, dir, "http://a"), time.Second)
		before := h.all()
		dryRun := func(machine string) (string, error) {
			s := owned(t, h, dir, "http://a")
			ledger, err := forwarder.NewLedger(dir, filepath.Join(dir, "agent.pid"), machine)
			if err != nil {
				t.Fatal(err)
			}
			writes := 0
			ledger.OnStep(func(string) { writes++ })
			s.Ledger, s.Instance = ledger, "web-2"
			f, err := forwarder.New(s.Config)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			err = f.DryRun(t.Context(), &b)
			if writes > 0 || !slices.Equal(h.all(), before) {
				t.Errorf("%d writes, groups %q", writes, h.all())
			}
			return b.String(), err
		}
		const line = "# delete from http://a, group {job=\"node\",instance=\"web-1\"}, which is no longer configured\n"
		if out, err := dryRun(machine); err != nil || !strings.Contains(out, line) {
			t.Errorf("%v: %s", err, out)
		}
		if out, err := dryRun("f" + machine[1:]); err != nil || strings.Contains(out, "delete") {
			t.Errorf("another host's: %v: %s", err, out)
		}
	})
}
