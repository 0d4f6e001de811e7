package gateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// inFile makes a gateway keep its groups in a file.
func inFile(file string) func(*Config) { return func(c *Config) { c.File = file } }

// restart returns a gateway on the file of another one, which it closes.
func restart(t *testing.T, g *Gateway, change func(*Config)) *Gateway {
	t.Helper()
	file := g.config.File
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	return newTest(t, func(c *Config) {
		c.File = file
		if change != nil {
			change(c)
		}
	})
}

// pages returns all that a gateway serves of its groups.
func pages(g *Gateway) string {
	var all strings.Builder
	own := regexp.MustCompile(`(?m)^.*(promferry_gateway|gateway_test).*\n`)
	all.WriteString(own.ReplaceAllString(ask(g, http.MethodGet, "/metrics", "", "Accept", quotedText).Body.String(), ""))
	sd := ask(g, http.MethodGet, "/sd", "").Body.String()
	all.WriteString(sd)
	var entries []targetGroup
	_ = json.Unmarshal([]byte(sd), &entries)
	for _, entry := range entries {
		for _, accept := range []string{quotedText, "", string(expfmt.FmtProtoDelim)} {
			all.WriteString(ask(g, http.MethodGet, entry.Labels["__metrics_path__"], "", "Accept", accept).Body.String())
		}
	}
	all.WriteString(ask(g, http.MethodGet, "/api/v1/metrics", "").Body.String())
	return all.String()
}

const quotedText = "text/plain;version=0.0.4;escaping=allow-utf-8"

// TestRestart shows that what does not expire is served after a restart byte for byte as
// before, and can be added to.
func TestRestart(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	native := &dto.MetricFamily{Name: new("n"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: &dto.Histogram{
		SampleCount: new(uint64(3)), SampleSum: new(4.5), Schema: new(int32(3)), ZeroThreshold: new(0.001), ZeroCount: new(uint64(0)),
		PositiveSpan: []*dto.BucketSpan{{Offset: new(int32(0)), Length: new(uint32(1))}}, PositiveDelta: []int64{3},
	}}}}
	want(t, ask(g, http.MethodPut, "/metrics/job/native", delimited(t, native, gauge("up"), gauge("foo.bar", "l.m", "a\"\\\nb")), "Content-Type", string(expfmt.FmtProtoDelim)), http.StatusOK)
	put(t, g, "/metrics/job@base64/L3Zhci90bXA/x@base64/YSBi", "# HELP a What \\\\ a\\nis.\n# TYPE a counter\na 1\na{b=\"#\"} 2\n")
	put(t, g, "/metrics/job/down", "# TYPE up gauge\nup 0\n")
	put(t, g, "/metrics/job/empty", "")
	put(t, g, "/metrics/job/refused", "a 1\n")
	want(t, ask(g, http.MethodPut, "/metrics/job/refused", "a 1 1\n"), http.StatusBadRequest)
	g.store.sweep() // Writes that it was refused.
	before, status := pages(g), g.Status()
	g = restart(t, g, nil)
	if after := pages(g); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	for i, s := range g.Status().Groups {
		b := status.Groups[i]
		if s.State != b.State || s.Failure != b.Failure || !s.Failed.Equal(b.Failed) || !s.Pushed.Equal(b.Pushed) || s.Series != b.Series || s.Bytes != b.Bytes || !s.OnDisk {
			t.Errorf("before\n%+v\nafter\n%+v", b, s)
		}
	}
	want(t, ask(g, http.MethodPost, "/metrics/job/native", "b 1\n"), http.StatusOK)
	want(t, ask(g, http.MethodGet, "/groups/job/native/metrics", "", "Accept", quotedText), http.StatusOK, "\nb{", "n_count{", `{"foo.bar",`)
	// A younger group comes after the older ones, as before.
	put(t, g, "/metrics/job/younger", "# TYPE b counter\nb 1\n")
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `# Left out: the family "b" of {instance="",job="younger"}`)
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `# Left out: the family "b" of {instance="",job="younger"}`)
}

