//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/natlab"
	"github.com/promferry/promferry/e2e/real"
)

// TestPull goes through the life of a node behind a NAT as Prometheus sees it. The steps
// share the programs and follow each other: each begins with all of them running.
func TestPull(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	exporter := startExporterAt(t, lab.Worker, exporterAddr)
	serveIn(t, lab.Worker, appAddr, expose(textType, kinds))
	proxy := startProxy(t, lab)
	client := startClient(t, lab, []string{"node=http://" + exporterAddr + "/metrics", "app=http://" + appAddr + "/metrics"}, "--push.label=env=prod")
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	const (
		node = `{job="node",instance="web-1",env="prod"}`
		app  = `{job="app",instance="web-1",env="prod"}`
	)
	arrives := func(t *testing.T) {
		t.Helper()
		since := now(t, prometheus)
		waitScraped(t, prometheus, node, since)
		waitScraped(t, prometheus, app, since)
		waitQuery(t, prometheus, "node_load1"+node, above(-1))
	}
	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"arrives", func(t *testing.T) {
			arrives(t)
			waitQuery(t, prometheus, "scrape_duration_seconds"+node+" > 0 < 1", above(0))
			waitEnded(t, prometheus, `{__name__=~"exported_.*"}`)
			waitEnded(t, prometheus, `{__name__!="",job!~"node|app"}`)
			waitListed(t, proxy, "app of web-1", "node of web-1")
			proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "ptth")
			proxy.waitSum(t, exactly(1), "promferry_proxy_clients", "state", "connected")
		}},
		{"values", func(t *testing.T) { checkValues(t, prometheus, app) }},
		{"node_exporter's families", func(t *testing.T) { checkNodeFamilies(t, prometheus, exporter, node) }},
		{"labels of a push", func(t *testing.T) { checkLabelsOfPush(t, prometheus) }},
		{"refused at once", func(t *testing.T) {
			scrape(t, lab, "http://web-2:9100/metrics", time.Minute).check(t, http.StatusNotFound, "unknown_client")
			scrape(t, lab, "http://web-1:9099/metrics", time.Minute).check(t, http.StatusForbidden, "not_allowed")
		}},
		{"target down and back", func(t *testing.T) {
			exporter.Kill()
			waitFault(t, prometheus, "node", http.StatusBadGateway)
			waitQuery(t, prometheus, "up"+node, exactly(0))
			waitEnded(t, prometheus, `{__name__=~"node_.*"}`)
			scrape(t, lab, "http://web-1:9100/metrics", time.Minute).check(t, http.StatusBadGateway, "target_down")
			waitScraped(t, prometheus, app, now(t, prometheus))
			proxy.waitSum(t, exactly(1), "promferry_proxy_clients", "state", "connected")
			if err := exporter.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			arrives(t)
		}},
		{"agent killed and back", func(t *testing.T) {
			client.Kill()
			waitQuery(t, prometheus, "up"+node, exactly(0))
			waitQuery(t, prometheus, "up"+app, exactly(0))
			waitFault(t, prometheus, "node", http.StatusServiceUnavailable)
			proxy.waitSum(t, exactly(0), "promferry_proxy_lines")
			waitListed(t, proxy, "app of web-1", "node of web-1")
			scrape(t, lab, "http://web-1:9100/metrics", time.Minute).check(t, http.StatusServiceUnavailable, "client_away")
			client.restart(t)
			arrives(t)
		}},
		{"agent stopped and back", func(t *testing.T) {
			if err := client.Stop(); err != nil {
				t.Error(err)
			}
			scrape(t, lab, "http://web-1:9100/metrics", time.Minute).check(t, http.StatusServiceUnavailable, "client_away")
			waitQuery(t, prometheus, "up"+node, exactly(0))
			waitListed(t, proxy, "app of web-1", "node of web-1")
			client.restart(t)
			arrives(t)
		}},
		{"proxy killed and back", func(t *testing.T) {
			proxy.Kill()
			waitQuery(t, prometheus, "up"+node, exactly(0))
			proxy.restart(t)
			arrives(t)
		}},
		{"everything stops", func(t *testing.T) {
			for _, d := range []*daemon{client, proxy} {
				if err := d.Stop(); err != nil {
					t.Error(err)
				}
			}
		}},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
	}
}

