//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/natlab"
	"github.com/promferry/promferry/e2e/real"
)

// Reverse pull, behind a real NAT: what is scraped, and the agent, run on the worker of a
// natlab.Lab, the proxy and Prometheus on its hub.

const (
	proxyAddr      = natlab.HubIP + ":8080"
	prometheusAddr = "127.0.0.1:9090"
	exporterAddr   = "127.0.0.1:9100"
	appAddr        = "127.0.0.1:8000"
)

// discovered is the scrape configuration that docs and README tell people to write.
const discovered = `
- job_name: promferry
  proxy_url: http://` + proxyAddr + `
  http_sd_configs: [{url: http://` + proxyAddr + `/sd, refresh_interval: 1s}]
`

// A daemon is a running `promferry proxy` or `promferry agent` in a lab.
type daemon struct {
	*natlab.Server
	stateDir string
}

func startDaemon(t *testing.T, node *natlab.Node, addr, command string, flags ...string) *daemon {
	t.Helper()
	d := &daemon{stateDir: filepath.Join(t.TempDir(), command)}
	d.Server = node.Serve(t, addr, real.Command{
		Path: promferry(t), Args: append([]string{command, "--state.dir=" + d.stateDir}, flags...),
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log of the %s at %s:\n%s", command, addr, tail(d.Stderr(), 8<<10))
		}
	})
	return d
}

// startProxy starts a proxy that has a heartbeat each second unless flags say otherwise.
func startProxy(t *testing.T, lab *natlab.Lab, flags ...string) *daemon {
	t.Helper()
	if !hasFlag(flags, "--heartbeat=") {
		flags = append(flags, "--heartbeat=1s")
	}
	return startDaemon(t, lab.Hub, proxyAddr, "proxy", flags...)
}

// startClient starts the agent of web-1 with these pull targets, given as job=URL.
func startClient(t *testing.T, lab *natlab.Lab, targets []string, flags ...string) *daemon {
	t.Helper()
	all := []string{"--fqdn=web-1", "--instance=web-1"}
	for _, target := range targets {
		all = append(all, "--pull.target="+target)
	}
	if !hasFlag(flags, "--proxy-url=") {
		all = append(all, "--proxy-url=http://"+proxyAddr)
	}
	return startDaemon(t, lab.Worker, "127.0.0.1:9099", "agent", append(all, flags...)...)
}

func hasFlag(flags []string, flag string) bool {
	return slices.ContainsFunc(flags, func(f string) bool { return strings.HasPrefix(f, flag) })
}

// waitSum waits until the sum of those series of one of the daemon's own metrics that have
// these labels is good.
func (d *daemon) waitSum(t *testing.T, good func(float64) bool, name string, labels ...string) {
	t.Helper()
	wait(t, name, func(ctx context.Context) error {
		body, err := d.Get(ctx, "/metrics")
		if err != nil {
			return err
		}
		value, err := sum(body, name, labels...)
		if err == nil && !good(value) {
			err = fmt.Errorf("%s%v is %v", name, labels, value)
		}
		return err
	})
}

// waitEnd waits until the daemon, which was sent SIGTERM, has ended well.
func (d *daemon) waitEnd(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if status, err := d.Wait(ctx); status != 0 || err != nil {
		t.Errorf("after SIGTERM: status %d, %v", status, err)
	}
}

// restart starts the daemon again, which has ended.
func (d *daemon) restart(t *testing.T) {
	t.Helper()
	if err := d.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// startExporterAt starts a node_exporter on the worker's loopback interface.
func startExporterAt(t *testing.T, node *natlab.Node, addr string) *natlab.Server {
	t.Helper()
	path, err := real.Find("node_exporter")
	if err != nil {
		t.Fatal(err)
	}
	return node.Serve(t, addr, real.Command{Path: path})
}

// startPrometheusIn starts a Prometheus on a node of a lab. scrapeConfigs is the list under
// scrape_configs; a scrape comes each second, and may take as long, unless it says otherwise.
func startPrometheusIn(t *testing.T, node *natlab.Node, addr, scrapeConfigs string) *real.PrometheusServer {
	t.Helper()
	path, err := real.Find("prometheus")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	content := "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:" + scrapeConfigs
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	server := node.Serve(t, addr, real.Command{Path: path, Args: []string{
		"--config.file=" + config,
		"--storage.tsdb.path=" + filepath.Join(dir, "data"),
		"--scrape.discovery-reload-interval=100ms", // Prometheus 3: no wait; 2: no effect
	}})
	p := &real.PrometheusServer{Server: server.Server}
	wait(t, "Prometheus is ready", func(ctx context.Context) error {
		_, err := p.Get(ctx, "/-/ready")
		return err
	})
	return p
}

// serveIn starts an HTTP server on a node of a lab that ends with the test. Handlers that
// would never end have to watch their request's context.
func serveIn(t *testing.T, node *natlab.Node, addr string, handler http.Handler) {
	t.Helper()
	server := &http.Server{Handler: handler, ReadHeaderTimeout: patience}
	listener := node.Listen(t, addr)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
	})
}

// counting is a target whose only sample says how often it was scraped.
type counting struct{ scrapes atomic.Int64 }

func (c *counting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	expose(textType, fmt.Sprintf("app_scrapes %d\n", c.scrapes.Add(1)))(w, r)
}

// A held target answers each scrape when the test says so.
type held struct {
	began chan struct{} // gets a value for each scrape
	end   chan struct{} // lets one end
	text  string
}

func hold(text string) *held {
	return &held{began: make(chan struct{}, 100), end: make(chan struct{}), text: text}
}