// TestDeleted shows that what was deleted does not come back.
func TestDeleted(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	for _, job := range []string{"a", "b", "c"} {
		put(t, g, "/metrics/job/"+job, "a 1\n")
		put(t, g, "/metrics/job/"+job+"/instance/1", "up 1\npromferry_expires_after_seconds 30\n")
	}
	want(t, ask(g, http.MethodDelete, "/metrics/job/a", ""), http.StatusAccepted)
	want(t, ask(g, http.MethodDelete, "/metrics/job/b/instance/1", ""), http.StatusAccepted)
	put(t, g, "/metrics/job/b/instance/1", "b 1\n") // Made anew, of the other kind.
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, "!/groups/job/a/metrics", "/groups/job/a/instance/1/metrics", "/groups/job/b/metrics", "/groups/job/b/instance/1/metrics")
	want(t, ask(g, http.MethodGet, "/groups/job/b/instance/1/metrics", ""), http.StatusOK, `b{instance="1",job="b"} 1`)
	_, err := g.store.remove(allGroups(g.store), func(*state) bool { return true })
	if err != nil {
		t.Error(err)
	}
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, "[]")
}

func allGroups(s *Store) []*group {
	var all []*group
	for _, st := range s.states(time.Now()) {
		all = append(all, st.group)
	}
	return all
}

const expiring = "# TYPE up gauge\nup 1\na 1\npromferry_expires_after_seconds 30\n"

// TestRestartExpiring restarts the gateway while nodes are alive, down, silent, and gone: nobody
// that was dead vanishes, and nobody that lives is put down before its time has passed anew.
func TestRestartExpiring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const target = "/groups/job/node/instance/%s/metrics"
		g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
		push := func(instance, body string) {
			put(t, g, "/metrics/job/node/instance/"+instance, body)
		}
		push("dead", expiring)
		died := time.Now()
		<-time.After(time.Hour)
		push("down", strings.Replace(expiring, "up 1", "up 0", 1))
		downSince := time.Now()
		push("alive", expiring)
		push("lost", expiring)
		g.store.sweep()
		<-time.After(29 * time.Second)
		silentSince := died.Add(30 * time.Second).UTC().Format(time.RFC3339)
		deadSays := "silent since " + silentSince + ": the last push, at " + died.UTC().Format(time.RFC3339)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "dead"), ""), http.StatusServiceUnavailable, deadSays)

		g = restart(t, g, nil)
		started := time.Now()
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"dead"`, `"down"`, `"alive"`, `"lost"`)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "dead"), ""), http.StatusServiceUnavailable, deadSays)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "down"), ""), http.StatusServiceUnavailable, "down since "+downSince.UTC().Format(time.RFC3339), "before the gateway restarted")
		for _, lives := range []string{"alive", "lost"} {
			w := ask(g, http.MethodGet, fmt.Sprintf(target, lives), "")
			want(t, w, http.StatusOK, "# The gateway has restarted", "!a{", "!push_time")
			readPage(t, w)
		}
		page := ask(g, http.MethodGet, "/metrics", "")
		want(t, page, http.StatusOK, `up{instance="dead",job="node"} 0`, `up{instance="down",job="node"} 0`, `!"alive"`, `!"lost"`,
			fmt.Sprintf(`push_time_seconds{instance="dead",job="node"} %v`, float64(died.Unix())),
			`promferry_gateway_groups{state="awaited"} 2`, `promferry_gateway_groups{state="down"} 1`, `promferry_gateway_groups{state="silent"} 1`, `promferry_gateway_groups{state="live"} 0`)
		want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK, `"lost"`)

		<-time.After(30*time.Second - 1)
		push("alive", expiring)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "alive"), ""), http.StatusOK, `a{instance="alive",job="node"} 1`)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "lost"), ""), http.StatusOK)
		<-time.After(1)
		for _, gone := range []string{"lost", "down"} { // Down before, and silent now.
			want(t, ask(g, http.MethodGet, fmt.Sprintf(target, gone), ""), http.StatusServiceUnavailable,
				"silent since "+started.Add(30*time.Second).UTC().Format(time.RFC3339)+": no push came")
			want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, fmt.Sprintf(`up{instance=%q,job="node"} 0`, gone))
		}
		g.store.sweep()

		// A second one: who was found silent after the first still is.
		<-time.After(10 * time.Second)
		g = restart(t, g, nil)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "lost"), ""), http.StatusServiceUnavailable, "silent since "+started.Add(30*time.Second).UTC().Format(time.RFC3339))
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "dead"), ""), http.StatusServiceUnavailable, deadSays)
		// Each has a day from when it fell silent.
		<-time.After(time.Until(died.Add(30*time.Second + 24*time.Hour - 1)))
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"dead"`, `"lost"`)
		<-time.After(1)
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"dead"`, `"lost"`)
		g.store.sweep()

		// The hub is away over a week-end: somebody is still told.
		file := g.config.File
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		<-time.After(72 * time.Hour)
		g = newTest(t, inFile(file))
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"dead"`, `"lost"`, `"alive"`)
		want(t, ask(g, http.MethodGet, fmt.Sprintf(target, "alive"), ""), http.StatusServiceUnavailable, "silent since")
		<-time.After(time.Hour - 1)
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"lost"`, `"alive"`)
		<-time.After(1)
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"lost"`)
	})
}