// kinds is an exposition with something of everything that Prometheus reads in the text
// format. What of it a push could not carry is the timestamp.
const kinds = `# HELP app_requests_total Requests.
# TYPE app_requests_total counter
app_requests_total{path="/a \"b\" \\ \n c",code="200"} 12345678901
app_requests_total{path="/ü/日本",code="500"} 1e-300
# TYPE app_temperature gauge
app_temperature -273.15
# TYPE app_size_bytes histogram
app_size_bytes_bucket{le="10"} 1
app_size_bytes_bucket{le="+Inf"} 3
app_size_bytes_sum 1000.5
app_size_bytes_count 3
# TYPE app_wait_seconds summary
app_wait_seconds{quantile="0.5"} 0.25
app_wait_seconds_sum 7
app_wait_seconds_count 4
app_untyped 42
app_infinite +Inf
`

// checkValues checks each sample of kinds in Prometheus.
func checkValues(t *testing.T, p *real.PrometheusServer, app string) {
	t.Helper()
	with := func(labels string) string { return strings.TrimSuffix(app, "}") + "," + labels + "}" }
	values := map[string]float64{
		"app_requests_total" + with(`path="/a \"b\" \\ \n c",code="200"`): 12345678901,
		"app_requests_total" + with(`path="/ü/日本",code="500"`):            1e-300,
		"app_temperature" + app:                      -273.15,
		"app_size_bytes_bucket" + with(`le=~"10.*"`): 1,
		"app_size_bytes_bucket" + with(`le="+Inf"`):  3,
		"app_size_bytes_sum" + app:                   1000.5,
		"app_size_bytes_count" + app:                 3,
		"app_wait_seconds" + with(`quantile="0.5"`):  0.25,
		"app_wait_seconds_sum" + app:                 7,
		"app_wait_seconds_count" + app:               4,
		"app_untyped" + app:                          42,
		"app_infinite" + app:                         math.Inf(1),
		`count({__name__=~"app_.*"})`:                12, // and no others
		"scrape_samples_scraped" + app:               12,
	}
	for promql, want := range values {
		samples, err := p.Query(t.Context(), promql)
		if err != nil || len(samples) != 1 || samples[0].Value != want {
			t.Errorf("%s is %v, %v, want %v", promql, samples, err, want)
		}
	}
}

// checkNodeFamilies checks that Prometheus has all that a node_exporter exposes, and the values
// of what does not change.
func checkNodeFamilies(t *testing.T, p *real.PrometheusServer, exporter *natlab.Server, node string) {
	t.Helper()
	text, err := exporter.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string]bool)
	for _, match := range regexp.MustCompile(`(?m)^([a-z_A-Z0-9:]+)[{ ]`).FindAllSubmatch(text, -1) {
		want[string(match[1])] = true
	}
	samples, err := p.Query(t.Context(), "group by (__name__) ("+node+")")
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	for _, s := range samples {
		if name := s.Labels["__name__"]; name != "up" && !strings.HasPrefix(name, "scrape_") {
			have[name] = true
		}
	}
	if !maps.Equal(have, want) || len(want) < 100 {
		t.Errorf("Prometheus has %q, want %q", slices.Sorted(maps.Keys(have)), slices.Sorted(maps.Keys(want)))
	}
	for _, name := range []string{"node_memory_MemTotal_bytes", "node_boot_time_seconds", "node_uname_info"} {
		value, err := sum(text, name)
		if err != nil {
			t.Error(err)
		}
		waitQuery(t, p, name+node, exactly(value))
	}
}

// checkLabelsOfPush checks that up has the very labels that a push has with the same settings.
func checkLabelsOfPush(t *testing.T, p *real.PrometheusServer) {
	t.Helper()
	gateway := startPushgateway(t)
	status, _, stderr := runAgent(t, "--once", "--state.dir="+t.TempDir(), "--instance=web-1", "--push.label=env=prod",
		"--push.target=node="+serve(t, expose(textType, "a 1\n")), "--push.url="+gateway.URL)
	if status != 0 {
		t.Fatal(stderr)
	}
	groups, err := gateway.Groups(t.Context())
	if err != nil || len(groups) != 1 {
		t.Fatal(groups, err)
	}
	samples, err := p.Query(t.Context(), `up{job="node"}`)
	if err != nil || len(samples) != 1 {
		t.Fatal(samples, err)
	}
	delete(samples[0].Labels, "__name__")
	if !maps.Equal(samples[0].Labels, groups[0].Labels) {
		t.Errorf("a pull has %v, a push %v", samples[0].Labels, groups[0].Labels)
	}
}

