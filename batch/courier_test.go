package batch_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/batch"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

// fakeGateway stands for a Pushgateway; e2e has the real one.
type fakeGateway struct {
	name string
	// answer is asked for each push, "op job body".
	answer func(push string) error

	mu  sync.Mutex
	got []string
	at  []time.Time
}

func (g *fakeGateway) String() string { return g.name }

func (g *fakeGateway) Put(_ context.Context, key pushgw.GroupingKey, body pushgw.Body) error {
	return g.push("put " + key.Job + " " + string(body.Gzipped))
}

func (g *fakeGateway) Add(_ context.Context, key pushgw.GroupingKey, body pushgw.Body) error {
	return g.push("add " + key.Job + " " + string(body.Gzipped))
}

func (g *fakeGateway) Delete(_ context.Context, key pushgw.GroupingKey) error {
	return g.push("delete " + key.Job)
}

func (g *fakeGateway) push(push string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.got = append(g.got, push)
	g.at = append(g.at, time.Now())
	if g.answer == nil {
		return nil
	}
	return g.answer(push)
}

func push(op outbox.Op, job, body string) batch.Push {
	return batch.Push{Op: op, Key: pushgw.GroupingKey{Job: job}, At: time.Now(), Body: pushgw.Body{Gzipped: []byte(body)}}
}

func newCourier(t *testing.T, gateways ...*fakeGateway) *batch.Courier {
	t.Helper()
	box, err := outbox.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = box.Close() })
	c := &batch.Courier{Outbox: box, Timeout: 10 * time.Second}
	for _, g := range gateways {
		c.Gateways = append(c.Gateways, g)
	}
	return c
}

