package expiry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/expiry"
	"github.com/promferry/promferry/pushgw"
)

// TestPutDown has a node that pushes for a while, goes silent, and comes back; whatever the
// Pushgateway's clock says.
func TestPutDown(t *testing.T) {
	for _, skew := range []time.Duration{0, time.Hour, -time.Hour, 400 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(t)
			g.skew = skew
			g.started = g.started.Add(skew)
			s := config(g)
			go func() {
				for range 3 { // At 0, 15 and 30 s.
					g.push("web-1", 40)
					<-time.After(15 * time.Second)
				}
				<-time.After(75 * time.Second)
				g.push("web-1", 40) // At 120 s.
			}()
			s.run(t, 150*time.Second)
			// Last push at 30 s, so 70 s is not later than the expiry and 75 s is.
			equal(t, g.did(), op{75 * time.Second, "put", "web-1"})
			if g.texts["web-1"] != "up 1\n" {
				t.Errorf("skew %v: after the node came back: %s", skew, g.texts["web-1"])
			}
			if n := s.metric(t, "promferry_expiry_put_down_total"); n != 1 {
				t.Errorf("%v put down", n)
			}
			if n := s.metric(t, "promferry_expiry_groups", "state=live"); n != 1 {
				t.Errorf("%v live", n)
			}
		})
	}
}

func TestWhatIsPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("web-1", 12.5)
		<-time.After(time.Hour)
		s := config(g)
		if err := expiry.New(s.Config).Once(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The bubble's time begins with the year 2000.
		const want = `# HELP up 1 if the target was scraped, 0 if the scrape failed or the agent stopped.
# TYPE up gauge
up 0
# HELP promferry_expires_after_seconds For how long after a put this group is good.
# TYPE promferry_expires_after_seconds gauge
promferry_expires_after_seconds 12.5
# HELP promferry_silent_since_timestamp_seconds When the owner of this group last pushed, in Unix time: it has been silent since.
# TYPE promferry_silent_since_timestamp_seconds gauge
promferry_silent_since_timestamp_seconds 9.466848e+08
`
		if g.texts["web-1"] != want {
			t.Errorf("put:\n%s\nwant:\n%s", g.texts["web-1"], want)
		}
		if !strings.Contains(s.log.String(), `msg="Group put down: its owner is silent" gateway=http://pgw group="{job=\"node\",instance=\"web-1\"}" silent_for=1h0m0s`) {
			t.Errorf("log: %s", s.log)
		}
	})
}

func TestUntouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("batch", 0)
		g.push("never", 40)
		g.set(func() {
			never := g.groups["never"]
			never.Pushed = time.Time{}
			g.groups["never"] = never
			g.groups["unreadable"] = pushgw.Group{Pushed: time.Now(), ExpiresAfter: 40}
			g.groups["utf-8"] = pushgw.Group{
				Key:    pushgw.GroupingKey{Job: "j", Labels: map[string]string{"my-label": "x"}},
				Pushed: time.Now(), ExpiresAfter: 40,
			}
		})
		<-time.After(1000 * time.Hour)
		s := config(g)
		s.run(t, time.Hour)
		equal(t, g.did())
		for state, want := range map[string]float64{"live": 0, "silent": 0, "without_expiry": 2, "unreadable": 2} {
			if n := s.metric(t, "promferry_expiry_groups", "state="+state); n != want {
				t.Errorf("%v groups %s, want %v", n, state, want)
			}
		}
	})
}

// TestRestart has a Pushgateway that kept its groups while it was down: silence counts from
// its start.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("dead", 40)
		g.push("web-1", 40)
		<-time.After(10 * time.Hour)
		g.begin, g.started = time.Now(), time.Now()
		go func() {
			<-time.After(20 * time.Second)
			g.push("web-1", 40)
		}()
		config(g).run(t, 60*time.Second)
		equal(t, g.did(), op{45 * time.Second, "put", "dead"})
	})
}

