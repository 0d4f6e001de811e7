package forwarder

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/promferry/promferry/internal/backoff"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/pushgw"
)

// The bounds of the wait before another try after a refused connection or a 5xx.
const (
	retryBase  = 500 * time.Millisecond
	retryLimit = 10 * time.Second
	// maxRetryAfter bounds what a Pushgateway may ask for, so that a mistake there does
	// not silence a node for good.
	maxRetryAfter = time.Hour
)

// worker puts to one Pushgateway, one group after the other, as a Pushgateway does them
// anyway. For each target it holds the newest contents only.
type worker struct {
	forwarder *Forwarder
	gateway   Gateway
	faults    map[*pushTarget]*faultlog.Log
	running   stopwatch
	wake      chan struct{}
	// noted tells that the groups are in the ledger, added are those that were not before,
	// and reached tells that a put may have arrived. They are used while putting only.
	noted   bool
	added   []pushgw.GroupingKey
	reached bool

	mu      sync.Mutex
	pending map[*pushTarget]*try
	refused map[*pushTarget]map[string]bool
	errs    map[*pushTarget]error
	// notBefore is what the Pushgateway asked for with Retry-After.
	notBefore time.Time
	closed    bool
	retrying  bool // tries again after close
}

// try is a put that is to be done.
type try struct {
	*contents
	attempt   int
	notBefore time.Time
}

func newWorker(f *Forwarder, g Gateway) *worker {
	w := &worker{
		forwarder: f,
		gateway:   g,
		faults:    make(map[*pushTarget]*faultlog.Log),
		wake:      make(chan struct{}, 1),
		pending:   make(map[*pushTarget]*try),
		refused:   make(map[*pushTarget]map[string]bool),
		errs:      make(map[*pushTarget]error),
		retrying:  true,
	}
	for _, t := range f.targets {
		w.faults[t] = &faultlog.Log{Logger: f.cfg.Logger.With("target", t.Job, "gateway", g.String())}
	}
	return w
}

// offer gives the worker newer contents for a group. It does not wait.
func (w *worker) offer(c *contents) {
	w.mu.Lock()
	if w.pending[c.target] != nil {
		w.superseded(c.target)
	}
	w.pending[c.target] = &try{contents: c}
	w.mu.Unlock()
	w.poke()
}

// close lets run end when nothing is pending. What has failed before is tried again only
// if retry says so.
func (w *worker) close(retry bool) {
	w.mu.Lock()
	w.closed, w.retrying = true, retry
	for t, p := range w.pending {
		if p.attempt > 0 && !retry {
			delete(w.pending, t)
		}
	}
	if !retry {
		w.notBefore = time.Time{}
	}
	w.mu.Unlock()
	w.poke()
}

func (w *worker) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run puts what is offered until the worker is closed and nothing is pending, or until
// ctx ends.
func (w *worker) run(ctx context.Context) {
	for ctx.Err() == nil {
		next, wait, done := w.next()
		if done {
			return
		}
		if next != nil {
			w.finish(next, w.put(ctx, next.contents))
			continue
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-w.wake:
		case <-timer:
		case <-ctx.Done():
		}
	}
}

// next takes the oldest of the tries whose time has come, or says how long that is off: 0
// means until something is offered.
func (w *worker) next() (next *try, wait time.Duration, done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for _, p := range w.pending {
		ready := later(p.notBefore, w.notBefore)
		if ready.After(now) {
			if left := ready.Sub(now); wait == 0 || left < wait {
				wait = left
			}
			continue
		}
		if next == nil || p.at.Before(next.at) {
			next = p
		}
	}
	if next != nil {
		delete(w.pending, next.target)
	}
	return next, wait, w.closed && len(w.pending) == 0 && next == nil
}

// finish notes how a try went, and sets the next one where there may be one.
func (w *worker) finish(t *try, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errs[t.target] = err
	if err == nil {
		return
	}
	se, ok := errors.AsType[*pushgw.StatusError](err)
	if ok && se.RetryAfter > 0 {
		w.notBefore = time.Now().Add(min(se.RetryAfter, maxRetryAfter))
	}
	if !pushgw.IsRefused(err) && !(ok && se.Temporary()) || !w.retrying {
		return
	}
	if w.pending[t.target] != nil {
		w.superseded(t.target)
		return
	}
	at := later(time.Now().Add(backoff.Delay(t.attempt, retryBase, retryLimit)), w.notBefore)
	if at.Before(t.until) {
		w.pending[t.target] = &try{contents: t.contents, attempt: t.attempt + 1, notBefore: at}
	}
}

// put puts c. When the Pushgateway refuses a family by name, that one is left out from
// then on, and the rest is put once more; when it refuses without a name, up 0 is put.
func (w *worker) put(ctx context.Context, c *contents) error {
	err := w.send(ctx, c)
	se, ok := errors.AsType[*pushgw.StatusError](err)
	if !ok || !se.Refused() {
		return err
	}
	if w.refuse(ctx, c, se) {
		err = w.send(ctx, c)
		if se, ok := errors.AsType[*pushgw.StatusError](err); ok && se.Refused() {
			w.refuse(ctx, c, se) // For the next cycle.
		}
		return err
	}
	if c.err == nil {
		// Should this fail as well, it is counted there.
		_ = w.send(ctx, w.forwarder.down(c.target, err))
	}
	return err
}

