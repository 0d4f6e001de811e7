package expiry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/pushgw"
)

const (
	// actFor is for how long a listing is acted on. A Pushgateway that checks its pushes does
	// one a second when it is large; what is left waits for the next listing, so that a
	// node that has come back since is not put down.
	actFor = 30 * time.Second
	// maxActions is how many groups one sweep puts down or deletes at most, which bounds the
	// memory it needs.
	maxActions = 1000
	// awayAfter is how much later than expected the answer comes from a Pushgateway that was
	// away: hung, cut off, or its clock set forward. A node that pushes every 15 s is good for
	// 40 s, and so bears an absence of less.
	awayAfter = 15 * time.Second
)

// sweeper sweeps one Pushgateway.
type sweeper struct {
	cfg     *Config
	gateway Gateway
	metrics *metrics
	faults  faultlog.Log
	status  status

	// expected is when, by the Pushgateway's clock, the sweep after the last one that listed
	// was to be; back is when the Pushgateway was back from being away. Only sweep uses them.
	expected, back time.Time
	// stopped is the group at which the last sweep that did not come to its end stopped.
	stopped string
	// listing is how long the last listing took. Only run and sweep use it.
	listing time.Duration
}

func newSweeper(cfg *Config, g Gateway, m *metrics) *sweeper {
	return &sweeper{cfg: cfg, gateway: g, metrics: m, faults: faultlog.Log{Logger: cfg.Logger.With("gateway", g.String())}}
}

// run sweeps until ctx ends.
func (s *sweeper) run(ctx context.Context) {
	for {
		begin := time.Now()
		_ = s.sweep(ctx) // Logged and counted there.
		select {
		case <-time.After(s.pause(time.Since(begin))):
		case <-ctx.Done():
			return
		}
	}
}

// pause returns how long to wait after a sweep that took so long: a Pushgateway that is slow to
// list is not kept busy with that for more than half of its time.
func (s *sweeper) pause(took time.Duration) time.Duration {
	return max(s.cfg.Interval-took, s.listing)
}

// A verdict is what is to be done with a group.
type verdict string

const (
	nothing verdict = "nothing"
	putDown verdict = "put down"
	forget  verdict = "delete"
)

// The states of promferry_expiry_groups.
const (
	stateLive       = "live"
	stateSilent     = "silent"
	stateWithout    = "without_expiry"
	stateUnreadable = "unreadable" // the listing does not tell its key, or it is one that we do not put
)

var states = []string{stateLive, stateSilent, stateWithout, stateUnreadable}

// action is a group and what is to be done with it.
type action struct {
	group   pushgw.Group
	verdict verdict
}

// silence returns for how long the group's owner has been silent.
func (a action) silence(now time.Time) time.Duration {
	since := a.group.Pushed
	if !a.group.SilentSince.IsZero() {
		since = a.group.SilentSince
	}
	return now.Sub(since).Round(time.Second)
}

// findings is what came of reading a listing.
type findings struct {
	now     time.Time // by the Pushgateway's clock
	groups  map[string]int
	actions []action
}

// sweep lists the groups and does with each what is to be done. It returns what went wrong,
// which is logged and counted.
func (s *sweeper) sweep(ctx context.Context) error {
	begin := time.Now()
	s.status.began()
	found, err := s.find(ctx)
	s.listing = time.Since(begin)
	if err == nil {
		for _, state := range states {
			s.metrics.groups.WithLabelValues(s.gateway.String(), state).Set(float64(found.groups[state]))
		}
		err = s.act(ctx, found)
		took := time.Since(begin)
		s.expected = found.now.Add(took + s.pause(took))
	} else if ctx.Err() == nil {
		s.metrics.failures.WithLabelValues(s.gateway.String(), reason(err)).Inc()
	}
	if err != nil && ctx.Err() != nil {
		return err // We were told to stop, and that is no fault.
	}
	s.metrics.duration.WithLabelValues(s.gateway.String()).Observe(time.Since(begin).Seconds())
	s.status.ended(found.groups, err)
	if err != nil {
		s.metrics.sweeps.WithLabelValues(s.gateway.String(), sweepFailure).Inc()
		s.faults.Failed(ctx, "Sweep failed", err)
		return err
	}
	s.metrics.sweeps.WithLabelValues(s.gateway.String(), sweepSuccess).Inc()
	s.metrics.lastSweep.WithLabelValues(s.gateway.String()).SetToCurrentTime()
	s.faults.Succeeded(ctx, "Sweep succeeded again")
	return nil
}

// find reads the whole listing before anything is done: so nothing is done because of one
// that breaks off, and the Pushgateway, which holds all of it in its memory, gets rid of it.
func (s *sweeper) find(ctx context.Context) (findings, error) {
	found := findings{groups: make(map[string]int)}
	// The time is asked for first. That of the listing's own answer is later than the
	// listing, by what making it took, and would make groups look older than they are.
	statusCtx, cancel := context.WithTimeout(ctx, s.cfg.PushTimeout)
	defer cancel()
	status, err := s.gateway.Status(statusCtx)
	if err != nil {
		return found, err
	}
	found.now = status.Now
	if !s.expected.IsZero() && status.Now.Sub(s.expected) > awayAfter {
		s.back = status.Now
	} else if s.back.After(status.Now) {
		s.back = status.Now // The clock had been ahead, and was set back.
	}
	since := status.Started
	if s.back.After(since) {
		since = s.back
	}
	listCtx, cancel := context.WithTimeout(ctx, s.cfg.ListTimeout)
	defer cancel()
	for group, err := range s.gateway.Groups(listCtx) {
		if err != nil {
			return found, err
		}
		state, verdict := s.judge(group, status.Now, since)
		if verdict != nothing && group.Key.Validate() != nil {
			state, verdict = stateUnreadable, nothing
		}
		found.groups[state]++
		if verdict != nothing && len(found.actions) < maxActions {
			found.actions = append(found.actions, action{group, verdict})
		}
	}
	return found, nil
}

