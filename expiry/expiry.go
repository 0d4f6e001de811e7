// Package expiry finds the groups on Pushgateways whose owner went silent. It puts them down,
// as a scrape that fails would under pull, and later deletes them.
package expiry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/pushgw"
)

// Gateway is a Pushgateway; String is its URL as it may be shown. Its methods must return
// when their context ends.
type Gateway interface {
	fmt.Stringer
	Status(ctx context.Context) (pushgw.Status, error)
	Groups(ctx context.Context) iter.Seq2[pushgw.Group, error]
	Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error
	Delete(ctx context.Context, key pushgw.GroupingKey) error
}

// Config is what an Expirer works with. All fields are needed but those that say what their
// zero value means.
type Config struct {
	// Gateways are swept, each on its own.
	Gateways []Gateway
	// Interval is how often each is swept, from begin to begin. After a sweep there is a pause
	// that is at least as long as its listing took.
	Interval time.Duration
	// ListTimeout is how long reading the list of groups may take.
	ListTimeout time.Duration
	// PushTimeout is how long one put, one delete and the question for the time may take.
	PushTimeout time.Duration
	// ForgetAfter is how long after it was put down a group is deleted.
	ForgetAfter time.Duration
	// Heartbeat is how often OnHeartbeat is called. Zero means never.
	Heartbeat time.Duration
	// OnHeartbeat is called while no sweep is stuck.
	OnHeartbeat func()
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Expirer sweeps. One of Run, Once and DryRun can be called, once. Two that sweep the same
// Pushgateway do no harm: the second one finds done what the first one did.
type Expirer struct {
	cfg      Config
	sweepers []*sweeper
}

// New returns an expirer, which does nothing yet.
func New(cfg Config) *Expirer {
	e := &Expirer{cfg: cfg}
	m := newMetrics(cfg.Registerer, cfg.Gateways)
	for _, g := range cfg.Gateways {
		e.sweepers = append(e.sweepers, newSweeper(&e.cfg, g, m))
	}
	return e
}

// Run sweeps until ctx ends, when it returns nil.
func (e *Expirer) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, s := range e.sweepers {
		all.Go(func() { s.run(ctx) })
	}
	if e.cfg.Heartbeat > 0 {
		all.Go(func() { e.beat(ctx) })
	}
	all.Wait()
	return nil
}

// Once sweeps each Pushgateway once. It returns all that went wrong.
func (e *Expirer) Once(ctx context.Context) error {
	errs := make([]error, len(e.sweepers))
	var all sync.WaitGroup
	for i, s := range e.sweepers {
		all.Go(func() { errs[i] = s.sweep(ctx) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// DryRun writes to w what a sweep of each Pushgateway would do, and does nothing of it.
func (e *Expirer) DryRun(ctx context.Context, w io.Writer) error {
	var errs []error
	for _, s := range e.sweepers {
		found, err := s.find(ctx)
		errs = append(errs, err)
		if err != nil {
			continue
		}
		for _, a := range found.actions {
			if _, err := fmt.Fprintf(w, "%s on %s: group %s, silent for %v\n", a.verdict, s.gateway, a.group.Key, a.silence(found.now)); err != nil {
				return err
			}
		}
		n := found.groups
		if _, err := fmt.Fprintf(w, "%s: %d groups live, %d silent, %d without expiry, %d not readable\n",
			s.gateway, n[stateLive], n[stateSilent], n[stateWithout], n[stateUnreadable]); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

func (e *Expirer) beat(ctx context.Context) {
	tick := time.NewTicker(e.cfg.Heartbeat)
	defer tick.Stop()
	for {
		stuck := false
		for _, s := range e.sweepers {
			stuck = stuck || s.stuck()
		}
		if !stuck {
			e.cfg.OnHeartbeat()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
