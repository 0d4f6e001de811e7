// Package forwarder scrapes push targets on a schedule and puts what they expose to
// Pushgateways, in the way that Prometheus would have recorded it.
package forwarder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"sync"
	"time"

	"github.com/go-co-op/gocron/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/target"
)

// Scraper reads the whole exposition of a target, or returns a *target.ScrapeError.
type Scraper interface {
	Scrape(ctx context.Context, t target.Target) (body []byte, contentType string, err error)
}

// Gateway is where groups are put; String is its URL as it may be shown. Its methods must
// return when their context ends.
type Gateway interface {
	fmt.Stringer
	Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error
	Delete(ctx context.Context, key pushgw.GroupingKey) error
}

// OnStop says what becomes of the groups when the forwarder stops.
type OnStop string

const (
	// Down replaces each group by up 0 and its companions.
	Down OnStop = "down"
	// Delete deletes each group.
	Delete OnStop = "delete"
	// Keep leaves each group as it is.
	Keep OnStop = "keep"
)

// Config is what a Forwarder works with. All fields are needed but those that say what
// their zero value means.
type Config struct {
	// Targets are what is scraped. No two may have one job.
	Targets []target.Target
	// Gateways are where each exposition is put, each on its own.
	Gateways []Gateway
	// Scraper reads the targets.
	Scraper Scraper
	// Shown returns the begin of a text that quotes what the target at u answered, without
	// what must not be shown of that; nil shows it as it is.
	Shown func(u *url.URL, text string) string
	// Instance is the instance label of each group.
	Instance string
	// Labels are further labels of each group's grouping key; nil means none.
	Labels map[string]string
	// Schedule says when the targets are scraped. Once and DryRun take from it how long
	// a failed put is tried again.
	Schedule Schedule
	// ScrapeTimeout is how long one scrape may take.
	ScrapeTimeout time.Duration
	// PushTimeout is how long one put may take.
	PushTimeout time.Duration
	// ExpiresAfter is what each group says it is good for. Zero leaves it out.
	ExpiresAfter time.Duration
	// OnStop says what becomes of the groups when Run ends.
	OnStop OnStop
	// ShutdownBudget is how long Run takes at most to end.
	ShutdownBudget time.Duration
	// Format is what puts are written in.
	Format exposition.Format
	// Keep and Drop match names of families; nil keeps all, and drops none.
	Keep, Drop *regexp.Regexp
	// Ledger remembers the groups that are put, so that those that are no longer configured
	// are deleted; nil remembers none.
	Ledger *Ledger
	// GatewayAt returns the Pushgateway at a URL of the ledger, which is not configured any
	// more. It is needed with a Ledger. Credentials are for what is configured: it must send
	// them to no other server.
	GatewayAt func(*url.URL) Gateway
	// Version is this program's, for promferry_info.
	Version string
	// Heartbeat is how often OnHeartbeat is called. Zero means never.
	Heartbeat time.Duration
	// OnHeartbeat is called from the scheduler, while no cycle and no put is stuck.
	OnHeartbeat func()
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the forwarder's metrics.
	Registerer prometheus.Registerer
}

// Forwarder forwards. One of Run, Once and DryRun can be called, once.
type Forwarder struct {
	cfg     Config
	metrics *metrics
	targets []*pushTarget
	workers []*worker
	// keys are those of all targets' groups.
	keys   []pushgw.GroupingKey
	status status
	notes  faultlog.Log
}

// pushTarget is a target with its group and the state of its cycles.
type pushTarget struct {
	target.Target
	key    pushgw.GroupingKey
	rules  exposition.Rules
	faults faultlog.Log

	cycling sync.Mutex // held through a cycle
	running stopwatch
	left    leftOutLog
}

// New returns a forwarder, which does nothing yet. It fails when a group's key could not
// be put.
func New(cfg Config) (*Forwarder, error) {
	f := &Forwarder{cfg: cfg, metrics: newMetrics(cfg.Registerer, cfg.Targets, cfg.Gateways)}
	f.notes.Logger = cfg.Logger
	f.status.targets, f.status.gateways = len(cfg.Targets), len(cfg.Gateways)
	for _, t := range cfg.Targets {
		labels := map[string]string{model.InstanceLabel: cfg.Instance}
		grouping := []string{model.JobLabel, model.InstanceLabel}
		for name, value := range cfg.Labels {
			labels[name] = value
			grouping = append(grouping, name)
		}
		logger := cfg.Logger.With("target", t.Job)
		pt := &pushTarget{
			Target: t,
			key:    pushgw.GroupingKey{Job: t.Job, Labels: labels},
			rules:  exposition.Rules{Grouping: grouping, Keep: cfg.Keep, Drop: cfg.Drop},
			faults: faultlog.Log{Logger: logger},
			left:   leftOutLog{logger: logger},
		}
		if err := pt.key.Validate(); err != nil {
			return nil, fmt.Errorf("target %s: %w", t, err)
		}
		f.targets = append(f.targets, pt)
		f.keys = append(f.keys, pt.key)
	}
	for _, g := range cfg.Gateways {
		f.workers = append(f.workers, newWorker(f, g))
	}
	return f, nil
}

