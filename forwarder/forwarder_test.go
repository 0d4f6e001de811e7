package forwarder_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/forwarder"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/target"
)

// scraper answers each scrape as answer says. It is nil-safe for what tests leave out.
type scraper struct {
	mu     sync.Mutex
	begins []time.Time
	answer func(ctx context.Context, job string) (string, error)
}

func (s *scraper) Scrape(ctx context.Context, t target.Target) ([]byte, string, error) {
	s.mu.Lock()
	s.begins = append(s.begins, time.Now())
	s.mu.Unlock()
	if s.answer == nil {
		return []byte("node_load1 1\n"), "text/plain", nil
	}
	text, err := s.answer(ctx, t.Job)
	if err != nil {
		return nil, "", &target.ScrapeError{Reason: target.ReasonConnect, URL: t.URL.String(), Err: err}
	}
	return []byte(text), "text/plain", nil
}

// gateway notes what is put, and answers as answer says.
type gateway struct {
	t      *testing.T
	name   string
	answer func(ctx context.Context, n int) error
	mu     sync.Mutex
	puts   []put
}

// put is one request: its time, group, and as text what was in it; "deleted" for a delete.
type put struct {
	at          time.Time
	group, text string
}

func (g *gateway) String() string { return g.name }

func (g *gateway) Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error {
	r, err := gzip.NewReader(bytes.NewReader(body.Gzipped))
	if err != nil {
		g.t.Error(err)
		return err
	}
	text, err := io.ReadAll(r)
	if err != nil {
		g.t.Error(err)
	}
	return g.note(ctx, put{time.Now(), key.String(), string(text)})
}

func (g *gateway) Delete(ctx context.Context, key pushgw.GroupingKey) error {
	return g.note(ctx, put{time.Now(), key.String(), "deleted"})
}

func (g *gateway) note(ctx context.Context, p put) error {
	g.mu.Lock()
	g.puts = append(g.puts, p)
	n := len(g.puts)
	g.mu.Unlock()
	if g.answer == nil {
		return nil
	}
	return g.answer(ctx, n)
}

func (g *gateway) all() []put {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.puts)
}

func (p put) has(line string) bool { return strings.Contains("\n"+p.text, "\n"+line+"\n") }

func hang(ctx context.Context, _ int) error {
	<-ctx.Done()
	return ctx.Err()
}

// setup has what the tests vary; the rest is as config makes it.
type setup struct {
	forwarder.Config
	registry *prometheus.Registry
	log      *bytes.Buffer
}

func config(s forwarder.Scraper, gateways ...*gateway) setup {
	registry := prometheus.NewRegistry()
	var log bytes.Buffer
	u, _ := url.Parse("http://127.0.0.1:9100/metrics")
	cfg := forwarder.Config{
		Targets:        []target.Target{{Job: "node", URL: u}},
		Scraper:        s,
		Instance:       "web-1",
		Schedule:       forwarder.Every(15 * time.Second),
		ScrapeTimeout:  10 * time.Second,
		PushTimeout:    10 * time.Second,
		ExpiresAfter:   40 * time.Second,
		OnStop:         forwarder.Down,
		ShutdownBudget: 20 * time.Second,
		Format:         exposition.Text,
		Version:        "1.2.3",
		Logger:         slog.New(slog.NewTextHandler(&log, nil)),
		Registerer:     registry,
	}
	for _, g := range gateways {
		cfg.Gateways = append(cfg.Gateways, g)
	}
	return setup{cfg, registry, &log}
}

// forward runs a forwarder for some time, then stops it and waits for its end.
func forward(t *testing.T, s setup, d time.Duration) {
	t.Helper()
	f, err := forwarder.New(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := f.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func (s setup) metric(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			matches := 0
			for _, l := range m.GetLabel() {
				if slices.Contains(labels, l.GetName()+"="+l.GetValue()) {
					matches++
				}
			}
			if matches == len(labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s %q", name, labels)
	return 0
}

func TestGroupHasTargetsFamiliesAndCompanions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw"}
		s := config(&scraper{answer: func(context.Context, string) (string, error) {
			<-time.After(2 * time.Second)
			return "node_load1{instance=\"x\"} 1\nup 7\nb 1\n", nil
		}}, g)
		s.Labels = map[string]string{"env": "prod"}
		s.Schedule = forwarder.Every(time.Hour)
		forward(t, s, 5*time.Second)
		puts := g.all()
		if len(puts) != 2 {
			t.Fatalf("%d puts, want the first cycle's and that on stop: %v", len(puts), puts)
		}
		for _, line := range []string{
			`node_load1{exported_instance="x"} 1`, "b 1", "up 1", "scrape_duration_seconds 2", "scrape_samples_scraped 3",
			"promferry_expires_after_seconds 40", `promferry_info{mode="push",version="1.2.3"} 1`,
		} {
			if !puts[0].has(line) {
				t.Errorf("no line %q in\n%s", line, puts[0].text)
			}
		}
		if want := `{job="node",env="prod",instance="web-1"}`; puts[0].group != want {
			t.Errorf("group %s, want %s", puts[0].group, want)
		}
		if strings.Contains(puts[1].text, "node_load1") || !puts[1].has("up 0") || !puts[1].has("scrape_samples_scraped 0") || !puts[1].has("promferry_expires_after_seconds 40") {
			t.Errorf("put on stop:\n%s", puts[1].text)
		}
		if n := s.metric(t, "promferry_forwarder_left_out_families", "reason=reserved"); n != 1 {
			t.Errorf("%v families left out as reserved, want 1", n)
		}
	})
}

