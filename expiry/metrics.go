package expiry

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/pushgw"
)

// The results of promferry_expiry_sweeps_total.
const (
	sweepSuccess = "success"
	sweepFailure = "failure"
)

// The reasons of promferry_expiry_failures_total.
const (
	failedRefused   = "refused" // nothing listens there
	failedTimeout   = "timeout"
	failedStatus    = "status"    // any status that is no success, but 400
	failedInvalid   = "invalid"   // 400: what was put
	failedMalformed = "malformed" // an answer that is not a Pushgateway's
	failedOther     = "other"     // no connection, TLS, an answer cut off
)

var reasons = []string{failedRefused, failedTimeout, failedStatus, failedInvalid, failedMalformed, failedOther}

func reason(err error) string {
	if _, ok := errors.AsType[*pushgw.FormatError](err); ok {
		return failedMalformed
	}
	se, ok := errors.AsType[*pushgw.StatusError](err)
	switch {
	case ok && se.Refused():
		return failedInvalid
	case ok:
		return failedStatus
	case pushgw.IsTimeout(err):
		return failedTimeout
	case pushgw.IsRefused(err):
		return failedRefused
	default:
		return failedOther
	}
}

// metrics are the expirer's own. The label gateway is the Pushgateway's URL: the
// configuration bounds it.
type metrics struct {
	sweeps    *prometheus.CounterVec
	failures  *prometheus.CounterVec
	groups    *prometheus.GaugeVec
	putDown   *prometheus.CounterVec
	deleted   *prometheus.CounterVec
	lastSweep *prometheus.GaugeVec
	duration  *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer, gateways []Gateway) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		r.MustRegister(c)
		return c
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
		r.MustRegister(g)
		return g
	}
	m := &metrics{
		sweeps:    counter("promferry_expiry_sweeps_total", "Sweeps of a Pushgateway, by whether all went well.", "gateway", "result"),
		failures:  counter("promferry_expiry_failures_total", "Requests to a Pushgateway that failed: for its status, its groups, a put or a delete.", "gateway", "reason"),
		groups:    gauge("promferry_expiry_groups", "Groups that the last sweep found. Silent ones are down, or were put down by it.", "gateway", "state"),
		putDown:   counter("promferry_expiry_put_down_total", "Groups that were put down because their owner was silent.", "gateway"),
		deleted:   counter("promferry_expiry_deleted_total", "Groups that were deleted because their owner stayed silent.", "gateway"),
		lastSweep: gauge("promferry_expiry_last_successful_sweep_timestamp_seconds", "When a sweep last succeeded, in Unix time; 0 before the first.", "gateway"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "promferry_expiry_sweep_duration_seconds",
			Help:    "How long sweeps took, the failed ones included.",
			Buckets: []float64{.01, .05, .25, 1, 2.5, 5, 10, 30, 60},
		}, []string{"gateway"}),
	}
	r.MustRegister(m.duration)
	for _, g := range gateways {
		name := g.String()
		m.sweeps.WithLabelValues(name, sweepSuccess)
		m.sweeps.WithLabelValues(name, sweepFailure)
		for _, reason := range reasons {
			m.failures.WithLabelValues(name, reason)
		}
		for _, state := range states {
			m.groups.WithLabelValues(name, state)
		}
		m.putDown.WithLabelValues(name)
		m.deleted.WithLabelValues(name)
		m.lastSweep.WithLabelValues(name)
		m.duration.WithLabelValues(name)
	}
	return m
}