// Run forwards until ctx ends, when it ends the cycles in flight, does what OnStop says
// and returns nil, all within ShutdownBudget. It returns an error when it cannot begin.
func (f *Forwarder) Run(ctx context.Context) error {
	scheduler, err := gocron.NewScheduler()
	if err != nil {
		return err
	}
	cleaners := f.openLedger(ctx)
	defer f.cfg.Ledger.close()
	// What is in flight when ctx ends goes on: a scrape for half of the budget, so that
	// there is time to put, a put for all of it.
	work, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	scrapes, cutScrapes := context.WithCancel(work)
	defer cutScrapes()

	var cycles gate
	for _, t := range f.targets {
		job, options := f.cfg.Schedule.job(f.cfg.Instance+"\xff"+t.Job, time.Now())
		if _, err := scheduler.NewJob(job, gocron.NewTask(func() { cycles.run(func() { _ = f.cycle(scrapes, t) }) }), options...); err != nil {
			return fmt.Errorf("schedule %s: %w", t, err)
		}
	}
	if f.cfg.Heartbeat > 0 {
		if _, err := scheduler.NewJob(gocron.DurationJob(f.cfg.Heartbeat), gocron.NewTask(f.heartbeat),
			gocron.WithStartAt(gocron.WithStartImmediately())); err != nil {
			return fmt.Errorf("schedule the heartbeat: %w", err)
		}
	}

	var workers, first, cleaning sync.WaitGroup
	for _, w := range f.workers {
		workers.Go(func() {
			w.run(work)
			w.leave(work) // As soon as it can: no gateway waits for another.
			w.unnote(work)
		})
	}
	for _, t := range f.targets {
		first.Go(func() { cycles.run(func() { _ = f.cycle(scrapes, t) }) })
	}
	for _, c := range cleaners {
		cleaning.Go(func() {
			c.run(ctx, func(t *pushTarget) { cycles.run(func() { _ = f.cycle(scrapes, t) }) })
		})
	}
	scheduler.Start()

	<-ctx.Done()
	f.cfg.Logger.Info("Stopping", "cause", context.Cause(ctx), "on_stop", f.cfg.OnStop)
	budget := time.AfterFunc(f.cfg.ShutdownBudget, cut)
	defer budget.Stop()
	half := time.AfterFunc(f.cfg.ShutdownBudget/2, cutScrapes)
	defer half.Stop()
	// Before the scheduler, which would wait for them in a loop that takes a whole core.
	cycles.close()
	first.Wait()
	cleaning.Wait()
	if err := scheduler.Shutdown(); err != nil {
		f.cfg.Logger.Warn("Scheduler did not end in time", "err", err)
	}
	for _, w := range f.workers {
		w.close(false)
	}
	workers.Wait()
	return nil
}

// Once tries once to delete each group that is no longer configured, within PushTimeout in
// all, and does one cycle of each target. It returns all that went wrong.
func (f *Forwarder) Once(ctx context.Context) error {
	cleaners := f.openLedger(ctx)
	defer f.cfg.Ledger.close()
	cleaned := f.cleanOnce(ctx, cleaners)
	errs := make([]error, len(f.targets)+len(f.workers))
	var all sync.WaitGroup
	for i, t := range f.targets {
		all.Go(func() { errs[i] = f.cycle(ctx, t) })
	}
	all.Wait()
	for i, w := range f.workers {
		w.close(true)
		all.Go(func() {
			w.run(ctx)
			w.unnote(ctx)
			errs[len(f.targets)+i] = w.lastErrors()
		})
	}
	all.Wait()
	return errors.Join(append(errs, cleaned)...)
}

// DryRun does one cycle of each target, but writes to w, as text, what it would have put
// and to which group, and which groups it would have deleted.
func (f *Forwarder) DryRun(ctx context.Context, w io.Writer) error {
	errs := []error{f.printAbandoned(w)}
	for _, t := range f.targets {
		c := f.scrape(ctx, t)
		errs = append(errs, c.err)
		for _, gateway := range f.cfg.Gateways {
			if _, err := fmt.Fprintf(w, "# put to %s, group %s\n", gateway, t.key); err != nil {
				return err
			}
		}
		for _, l := range c.left {
			if _, err := fmt.Fprintf(w, "# left out: %s\n", describe(l)); err != nil {
				return err
			}
		}
		if err := exposition.Write(w, c.families, exposition.Text); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// Reload forgets which families Pushgateways refused: they are put again.
func (f *Forwarder) Reload() {
	for _, w := range f.workers {
		w.forgetRefused()
	}
}

// Status returns a sentence for an operator: targets, last put, last fault. It is safe
// for concurrent use.
func (f *Forwarder) Status() string { return f.status.String() }

// gate lets functions run until it is closed.
type gate struct {
	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup
}

// run runs f, unless the gate is closed.
func (g *gate) run(f func()) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.running.Add(1)
	g.mu.Unlock()
	defer g.running.Done()
	f()
}

// close waits for what runs.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.running.Wait()
}

// stuckAfter is by how much a scrape or put may overrun its timeout, before the forwarder
// counts as stuck rather than as late.
const stuckAfter = 10 * time.Second

func (f *Forwarder) heartbeat() {
	for _, t := range f.targets {
		if t.running.elapsed() > f.cfg.ScrapeTimeout+stuckAfter {
			return
		}
	}
	for _, w := range f.workers {
		if w.running.elapsed() > f.cfg.PushTimeout+stuckAfter {
			return
		}
	}
	f.cfg.OnHeartbeat()
}
