package access

import "github.com/prometheus/client_golang/prometheus"

// metrics are the guard's own.
type metrics struct {
	failures *prometheus.CounterVec
	open     *prometheus.GaugeVec
	reloaded prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_proxy_auth_failures_total", Help: "Requests that were refused for who sent them.",
		}, []string{"face", "reason"}),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "promferry_proxy_auth_open", Help: "Whether a face asks nobody for a credential.",
		}, []string{"face"}),
		reloaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_proxy_auth_last_reload_successful", Help: "Whether the last reload of the auth file succeeded, 1 before the first.",
		}),
	}
	r.MustRegister(m.failures, m.open, m.reloaded)
	for _, face := range Faces {
		for _, reason := range Reasons {
			m.failures.WithLabelValues(string(face), string(reason))
		}
	}
	m.reloaded.Set(1)
	return m
}