// TestAway has Pushgateways that nobody could reach for ten minutes, that hung, and whose
// clock jumped: silence counts from when they are back.
func TestAway(t *testing.T) {
	for name, leave := range map[string]func(g *gateway){
		"away":                  func(g *gateway) { g.away = true },
		"suspended":             func(g *gateway) { g.skew += 10 * time.Minute },
		"clock set forward 1 d": func(g *gateway) { g.skew += 24 * time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t)
				g.push("dead", 40)
				every(t, 15*time.Second, func() {
					g.mu.Lock()
					away := g.away
					g.mu.Unlock()
					if !away {
						g.push("web-1", 40)
					}
				})
				s := config(g)
				go func() {
					<-time.After(32 * time.Second)
					g.set(func() { leave(g) })
					<-time.After(10 * time.Minute)
					g.set(func() { g.away = false })
				}()
				s.run(t, 12*time.Minute)
				did := g.did()
				if len(did) != 1 || did[0].instance != "dead" {
					t.Fatalf("done: %v", did)
				}
				// The sweep at 35 s finds that the clock jumped; away for 10 minutes, the
				// first answer comes with a sweep at 632 s or within 20 s of it.
				least, most := 75*time.Second, 80*time.Second
				if name == "away" {
					least, most = (632+40)*time.Second, (652+45)*time.Second
				}
				if did[0].at < least || did[0].at > most {
					t.Errorf("put down at %v, want %v to %v", did[0].at, least, most)
				}
			})
		})
	}
}

// TestLeap has a clock that is a day and more ahead for ten seconds: nothing is deleted for
// that, and after it silence counts from when the clock was right again.
func TestLeap(t *testing.T) {
	for _, leap := range []time.Duration{time.Minute, 30 * time.Hour, 200 * 365 * 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(t)
			g.push("silent", 10)
			s := config(g)
			go func() {
				<-time.After(31 * time.Second)
				g.push("dead", 40)
				<-time.After(time.Second)
				g.set(func() { g.skew = leap })
				<-time.After(10 * time.Second)
				g.set(func() { g.skew = 0 })
			}()
			s.run(t, 3*time.Minute)
			equal(t, g.did(), op{15 * time.Second, "put", "silent"}, op{90 * time.Second, "put", "dead"})
		})
	}
}

// TestOneInTheWay has a group whose put never gets an answer: the others have their turn.
func TestOneInTheWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		for _, instance := range []string{"a", "b", "c", "d"} {
			g.push(instance, 7)
		}
		g.answer = func(o op) error {
			if o.instance == "a" || o.instance == "c" {
				return errors.New("reset")
			}
			return nil
		}
		config(g).run(t, 21*time.Second)
		at := func(seconds time.Duration, instance string) op { return op{seconds * time.Second, "put", instance} }
		equal(t, g.did(), at(10, "a"), at(15, "b"), at(15, "c"), at(20, "d"), at(20, "a"))
	})
}

// TestForget has a group that is put down after a minute, and deleted a day later.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("web-1", 40)
		s := config(g)
		s.Interval = time.Minute
		s.run(t, 25*time.Hour)
		equal(t, g.did(), op{time.Minute, "put", "web-1"}, op{24*time.Hour + time.Minute, "delete", "web-1"})
		if n := s.metric(t, "promferry_expiry_deleted_total"); n != 1 {
			t.Errorf("%v deleted", n)
		}
	})
}

// TestLongOutage has a node that was silent for a week when the hub came back: its group is
// down for a day before it is deleted.
func TestLongOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("web-1", 40)
		<-time.After(7 * 24 * time.Hour)
		g.begin, g.started = time.Now(), time.Now()
		s := config(g)
		s.Interval = time.Minute
		s.run(t, 25*time.Hour)
		equal(t, g.did(), op{time.Minute, "put", "web-1"}, op{24*time.Hour + time.Minute, "delete", "web-1"})
	})
}

// TestCrossing has a node that puts between the listing and the put that puts it down.
func TestCrossing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("web-1", 40)
		<-time.After(time.Minute)
		g.begin = time.Now()
		var back atomic.Bool
		g.during = func() {
			if back.CompareAndSwap(false, true) {
				g.push("web-1", 40)
				time.AfterFunc(15*time.Second, func() { g.push("web-1", 40) })
			}
		}
		config(g).run(t, 30*time.Second)
		equal(t, g.did(), op{0, "put", "web-1"})
		if g.texts["web-1"] != "up 1\n" {
			t.Errorf("it holds %s", g.texts["web-1"])
		}
	})
}

