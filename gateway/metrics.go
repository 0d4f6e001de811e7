package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// What can become of a push.
const (
	resultSuccess      = "success"
	reasonPath         = "bad_path"
	reasonBody         = "bad_body"
	reasonInconsistent = "inconsistent"
	reasonSize         = "too_large"
	reasonSeries       = "too_many_series"
	reasonGroups       = "too_many_groups"
	reasonTotal        = "too_many_bytes"
	reasonTimeout      = "timeout"
	reasonDisk         = "disk"
	reasonBusy         = "busy"
	reasonRights       = "not_allowed"
)

var results = []string{
	resultSuccess, reasonPath, reasonBody, reasonInconsistent, reasonSize, reasonSeries, reasonGroups, reasonTotal, reasonTimeout, reasonDisk, reasonBusy,
	reasonRights,
}

type metrics struct {
	pushes   map[string]prometheus.Counter
	duration prometheus.Histogram
	leftOut  prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, store *Store) *metrics {
	pushes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "promferry_gateway_pushes_total", Help: "Puts and adds, by what came of them.",
	}, []string{"result"})
	m := &metrics{
		pushes: make(map[string]prometheus.Counter),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "promferry_gateway_push_duration_seconds", Help: "How long puts and adds took, with the time in which their bodies came.",
			Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30},
		}),
		leftOut: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_gateway_left_out_families", Help: "Families of groups that the last page with all groups had to leave out because they clash with those of groups before.",
		}),
	}
	for _, result := range results {
		m.pushes[result] = pushes.WithLabelValues(result)
	}
	limit := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "promferry_gateway_limit_groups", Help: "How many groups there may be (--limit.groups).",
	})
	limit.Set(float64(store.config.MaxGroups))
	kept := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "promferry_gateway_groups_bytes", Help: "Memory that the metrics of all groups take, compressed, in bytes.",
	}, func() float64 { return float64(store.memory.Load()) })
	limitBytes := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "promferry_gateway_limit_bytes", Help: "Maximum of promferry_gateway_groups_bytes (--limit.total-bytes).",
	})
	limitBytes.Set(float64(store.config.MaxBytes))
	reg.MustRegister(pushes, m.duration, m.leftOut, limit, kept, limitBytes, collector{store})
	return m
}

// collector counts when it is asked.
type collector struct{ store *Store }

var (
	groupsDesc = prometheus.NewDesc("promferry_gateway_groups", "Groups; down are those whose last put said up 0, awaited those that were not pushed to since the gateway restarted, refused those that no push to ever succeeded.", []string{"state"}, nil)
	seriesDesc = prometheus.NewDesc("promferry_gateway_series", "Series in all groups.", nil, nil)
)

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- groupsDesc
	ch <- seriesDesc
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	counts := make(map[string]int, len(States))
	for _, state := range States {
		counts[state] = 0
	}
	series := 0
	now := time.Now()
	for _, s := range c.store.states(now) {
		counts[s.in(now)]++
		if s.content != nil {
			series += s.content.Series
		}
	}
	for state, n := range counts {
		ch <- prometheus.MustNewConstMetric(groupsDesc, prometheus.GaugeValue, float64(n), state)
	}
	ch <- prometheus.MustNewConstMetric(seriesDesc, prometheus.GaugeValue, float64(series))
}
