package expiry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/expiry"
	"github.com/promferry/promferry/pushgw"
)

var errBroken = errors.New("broken")

// gateway is a Pushgateway in memory, with a clock of its own.
type gateway struct {
	t    *testing.T
	name string

	mu      sync.Mutex
	skew    time.Duration // by which its clock is ahead of ours
	started time.Time
	groups  map[string]pushgw.Group
	texts   map[string]string // what was last put to a group
	ops     []op
	sweeps  []time.Duration // when it was asked for its status, since begin

	begin  time.Time
	away   bool          // answers nothing, not even a refusal
	takes  time.Duration // that a listing takes
	cutAt  int           // the listing breaks off before this group, counted from 1
	during func()        // is called when a listing is made, and not yet read
	answer func(o op) error
}

// op is a put or a delete: when it came, since begin, and to which instance.
type op struct {
	at             time.Duration
	what, instance string
}

func newGateway(t *testing.T) *gateway {
	t.Helper()
	return &gateway{
		t: t, name: "http://pgw", begin: time.Now(), started: time.Now().Add(-1000 * time.Hour),
		groups: make(map[string]pushgw.Group), texts: make(map[string]string),
	}
}

func key(instance string) pushgw.GroupingKey {
	return pushgw.GroupingKey{Job: "node", Labels: map[string]string{"instance": instance}}
}

// now returns the time by the gateway's clock. The caller holds mu.
func (g *gateway) now() time.Time { return time.Now().Add(g.skew) }

// push puts a group as its owner does.
func (g *gateway) push(instance string, expiresAfter float64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.groups[instance] = pushgw.Group{Key: key(instance), Families: 5, Pushed: g.now(), ExpiresAfter: expiresAfter}
	g.texts[instance] = "up 1\n"
}

func (g *gateway) String() string { return g.name }

func (g *gateway) wait(ctx context.Context) error {
	g.mu.Lock()
	away := g.away
	g.mu.Unlock()
	if away {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (g *gateway) Status(ctx context.Context) (pushgw.Status, error) {
	g.mu.Lock()
	g.sweeps = append(g.sweeps, time.Since(g.begin))
	g.mu.Unlock()
	if err := g.wait(ctx); err != nil {
		return pushgw.Status{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return pushgw.Status{Now: g.now().Truncate(time.Second), Started: g.started}, nil
}

func (g *gateway) Groups(ctx context.Context) iter.Seq2[pushgw.Group, error] {
	return func(yield func(pushgw.Group, error) bool) {
		if err := g.wait(ctx); err != nil {
			yield(pushgw.Group{}, err)
			return
		}
		g.mu.Lock()
		listed := maps.Clone(g.groups)
		takes, during, cutAt := g.takes, g.during, g.cutAt
		g.mu.Unlock()
		if during != nil {
			during()
		}
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			yield(pushgw.Group{}, ctx.Err())
			return
		}
		for i, instance := range slices.Sorted(maps.Keys(listed)) {
			if i+1 == cutAt {
				yield(pushgw.Group{}, errBroken)
				return
			}
			if !yield(listed[instance], nil) {
				return
			}
		}
	}
}

func (g *gateway) Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error {
	r, err := gzip.NewReader(bytes.NewReader(body.Gzipped))
	if err != nil {
		return err
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	instance := key.Labels["instance"]
	if err := g.note(ctx, "put", instance); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.groups[instance]
	// Only that there is one is of interest: the text has its value.
	since := time.Time{}
	if strings.Contains(string(text), "\npromferry_silent_since_timestamp_seconds ") {
		since = old.Pushed
	}
	g.groups[instance] = pushgw.Group{Key: key, Families: 5, Pushed: g.now(), ExpiresAfter: old.ExpiresAfter, SilentSince: since}
	g.texts[instance] = string(text)
	return nil
}

func (g *gateway) Delete(ctx context.Context, key pushgw.GroupingKey) error {
	instance := key.Labels["instance"]
	if err := g.note(ctx, "delete", instance); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.groups, instance)
	return nil
}

func (g *gateway) note(ctx context.Context, what, instance string) error {
	o := op{time.Since(g.begin), what, instance}
	g.mu.Lock()
	g.ops = append(g.ops, o)
	answer := g.answer
	g.mu.Unlock()
	if err := g.wait(ctx); err != nil {
		return err
	}
	if answer == nil {
		return nil
	}
	return answer(o)
}

// did returns the puts and deletes so far, without those of the owners.
func (g *gateway) did() []op {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.ops)
}

// set changes the gateway under its lock.
func (g *gateway) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
}

// setup has what the tests vary.
type setup struct {
	expiry.Config
	registry *prometheus.Registry
	log      *bytes.Buffer
}

func config(gateways ...*gateway) setup {
	s := setup{registry: prometheus.NewRegistry(), log: &bytes.Buffer{}}
	s.Config = expiry.Config{
		Interval: 5 * time.Second, ListTimeout: time.Minute, PushTimeout: 10 * time.Second, ForgetAfter: 24 * time.Hour,
		Logger: slog.New(slog.NewTextHandler(s.log, nil)), Registerer: s.registry,
	}
	for _, g := range gateways {
		s.Gateways = append(s.Gateways, g)
	}
	return s
}

// run sweeps for some time, then stops and waits for the end.
func (s setup) run(t *testing.T, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := expiry.New(s.Config).Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// every does something now and then each interval, until the test ends.
func every(t *testing.T, interval time.Duration, do func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wait.Wait()
	})
	do()
	wait.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				do()
			case <-ctx.Done():
				return
			}
		}
	})
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

func equal(t *testing.T, got []op, want ...op) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("done: %v, want %v", got, want)
	}
}