// TestBrokenListing has listings that break off after a group that is silent.
func TestBrokenListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("dead", 40)
		g.push("web-1", 40)
		<-time.After(time.Hour)
		g.begin, g.cutAt = time.Now(), 2
		s := config(g)
		go func() {
			<-time.After(12 * time.Second)
			g.set(func() { g.cutAt = 0 })
		}()
		s.run(t, 17*time.Second)
		equal(t, g.did(), op{15 * time.Second, "put", "dead"}, op{15 * time.Second, "put", "web-1"})
		for labels, want := range map[string]float64{"result=failure": 3, "result=success": 1} {
			if n := s.metric(t, "promferry_expiry_sweeps_total", labels); n != want {
				t.Errorf("%v sweeps %s, want %v", n, labels, want)
			}
		}
		if n := s.metric(t, "promferry_expiry_failures_total", "reason=other"); n != 3 {
			t.Errorf("%v failures, want 3", n)
		}
		if log := s.log.String(); strings.Count(log, "Sweep failed") != 1 || strings.Count(log, "Sweep succeeded again") != 1 {
			t.Errorf("log: %s", log)
		}
	})
}

// TestSlow has a Pushgateway that needs 20 s for its list: half of its time at most. The node
// is found silent all the same, when it has been for 40 s.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.takes = 20 * time.Second
		g.push("dead", 40)
		every(t, 15*time.Second, func() { g.push("web-1", 40) })
		config(g).run(t, 119*time.Second)
		if want := []time.Duration{0, 40 * time.Second, 80 * time.Second}; !slices.Equal(g.sweeps, want) {
			t.Errorf("sweeps at %v, want %v", g.sweeps, want)
		}
		equal(t, g.did(), op{100 * time.Second, "put", "dead"})
	})
}

// TestOthersGoOn has a Pushgateway that hangs beside one that does not.
func TestOthersGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hanging, g := newGateway(t), newGateway(t)
		hanging.name, hanging.away = "http://hanging", true
		g.push("web-1", 40)
		s := config(hanging, g)
		s.run(t, 58*time.Second)
		equal(t, g.did(), op{45 * time.Second, "put", "web-1"})
		if len(g.sweeps) != 12 {
			t.Errorf("%d sweeps in 58 s, want 12", len(g.sweeps))
		}
		// Ten seconds of waiting, and as long a pause; the last one was cut by the end.
		if n := s.metric(t, "promferry_expiry_sweeps_total", "gateway=http://hanging", "result=failure"); n != 3 {
			t.Errorf("%v failures, want 3", n)
		}
	})
}

// TestRefusedPut has a Pushgateway that refuses one group, and one that does not answer.
func TestRefusedPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct {
			err    error
			want   string
			reason string
		}{
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 400}, "[a b c]", "invalid"},
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 413}, "[a b c]", "status"},
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 403}, "[a b c]", "status"},
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 500}, "[a b c]", "status"},
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 401}, "[a]", "status"},
			{&pushgw.StatusError{Op: "put", URL: "u", Code: 503}, "[a]", "status"},
			{errors.New("reset"), "[a]", "other"},
		} {
			g := newGateway(t)
			for _, instance := range []string{"a", "b", "c"} {
				g.push(instance, 40)
			}
			<-time.After(time.Hour)
			g.answer = func(o op) error {
				if o.instance == "a" {
					return tc.err
				}
				return nil
			}
			s := config(g)
			err := expiry.New(s.Config).Once(t.Context())
			if !errors.Is(err, tc.err) {
				t.Errorf("%v: error %v", tc.err, err)
			}
			var instances []string
			for _, o := range g.did() {
				instances = append(instances, o.instance)
			}
			if got := fmt.Sprint(instances); got != tc.want {
				t.Errorf("%v: put %s, want %s", tc.err, got, tc.want)
			}
			if n := s.metric(t, "promferry_expiry_failures_total", "reason="+tc.reason); n != 1 {
				t.Errorf("%v: %v failures %s", tc.err, n, tc.reason)
			}
		}
	})
}