func (h *held) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.began <- struct{}{}
	select {
	case <-h.end:
		expose(textType, h.text)(w, r)
	case <-r.Context().Done():
	}
}

// await waits for a value on a channel.
func await[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
		panic("not reached")
	}
}

// An answer is what a scrape through the proxy got.
type answer struct {
	status int
	reason string // Promferry-Error
	body   string
	took   time.Duration
	err    error
}

// scrape scrapes a URL through a proxy as Prometheus does. timeout is what the scrape says
// of itself; the answer is waited for longer than that.
func scrape(t *testing.T, lab *natlab.Lab, target string, timeout time.Duration) answer {
	t.Helper()
	transport := &http.Transport{
		Proxy:       http.ProxyURL(&url.URL{Scheme: "http", Host: proxyAddr}),
		DialContext: lab.Hub.Dial, DisableKeepAlives: true,
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout+patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", fmt.Sprint(timeout.Seconds()))
	began := time.Now()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return answer{err: err, took: time.Since(began)}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header.Get("Promferry-Error"), string(body), time.Since(began), err}
}

// check checks that the proxy or the agent said that something is wrong, and at once: long
// before the scrape's time was up.
func (a answer) check(t *testing.T, status int, reason string) {
	t.Helper()
	if a.err != nil || a.status != status || a.reason != reason || a.took > patience/2 {
		t.Errorf("%d %q after %v (%v): %s; want %d %q at once", a.status, a.reason, a.took, a.err, a.body, status, reason)
	}
}

// listed returns the job and instance labels of all targets of /sd, sorted.
func listed(ctx context.Context, proxy *daemon) ([]string, error) {
	body, err := proxy.Get(ctx, "/sd")
	if err != nil {
		return nil, err
	}
	var groups []struct {
		Targets []string
		Labels  map[string]string
	}
	if err := json.Unmarshal(body, &groups); err != nil {
		return nil, fmt.Errorf("/sd: %w: %s", err, body)
	}
	all := []string{}
	for _, g := range groups {
		for range g.Targets {
			all = append(all, g.Labels["job"]+" of "+g.Labels["instance"])
		}
	}
	slices.Sort(all)
	return all, nil
}

func waitListed(t *testing.T, proxy *daemon, want ...string) {
	t.Helper()
	wait(t, "/sd", func(ctx context.Context) error {
		have, err := listed(ctx, proxy)
		if err == nil && !slices.Equal(have, want) {
			err = fmt.Errorf("/sd lists %q, want %q", have, want)
		}
		return err
	})
}

// An activeTarget is what Prometheus says of a target.
type activeTarget struct {
	Labels    map[string]string
	Health    string
	LastError string
}

// activeTargets returns Prometheus's targets by their job label.
func activeTargets(ctx context.Context, p *real.PrometheusServer) (map[string]activeTarget, error) {
	body, err := p.Get(ctx, "/api/v1/targets?state=active")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct{ ActiveTargets []activeTarget }
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	all := make(map[string]activeTarget)
	for _, target := range answer.Data.ActiveTargets {
		all[target.Labels["job"]] = target
	}
	return all, nil
}

// waitFault waits until Prometheus says of a job that it is down because of a status.
func waitFault(t *testing.T, p *real.PrometheusServer, job string, status int) {
	t.Helper()
	wait(t, fmt.Sprintf("status %d of %s", status, job), func(ctx context.Context) error {
		all, err := activeTargets(ctx, p)
		if target := all[job]; err == nil && (target.Health != "down" || !strings.Contains(target.LastError, fmt.Sprintf("HTTP status %d ", status))) {
			err = fmt.Errorf("Prometheus says of %s: %q %q", job, target.Health, target.LastError)
		}
		return err
	})
}

// now returns Prometheus's time, as it stands in its samples.
func now(t *testing.T, p *real.PrometheusServer) float64 {
	t.Helper()
	samples, err := p.Query(t.Context(), "vector(time())")
	if err != nil || len(samples) != 1 {
		t.Fatal(samples, err)
	}
	return samples[0].Value
}

// waitScraped waits until a target has been scraped well after a time.
func waitScraped(t *testing.T, p *real.PrometheusServer, selector string, after float64) {
	t.Helper()
	waitQuery(t, p, fmt.Sprintf("timestamp(up%s) > %f and up%[1]s == 1", selector, after), above(after))
}

// always checks something 20 times a second, until the function that it returns is called,
// which tells of the first fault.
func always(t *testing.T, what string, check func(context.Context) error) (end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var checking sync.WaitGroup
	checks := 0
	var fault error
	checking.Go(func() {
		for fault == nil && ctx.Err() == nil {
			if err := check(ctx); ctx.Err() == nil {
				fault = err
				checks++
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	t.Cleanup(cancel)
	return func() {
		t.Helper()
		cancel()
		checking.Wait()
		if fault != nil {
			t.Errorf("%s, after %d checks: %v", what, checks, fault)
		}
		if checks == 0 {
			t.Errorf("%s: was never checked", what)
		}
	}
}

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

// prometheusSum waits until one of Prometheus's own counters has grown by more.
func prometheusSum(t *testing.T, p *real.PrometheusServer, more float64, name string) {
	t.Helper()
	begin := -1.0
	wait(t, name, func(ctx context.Context) error {
		body, err := p.Get(ctx, "/metrics")
		if err != nil {
			return err
		}
		value, err := sum(body, name)
		if begin < 0 {
			begin = value
		}
		if err == nil && value < begin+more {
			err = fmt.Errorf("%s is %v, was %v", name, value, begin)
		}
		return err
	})
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
