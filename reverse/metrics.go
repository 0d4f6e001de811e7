package reverse

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The kinds of lines.
const (
	KindPTTH     = "ptth"
	KindLongPoll = "longpoll"
	// KindPushProx is long-poll with PushProx at the other end.
	KindPushProx = "pushprox"
)

var kinds = []string{KindPTTH, KindLongPoll, KindPushProx}

type registryMetrics struct {
	duplicateSessions, duplicateTargets, saveFailures prometheus.Counter
	sessions, ended, forgotten                        prometheus.Counter
	refused                                           *prometheus.CounterVec
}

func newRegistryMetrics(reg prometheus.Registerer, r *Registry) *registryMetrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &registryMetrics{
		duplicateSessions: counter("promferry_proxy_duplicate_sessions_total", "Sessions that began while another of the same client had lines."),
		duplicateTargets:  counter("promferry_proxy_duplicate_targets_total", "Targets announced and not listed because another client holds their job and instance."),
		sessions:          counter("promferry_proxy_sessions_total", "Processes of clients that connected."),
		ended:             counter("promferry_proxy_sessions_ended_total", "Processes of clients that said goodbye or went away."),
		forgotten:         counter("promferry_proxy_forgotten_clients_total", "Clients that were away for so long that they are listed no more."),
		saveFailures:      counter("promferry_proxy_save_failures_total", "Times that the known clients could not be saved."),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_proxy_refused_lines_total", Help: "Lines that clients asked for and did not get.",
		}, []string{"reason"}),
	}
	for _, reason := range []string{"clients", "lines", "identity", "other"} {
		m.refused.WithLabelValues(reason)
	}
	reg.MustRegister(m.duplicateSessions, m.duplicateTargets, m.sessions, m.ended, m.forgotten, m.saveFailures, m.refused, registryCollector{r})
	return m
}

func refusedReason(r *Refusal) string {
	switch r.Status {
	case http.StatusTooManyRequests:
		return "lines"
	case http.StatusConflict:
		return "identity"
	default:
		return "other"
	}
}

// registryCollector counts when it is asked.
type registryCollector struct{ registry *Registry }

var (
	clientsDesc = prometheus.NewDesc("promferry_proxy_clients", "Clients that are known; stopped are those that said goodbye.", []string{"state"}, nil)
	severalDesc = prometheus.NewDesc("promferry_proxy_clients_with_several_sessions", "Clients that several processes have lines under the name of.", nil, nil)
	hiddenDesc  = prometheus.NewDesc("promferry_proxy_hidden_targets", "Targets that are not listed because another client holds their job and instance.", nil, nil)
	linesDesc   = prometheus.NewDesc("promferry_proxy_lines", "Lines of clients.", []string{"kind", "state"}, nil)
	settledDesc = prometheus.NewDesc("promferry_proxy_settled", "Whether clients that were known before the start are waited for no more.", nil, nil)
)

func (c registryCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- clientsDesc
	ch <- severalDesc
	ch <- hiddenDesc
	ch <- linesDesc
	ch <- settledDesc
}

func (c registryCollector) Collect(ch chan<- prometheus.Metric) {
	connected, away, stopped, several, hidden := 0, 0, 0, 0, 0
	free, busy := make(map[string]int), make(map[string]int)
	for _, client := range c.registry.all() {
		client.mu.Lock()
		switch {
		case client.connected():
			connected++
		case client.goodbye:
			stopped++
		default:
			away++
		}
		if len(client.sessions) > 1 {
			several++
		}
		for k := range client.announcement.claims() {
			if _, conflict := c.registry.holder(client, k); conflict {
				hidden++
			}
		}
		for _, s := range client.sessions {
			free[s.kind] += len(s.free)
			busy[s.kind] += s.lines - len(s.free)
		}
		client.mu.Unlock()
	}
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	gauge(clientsDesc, connected, "connected")
	gauge(clientsDesc, away, "away")
	gauge(clientsDesc, stopped, "stopped")
	gauge(severalDesc, several)
	gauge(hiddenDesc, hidden)
	for _, kind := range kinds {
		gauge(linesDesc, free[kind], kind, "free")
		gauge(linesDesc, busy[kind], kind, "busy")
	}
	c.registry.mu.RLock()
	settled := 0
	if c.registry.settled {
		settled = 1
	}
	c.registry.mu.RUnlock()
	gauge(settledDesc, settled)
}

// results are all that can become of a scrape.
var results = []string{
	"success", "bad_request", "unauthorized", "unknown_client", "client_away", "no_free_line", "client_gone", "client_limit",
	"proxy_limit", "stopping", "not_allowed", "target_down", "too_large", "timeout", "bad_answer", "no_tunnel", "broken_off", "redirect", "canceled",
}

type proxyMetrics struct {
	scrapes  map[string]prometheus.Counter
	duration prometheus.Histogram
	bytes    prometheus.Counter
}

func newProxyMetrics(reg prometheus.Registerer, inFlight interface{ Load() int64 }) *proxyMetrics {
	scrapes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "promferry_proxy_scrapes_total", Help: "Scrapes through the proxy, by what came of them.",
	}, []string{"result"})
	m := &proxyMetrics{
		scrapes: make(map[string]prometheus.Counter),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "promferry_proxy_scrape_duration_seconds", Help: "How long scrapes through the proxy took.",
			Buckets: []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30},
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "promferry_proxy_answer_bytes_total", Help: "Bytes of answers' bodies that were passed on.",
		}),
	}
	for _, result := range results {
		m.scrapes[result] = scrapes.WithLabelValues(result)
	}
	reg.MustRegister(scrapes, m.duration, m.bytes, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "promferry_proxy_scrapes_in_flight", Help: "Scrapes and tunnels that are going on.",
	}, func() float64 { return float64(inFlight.Load()) }))
	return m
}

func (m *proxyMetrics) done(result string, took time.Duration) {
	m.scrapes[result].Inc()
	m.duration.Observe(took.Seconds())
}