// TestPullSlowTarget shows what Prometheus learns of a target that does not answer, and that
// this costs others of the same client nothing.
func TestPullSlowTarget(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	slow := hold("slow 1\n")
	serveIn(t, lab.Worker, "127.0.0.1:8100", slow)
	targets := []string{"slow=http://127.0.0.1:8100/metrics"}
	fast := []string{"fast1", "fast2", "fast3", "fast4", "fast5", "fast6"}
	for i, job := range fast {
		addr := fmt.Sprintf("127.0.0.1:%d", 8101+i)
		serveIn(t, lab.Worker, addr, expose(textType, job+" 1\n"))
		targets = append(targets, job+"=http://"+addr+"/metrics")
	}
	proxy := startProxy(t, lab)
	client := startClient(t, lab, targets)
	waitListed(t, proxy, "fast1 of web-1", "fast2 of web-1", "fast3 of web-1", "fast4 of web-1", "fast5 of web-1", "fast6 of web-1", "slow of web-1")
	client.waitSum(t, above(0), "promferry_client_lines")

	t.Run("side by side", func(t *testing.T) {
		answers := make(chan answer, 1)
		go func() { answers <- scrape(t, lab, "http://web-1:8100/metrics", 10*time.Minute) }()
		await(t, "a scrape of the slow target", slow.began)
		for i, job := range fast {
			got := scrape(t, lab, fmt.Sprintf("http://web-1:%d/metrics", 8101+i), time.Minute)
			if got.err != nil || got.status != http.StatusOK || got.body != job+" 1\n" {
				t.Errorf("%s, while another hangs: %+v", job, got)
			}
		}
		slow.end <- struct{}{}
		if got := await(t, "the slow target's answer", answers); got.err != nil || got.status != http.StatusOK || got.body != "slow 1\n" {
			t.Errorf("the slow target: %+v", got)
		}
	})

	// The time is five seconds, so that a quarter of one is left to say so: see docs/protocol.md.
	t.Run("timeout", func(t *testing.T) {
		if got := scrape(t, lab, "http://web-1:8100/metrics", 5*time.Second); got.err != nil || got.status != http.StatusGatewayTimeout || got.reason != "timeout" || got.body == "" {
			t.Errorf("%+v, want a 504 with a sentence", got)
		}
		prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  scrape_interval: 5s\n  scrape_timeout: 5s\n")
		waitFault(t, prometheus, "slow", http.StatusGatewayTimeout)
		waitQuery(t, prometheus, `up{job="slow"}`, exactly(0))
		// All of it: no scrape of another was kept waiting, in the time that the slow one took.
		waitQuery(t, prometheus, `count(count_over_time(up{job=~"fast."}[10m]) >= 2)`, exactly(6))
		waitQuery(t, prometheus, `min(min_over_time(up{job=~"fast."}[10m]))`, exactly(1))
		waitQuery(t, prometheus, `max(max_over_time(scrape_duration_seconds{job=~"fast."}[10m]))`, func(v float64) bool { return v < 2.5 })
		waitFault(t, prometheus, "slow", http.StatusGatewayTimeout)
		client.waitSum(t, above(0), "promferry_client_lines")
	})
}

// TestPullUnknownName shows that Prometheus learns at once that nobody has a target's name.
func TestPullUnknownName(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	startProxy(t, lab)
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, `
- job_name: nobody
  proxy_url: http://`+proxyAddr+`
  scrape_interval: 10s
  scrape_timeout: 10s
  static_configs: [{targets: ["web-9:9100"]}]
`)
	waitFault(t, prometheus, "nobody", http.StatusNotFound)
	waitQuery(t, prometheus, `up{job="nobody"}`, exactly(0))
	waitQuery(t, prometheus, `scrape_duration_seconds{job="nobody"}`, func(v float64) bool { return v < 5 })
}