// TestRestored has clocks that were set while a gateway was away, and after its start.
func TestRestored(t *testing.T) {
	started := time.Now()
	s := &Store{config: StoreConfig{ForgetAfter: 24 * time.Hour}, started: started}
	for since, want := range map[time.Duration]time.Duration{-time.Minute: -time.Minute, -72 * time.Hour: -72 * time.Hour, time.Hour: 0} {
		st := s.restored(&group{}, record{ExpiresAfter: time.Minute, SilentSince: started.Add(since).Round(0)})
		if got := st.silentFrom.Sub(started); got != want || !st.silent(started) || st.gone(started) {
			t.Errorf("silent since %v: it is so since %v, want %v", since, got, want)
		}
		for _, at := range []time.Time{st.silentFrom, st.forgotFrom} {
			if !strings.Contains(at.String(), " m=") {
				t.Errorf("%v depends on what the clock is set to", at)
			}
		}
	}
}

// TestRestartDefault has a group whose expiry is that of --expire.default, before and after
// that changes.
func TestRestartDefault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
		put(t, g, "/metrics/job/j", "a 1\n")
		g = restart(t, g, func(c *Config) { c.ExpireDefault = time.Minute })
		<-time.After(time.Minute - 1)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK, "a{")
		<-time.After(1)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable)
		// The default was a mistake, and nothing is lost by it.
		g.store.sweep()
		g = restart(t, g, nil)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK, "a{")
	})
}

// TestManyAtOnce has many push at once: fewer writes than pushes, and all of them are there.
func TestManyAtOnce(t *testing.T) {
	g := newTest(t, func(c *Config) { c.File, c.MaxGroups = filepath.Join(t.TempDir(), "groups.db"), 1000 })
	const pushers, pushes = 32, 20
	var wg sync.WaitGroup
	for p := range pushers {
		wg.Go(func() {
			for i := range pushes {
				w := ask(g, http.MethodPost, fmt.Sprintf("/metrics/job/j/instance/%d", p), fmt.Sprintf("a_%d %d\n", i, i))
				if w.Code != http.StatusOK {
					t.Error(w.Body)
				}
			}
		})
	}
	wg.Wait()
	var m dto.Metric
	if err := g.store.disk.metrics.duration.Write(&m); err != nil || m.GetHistogram().GetSampleCount() >= pushers*pushes {
		t.Errorf("%d writes of %d pushes, %v", m.GetHistogram().GetSampleCount(), pushers*pushes, err)
	}
	g = restart(t, g, nil)
	for p := range pushers {
		families := readPage(t, ask(g, http.MethodGet, fmt.Sprintf("/groups/job/j/instance/%d/metrics", p), ""))
		for i := range pushes {
			if got := families[fmt.Sprintf("a_%d", i)].GetMetric(); len(got) != 1 || got[0].GetUntyped().GetValue() != float64(i) {
				t.Errorf("pusher %d: a_%d is %v", p, i, got)
			}
		}
	}
}

