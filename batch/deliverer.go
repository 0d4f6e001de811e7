package batch

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/internal/backoff"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

const (
	// lookEvery is how often the outbox is looked at: what costs a directory to be read.
	lookEvery = 5 * time.Second
	// The bounds of the wait before another try at a Pushgateway that failed. Many nodes
	// may wait for the same one to come back.
	deliverBase, deliverLimit = 5 * time.Second, time.Minute
	// maxRetryAfter bounds what a Pushgateway may ask for, so that a mistake there does not
	// silence a node for good.
	maxRetryAfter = time.Hour
)

// Deliverer delivers what waits in an outbox, for as long as it runs.
type Deliverer struct {
	courier *Courier
	logger  *slog.Logger
	metrics *outboxMetrics
}

// NewDeliverer returns a Deliverer for a courier that has an outbox. Its metrics are
// registered.
func NewDeliverer(c *Courier, logger *slog.Logger, r prometheus.Registerer) *Deliverer {
	d := &Deliverer{courier: c, logger: logger, metrics: newOutboxMetrics(r)}
	for _, g := range c.Gateways {
		d.metrics.init(g.String())
	}
	d.count()
	return d
}

// Run delivers until ctx ends, when it returns nil. Each Pushgateway is served on its own.
func (d *Deliverer) Run(ctx context.Context) error {
	var group errgroup.Group
	for _, g := range d.courier.Gateways {
		group.Go(func() error {
			d.serve(ctx, g)
			return nil
		})
	}
	return group.Wait()
}

func (d *Deliverer) serve(ctx context.Context, g Gateway) {
	faults := &faultlog.Log{Logger: d.logger.With("gateway", g.String())}
	for attempt := 0; ctx.Err() == nil; {
		wait := lookEvery
		if retryAfter, err := d.once(ctx, g, faults); err != nil {
			wait = max(lookEvery, backoff.Delay(attempt, deliverBase, deliverLimit), min(retryAfter, maxRetryAfter))
			attempt++
		} else {
			attempt = 0
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// Once tries each Pushgateway once.
func (d *Deliverer) Once(ctx context.Context) {
	for _, g := range d.courier.Gateways {
		_, _ = d.once(ctx, g, &faultlog.Log{Logger: d.logger.With("gateway", g.String())}) // Logged and counted there.
	}
}

func (d *Deliverer) once(ctx context.Context, g Gateway, faults *faultlog.Log) (retryAfter time.Duration, err error) {
	done := d.courier.DeliverAll(ctx, g)
	name := g.String()
	d.metrics.delivered.WithLabelValues(name).Add(float64(done.Delivered))
	d.metrics.failures.WithLabelValues(name, reasonInvalid).Add(float64(len(done.Rejected)))
	for _, err := range done.Rejected {
		faults.Logger.ErrorContext(ctx, "Push refused: set aside in the outbox, see promferry flush --list", "err", err)
	}
	if done.Delivered > 0 {
		faults.Logger.InfoContext(ctx, "Delivered what waited in the outbox", "pushes", done.Delivered)
	}
	defer d.count()
	if ctx.Err() != nil {
		return 0, nil
	}
	if done.Err != nil {
		d.metrics.failures.WithLabelValues(name, reasonOf(done.Err)).Inc()
		faults.Failed(ctx, "Outbox not delivered", done.Err)
		return done.RetryAfter, done.Err
	}
	faults.Succeeded(ctx, "Outbox delivered again")
	return 0, nil
}

// count sets the metrics of what is in the outbox.
func (d *Deliverer) count() {
	var names []string
	for _, g := range d.courier.Gateways {
		names = append(names, g.String())
	}
	stats, err := d.courier.Outbox.Stats(names...)
	if err != nil {
		return // Delivering fails for the same reason, and says so.
	}
	d.metrics.set(stats)
}

// The reasons of promferry_outbox_delivery_failures_total.
const (
	reasonRefused = "refused" // the connection
	reasonTimeout = "timeout"
	reasonStatus  = "status"
	reasonInvalid = "invalid" // the push: it is set aside
	reasonOther   = "other"
)

func reasonOf(err error) string {
	_, ok := errors.AsType[*pushgw.StatusError](err)
	switch {
	case ok:
		return reasonStatus
	case pushgw.IsTimeout(err):
		return reasonTimeout
	case pushgw.IsRefused(err):
		return reasonRefused
	default:
		return reasonOther
	}
}

// otherGateway is the label value for Pushgateways that are not configured.
const otherGateway = "other"

type outboxMetrics struct {
	waiting   *prometheus.GaugeVec
	rejected  prometheus.Gauge
	oldest    prometheus.Gauge
	delivered *prometheus.CounterVec
	failures  *prometheus.CounterVec
}

func newOutboxMetrics(r prometheus.Registerer) *outboxMetrics {
	m := &outboxMetrics{
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "promferry_outbox_waiting_pushes", Help: "Pushes of batch jobs that wait for a Pushgateway; \"other\" are those that are not configured here.",
		}, []string{"gateway"}),
		rejected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_outbox_rejected_pushes", Help: "Pushes that a Pushgateway refused and that were set aside.",
		}),
		oldest: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_outbox_oldest_push_timestamp_seconds", Help: "When the oldest push that waits was made, in Unix time; 0 when none waits.",
		}),
		delivered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_outbox_delivered_pushes_total", Help: "Pushes that waited and were delivered by this agent.",
		}, []string{"gateway"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_outbox_delivery_failures_total", Help: "Tries to deliver what waits that failed; \"invalid\" are pushes that were set aside.",
		}, []string{"gateway", "reason"}),
	}
	r.MustRegister(m.waiting, m.rejected, m.oldest, m.delivered, m.failures)
	return m
}

func (m *outboxMetrics) init(gateway string) {
	m.delivered.WithLabelValues(gateway)
	for _, reason := range []string{reasonRefused, reasonTimeout, reasonStatus, reasonInvalid, reasonOther} {
		m.failures.WithLabelValues(gateway, reason)
	}
}

func (m *outboxMetrics) set(s outbox.Stats) {
	for gateway, n := range s.Waiting {
		m.waiting.WithLabelValues(gateway).Set(float64(n))
	}
	m.waiting.WithLabelValues(otherGateway).Set(float64(s.Other))
	m.rejected.Set(float64(s.Rejected))
	m.oldest.Set(0)
	if !s.Oldest.IsZero() {
		m.oldest.Set(seconds(s.Oldest))
	}
}
