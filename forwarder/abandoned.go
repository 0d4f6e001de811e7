package forwarder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/promferry/promferry/internal/backoff"
	"github.com/promferry/promferry/pushgw"
)

// The bounds of the wait before another try to delete a group. Nobody waits for it, and the
// Pushgateway may be gone for good.
const (
	cleanBase  = 5 * time.Second
	cleanLimit = 5 * time.Minute
)

// cleaner deletes, on one Pushgateway, the groups that are no longer configured.
type cleaner struct {
	forwarder *Forwarder
	// url is the Pushgateway's in the ledger.
	url     string
	gateway Gateway
	// former tells that it is not configured, so that it gets no credentials, unless another
	// one at the same server is.
	former bool
	left   []pushgw.GroupingKey
	// told is the reason of the last failure that was logged.
	told string
}

// openLedger opens the ledger and returns the cleaners for what is no longer configured. A
// fault of the ledger stops nothing: it is logged and counted.
func (f *Forwarder) openLedger(ctx context.Context) []*cleaner {
	switch err := f.cfg.Ledger.open(); {
	case errors.Is(err, errNotOwner):
		f.cfg.Logger.WarnContext(ctx, "Ledger of groups is not acted on and begins anew, as in a copy of a disk or an image", "err", err)
	case err != nil:
		f.metrics.ledgerFailures.Inc()
		f.cfg.Logger.ErrorContext(ctx, "Ledger of groups is not usable: what is no longer configured is not deleted", "err", err)
	}
	return f.cleaners()
}

// cleaners returns one for each Pushgateway on which the ledger has a group that is no
// longer configured. What is configured changes with a restart only, so nothing that they
// delete is ever put by this process.
func (f *Forwarder) cleaners() []*cleaner {
	abandoned := f.cfg.Ledger.abandoned(f.cfg.Gateways, f.keys)
	var cleaners []*cleaner
	for _, at := range slices.Sorted(maps.Keys(abandoned)) {
		c := &cleaner{forwarder: f, url: at, left: abandoned[at]}
		if i := slices.IndexFunc(f.cfg.Gateways, func(g Gateway) bool { return g.String() == at }); i >= 0 {
			c.gateway = f.cfg.Gateways[i]
		} else {
			u, _ := url.Parse(at) // The ledger has URLs only.
			u.RawQuery = ""       // Where there was one, it is not known.
			c.gateway, c.former = f.cfg.GatewayAt(u), true
		}
		f.metrics.abandoned.Add(float64(len(c.left)))
		cleaners = append(cleaners, c)
	}
	return cleaners
}

// run deletes until nothing is left or ctx ends. Another Pushgateway's URL may have been
// this one's as well: then what is configured there was deleted here, and again scrapes and
// puts it at once.
func (c *cleaner) run(ctx context.Context, again func(*pushTarget)) {
	for attempt := 0; ; attempt++ {
		deleted, err := c.once(ctx)
		for _, t := range c.forwarder.targets {
			if slices.ContainsFunc(deleted, func(key pushgw.GroupingKey) bool { return key.String() == t.key.String() }) {
				again(t)
			}
		}
		if len(c.left) == 0 || ctx.Err() != nil {
			return
		}
		wait := backoff.Delay(attempt, cleanBase, cleanLimit)
		if se, ok := errors.AsType[*pushgw.StatusError](err); ok {
			wait = max(wait, min(se.RetryAfter, maxRetryAfter))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// once tries each group that is left, unless the Pushgateway does not answer. It returns
// those that it deleted, and takes them off the ledger.
func (c *cleaner) once(ctx context.Context) (deleted []pushgw.GroupingKey, err error) {
	f := c.forwarder
	var left []pushgw.GroupingKey
	var errs []error
	for i, key := range c.left {
		err := c.delete(ctx, key)
		if err == nil {
			deleted = append(deleted, key)
			continue
		}
		left = append(left, key)
		errs = append(errs, err)
		if _, answered := errors.AsType[*pushgw.StatusError](err); !answered {
			left = append(left, c.left[i+1:]...)
			break
		}
	}
	c.left = left
	if len(deleted) > 0 {
		f.metrics.abandoned.Sub(float64(len(deleted)))
		f.forget(ctx, c.url, deleted...)
	}
	return deleted, errors.Join(errs...)
}

func (c *cleaner) delete(ctx context.Context, key pushgw.GroupingKey) error {
	f := c.forwarder
	logger := f.cfg.Logger.With("group", key.String(), "gateway", c.gateway.String())
	deleteCtx, cancel := context.WithTimeout(ctx, f.cfg.PushTimeout)
	defer cancel()
	err := c.gateway.Delete(deleteCtx, key)
	switch {
	case err == nil:
		f.metrics.deletions.WithLabelValues(outcomeSuccess).Inc()
		logger.InfoContext(ctx, "Abandoned group deleted: it is no longer configured")
		c.told = ""
	case !errors.Is(ctx.Err(), context.Canceled):
		f.metrics.deletions.WithLabelValues(outcomeFailure).Inc()
		// It may go on for ever: a line for each try would fill the log of a node whose
		// Pushgateway was moved.
		reason := putReason(err)
		endIt := "if that Pushgateway is gone for good, take it out of " + f.cfg.Ledger.Path() + " while the agent is stopped"
		if c.former && unauthorized(err) {
			reason = "unauthorized"
			endIt = "credentials are sent to the Pushgateways of --push.url only: run the agent once with this one as --push.url and with --push.on-stop=delete, " +
				"or delete the group with promferry delete and take that Pushgateway out of " + f.cfg.Ledger.Path() + " while the agent is stopped"
		}
		if reason != c.told {
			c.told = reason
			logger.WarnContext(ctx, "Abandoned group not deleted, it will be tried until it is", "err", err, "end_it", endIt)
		}
	}
	return err
}

// unauthorized tells whether err says that credentials are missing.
func unauthorized(err error) bool {
	se, ok := errors.AsType[*pushgw.StatusError](err)
	return ok && (se.Code == http.StatusUnauthorized || se.Code == http.StatusForbidden)
}

// cleanOnce tries each group that is no longer configured once. All of that has PushTimeout.
func (f *Forwarder) cleanOnce(ctx context.Context, cleaners []*cleaner) error {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.PushTimeout)
	defer cancel()
	errs := make([]error, len(cleaners))
	var all sync.WaitGroup
	for i, c := range cleaners {
		all.Go(func() { _, errs[i] = c.once(ctx) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// printAbandoned writes which groups would be deleted.
func (f *Forwarder) printAbandoned(w io.Writer) error {
	if err := f.cfg.Ledger.peek(); err != nil && !errors.Is(err, errNotOwner) {
		return err
	}
	for _, c := range f.cleaners() {
		for _, key := range c.left {
			if _, err := fmt.Fprintf(w, "# delete from %s, group %s, which is no longer configured\n", c.gateway, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// forget takes groups off the ledger that were deleted. Where that fails, they are deleted
// once more later.
func (f *Forwarder) forget(ctx context.Context, gateway string, keys ...pushgw.GroupingKey) {
	f.tellLedger(ctx, f.cfg.Ledger.forget(gateway, keys...))
}

// tellLedger counts and logs how a write of the ledger went.
func (f *Forwarder) tellLedger(ctx context.Context, err error) {
	if err != nil {
		f.metrics.ledgerFailures.Inc()
		f.notes.Failed(ctx, "Ledger of groups not written: what is put now may be left behind when it is configured no more", err)
		return
	}
	f.notes.Succeeded(ctx, "Ledger of groups written again")
}
