package forwarder

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/target"
)

// The reasons of promferry_forwarder_put_failures_total.
const (
	putRefused = "refused" // nothing listens there
	putTimeout = "timeout"
	putStatus  = "status"  // any status that is no success, but 400
	putInvalid = "invalid" // 400: what was put
	putOther   = "other"   // no connection, TLS, no answer
)

var putReasons = []string{putRefused, putTimeout, putStatus, putInvalid, putOther}

// The outcomes of promferry_forwarder_abandoned_group_deletions_total.
const (
	outcomeSuccess = "success"
	outcomeFailure = "failure"
)

// metrics are the forwarder's own. The label target is the target's job, the label
// gateway the Pushgateway's URL: the configuration bounds both.
type metrics struct {
	scrapes        *prometheus.CounterVec
	scrapeFailures *prometheus.CounterVec
	skipped        *prometheus.CounterVec
	leftOut        *prometheus.GaugeVec
	puts           *prometheus.CounterVec
	putFailures    *prometheus.CounterVec
	superseded     *prometheus.CounterVec
	refused        *prometheus.GaugeVec
	lastPut        *prometheus.GaugeVec
	putDuration    *prometheus.HistogramVec
	abandoned      prometheus.Gauge
	deletions      *prometheus.CounterVec
	ledgerFailures prometheus.Counter
}

func newMetrics(r prometheus.Registerer, targets []target.Target, gateways []Gateway) *metrics {
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
		scrapes:        counter("promferry_forwarder_scrapes_total", "Scrapes of a push target.", "target"),
		scrapeFailures: counter("promferry_forwarder_scrape_failures_total", "Scrapes of a push target that gave no exposition.", "target", "reason"),
		skipped:        counter("promferry_forwarder_cycles_skipped_total", "Cycles that did not begin because the target's cycle before had not ended.", "target"),
		leftOut:        gauge("promferry_forwarder_left_out_families", "Families of the last exposition of which something was left out, for a Pushgateway would refuse it or break on it.", "target", "reason"),
		puts:           counter("promferry_forwarder_puts_total", "Puts that a Pushgateway took.", "target", "gateway"),
		putFailures:    counter("promferry_forwarder_put_failures_total", "Puts that failed.", "target", "gateway", "reason"),
		superseded:     counter("promferry_forwarder_puts_superseded_total", "Expositions that were not put, or not tried again, because a newer one was there.", "target", "gateway"),
		refused:        gauge("promferry_forwarder_refused_families", "Families that the Pushgateway refused, and that are left out of puts to it until the next reload or restart.", "target", "gateway"),
		lastPut:        gauge("promferry_forwarder_last_put_timestamp_seconds", "When a Pushgateway last took a put, in Unix time.", "target", "gateway"),
		putDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "promferry_forwarder_put_duration_seconds",
			Help:    "How long puts took, the failed ones included.",
			Buckets: []float64{.005, .025, .1, .25, 1, 2.5, 10, 30},
		}, []string{"gateway"}),
		abandoned: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_forwarder_abandoned_groups", Help: "Groups that earlier runs put, that are no longer configured, and that are still to be deleted.",
		}),
		deletions: counter("promferry_forwarder_abandoned_group_deletions_total", "Tries to delete such groups.", "outcome"),
		ledgerFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "promferry_forwarder_ledger_failures_total", Help: "Failures to read or write the ledger of the groups that this agent put.",
		}),
	}
	r.MustRegister(m.putDuration, m.abandoned, m.ledgerFailures)
	m.deletions.WithLabelValues(outcomeSuccess)
	m.deletions.WithLabelValues(outcomeFailure)
	for _, t := range targets {
		m.scrapes.WithLabelValues(t.Job)
		m.skipped.WithLabelValues(t.Job)
		for _, reason := range target.Reasons {
			m.scrapeFailures.WithLabelValues(t.Job, string(reason))
		}
		for _, reason := range exposition.Reasons {
			m.leftOut.WithLabelValues(t.Job, string(reason))
		}
		for _, g := range gateways {
			m.puts.WithLabelValues(t.Job, g.String())
			m.superseded.WithLabelValues(t.Job, g.String())
			m.refused.WithLabelValues(t.Job, g.String())
			m.lastPut.WithLabelValues(t.Job, g.String())
			for _, reason := range putReasons {
				m.putFailures.WithLabelValues(t.Job, g.String(), reason)
			}
		}
	}
	for _, g := range gateways {
		m.putDuration.WithLabelValues(g.String())
	}
	return m
}