// judge tells what state a group is in, and what is to be done with it. Silence counts from
// since, unless the last push was later.
func (s *sweeper) judge(g pushgw.Group, now, since time.Time) (string, verdict) {
	switch {
	case g.Key.Job == "":
		return stateUnreadable, nothing
	case g.ExpiresAfter == 0 || g.Pushed.IsZero():
		return stateWithout, nothing
	case !g.SilentSince.IsZero():
		// From the last push, which was the one that put it down, and not from when the
		// silence began: after a week-end's outage of the hub, up 0 stands long enough
		// for somebody to see it.
		// Nor is the time of an absence counted, which may be a clock that leaps.
		if now.Sub(g.Pushed) >= s.cfg.ForgetAfter && now.Sub(s.back) >= s.cfg.ForgetAfter {
			return stateSilent, forget
		}
		return stateSilent, nothing
	}
	if g.Pushed.After(since) {
		since = g.Pushed
	}
	if now.Sub(since).Seconds() > g.ExpiresAfter {
		return stateSilent, putDown
	}
	return stateLive, nothing
}

// act does what was found to do. There is no way to ask a Pushgateway for one group, to see
// whether it was put since the listing: if it was, its owner's next put heals it.
func (s *sweeper) act(ctx context.Context, found findings) error {
	begin := time.Now()
	var failed []error
	// A group that fails each time must not be in the way of the others each time.
	at := func(a action) bool { return a.group.Key.String() == s.stopped }
	after := slices.IndexFunc(found.actions, at) + 1
	actions := slices.Concat(found.actions[after:], found.actions[:after])
	for i, a := range actions {
		if time.Since(begin) > actFor {
			s.faults.Logger.InfoContext(ctx, "The rest waits for the next sweep: the list is old", "done", i, "left", len(actions)-i)
			break
		}
		err := s.do(ctx, a, found.now)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return err
		}
		s.metrics.failures.WithLabelValues(s.gateway.String(), reason(err)).Inc()
		failed = append(failed, err)
		if !onlyThis(err) {
			s.stopped = a.group.Key.String()
			break
		}
	}
	switch len(failed) {
	case 0:
		return nil
	case 1:
		return failed[0]
	}
	return fmt.Errorf("%w; and %d more", failed[0], len(failed)-1)
}

// onlyThis tells whether an error may be because of one group: a Pushgateway, or what is in front
// of it, has answered, and not that it is busy or does not know us.
func onlyThis(err error) bool {
	answer, ok := errors.AsType[*pushgw.StatusError](err)
	if !ok {
		return false
	}
	switch answer.Code {
	case http.StatusUnauthorized, http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return false
	}
	return true
}

func (s *sweeper) do(ctx context.Context, a action, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.PushTimeout)
	defer cancel()
	if a.verdict == forget {
		if err := s.gateway.Delete(ctx, a.group.Key); err != nil {
			return err
		}
		s.metrics.deleted.WithLabelValues(s.gateway.String()).Inc()
		s.faults.Logger.InfoContext(ctx, "Group deleted: its owner did not come back", "group", a.group.Key.String(), "silent_for", a.silence(now))
		return nil
	}
	body, err := downBody(a.group)
	if err != nil {
		return err
	}
	if err := s.gateway.Put(ctx, a.group.Key, body); err != nil {
		return err
	}
	s.metrics.putDown.WithLabelValues(s.gateway.String()).Inc()
	s.faults.Logger.InfoContext(ctx, "Group put down: its owner is silent", "group", a.group.Key.String(), "silent_for", a.silence(now))
	return nil
}

// downBody returns what a group holds whose owner is silent. The first two are as the
// forwarder puts them: a Pushgateway refuses a family of two types, and logs two texts.
func downBody(g pushgw.Group) (pushgw.Body, error) {
	since := float64(g.Pushed.UnixMilli()) / 1000
	gzipped, err := exposition.Encode([]*dto.MetricFamily{
		gauge("up", "1 if the target was scraped, 0 if the scrape failed or the agent stopped.", 0),
		gauge("promferry_expires_after_seconds", "For how long after a put this group is good.", g.ExpiresAfter),
		gauge("promferry_silent_since_timestamp_seconds", "When the owner of this group last pushed, in Unix time: it has been silent since.", since),
	}, exposition.Text)
	return pushgw.Body{ContentType: exposition.Text.ContentType(), Gzipped: gzipped}, err
}

func gauge(name, help string, value float64) *dto.MetricFamily {
	return &dto.MetricFamily{
		Name: &name, Help: &help, Type: dto.MetricType_GAUGE.Enum(),
		Metric: []*dto.Metric{{Gauge: &dto.Gauge{Value: &value}}},
	}
}