// TestInTurns has many who each push to a group of their own, of either kind, and delete it, while
// groups are swept, and others deleted by matchers: each finds what it did last, also after a
// restart.
func TestInTurns(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	const pushers, steps = 8, 60
	ended := make([]string, pushers) // What each has on disk at its end: "" is no group.
	var pushing, others sync.WaitGroup
	for p := range pushers {
		pushing.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(p)))
			group := fmt.Sprintf("/job/j/instance/%d", p)
			has := ""
			for step := range steps {
				sample := fmt.Sprintf("a{instance=\"%d\",job=\"j\"} %d\n", p, step)
				switch random.IntN(5) {
				case 0:
					want(t, ask(g, http.MethodDelete, "/metrics"+group, ""), http.StatusAccepted)
					has, ended[p] = "", ""
				case 1:
					want(t, ask(g, http.MethodPut, "/metrics"+group, fmt.Sprintf("promferry_expires_after_seconds 60\na %d\n", step)), http.StatusOK)
					has, ended[p] = sample, "# The gateway has restarted"
				case 2:
					if has != "" {
						want(t, ask(g, http.MethodPut, "/metrics"+group, "a 1 1\n"), http.StatusBadRequest)
					}
				default:
					want(t, ask(g, http.MethodPut, "/metrics"+group, fmt.Sprintf("a %d\n", step)), http.StatusOK)
					has, ended[p] = sample, sample
				}
				status := http.StatusOK
				if has == "" {
					status = http.StatusNotFound
				}
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), status, has)
			}
		})
	}
	done := make(chan struct{})
	others.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			put(t, g, "/metrics/job/other", "a 1\n")
			g.store.sweep()
			want(t, ask(g, http.MethodDelete, matching(`{job="other"}`), ""), http.StatusOK, `"other"`)
		}
	})
	pushing.Wait()
	close(done)
	others.Wait()
	g = restart(t, g, nil)
	for p, what := range ended {
		status := http.StatusOK
		if what == "" {
			status = http.StatusNotFound
		}
		want(t, ask(g, http.MethodGet, fmt.Sprintf("/groups/job/j/instance/%d/metrics", p), ""), status, what)
	}
	want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"other"`)
}

// TestBusy has a pusher that waits for the disk, and somebody who deletes many groups: neither a sweep
// nor the deletion of another group waits for them.
func TestBusy(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/busy", "a 1\n")
	put(t, g, "/metrics/job/other", "a 1\n")
	done := make(chan struct{})
	busy := g.store.groups["/job/busy"]
	busy.mu.Lock()
	go func() {
		defer close(done)
		g.store.sweep()
		g.store.several.Lock()
		want(t, ask(g, http.MethodDelete, "/metrics/job/other", ""), http.StatusAccepted)
		g.store.several.Unlock()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("it waits")
	}
	busy.mu.Unlock()
	<-done
}

// TestDiskFails has a disk that takes nothing: what has to be on it is refused and changes
// nothing, and what lives in memory goes on.
func TestDiskFails(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/batch", "a 1\n")
	put(t, g, "/metrics/job/both", "a 1\n")
	if err := g.store.disk.db.Close(); err != nil {
		t.Fatal(err)
	}
	for _, job := range []string{"batch", "new"} {
		want(t, ask(g, http.MethodPut, "/metrics/job/"+job, "a 2\n"), http.StatusServiceUnavailable, "could not be kept", "groups.db", "push it again")
	}
	// On disk it would be one that does not expire, for ever.
	want(t, ask(g, http.MethodPut, "/metrics/job/both", expiring), http.StatusServiceUnavailable)
	want(t, ask(g, http.MethodDelete, "/metrics/job/batch", ""), http.StatusServiceUnavailable, "nothing is deleted")
	put(t, g, "/metrics/job/node", expiring)
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="",job="batch"} 1`, `a{instance="",job="both"} 1`, `a{instance="",job="node"} 1`, `!job="new"`,
		`promferry_gateway_pushes_total{result="disk"} 3`, `push_failure_time_seconds{instance="",job="batch"} 0`)
	if got := testutil.ToFloat64(g.store.disk.metrics.failures); got != 5 {
		t.Errorf("%v failures, want 5", got)
	}
	// It is here again.
	again, err := openDisk(g.config.File, discard{})
	if err != nil {
		t.Fatal(err)
	}
	g.store.disk.db = again.db
	g.store.sweep()
	put(t, g, "/metrics/job/new", "a 3\n")
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"batch"`, `"both"`, `"new"`, `"node"`)
}

// TestRefusedWhenGone refuses pushes to groups in the moment in which they are forgotten: what is
// on disk of them goes as well.
func TestRefusedWhenGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
		put(t, g, "/metrics/job/node", expiring)
		put(t, g, "/metrics/job/other", expiring)
		<-time.After(30*time.Second + g.config.ForgetAfter)
		for _, job := range []string{"node", "other"} {
			want(t, ask(g, http.MethodPut, "/metrics/job/"+job, "a 1 1\n"), http.StatusBadRequest)
		}
		g.store.sweep()
		want(t, ask(g, http.MethodDelete, "/metrics/job/other", ""), http.StatusAccepted)
		g = restart(t, g, nil)
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, "[]")
	})
}

// TestUnsure has a disk that says of writes that they failed, while they are on it, as when only
// the sync at the end of them fails. What was answered with 503 is undone.
func TestUnsure(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/old", "a 1\n")
	put(t, g, "/metrics/job/deleted", "a 1\n")
	if err := g.store.disk.db.Close(); err != nil {
		t.Fatal(err)
	}
	want(t, ask(g, http.MethodPut, "/metrics/job/old", "a 2\n"), http.StatusServiceUnavailable)
	want(t, ask(g, http.MethodPut, "/metrics/job/new", "a 2\n"), http.StatusServiceUnavailable)
	want(t, ask(g, http.MethodDelete, "/metrics/job/deleted", ""), http.StatusServiceUnavailable)
	again, err := openDisk(g.config.File, discard{})
	if err != nil {
		t.Fatal(err)
	}
	g.store.disk.db = again.db
	groups := g.store.groups
	for _, job := range []string{"old", "new"} {
		st := &state{group: groups["/job/"+job], content: &content{}, durable: true}
		if err := g.store.disk.write(st.record(time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.store.disk.write(change{number: groups["/job/deleted"].number}); err != nil {
		t.Fatal(err)
	}
	g.store.sweep()
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="",job="old"} 1`, `a{instance="",job="deleted"} 1`, `!job="new"`)
}