// TestPullProxyDrains shows that a proxy that is stopped in the middle of a scrape ends it
// well, and takes no other.
func TestPullProxyDrains(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	slow := hold("drained 1\n")
	serveIn(t, lab.Worker, appAddr, slow)
	proxy := startProxy(t, lab)
	startClient(t, lab, []string{"slow=http://" + appAddr + "/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  scrape_interval: 10s\n  scrape_timeout: 10s\n")

	await(t, "Prometheus's scrape", slow.began)
	if err := proxy.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait(t, "that it takes no other scrape", func(context.Context) error {
		got := scrape(t, lab, "http://web-9:9100/metrics", time.Minute)
		if got.err != nil || got.status == http.StatusServiceUnavailable && got.reason == "stopping" {
			return nil
		}
		return fmt.Errorf("a new scrape: %+v", got)
	})
	select {
	case slow.end <- struct{}{}:
	case <-time.After(patience):
		t.Fatal("the scrape was given up")
	}
	proxy.waitEnd(t)
	waitQuery(t, prometheus, `max_over_time(drained[10m])`, exactly(1))
	waitQuery(t, prometheus, `max_over_time(up{job="slow"}[10m])`, exactly(1))
}

// TestPullAgentDrains shows that an agent that is stopped in the middle of a scrape ends it
// well, and that the proxy knows at once not to send it another.
func TestPullAgentDrains(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	slow := hold("drained 1\n")
	serveIn(t, lab.Worker, appAddr, slow)
	startProxy(t, lab)
	client := startClient(t, lab, []string{"slow=http://" + appAddr + "/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  scrape_interval: 10s\n  scrape_timeout: 10s\n")

	await(t, "Prometheus's scrape", slow.began)
	if err := client.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait(t, "that the proxy knows", func(context.Context) error {
		got := scrape(t, lab, "http://web-1:9/metrics", time.Minute)
		if got.status == http.StatusServiceUnavailable && got.reason == "client_away" {
			return nil
		}
		return fmt.Errorf("a new scrape: %+v", got)
	})
	select {
	case slow.end <- struct{}{}:
	case <-time.After(patience):
		t.Fatal("the scrape was given up")
	}
	client.waitEnd(t)
	waitQuery(t, prometheus, `max_over_time(drained[10m])`, exactly(1))
	waitQuery(t, prometheus, `max_over_time(up{job="slow"}[10m])`, exactly(1))
}

// TestPullProxyRestart shows that a restart of the proxy costs Prometheus none of its targets,
// however long the clients take to come back.
func TestPullProxyRestart(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, new(counting))
	proxy := startProxy(t, lab, "--sd.settle=1h")
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	waitQuery(t, prometheus, `up{job="app",instance="web-1"}`, exactly(1))

	still := always(t, "Prometheus's targets", func(ctx context.Context) error {
		all, err := activeTargets(ctx, prometheus)
		if _, ok := all["app"]; err == nil && !ok {
			err = errors.New("the target has vanished")
		}
		return err
	})
	// An empty list would be the end of all targets. No list is not.
	whole := always(t, "/sd", func(ctx context.Context) error {
		have, err := listed(ctx, proxy)
		if err == nil && !slices.Equal(have, []string{"app of web-1"}) {
			return fmt.Errorf("/sd lists %q", have)
		}
		return nil
	})

	client.Kill() // and does not come back until the test says so
	if err := proxy.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	proxy.waitEnd(t)
	whole() // Restart changes what it uses
	proxy.restart(t)
	whole = always(t, "/sd before the client is back", func(ctx context.Context) error {
		have, err := listed(ctx, proxy)
		if err == nil || !strings.Contains(err.Error(), "unexpected status 503") {
			return fmt.Errorf("/sd lists %q, error %w; want a 503", have, err)
		}
		return nil
	})
	// Prometheus asks each second, and takes up to five to act upon an answer.
	prometheusSum(t, prometheus, 8, "prometheus_sd_http_failures_total")
	waitQuery(t, prometheus, `up{job="app",instance="web-1"}`, exactly(0))
	whole()

	since := now(t, prometheus)
	client.restart(t)
	waitListed(t, proxy, "app of web-1")
	waitScraped(t, prometheus, `{job="app",instance="web-1"}`, since)
	still()

	// One that said goodbye is not waited for.
	for _, d := range []*daemon{client, proxy} {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	}
	proxy.restart(t)
	waitListed(t, proxy, "app of web-1")
}

// TestPullSettles shows that clients that were known, and are not back in time, are listed all
// the same, even when the proxy was killed.
func TestPullSettles(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	proxy := startProxy(t, lab, "--sd.settle=1s")
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
	waitListed(t, proxy, "app of web-1")
	wait(t, "the proxy saves what it knows", func(context.Context) error {
		b, err := os.ReadFile(filepath.Join(proxy.stateDir, "clients.json"))
		if err == nil && !strings.Contains(string(b), "web-1") {
			err = fmt.Errorf("no client in %s", b)
		}
		return err
	})
	client.Kill()
	proxy.Kill()
	proxy.restart(t)
	waitListed(t, proxy, "app of web-1")
	scrape(t, lab, "http://web-1:8000/metrics", time.Minute).check(t, http.StatusServiceUnavailable, "client_away")
}

// TestPullForgets shows that a client that is away for long is gone from Prometheus.
func TestPullForgets(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, new(counting))
	proxy := startProxy(t, lab, "--sd.forget-after=5s")
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	waitQuery(t, prometheus, `up{job="app",instance="web-1"}`, exactly(1))
	client.Kill()
	waitListed(t, proxy)
	waitEnded(t, prometheus, `up{job="app"}`)
	scrape(t, lab, "http://web-1:8000/metrics", time.Minute).check(t, http.StatusNotFound, "unknown_client")
}