// TestManySilent has a Pushgateway that checks its pushes, a second each: after half a minute
// the list is read anew, and nodes that came back since are left alone.
func TestManySilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		for i := range 100 {
			g.push(fmt.Sprintf("web-%02d", i), 40)
		}
		<-time.After(time.Hour)
		g.begin = time.Now()
		g.answer = func(op) error {
			<-time.After(time.Second)
			return nil
		}
		go func() {
			<-time.After(10500 * time.Millisecond)
			for i := range 100 {
				g.push(fmt.Sprintf("web-%02d", i), 4000)
			}
		}()
		config(g).run(t, 10*time.Minute)
		if did := g.did(); len(did) != 31 || did[30].at != 30*time.Second {
			t.Errorf("%d put down: %v", len(did), did)
		}
	})
}

// TestStop has a stop in the middle of a put: Run ends at once, and that is no fault.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("web-1", 40)
		<-time.After(time.Hour)
		g.answer = func(op) error { return context.Canceled }
		begin := time.Now()
		g.during = func() { g.set(func() { g.away = true }) }
		s := config(g)
		s.run(t, 3*time.Second)
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("it took %v", took)
		}
		if n := s.metric(t, "promferry_expiry_sweeps_total", "result=failure"); n != 0 {
			t.Errorf("%v failures", n)
		}
		if strings.Contains(s.log.String(), "failed") {
			t.Errorf("log: %s", s.log)
		}
	})
}

func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		stuck := make(chan struct{})
		s := config(g)
		var beats atomic.Int32
		var last atomic.Int64
		begin := time.Now()
		s.Heartbeat = 10 * time.Second
		s.OnHeartbeat = func() {
			beats.Add(1)
			last.Store(int64(time.Since(begin)))
		}
		e := expiry.New(s.Config)
		go func() {
			<-time.After(12 * time.Second)
			g.set(func() { g.during = func() { <-stuck } }) // Whatever its context says.
			<-time.After(10 * time.Minute)
			close(stuck)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 11*time.Minute)
		defer cancel()
		_ = e.Run(ctx)
		// From the sweep at 15 s on: 60 s for the list, twice 10 for the rest, 30 to act, 10.
		if n := beats.Load(); n != 14+5 {
			t.Errorf("%d heartbeats, the last at %v", n, time.Duration(last.Load()))
		}
		if status := e.Status(); !strings.HasPrefix(status, "Sweeping http://pgw: 0 groups live, 0 silent, last sweep ") {
			t.Errorf("status %q", status)
		}
	})
}

func TestDryRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.push("forgotten", 40)
		g.set(func() {
			f := g.groups["forgotten"]
			f.SilentSince = f.Pushed
			g.groups["forgotten"] = f
		})
		g.push("batch", 0)
		<-time.After(24 * time.Hour)
		g.push("silent", 40)
		<-time.After(time.Minute)
		g.push("web-1", 40)
		var out strings.Builder
		if err := expiry.New(config(g).Config).DryRun(t.Context(), &out); err != nil {
			t.Fatal(err)
		}
		const want = `delete on http://pgw: group {job="node",instance="forgotten"}, silent for 24h1m0s
put down on http://pgw: group {job="node",instance="silent"}, silent for 1m0s
http://pgw: 1 groups live, 2 silent, 1 without expiry, 0 not readable
`
		if out.String() != want {
			t.Errorf("got\n%swant\n%s", out.String(), want)
		}
		equal(t, g.did())
	})
}

func TestMetricsLint(t *testing.T) {
	s := config(newGateway(t))
	_ = expiry.New(s.Config)
	problems, err := testutil.GatherAndLint(s.registry)
	if err != nil || len(problems) > 0 {
		t.Error(err, problems)
	}
	for _, reason := range []string{"refused", "timeout", "status", "invalid", "malformed", "other"} {
		if n := s.metric(t, "promferry_expiry_failures_total", "gateway=http://pgw", "reason="+reason); n != 0 {
			t.Errorf("%s begins at %v", reason, n)
		}
	}
}
