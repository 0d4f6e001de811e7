package batch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

// Gateway is what a Courier needs of a *pushgw.Client.
type Gateway interface {
	Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error
	Add(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error
	Delete(ctx context.Context, key pushgw.GroupingKey) error
	// String returns the URL without anything secret, which names the gateway in the outbox.
	String() string
}

// Courier brings pushes to Pushgateways, by way of an outbox, so that those that cannot be
// brought now are brought later. It is safe for concurrent use.
type Courier struct {
	// Gateways are where each push goes.
	Gateways []Gateway
	// Outbox keeps pushes. Without one, nil, they are tried once.
	Outbox *outbox.Outbox
	// Timeout is that of one push.
	Timeout time.Duration
}

// Push is one push, to each Gateway.
type Push struct {
	Op  outbox.Op
	Key pushgw.GroupingKey
	At  time.Time
	// Body is empty for outbox.Delete.
	Body pushgw.Body
}

// A Fate is what became of a push that was not brought.
type Fate int

const (
	// Kept means that it waits in the outbox.
	Kept Fate = iota
	// Refused means that the Pushgateway will not take it, and that the outbox has set it
	// aside.
	Refused
	// Lost means that it was neither brought nor kept.
	Lost
)

// UndeliveredError tells of pushes that were not brought to one Pushgateway.
type UndeliveredError struct {
	// Gateway is the Pushgateway's name.
	Gateway string
	Fate    Fate
	// Outbox is where they are now, or empty for Lost.
	Outbox string
	Err    error
}

func (e *UndeliveredError) Error() string {
	switch e.Fate {
	case Kept:
		return fmt.Sprintf("%v; kept in %s until it can be delivered", e.Err, e.Outbox)
	case Refused:
		return fmt.Sprintf("%v; set aside in %s/rejected", e.Err, e.Outbox)
	default:
		return fmt.Sprintf("%v; not kept, so it is lost", e.Err)
	}
}

func (e *UndeliveredError) Unwrap() error { return e.Err }

// Parcel is pushes, of one group, that are on their way.
type Parcel struct {
	courier *Courier
	parts   []part
	// kept tells whether all of it is in the outbox.
	kept bool
}

// part is what of a parcel goes to one Pushgateway.
type part struct {
	gateway Gateway
	// waiting is what waits for the group, the kept pushes of the parcel at the end.
	waiting outbox.Waiting
	// loose are the pushes of the parcel that are not kept.
	loose []*outbox.Entry
	// err is why it is not known what waits.
	err error
	// done is closed when Deliver has done what it could.
	done chan struct{}
}

// Keep puts pushes, all of one group, into the outbox. When it returns without an error
// they are safe there. Otherwise it tells why they are not; Deliver will try them all the
// same.
func (c *Courier) Keep(ctx context.Context, pushes ...Push) (*Parcel, error) {
	return c.parcel(ctx, true, pushes)
}

// Once makes a parcel of a push that is tried once and never kept.
func (c *Courier) Once(ctx context.Context, push Push) *Parcel {
	p, _ := c.parcel(ctx, false, []Push{push}) // Without keeping there is nothing to fail.
	return p
}

func (c *Courier) parcel(ctx context.Context, keep bool, pushes []Push) (*Parcel, error) {
	p := &Parcel{courier: c}
	var failed error
	for _, g := range c.Gateways {
		to := part{gateway: g, done: make(chan struct{})}
		var group outbox.Group
		for _, push := range pushes {
			e := &outbox.Entry{
				Op: push.Op, Gateway: g.String(), Job: push.Key.Job, Labels: push.Key.Labels,
				At: push.At, ContentType: push.Body.ContentType, Body: push.Body.Gzipped,
			}
			group = e.Group()
			err := errors.ErrUnsupported
			if keep && c.Outbox != nil && !errors.Is(failed, context.DeadlineExceeded) { // A lock that is held is not waited for again.
				if err = c.Outbox.Add(ctx, e); err != nil {
					failed = err // The others say the same.
				}
			}
			if err != nil {
				to.loose = append(to.loose, e)
			}
		}
		if errors.Is(failed, context.DeadlineExceeded) {
			to.err = failed
		} else if c.Outbox != nil && len(pushes) > 0 {
			to.waiting, to.err = c.Outbox.WaitingFor(ctx, group)
		}
		p.parts = append(p.parts, to)
	}
	p.kept = keep && c.Outbox != nil && failed == nil
	return p, failed
}

// Deliver brings the pushes, after whatever waited for the same group, to all Pushgateways
// at the same time, until ctx ends. To each they come after those of another parcel of the
// same courier that is on its way, unless that is nil. The errors are *UndeliveredError. It
// must be called once.
func (p *Parcel) Deliver(ctx context.Context, after *Parcel) []error {
	errs := make([]error, len(p.parts))
	var wg sync.WaitGroup
	for i, to := range p.parts {
		wg.Go(func() {
			defer close(to.done)
			if after != nil {
				select {
				case <-after.parts[i].done:
				case <-ctx.Done():
				}
			}
			errs[i] = p.courier.deliver(ctx, to)
		})
	}
	wg.Wait()
	return slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

func (c *Courier) deliver(ctx context.Context, to part) error {
	var refused, sent error
	if c.Outbox != nil {
		var d outbox.Delivery
		err := to.err
		if err == nil {
			d, err = c.Outbox.Deliver(ctx, to.waiting, c.Timeout, func(ctx context.Context, e *outbox.Entry) error {
				sent = c.send(ctx, to.gateway, e)
				return sent
			})
		}
		switch {
		case err != nil && len(to.loose) > 0:
			if sent != nil { // What waits comes first, and did not get there.
				return &UndeliveredError{Gateway: to.gateway.String(), Fate: Lost, Err: err}
			} // Else the fault is in the outbox, and says nothing of the Pushgateway.
		case err != nil:
			return &UndeliveredError{Gateway: to.gateway.String(), Fate: Kept, Outbox: c.Outbox.Path(), Err: err}
		case len(d.Rejected) > 0:
			refused = &UndeliveredError{Gateway: to.gateway.String(), Fate: Refused, Outbox: c.Outbox.Path(), Err: errors.Join(d.Rejected...)}
		}
	}
	for _, e := range to.loose {
		if err := c.send(ctx, to.gateway, e); err != nil {
			return &UndeliveredError{Gateway: to.gateway.String(), Fate: Lost, Err: err}
		}
	}
	return refused
}

// Delivery tells what DeliverAll did.
type Delivery struct {
	outbox.Delivery
	// Err is why others still wait; nil when none does.
	Err error
	// RetryAfter is how long the Pushgateway asks to wait, or 0.
	RetryAfter time.Duration
}

// DeliverAll brings what waits for a Pushgateway until there is no more, ctx ends, or the
// Pushgateway cannot be reached. A group that another process is delivering is left to it.
func (c *Courier) DeliverAll(ctx context.Context, g Gateway) Delivery {
	var d Delivery
	var waiting []outbox.Waiting
	if d.Err = c.Outbox.Clean(); d.Err == nil {
		waiting, d.Err = c.Outbox.Waiting(ctx, g.String())
	}
	// In any order, so that a group that always fails does not always come first.
	rand.Shuffle(len(waiting), func(i, j int) { //nolint:gosec // Nothing depends on it being secret.
		waiting[i], waiting[j] = waiting[j], waiting[i]
	})
	for _, w := range waiting {
		if ctx.Err() != nil {
			d.Err = errors.Join(d.Err, context.Cause(ctx))
			break
		}
		var sent error
		one, err := c.Outbox.Deliver(ctx, w, time.Millisecond, func(ctx context.Context, e *outbox.Entry) error {
			sent = c.send(ctx, g, e)
			return sent
		})
		d.Delivered += one.Delivered
		d.Rejected = append(d.Rejected, one.Rejected...)
		if err == nil || errors.Is(err, outbox.ErrBusy) {
			continue
		}
		d.Err = err
		if sent == nil { // The fault is in the outbox, and says nothing of the Pushgateway.
			continue
		}
		se, ok := errors.AsType[*pushgw.StatusError](err)
		if ok {
			d.RetryAfter = max(d.RetryAfter, se.RetryAfter)
		}
		// A Pushgateway that fails may do so for this push alone, and a gateway may know these
		// credentials for other groups.
		if !ok || se.Code != http.StatusInternalServerError && se.Code != http.StatusForbidden {
			break
		}
	}
	return d
}

// send brings one push. When it would be refused again the error is an
// *outbox.RejectedError.
func (c *Courier) send(ctx context.Context, g Gateway, e *outbox.Entry) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	key := pushgw.GroupingKey{Job: e.Job, Labels: e.Labels}
	if err := key.Validate(); err != nil {
		return &outbox.RejectedError{Err: err}
	}
	body := pushgw.Body{ContentType: e.ContentType, Gzipped: e.Body}
	var err error
	switch e.Op {
	case outbox.Put:
		err = g.Put(ctx, key, body)
	case outbox.Add:
		err = g.Add(ctx, key, body)
	default:
		err = g.Delete(ctx, key)
	}
	if se, ok := errors.AsType[*pushgw.StatusError](err); ok && se.Final() {
		return &outbox.RejectedError{Err: err}
	}
	return err
}