// TestPullFederation takes over series of a site's own Prometheus, behind the NAT.
func TestPullFederation(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	startExporterAt(t, lab.Worker, exporterAddr)
	startPrometheusIn(t, lab.Worker, prometheusAddr, `
- job_name: node
  static_configs: [{targets: ["`+exporterAddr+`"], labels: {instance: db-7}}]
`)
	startProxy(t, lab)
	startClient(t, lab, []string{"federate=http://" + prometheusAddr + "/federate"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, `
- job_name: site
  proxy_url: http://`+proxyAddr+`
  http_sd_configs: [{url: "http://`+proxyAddr+`/sd?job=federate", refresh_interval: 1s}]
  honor_labels: true
  params:
    match[]: ['{__name__=~"node_load.*"}', 'up{job="node"}']
`)
	waitQuery(t, prometheus, `up{job="federate",instance="web-1"}`, exactly(1))
	waitQuery(t, prometheus, `up{job="node",instance="db-7"}`, exactly(1)) // the second parameter
	waitQuery(t, prometheus, `count({__name__=~"node_.*",job="node",instance="db-7"})`, exactly(3))
	waitEnded(t, prometheus, `{exported_job!=""}`)
}

// TestPullPushgateway scrapes a Pushgateway behind the NAT: who pushed to it stays what it says.
func TestPullPushgateway(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	path, err := real.Find("pushgateway")
	if err != nil {
		t.Fatal(err)
	}
	gateway := lab.Worker.Serve(t, "127.0.0.1:9091", real.Command{Path: path, Args: []string{"--persistence.file="}})
	put(t, &real.Gateway{Server: gateway.Server}, "/metrics/job/backup/instance/db-1", "backup_bytes 1024\n")
	startProxy(t, lab)
	startClient(t, lab, []string{"pushgateway=http://127.0.0.1:9091/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  honor_labels: true\n")
	waitQuery(t, prometheus, `backup_bytes{job="backup",instance="db-1"}`, exactly(1024))
	waitQuery(t, prometheus, `push_time_seconds{job="backup",instance="db-1"}`, above(0))
	waitQuery(t, prometheus, `up{job="pushgateway",instance="web-1"}`, exactly(1))
	waitEnded(t, prometheus, `{exported_job!=""}`)
}

// TestPullTwoProxies shows a pair of proxies, each with a Prometheus of its own: the agent is
// scraped through both, and one of them is enough.
func TestPullTwoProxies(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	startExporterAt(t, lab.Worker, exporterAddr)
	const second = natlab.HubIP2 + ":8080"
	proxy := startProxy(t, lab)
	startDaemon(t, lab.Hub, second, "proxy", "--heartbeat=1s")
	startClient(t, lab, []string{"node=http://" + exporterAddr + "/metrics"}, "--proxy-url=http://"+proxyAddr, "--proxy-url=http://"+second)
	config := discovered + "  scrape_interval: 2s\n  scrape_timeout: 2s\n"
	one := startPrometheusIn(t, lab.Hub, prometheusAddr, config)
	other := startPrometheusIn(t, lab.Hub, "127.0.0.1:9091", strings.ReplaceAll(config, proxyAddr, second))
	const node = `{job="node",instance="web-1"}`
	waitQuery(t, one, "up"+node, exactly(1))
	waitQuery(t, other, "up"+node, exactly(1))

	for _, fault := range []struct {
		name          string
		breaks, heals func()
	}{
		{"killed", func() { proxy.Kill() }, func() { proxy.restart(t) }},
		{"cut off", func() { lab.Cut(t, natlab.HubIP) }, func() { lab.Heal(t) }},
	} {
		since := now(t, other)
		fault.breaks()
		waitQuery(t, one, "up"+node, exactly(0))
		for range 3 {
			waitScraped(t, other, node, now(t, other))
		}
		always := fmt.Sprintf("min_over_time(up%s[%.0fs])", node, now(t, other)-since+1)
		if samples, err := other.Query(t.Context(), always); err != nil || len(samples) != 1 || samples[0].Value != 1 {
			t.Errorf("%s: %s of the other Prometheus is %v, %v", fault.name, always, samples, err)
		}
		fault.heals()
		waitScraped(t, one, node, now(t, one))
	}
}

// TestPullBrokenOff shows that an answer that breaks off is none, however good what has come
// of it looks: its last line is a whole number, and not that of the target.
func TestPullBrokenOff(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	half := func(lines int, length string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", textType)
			if length != "" {
				w.Header().Set("Content-Length", length)
			}
			for i := range lines {
				fmt.Fprintf(w, "app_whole{n=\"%d\"} 1\n", i)
			}
			_, _ = w.Write([]byte("app_half 12")) // of 123456
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	}
	targets := map[string]http.HandlerFunc{
		"127.0.0.1:8001": half(1, ""),     // all within the buffers on the way
		"127.0.0.1:8002": half(20000, ""), // with the status out long before
		"127.0.0.1:8003": half(20000, "1000000"),
	}
	var flags []string
	for addr, target := range targets {
		serveIn(t, lab.Worker, addr, target)
		flags = append(flags, addr+"=http://"+addr+"/metrics")
	}
	startProxy(t, lab)
	startClient(t, lab, flags)
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	for job := range targets {
		waitQuery(t, prometheus, fmt.Sprintf("count_over_time(up{job=%q}[10m]) >= 3", job), above(2))
		waitQuery(t, prometheus, fmt.Sprintf("max_over_time(up{job=%q}[10m])", job), exactly(0))
	}
	waitEnded(t, prometheus, `last_over_time({__name__=~"app_.*"}[10m])`)
}

// TestPullLargeAnswer shows that an answer comes through whole that is larger than all buffers
// on the way.
func TestPullLargeAnswer(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	const size = 48 << 20
	content := bytes.Repeat([]byte("app_large{path=\"/0123456789abcdef\"} 0.123456789\n"), size/48)
	for i := range content { // so that no two parts are the same
		if content[i] == '0' {
			content[i] = byte('0' + i/48%10)
		}
	}
	serveIn(t, lab.Worker, appAddr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", textType)
		if r.URL.Path == "/length" {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		}
		_, _ = w.Write(content)
	}))
	proxy := startProxy(t, lab)
	startClient(t, lab, []string{"chunked=http://" + appAddr + "/chunked", "length=http://" + appAddr + "/length"})
	proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "ptth")
	for _, path := range []string{"/chunked", "/length"} {
		got := scrape(t, lab, "http://web-1:8000"+path, time.Minute)
		if got.err != nil || got.status != http.StatusOK || len(got.body) != len(content) || sha256.Sum256([]byte(got.body)) != sha256.Sum256(content) {
			t.Errorf("%s: status %d, %d bytes, %v, want %d bytes", path, got.status, len(got.body), got.err, len(content))
		}
	}
}