func keep(t *testing.T, c *batch.Courier, pushes ...batch.Push) *batch.Parcel {
	t.Helper()
	p, err := c.Keep(t.Context(), pushes...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func away(string) error { return &pushgw.StatusError{Code: 503} }

func fates(errs []error) []batch.Fate {
	var all []batch.Fate
	for _, err := range errs {
		if u, ok := errors.AsType[*batch.UndeliveredError](err); ok {
			all = append(all, u.Fate)
		}
	}
	return all
}

func TestEachGatewayOnItsOwn(t *testing.T) {
	good, bad := &fakeGateway{name: "http://good"}, &fakeGateway{name: "http://bad", answer: away}
	c := newCourier(t, bad, good)
	if errs := keep(t, c, push(outbox.Add, "a", "1"), push(outbox.Add, "a", "2")).Deliver(t.Context(), nil); !slices.Equal(fates(errs), []batch.Fate{batch.Kept}) {
		t.Errorf("%v", errs)
	}
	if want := []string{"add a 1", "add a 2"}; !slices.Equal(good.got, want) {
		t.Errorf("good got %q, want %q", good.got, want)
	}
	if want := []string{"add a 1"}; !slices.Equal(bad.got, want) {
		t.Errorf("bad was asked %q, want %q", bad.got, want)
	}
	bad.answer = nil
	// Another push of the same group brings what waited, first.
	if errs := keep(t, c, push(outbox.Add, "a", "3")).Deliver(t.Context(), nil); len(errs) != 0 {
		t.Errorf("%v", errs)
	}
	if want := []string{"add a 1", "add a 1", "add a 2", "add a 3"}; !slices.Equal(bad.got, want) {
		t.Errorf("bad got %q, want %q", bad.got, want)
	}
}

func TestOnceIsNotKept(t *testing.T) {
	g := &fakeGateway{name: "http://g", answer: away}
	c := newCourier(t, g)
	if errs := c.Once(t.Context(), push(outbox.Add, "a", "1")).Deliver(t.Context(), nil); !slices.Equal(fates(errs), []batch.Fate{batch.Lost}) {
		t.Errorf("%v", errs)
	}
	g.answer, g.got = nil, nil
	if d := c.DeliverAll(t.Context(), g); d.Delivered != 0 || d.Err != nil || len(g.got) != 0 {
		t.Errorf("%+v, %q", d, g.got)
	}
	// One that was made before a later push is brought after what waited then, and no more.
	keep(t, c, push(outbox.Add, "a", "old"))
	begin := c.Once(t.Context(), push(outbox.Add, "a", "begin"))
	end := keep(t, c, push(outbox.Add, "a", "end"))
	if errs := append(begin.Deliver(t.Context(), nil), end.Deliver(t.Context(), begin)...); len(errs) != 0 {
		t.Errorf("%v", errs)
	}
	if want := []string{"add a old", "add a begin", "add a end"}; !slices.Equal(g.got, want) {
		t.Errorf("got %q, want %q", g.got, want)
	}
}

func TestWithoutOutbox(t *testing.T) {
	g := &fakeGateway{name: "http://g"}
	c := &batch.Courier{Gateways: []batch.Gateway{g}, Timeout: time.Second}
	if errs := keep(t, c, push(outbox.Put, "a", "1")).Deliver(t.Context(), nil); len(errs) != 0 {
		t.Errorf("%v", errs)
	}
	g.answer = away
	if errs := keep(t, c, push(outbox.Put, "a", "2")).Deliver(t.Context(), nil); !slices.Equal(fates(errs), []batch.Fate{batch.Lost}) {
		t.Errorf("%v", errs)
	}
}

func TestDeliverAll(t *testing.T) {
	refused := &pushgw.StatusError{Code: 400, Message: "no"}
	for name, test := range map[string]struct {
		answer              func(string) error
		delivered, rejected int
		asked, waiting      int
		failed              bool
	}{
		"all is well":                                   {answer: nil, delivered: 6, asked: 6},
		"away: asked once":                              {answer: away, asked: 1, waiting: 6, failed: true},
		"refused connection: asked once":                {answer: func(string) error { return syscall.ECONNREFUSED }, asked: 1, waiting: 6, failed: true},
		"who asks is wrong: asked once":                 {answer: func(string) error { return &pushgw.StatusError{Code: 401} }, asked: 1, waiting: 6, failed: true},
		"one group may not be pushed to: the others go": {answer: failing("add b", &pushgw.StatusError{Code: 403}), delivered: 4, asked: 5, waiting: 2, failed: true},
		"one group breaks it: the others go":            {answer: failing("add b", &pushgw.StatusError{Code: 500}), delivered: 4, asked: 5, waiting: 2, failed: true},
		"one push is refused: set aside":                {answer: failing("add b 1", refused), delivered: 5, rejected: 1, asked: 6},
		"one push is too large: set aside":              {answer: failing("add b 1", &pushgw.StatusError{Code: 413}), delivered: 5, rejected: 1, asked: 6},
		"everything is refused: all of it aside":        {answer: func(string) error { return refused }, rejected: 6, asked: 6},
	} {
		t.Run(name, func(t *testing.T) {
			g := &fakeGateway{name: "http://g", answer: test.answer}
			c := newCourier(t, g)
			for _, job := range []string{"a", "b", "c"} {
				keep(t, c, push(outbox.Add, job, "1"), push(outbox.Add, job, "2"))
			}
			d := c.DeliverAll(t.Context(), g)
			stats, err := c.Outbox.Stats(g.name)
			if err != nil {
				t.Fatal(err)
			}
			if d.Delivered != test.delivered || len(d.Rejected) != test.rejected || len(g.got) != test.asked ||
				stats.Waiting[g.name] != test.waiting || stats.Rejected != test.rejected || (d.Err != nil) != test.failed {
				t.Errorf("%+v, asked %q, %+v; want %+v", d, g.got, stats, test)
			}
		})
	}
}

func failing(prefix string, err error) func(string) error {
	return func(push string) error {
		if strings.HasPrefix(push, prefix) {
			return err
		}
		return nil
	}
}

func TestInvalidKeyIsSetAside(t *testing.T) {
	g := &fakeGateway{name: "http://g"}
	c := newCourier(t, g)
	// Nothing of ours writes this; it would break a Pushgateway.
	if errs := keep(t, c, batch.Push{Op: outbox.Add, Key: pushgw.GroupingKey{Job: "a", Labels: map[string]string{"le": "1"}}}).Deliver(t.Context(), nil); !slices.Equal(fates(errs), []batch.Fate{batch.Refused}) {
		t.Errorf("%v", errs)
	}
	if len(g.got) != 0 {
		t.Errorf("pushed %q", g.got)
	}
}

// TestDeliverer runs for an hour in which the Pushgateway comes back after half of it.
func TestDeliverer(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		box, err := outbox.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = box.Close() }()
		g := &fakeGateway{name: "http://g", answer: away}
		c := &batch.Courier{Gateways: []batch.Gateway{g}, Outbox: box, Timeout: 10 * time.Second}
		registry := prometheus.NewRegistry()
		var log strings.Builder
		d := batch.NewDeliverer(c, slog.New(slog.NewTextHandler(&log, nil)), registry)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := d.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		keep(t, c, push(outbox.Add, "a", "1"), push(outbox.Add, "a", "2"))
		begin := time.Now()
		<-time.After(30 * time.Minute)
		synctest.Wait()
		tries := len(g.got)
		// Each try waits from 5 s to a minute.
		if tries < 30 || tries > 360 {
			t.Errorf("%d tries in half an hour", tries)
		}
		for i := 1; i < tries; i++ {
			if wait := g.at[i].Sub(g.at[i-1]); wait < 5*time.Second || wait > time.Minute {
				t.Errorf("try %d came after %v", i, wait)
			}
		}
		// At most one line a minute, and that of the first failure.
		if lines := strings.Count(log.String(), "Outbox not delivered"); lines == 0 || lines > 31 {
			t.Errorf("%d lines in half an hour", lines)
		}
		if got := testutil.ToFloat64(gauge(t, registry, "promferry_outbox_waiting_pushes")); got != 2 {
			t.Errorf("waiting: %v", got)
		}
		g.mu.Lock()
		g.answer = func(string) error { return nil }
		g.mu.Unlock()
		<-time.After(time.Minute + time.Second)
		synctest.Wait()
		if want := []string{"add a 1", "add a 2"}; !slices.Equal(g.got[tries:], want) {
			t.Errorf("after %v: %q, want %q", time.Since(begin), g.got[tries:], want)
		}
		// From then on a new one waits 5 s at most.
		keep(t, c, push(outbox.Add, "a", "3"))
		<-time.After(5 * time.Second)
		synctest.Wait()
		if last := g.got[len(g.got)-1]; last != "add a 3" {
			t.Errorf("last: %q", last)
		}
		cancel()
		running.Wait()
		problems, err := testutil.GatherAndLint(registry)
		if err != nil || len(problems) != 0 {
			t.Errorf("%v, %v", problems, err)
		}
	})
}

// TestDelivererHonoursRetryAfter has a Pushgateway that asks to wait.
func TestDelivererHonoursRetryAfter(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		box, err := outbox.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = box.Close() }()
		g := &fakeGateway{name: "http://g", answer: func(string) error { return &pushgw.StatusError{Code: 429, RetryAfter: 10 * time.Minute} }}
		c := &batch.Courier{Gateways: []batch.Gateway{g}, Outbox: box, Timeout: time.Second}
		keep(t, c, push(outbox.Add, "a", "1"))
		ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
		defer cancel()
		if err := batch.NewDeliverer(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry()).Run(ctx); err != nil {
			t.Error(err)
		}
		if len(g.got) != 3 {
			t.Errorf("asked %d times in 25 minutes, with Retry-After: 10 minutes", len(g.got))
		}
	})
}

// gauge returns the series of a family for http://g.
func gauge(t *testing.T, r *prometheus.Registry, name string) prometheus.Gauge {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == "http://g" {
				g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "x", Help: "x"})
				g.Set(m.GetGauge().GetValue())
				return g
			}
		}
	}
	panic(fmt.Sprint("no ", name))
}
