//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/natlab"
	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/internal/pushprox"
)

// Our proxy and agent with PushProx's other end, which is one of internal/pushprox in this
// process, behind the NAT.

// byClients is the scrape configuration of who uses PushProx: /clients has names only, and the
// port is for Prometheus to add.
const byClients = `
- job_name: app
  proxy_url: http://` + proxyAddr + `
  http_sd_configs: [{url: http://` + proxyAddr + `/clients, refresh_interval: 1s}]
  relabel_configs:
  - {source_labels: [__address__], target_label: instance}
  - {source_labels: [__address__], target_label: __address__, replacement: "$1:8000"}
`

const pushproxApp = `{job="app",instance="web-1"}`

// startPushProxClient starts PushProx's client of a name on the worker, which has the targets
// at 127.0.0.1, until the test ends or the function that it returns is called.
func startPushProxClient(t *testing.T, lab *natlab.Lab, name string) (stop func()) {
	t.Helper()
	c := &pushprox.Client{FQDN: name, ProxyURL: "http://" + proxyAddr, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if host, port, err := net.SplitHostPort(address); err == nil && host == name {
			address = "127.0.0.1:" + port
		}
		return lab.Worker.Dial(ctx, network, address)
	}}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// startPushProxProxy starts PushProx's proxy on the hub, likewise.
func startPushProxProxy(t *testing.T, lab *natlab.Lab) (stop func()) {
	t.Helper()
	proxy := pushprox.NewProxy(pushprox.ProxyConfig{})
	listener := lab.Hub.Listen(t, proxyAddr)
	server := &http.Server{Handler: proxy, ReadHeaderTimeout: patience}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	stop = sync.OnceFunc(func() {
		proxy.Close()
		server.Close()
		serving.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// stays checks all the time that Prometheus has the target of the job app, until the function
// that it returns is called.
func stays(t *testing.T, p *real.PrometheusServer) (end func()) {
	t.Helper()
	return always(t, "Prometheus's targets", func(ctx context.Context) error {
		all, err := activeTargets(ctx, p)
		if _, ok := all["app"]; err == nil && !ok {
			err = errors.New("the target has vanished")
		}
		return err
	})
}

// names returns what /clients has, sorted.
func names(ctx context.Context, proxy *daemon) ([]string, error) {
	body, err := proxy.Get(ctx, "/clients")
	if err != nil {
		return nil, err
	}
	var groups []struct{ Targets []string }
	if err := json.Unmarshal(body, &groups); err != nil {
		return nil, fmt.Errorf("/clients: %w: %s", err, body)
	}
	var all []string
	for _, g := range groups {
		all = append(all, g.Targets...)
	}
	slices.Sort(all)
	return all, nil
}

// TestPushProxClients has PushProx's clients at our proxy, with the configuration of Prometheus
// that they were used with.
func TestPushProxClients(t *testing.T) {
	t.Parallel()
	whole := t // What a step starts, others go on with.
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, expose(textType, kinds))
	proxy := startProxy(t, lab)
	stop := startPushProxClient(t, lab, "web-1")
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, byClients)
	arrives := func(t *testing.T) {
		t.Helper()
		waitScraped(t, prometheus, pushproxApp, now(t, prometheus))
	}
	var still func()
	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"arrives", func(t *testing.T) {
			waitQuery(t, prometheus, "up"+pushproxApp, exactly(1))
			still = stays(whole, prometheus)
			arrives(t)
			proxy.waitSum(t, exactly(1), "promferry_proxy_lines", "kind", "pushprox")
		}},
		{"values", func(t *testing.T) { checkValues(t, prometheus, pushproxApp) }},
		{"many", func(t *testing.T) {
			want := []string{"web-1"}
			for i := range 20 {
				name := fmt.Sprintf("other-%02d", i)
				want = append(want, name)
				startPushProxClient(whole, lab, name)
			}
			slices.Sort(want)
			wait(t, "/clients", func(ctx context.Context) error {
				have, err := names(ctx, proxy)
				if err == nil && !slices.Equal(have, want) {
					err = fmt.Errorf("%q, want %q", have, want)
				}
				return err
			})
			waitQuery(t, prometheus, `sum(up{job="app"})`, exactly(21))
			waitQuery(t, prometheus, `count(app_temperature == -273.15)`, exactly(21))
		}},
		{"says little of scrapes", func(t *testing.T) {
			lines := func() int { return strings.Count(proxy.Stderr(), "\n") }
			before := lines()
			for range 100 {
				if got := scrape(t, lab, "http://web-1:8000/metrics", time.Minute); got.err != nil || got.status != http.StatusOK || got.body != kinds {
					t.Fatalf("%+v", got)
				}
			}
			if n := lines() - before; n != 0 {
				t.Errorf("%d lines for 100 scrapes: %s", n, tail(proxy.Stderr(), 2<<10))
			}
		}},
		{"client killed and back", func(t *testing.T) {
			stop()
			waitQuery(t, prometheus, "up"+pushproxApp, exactly(0))
			scrape(t, lab, "http://web-1:8000/metrics", patience).check(t, http.StatusServiceUnavailable, "client_away")
			stop = startPushProxClient(whole, lab, "web-1")
			arrives(t)
		}},
		{"proxy restarted", func(t *testing.T) {
			if err := proxy.Stop(); err != nil {
				t.Error(err)
			}
			proxy.restart(t)
			listed := always(t, "/clients", func(ctx context.Context) error {
				have, err := names(ctx, proxy)
				if err == nil && !slices.Contains(have, "web-1") {
					err = fmt.Errorf("%q", have)
				}
				return err
			})
			arrives(t)
			listed()
		}},
		{"our agent in its place", func(t *testing.T) {
			stop()
			client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
			arrives(t)
			proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "ptth")
			proxy.waitSum(t, exactly(20), "promferry_proxy_lines", "kind", "pushprox")
			waitQuery(t, prometheus, "app_temperature"+pushproxApp, exactly(-273.15))
			waitListed(t, proxy, "app of web-1")
			// And back.
			if err := client.Stop(); err != nil {
				t.Error(err)
			}
			stop = startPushProxClient(whole, lab, "web-1")
			arrives(t)
			proxy.waitSum(t, exactly(21), "promferry_proxy_lines", "kind", "pushprox")
			waitQuery(t, prometheus, `sum(up{job="app"})`, exactly(21))
		}},
		{"never lost", func(*testing.T) { still() }},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
	}
}