// TestPullGivenUp shows that a scrape that Prometheus gives up is given up at the target.
func TestPullGivenUp(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	slow := hold("")
	serveIn(t, lab.Worker, appAddr, slow)
	proxy := startProxy(t, lab)
	startClient(t, lab, []string{"slow=http://" + appAddr + "/metrics"})
	proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "ptth", "state", "free")

	conn, err := lab.Hub.Dial(t.Context(), "tcp", proxyAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET http://web-1:8000/metrics HTTP/1.1\r\nHost: web-1:8000\r\nX-Prometheus-Scrape-Timeout-Seconds: 600\r\n\r\n")
	await(t, "the scrape", slow.began)
	conn.Close()
	await(t, "the end of the scrape at the target", slow.canceled)
	proxy.waitSum(t, above(0), "promferry_proxy_scrapes_total", "result", "canceled")
	proxy.waitSum(t, exactly(0), "promferry_proxy_scrapes_in_flight")
}

// TestPullHTTPS scrapes a target by https in both ways: the agent does it, for a Prometheus that
// knows of no TLS, or Prometheus does, through a tunnel that nobody on the way can look into.
// The lines go over TLS as well.
func TestPullHTTPS(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	dir := t.TempDir()
	makeCertificates(t, dir) // for 127.0.0.1
	write := func(name, content string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	serveTLSIn(t, lab.Worker, "127.0.0.1:8443", certificate, expose(textType, "secure 1\n"))
	trusting := fmt.Sprintf("tls_config: {ca_file: %s/ca.crt, server_name: 127.0.0.1}\n", dir)
	const forClients = natlab.HubIP + ":8444"
	startProxy(t, lab, "--client.listen-address="+forClients, "--client.config.file="+write("web.yml", "tls_server_config: {cert_file: server.crt, key_file: server.key}\n"))
	trust := write("trust.yml", trusting)
	startClient(t, lab, []string{"secure=https://127.0.0.1:8443/metrics"},
		"--proxy-url=https://"+forClients, "--proxy.http-config="+trust, "--scrape.http-config="+trust)
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+`
- job_name: tunnel
  scheme: https
  proxy_url: http://`+proxyAddr+`
  static_configs: [{targets: ["web-1:8443"]}]
  `+trusting)
	waitQuery(t, prometheus, `secure{job="secure",instance="web-1"}`, exactly(1))
	waitQuery(t, prometheus, `secure{job="tunnel"}`, exactly(1))
}