// send does one put, counts and logs it.
func (w *worker) send(ctx context.Context, c *contents) error {
	f := w.forwarder
	body, err := c.body(w.refusedOf(c.target))
	if err == nil {
		w.running.start()
		w.note(ctx)
		ctx, cancel := context.WithTimeout(ctx, f.cfg.PushTimeout)
		defer cancel()
		begin := time.Now()
		err = w.gateway.Put(ctx, c.target.key, body)
		w.running.stop()
		w.reached = w.reached || !neverSent(err)
		f.metrics.putDuration.WithLabelValues(w.gateway.String()).Observe(time.Since(begin).Seconds())
	}
	w.tell(ctx, c.target, err)
	return err
}

// note notes the groups of all targets before the first put: all at once, as each write
// takes its time. Where that fails they are put all the same, as metrics are worth more than
// the note, and it is tried again before the next put.
func (w *worker) note(ctx context.Context) {
	if w.noted {
		return
	}
	added, err := w.forwarder.cfg.Ledger.own(w.gateway.String(), w.forwarder.keys)
	w.added = append(w.added, added...)
	w.noted = err == nil
	w.forwarder.tellLedger(ctx, err)
}

// unnote takes off the ledger what note added, if nothing reached the Pushgateway, as when
// its URL is wrong: it would be tried to be deleted there for ever.
func (w *worker) unnote(ctx context.Context) {
	if !w.reached && len(w.added) > 0 {
		w.forwarder.forget(ctx, w.gateway.String(), w.added...)
	}
}

// neverSent tells whether err, of a put, says that there was no connection to send it over.
func neverSent(err error) bool {
	oe, ok := errors.AsType[*net.OpError](err)
	return pushgw.IsRefused(err) || ok && oe.Op == "dial"
}

// tell counts and logs how a put went.
func (w *worker) tell(ctx context.Context, t *pushTarget, err error) {
	m := w.forwarder.metrics
	if err != nil {
		m.putFailures.WithLabelValues(t.Job, w.gateway.String(), putReason(err)).Inc()
		w.forwarder.status.failed(err)
		w.faults[t].Failed(ctx, "Put failed", err)
		return
	}
	m.puts.WithLabelValues(t.Job, w.gateway.String()).Inc()
	m.lastPut.WithLabelValues(t.Job, w.gateway.String()).SetToCurrentTime()
	w.forwarder.status.succeeded()
	w.faults[t].Succeeded(ctx, "Put succeeded again")
}

func putReason(err error) string {
	se, ok := errors.AsType[*pushgw.StatusError](err)
	switch {
	case ok && se.Refused():
		return putInvalid
	case ok:
		return putStatus
	case pushgw.IsTimeout(err):
		return putTimeout
	case pushgw.IsRefused(err):
		return putRefused
	default:
		return putOther
	}
}

// refuse leaves the families of c that the Pushgateway named out of its puts from now on.
// It tells whether there was any that was not left out before.
func (w *worker) refuse(ctx context.Context, c *contents, se *pushgw.StatusError) bool {
	names := c.have(se.Families())
	w.mu.Lock()
	defer w.mu.Unlock()
	refused := make(map[string]bool)
	for name := range w.refused[c.target] {
		refused[name] = true
	}
	before := len(refused)
	for _, name := range names {
		if !refused[name] {
			refused[name] = true
			w.faults[c.target].Logger.ErrorContext(ctx, "Pushgateway refuses a family: it is left out until the next reload or restart", "family", name, "err", se)
		}
	}
	w.refused[c.target] = refused
	w.forwarder.metrics.refused.WithLabelValues(c.target.Job, w.gateway.String()).Set(float64(len(refused)))
	return len(refused) > before
}

func (w *worker) refusedOf(t *pushTarget) map[string]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refused[t] // Never written to: refuse makes another.
}

func (w *worker) forgetRefused() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.refused)
	for _, t := range w.forwarder.targets {
		w.forwarder.metrics.refused.WithLabelValues(t.Job, w.gateway.String()).Set(0)
	}
}

// leave does with each group what is to be done on stop. The worker must not be running.
func (w *worker) leave(ctx context.Context) {
	f := w.forwarder
	for _, t := range f.targets {
		if ctx.Err() != nil {
			w.faults[t].Logger.WarnContext(ctx, "Group left as it is: the time to stop was up")
			continue
		}
		switch f.cfg.OnStop {
		case Down:
			_ = w.send(ctx, f.down(t, nil)) // Logged and counted there.
		case Delete:
			ctx, cancel := context.WithTimeout(ctx, f.cfg.PushTimeout)
			if err := w.gateway.Delete(ctx, t.key); err != nil {
				w.faults[t].Failed(ctx, "Group not deleted", err)
			} else {
				f.forget(ctx, w.gateway.String(), t.key)
			}
			cancel()
		case Keep:
		}
	}
}

// lastErrors returns how the last put of each target went.
func (w *worker) lastErrors() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, t := range w.forwarder.targets {
		errs = append(errs, w.errs[t])
	}
	return errors.Join(errs...)
}

// superseded counts contents for which newer ones came. The caller holds mu.
func (w *worker) superseded(t *pushTarget) {
	w.forwarder.metrics.superseded.WithLabelValues(t.Job, w.gateway.String()).Inc()
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