// TestLastSweep shows that why a push was refused outlives a stop that comes at once.
func TestLastSweep(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/j", "a 1\n")
	want(t, ask(g, http.MethodPut, "/metrics/job/j", "a 1 1\n"), http.StatusBadRequest)
	refused := g.Status().Groups[0].Failure
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := g.Run(ctx); err != nil {
		t.Fatal(err)
	}
	g = restart(t, g, nil)
	if got := g.Status().Groups[0].Failure; refused == "" || got != refused {
		t.Errorf("%q, want %q", got, refused)
	}
}

// slowHandler takes a while for each line of the log.
type slowHandler struct {
	slog.Handler
	takes time.Duration
}

func (slowHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h slowHandler) Handle(context.Context, slog.Record) error {
	<-time.After(h.takes)
	return nil
}

// TestRestartTakesLong has a file that takes longer to read than a push is good: the time for the
// next push begins when it can be answered.
func TestRestartTakesLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
		put(t, g, "/metrics/job/node", expiring)
		if err := g.store.disk.write(change{number: 99, record: []byte("no record")}); err != nil {
			t.Fatal(err)
		}
		g = restart(t, g, func(c *Config) { c.Logger = slog.New(slowHandler{slog.DiscardHandler, time.Minute}) })
		<-time.After(30*time.Second - 1)
		want(t, ask(g, http.MethodGet, "/groups/job/node/metrics", ""), http.StatusOK)
		<-time.After(1)
		want(t, ask(g, http.MethodGet, "/groups/job/node/metrics", ""), http.StatusServiceUnavailable)
	})
}