// TestPullWithoutUpgrades puts a reverse proxy in between that passes no upgrades, as nginx does
// that nobody told to. The agent finds another way.
func TestPullWithoutUpgrades(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, new(counting))
	proxy := startProxy(t, lab)
	const between = natlab.HubIP2 + ":80"
	reverseProxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: proxyAddr})
	reverseProxy.Transport = &http.Transport{DialContext: lab.Hub.Dial}
	reverseProxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	serveIn(t, lab.Hub, between, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Upgrade")
		reverseProxy.ServeHTTP(w, r)
	}))
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"}, "--proxy-url=http://"+between)
	n := &natted{lab: lab, proxy: proxy, client: client, prometheus: startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)}
	n.arrives(t)
	proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "longpoll")
	proxy.waitSum(t, exactly(0), "promferry_proxy_lines", "kind", "ptth")

	for _, fault := range []struct {
		name          string
		breaks, heals func()
	}{
		{"agent killed", func() { client.Kill() }, func() { client.restart(t) }},
		{"proxy killed", func() { proxy.Kill() }, func() { proxy.restart(t) }},
		{"cut off", func() { lab.Cut(t, natlab.HubIP2) }, func() { lab.Heal(t) }},
	} {
		fault.breaks()
		waitQuery(t, n.prometheus, "up"+app, exactly(0))
		fault.heals()
		n.arrives(t)
		if t.Failed() {
			t.Fatal(fault.name)
		}
	}
	lab.FlushConntrack(t)
	n.arrives(t)
}