func TestOnStop(t *testing.T) {
	for onStop, want := range map[forwarder.OnStop]int{forwarder.Delete: 2, forwarder.Keep: 1} {
		synctest.Test(t, func(t *testing.T) {
			g := &gateway{t: t, name: "http://pgw"}
			s := config(&scraper{}, g)
			s.OnStop = onStop
			forward(t, s, time.Second)
			puts := g.all()
			if len(puts) != want || want == 2 && puts[1].text != "deleted" {
				t.Errorf("%s: %v", onStop, puts)
			}
		})
	}
}

func TestFailedScrapePutsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, answer := range map[string]struct {
			text string
			err  error
		}{
			"no answer": {"", errors.New("connection refused")},
			"empty":     {"", nil},
			"HTML":      {"<html>\n", nil},
			"cut":       {"node_load1 1\nnode_lo", nil},
		} {
			g := &gateway{t: t, name: "http://pgw"}
			s := config(&scraper{answer: func(context.Context, string) (string, error) { return answer.text, answer.err }}, g)
			s.OnStop = forwarder.Keep
			s.Schedule = forwarder.Every(time.Hour)
			forward(t, s, time.Second)
			puts := g.all()
			if len(puts) != 1 || !puts[0].has("up 0") || strings.Contains(puts[0].text, "node_load1") {
				t.Errorf("%s: puts %v", name, puts)
			}
			if !strings.Contains(s.log.String(), "Scrape failed") || !strings.Contains(s.log.String(), "scrape http://127.0.0.1:9100/metrics: ") {
				t.Errorf("%s: log %s", name, s.log)
			}
		}
	})
}

// TestPhase checks that the first cycle begins at once, that the others keep to the grid
// of host and target across a restart, and that hosts differ.
func TestPhase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval = 15 * time.Second
		phases := make(map[time.Duration]bool)
		for host := range 20 {
			var phase time.Duration
			for run := range 2 {
				<-time.After(7 * time.Second)
				started := time.Now()
				sc := &scraper{}
				s := config(sc, &gateway{t: t, name: "http://pgw"})
				s.Instance = fmt.Sprint("web-", host)
				forward(t, s, 5*interval)
				if got := sc.begins[0]; !got.Equal(started) {
					t.Fatalf("first cycle %v after the start", got.Sub(started))
				}
				if len(sc.begins) < 5 || len(sc.begins) > 6 {
					t.Fatalf("%d cycles in 5 intervals", len(sc.begins))
				}
				for i, begin := range sc.begins[1:] {
					got := time.Duration(begin.UnixNano()) % interval
					if run == 0 && i == 0 {
						phase = got
					}
					if got != phase {
						t.Fatalf("host %d, run %d: cycle %d has phase %v, want %v", host, run, i+1, got, phase)
					}
				}
			}
			phases[phase] = true
		}
		if len(phases) < 18 {
			t.Errorf("20 hosts have %d phases", len(phases))
		}
	})
}

func TestLateCycleIsSkippedAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running, most := 0, 0
		sc := &scraper{answer: func(context.Context, string) (string, error) {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			<-time.After(25 * time.Second)
			mu.Lock()
			running--
			mu.Unlock()
			return "m 1\n", nil
		}}
		s := config(sc, &gateway{t: t, name: "http://pgw"})
		s.ScrapeTimeout = time.Minute
		forward(t, s, 5*time.Minute)
		if most != 1 {
			t.Errorf("%d cycles of one target at once", most)
		}
		// In 300 s there are 20 ticks and the first cycle; each runs through one or two more.
		skipped := s.metric(t, "promferry_forwarder_cycles_skipped_total")
		if begun := len(sc.begins); begun < 9 || begun > 12 || int(skipped)+begun < 20 || int(skipped)+begun > 22 {
			t.Errorf("%d cycles begun, %v skipped", begun, skipped)
		}
	})
}

func TestCronIsKeptAsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		schedule, err := forwarder.Cron("CRON_TZ=UTC */5 * * * *")
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(90 * time.Second)
		sc := &scraper{}
		s := config(sc, &gateway{t: t, name: "http://pgw"})
		s.Schedule = schedule
		forward(t, s, 20*time.Minute)
		if len(sc.begins) != 5 {
			t.Fatalf("%d cycles, want the first and four", len(sc.begins))
		}
		for _, begin := range sc.begins[1:] {
			if begin.Unix()%300 != 0 || begin.Nanosecond() != 0 {
				t.Errorf("cycle at %v", begin)
			}
		}
	})
}

// TestSlowGatewayCostsOthersNothing has one gateway that hangs and one that is fine.
func TestSlowGatewayCostsOthersNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := &gateway{t: t, name: "http://bad", answer: hang}
		good := &gateway{t: t, name: "http://good"}
		sc := &scraper{}
		s := config(sc, bad, good)
		s.PushTimeout = 15 * time.Second
		begin := time.Now()
		forward(t, s, 10*time.Minute)
		// One put for each cycle, at its very time, and one on stop.
		puts := good.all()
		if len(puts) != len(sc.begins)+1 {
			t.Fatalf("%d puts for %d cycles", len(puts), len(sc.begins))
		}
		for i, b := range sc.begins {
			if !puts[i].at.Equal(b) {
				t.Errorf("put %d came %v after its scrape", i, puts[i].at.Sub(b))
			}
		}
		if took := time.Since(begin) - 10*time.Minute; took > s.ShutdownBudget {
			t.Errorf("the stop took %v", took)
		}
	})
}

func TestTimedOutPutIsNotTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw", answer: func(ctx context.Context, n int) error {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return hang(ctx, n)
		}}
		sc := &scraper{}
		s := config(sc, g)
		s.OnStop = forwarder.Keep
		forward(t, s, 5*time.Minute)
		if len(g.all()) != len(sc.begins) {
			t.Errorf("%d puts for %d cycles", len(g.all()), len(sc.begins))
		}
	})
}

// TestRetries checks after which answers a put is tried again within its interval, and
// that each try has the newest exposition.
func TestRetries(t *testing.T) {
	for _, tc := range []struct {
		name  string
		err   error
		retry bool
	}{
		{"refused", fmt.Errorf("put: %w", syscall.ECONNREFUSED), true},
		{"500", &pushgw.StatusError{Code: 500}, true},
		{"503", &pushgw.StatusError{Code: 503}, true},
		{"401", &pushgw.StatusError{Code: 401}, false},
		{"429", &pushgw.StatusError{Code: 429}, false},
		{"307", &pushgw.StatusError{Code: 307}, false},
		{"reset", fmt.Errorf("put: %w", syscall.ECONNRESET), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cycles := 0
				sc := &scraper{answer: func(context.Context, string) (string, error) {
					cycles++
					return fmt.Sprintf("cycle %d\n", cycles), nil
				}}
				g := &gateway{t: t, name: "http://pgw", answer: func(context.Context, int) error { return tc.err }}
				s := config(sc, g)
				s.OnStop = forwarder.Keep
				forward(t, s, 10*time.Minute)
				puts := g.all()
				if !tc.retry {
					if len(puts) != len(sc.begins) {
						t.Errorf("%d puts for %d cycles", len(puts), len(sc.begins))
					}
					return
				}
				// 15 s take full-jitter waits of 0.25, 0.5, 1, 2, 4 and 5 s on average: some 6 tries.
				if perCycle := float64(len(puts)) / float64(len(sc.begins)); perCycle < 3 || perCycle > 12 {
					t.Errorf("%.1f puts for each cycle", perCycle)
				}
				for _, p := range puts {
					n, _ := slices.BinarySearchFunc(sc.begins, p.at.Add(1), time.Time.Compare)
					if !p.has(fmt.Sprint("cycle ", n)) {
						t.Errorf("%v after cycle %d began this was put:\n%s", p.at.Sub(sc.begins[n-1]), n, p.text)
					}
				}
			})
		})
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw", answer: func(_ context.Context, n int) error {
			if n == 1 {
				return &pushgw.StatusError{Code: 503, RetryAfter: 100 * time.Second}
			}
			return nil
		}}
		sc := &scraper{}
		s := config(sc, g)
		s.OnStop = forwarder.Keep
		forward(t, s, 150*time.Second)
		puts := g.all()
		if wait := puts[1].at.Sub(puts[0].at); wait != 100*time.Second {
			t.Errorf("next put after %v", wait)
		}
		if n := s.metric(t, "promferry_forwarder_puts_superseded_total"); n < 5 {
			t.Errorf("%v puts superseded, want at least 5", n)
		}
	})
}