// TestFileReplaced has somebody move the file away, or put another one there: what would be gone
// with the process is not answered with 200.
func TestFileReplaced(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"deleted":  os.Remove,
		"moved":    func(file string) error { return os.Rename(file, file+".moved") },
		"replaced": func(file string) error { return errors.Join(os.Remove(file), os.WriteFile(file, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
			put(t, g, "/metrics/job/batch", "a 1\n")
			if err := change(g.config.File); err != nil {
				t.Fatal(err)
			}
			want(t, ask(g, http.MethodPut, "/metrics/job/batch", "a 2\n"), http.StatusServiceUnavailable, "moved or deleted", "restart the gateway")
			put(t, g, "/metrics/job/node", expiring)
			want(t, ask(g, http.MethodGet, "/groups/job/batch/metrics", ""), http.StatusOK, "} 1\n")
		})
	}
}

// TestPacked packs texts, with tails of all lengths at which something changes.
func TestPacked(t *testing.T) {
	random := make([]byte, 200000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	for _, text := range [][]byte{nil, []byte("a 1\n"), bytes.Repeat([]byte("node_load1 0.5\n"), 10000), random} {
		p := newPacker()
		p.write(text[:len(text)/3])
		p.write(text[len(text)/3:])
		packed := p.packed()
		if got, err := packed.unpack(); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%d bytes come back as %d, %v", len(text), len(got), err)
		}
		for _, n := range []int{0, 1, maxStored - 1, maxStored, maxStored + 1, 2*maxStored + 1} {
			before, behind := packed.gzip(random[:n])
			if got := ungzip(t, slices.Concat(before, packed.Stream, behind)); !bytes.Equal(got, slices.Concat(text, random[:n])) {
				t.Errorf("%d bytes and %d: %d come back", len(text), n, len(got))
			}
		}
		for _, damage := range []func(*packedText){
			func(p *packedText) { p.Sum++ },
			func(p *packedText) { p.Size++ },
			func(p *packedText) { p.Size = -1 },
			func(p *packedText) { p.Size = 1 << 50 },
			func(p *packedText) { p.Stream = append(bytes.Clone(p.Stream[:len(p.Stream)/2]), 0xff) },
		} {
			damaged := packed
			damage(&damaged)
			if got, err := damaged.unpack(); err == nil && len(text) > 0 {
				t.Errorf("damaged, %d bytes come back as %d", len(text), len(got))
			}
		}
	}
}

// TestSplit cuts texts into the families that they were made of.
func TestSplit(t *testing.T) {
	g := newTest(t, nil)
	put(t, g, "/metrics/job/j", "# HELP a # TYPE b gauge\\n\n# TYPE a counter\na{x=\"#\\n# TYPE c gauge\"} 1\n"+
		"# TYPE \"b # TYPE x\\\\\\\"\" gauge\n{\"b # TYPE x\\\\\\\"\",\"#\"=\"1\"} 1\n# TYPE s summary\ns{quantile=\"0.5\"} 1\ns_sum 1\ns_count 1\nup 1\n")
	c := g.store.states(time.Now())[0].content
	got := make(map[string]string)
	for _, f := range familiesOf(t, c) {
		got[f.name] = fmt.Sprint(f.typ, f.series(), f.quoted)
	}
	if want := map[string]string{"a": "COUNTER 1 false", `b # TYPE x\"`: "GAUGE 1 true", "s": "SUMMARY 3 false", "up": "UNTYPED 1 false"}; !maps.Equal(got, want) {
		t.Errorf("families %q, want %q", got, want)
	}
	for _, text := range []string{"a 1\n", "# TYPE a\na 1\n", "# TYPE a nothing\na 1\n", "# HELP a x\na 1\n", "# TYPE a gauge", "# TYPE a gauge\na 1"} {
		if families, err := c.split([]byte(text)); err == nil {
			t.Errorf("%q is %v", text, families)
		}
	}
}

// familiesOf returns copies of the families of a content.
func familiesOf(t *testing.T, c *content) []family {
	t.Helper()
	var all []family
	for _, r := range []textReader{readPlain(c.Own, 0), readPacked(&c.Text, 0)} {
		if err := c.families(r, func(f family) error {
			f.text = bytes.Clone(f.text)
			all = append(all, f)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// discard is a registerer that keeps nothing.
type discard struct{ prometheus.Registerer }

func (discard) MustRegister(...prometheus.Collector) {}

func ungzip(t *testing.T, b []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b)) // The standard library's, which is not what packs.
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