// TestPushProxProxy has our agent at PushProx's proxy, and then ours in its place, at the same
// address and with the same configuration of Prometheus.
func TestPushProxProxy(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, expose(textType, kinds))
	exporter := startExporterAt(t, lab.Worker, exporterAddr)
	stop := startPushProxProxy(t, lab)
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics", "node=http://" + exporterAddr + "/metrics"})
	const node = `{job="node",instance="web-1"}`
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, byClients+`
- job_name: node
  proxy_url: http://`+proxyAddr+`
  static_configs: [{targets: ["web-1:9100"], labels: {instance: web-1}}]
`)
	waitQuery(t, prometheus, "up"+pushproxApp, exactly(1))
	waitQuery(t, prometheus, "up"+node, exactly(1))
	checkValues(t, prometheus, pushproxApp)
	checkNodeFamilies(t, prometheus, exporter, node)

	// A restart of its proxy, which forgets all: Prometheus finds the name again by /clients.
	stop()
	waitQuery(t, prometheus, "up"+node, exactly(0))
	stop = startPushProxProxy(t, lab)
	waitScraped(t, prometheus, pushproxApp, now(t, prometheus))

	stop()
	proxy := startProxy(t, lab)
	// At first it knows nobody, and the agent tries again within ten seconds.
	waitScraped(t, prometheus, pushproxApp, now(t, prometheus))
	waitScraped(t, prometheus, node, now(t, prometheus))
	checkValues(t, prometheus, pushproxApp)
	waitListed(t, proxy, "app of web-1", "node of web-1")
	proxy.waitSum(t, above(0), "promferry_proxy_lines")
	waitQuery(t, prometheus, `min_over_time(up`+node+`[3s])`, exactly(1))

	// And back.
	if err := proxy.Stop(); err != nil {
		t.Error(err)
	}
	startPushProxProxy(t, lab)
	waitScraped(t, prometheus, pushproxApp, now(t, prometheus))
	waitScraped(t, prometheus, node, now(t, prometheus))
	if err := client.Stop(); err != nil {
		t.Error(err)
	}
}

// TestProxyOperations has what PushProx's proxy leaves out: a version, settings for all that
// bounds it, one answer for probes, metrics with one prefix, an end in order.
func TestProxyOperations(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	run := func(args ...string) string {
		t.Helper()
		p, err := real.Start(real.Command{Path: promferry(t), Args: args})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		status, err := p.Wait(ctx)
		if err != nil || status != 0 {
			t.Fatalf("%v: status %d, %v: %s", args, status, err, p.Stderr())
		}
		return p.Stdout() + p.Stderr()
	}
	if out := run("--version"); !strings.Contains(out, "promferry, version ") {
		t.Errorf("--version says %q", out)
	}
	help := run("proxy", "--help")
	for _, flag := range []string{
		"registration.timeout", "scrape.max-timeout", "scrape.default-timeout", "log.level", "log.format", "web.listen-address", // PushProx's
		"web.config.file", "auth.file", "client.listen-address", "scrape.max-bytes", "limit.clients", "limit.client-lines", "limit.scrapes",
	} {
		if !strings.Contains(help, "--"+flag+"=") {
			t.Errorf("no flag --%s", flag)
		}
	}
	// Of PushProx's flags, all that its proxy has do for ours.
	proxy := startProxy(t, lab, "--registration.timeout=5m", "--scrape.max-timeout=5m", "--scrape.default-timeout=15s", "--log.level=info", "--log.format=json")
	for path, want := range map[string]string{"/-/ready": "promferry proxy is ready.\n", "/-/healthy": "promferry proxy is healthy.\n", "/clients": "[]\n"} {
		body, err := proxy.Get(t.Context(), path)
		if err != nil || string(body) != want {
			t.Errorf("%s: %q, %v", path, body, err)
		}
	}
	body, err := proxy.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(string(body), -1) {
		if !regexp.MustCompile(`^(promferry_|go_|process_|promhttp_)`).MatchString(match[1]) {
			t.Errorf("metric %s", match[1])
		}
	}
	if err := proxy.Stop(); err != nil {
		t.Error(err)
	}
}