func clash(name string) error {
	return &pushgw.StatusError{Code: 400, Message: fmt.Sprintf("pushed metrics are invalid or inconsistent with existing metrics: collected metric %q { gauge:<value:1 > } is not a COUNTER", name)}
}

// TestRefusedFamilyIsLeftOut has a gateway that refuses two families, one after the other.
func TestRefusedFamilyIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw"}
		refusing := true
		g.answer = func(context.Context, int) error {
			last := g.all()[len(g.all())-1]
			for _, name := range []string{"a", "b"} {
				if refusing && last.has(name+" 1") {
					return clash(name)
				}
			}
			return nil
		}
		s := config(&scraper{answer: func(context.Context, string) (string, error) { return "a 1\nb 1\nc 1\n", nil }}, g)
		s.OnStop = forwarder.Keep
		f, err := forwarder.New(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		<-time.After(time.Minute)
		puts := g.all()
		// First cycle: all, then without a (which is refused for b). From then on: c alone.
		if len(puts) < 4 || !puts[0].has("a 1") || puts[1].has("a 1") || !puts[1].has("b 1") {
			t.Fatalf("puts %v", puts)
		}
		for _, p := range puts[2:] {
			if p.has("a 1") || p.has("b 1") || !p.has("c 1") || !p.has("up 1") {
				t.Errorf("put\n%s", p.text)
			}
		}
		if n := s.metric(t, "promferry_forwarder_refused_families", "gateway=http://pgw"); n != 2 {
			t.Errorf("%v families refused, want 2", n)
		}
		if n := strings.Count(s.log.String(), "Pushgateway refuses a family"); n != 2 {
			t.Errorf("%d lines of log for two families:\n%s", n, s.log)
		}
		refusing = false
		f.Reload()
		before := len(g.all())
		<-time.After(time.Minute)
		if p := g.all()[before]; !p.has("a 1") || !p.has("b 1") {
			t.Errorf("after a reload:\n%s", p.text)
		}
		cancel()
		running.Wait()
		if n := s.metric(t, "promferry_forwarder_refused_families", "gateway=http://pgw"); n != 0 {
			t.Errorf("%v families refused after a reload", n)
		}
	})
}

func TestRefusalWithoutANamePutsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw"}
		g.answer = func(context.Context, int) error {
			if g.all()[len(g.all())-1].has("m 1") {
				return &pushgw.StatusError{Op: "put", URL: "http://pgw", Code: 400, Message: "out of ideas"}
			}
			return nil
		}
		sc := &scraper{answer: func(context.Context, string) (string, error) { return "m 1\n", nil }}
		s := config(sc, g)
		s.OnStop = forwarder.Keep
		forward(t, s, time.Minute)
		puts := g.all()
		if len(puts) != 2*len(sc.begins) || !puts[1].has("up 0") {
			t.Errorf("%d cycles, puts %v", len(sc.begins), puts)
		}
		if !strings.Contains(s.log.String(), "out of ideas") {
			t.Errorf("log %s", s.log)
		}
	})
}

// TestStopWithinBudget has all that is slow at once.
func TestStopWithinBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := &gateway{t: t, name: "http://bad", answer: hang}
		good := &gateway{t: t, name: "http://good"}
		s := config(&scraper{answer: func(ctx context.Context, _ string) (string, error) { return "", hang(ctx, 0) }}, bad, good)
		s.Schedule, s.ScrapeTimeout, s.PushTimeout = forwarder.Every(time.Hour), time.Hour, time.Hour
		begin := time.Now()
		forward(t, s, time.Second)
		if took := time.Since(begin) - time.Second; took > s.ShutdownBudget {
			t.Errorf("the stop took %v", took)
		}
		puts := good.all()
		if len(puts) == 0 || !puts[len(puts)-1].has("up 0") {
			t.Fatalf("the good gateway was not told: %v", puts)
		}
		if at := puts[len(puts)-1].at.Sub(begin) - time.Second; at > s.ShutdownBudget/2 {
			t.Errorf("the good gateway was told %v after the stop began", at)
		}
		if !strings.Contains(s.log.String(), "Group left as it is") {
			t.Errorf("log %s", s.log)
		}
	})
}

func TestCycleInFlightEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gateway{t: t, name: "http://pgw"}
		s := config(&scraper{answer: func(context.Context, string) (string, error) {
			<-time.After(5 * time.Second)
			return "m 1\n", nil
		}}, g)
		forward(t, s, time.Second)
		puts := g.all()
		if len(puts) != 2 || !puts[0].has("m 1") || !puts[1].has("up 0") {
			t.Errorf("puts %v", puts)
		}
	})
}

// TestHeartbeat checks that the heartbeat stops while a gateway ignores its context.
func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		released := make(chan struct{})
		g := &gateway{t: t, name: "http://pgw", answer: func(context.Context, int) error { <-released; return nil }}
		s := config(&scraper{}, g)
		var mu sync.Mutex
		var last time.Time
		count := 0
		s.Heartbeat, s.OnHeartbeat = 5*time.Second, func() {
			mu.Lock()
			defer mu.Unlock()
			count, last = count+1, time.Now()
		}
		beats := func() (int, time.Time) {
			mu.Lock()
			defer mu.Unlock()
			return count, last
		}
		f, err := forwarder.New(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		begin := time.Now()
		<-time.After(5*time.Minute - time.Second)
		stuck, at := beats()
		if after := at.Sub(begin); after < 15*time.Second || after > s.PushTimeout+15*time.Second {
			t.Errorf("last heartbeat after %v", after)
		}
		close(released)
		<-time.After(time.Minute)
		if n, _ := beats(); n < stuck+11 {
			t.Errorf("%d heartbeats in the minute after", n-stuck)
		}
		cancel()
		running.Wait()
	})
}

func TestOnce(t *testing.T) {
	for _, tc := range []struct {
		name    string
		scrape  error
		put     func(context.Context, int) error
		wantErr string
		puts    int
	}{
		{name: "well", puts: 1},
		{name: "exporter down", scrape: errors.New("connection refused"), wantErr: "connection refused", puts: 1},
		{name: "gateway down", put: func(context.Context, int) error { return &pushgw.StatusError{Code: 401} }, wantErr: "401", puts: 1},
		{name: "gateway back", put: func(_ context.Context, n int) error {
			if n < 3 {
				return syscall.ECONNREFUSED
			}
			return nil
		}, puts: 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := &gateway{t: t, name: "http://pgw", answer: tc.put}
				s := config(&scraper{answer: func(context.Context, string) (string, error) { return "m 1\n", tc.scrape }}, g)
				s.ExpiresAfter = 0
				f, err := forwarder.New(s.Config)
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				err = f.Once(t.Context())
				if tc.wantErr == "" && err != nil || tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)) {
					t.Errorf("got %v, want %q", err, tc.wantErr)
				}
				puts := g.all()
				if len(puts) != tc.puts || strings.Contains(puts[0].text, "expires") || puts[0].has("up 1") != (tc.scrape == nil) {
					t.Errorf("puts %v", puts)
				}
				if took := time.Since(begin); took > 15*time.Second {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

func TestDryRun(t *testing.T) {
	g := &gateway{t: t, name: "http://pgw"}
	s := config(&scraper{answer: func(context.Context, string) (string, error) { return "m 1\nup 7\n", nil }}, g)
	f, err := forwarder.New(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := f.DryRun(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{`# put to http://pgw, group {job="node",instance="web-1"}`, "# left out: up (reserved)", "m 1", "up 1"} {
		if !strings.Contains(b.String(), line+"\n") {
			t.Errorf("no line %q in\n%s", line, b.String())
		}
	}
	if len(g.all()) > 0 {
		t.Error("something was put")
	}
	if _, _, err := exposition.Read(t.Context(), []byte(b.String()), "text/plain"); err != nil {
		t.Errorf("what is printed cannot be read: %v", err)
	}
}

func TestMetricsLint(t *testing.T) {
	s := config(&scraper{}, &gateway{t: t, name: "http://pgw"})
	if _, err := forwarder.New(s.Config); err != nil {
		t.Fatal(err)
	}
	problems, err := testutil.GatherAndLint(s.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n := s.metric(t, "promferry_forwarder_put_failures_total", "reason=timeout"); n != 0 {
		t.Errorf("begins at %v", n)
	}
}

func TestNewRefusesAKeyThatCannotBePut(t *testing.T) {
	s := config(&scraper{}, &gateway{t: t, name: "http://pgw"})
	s.Labels = map[string]string{"le": "x"}
	if _, err := forwarder.New(s.Config); err == nil {
		t.Error("no error")
	}
}
