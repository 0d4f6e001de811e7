package access

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the guard's own.
type metrics struct {
	failures *prometheus.CounterVec
	open     *prometheus.GaugeVec
	reloaded prometheus.Gauge
}

func newMetrics(role *role, r prometheus.Registerer) *metrics {
	m := &metrics{
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: role.failures, Help: "Requests that were refused for who sent them.",
		}, []string{"face", "reason"}),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: role.open, Help: "Whether a face asks nobody for a credential.",
		}, []string{"face"}),
		reloaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: role.reloaded, Help: "Whether the last reload of the auth file succeeded, 1 before the first.",
		}),
	}
	r.MustRegister(m.failures, m.open, m.reloaded)
	for _, face := range role.faces {
		for _, reason := range append(slices.Clone(reasons), role.other) {
			m.failures.WithLabelValues(string(face), string(reason))
		}
	}
	m.reloaded.Set(1)
	return m
}
