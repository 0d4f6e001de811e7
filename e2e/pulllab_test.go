//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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
  follow_redirects: false
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
	content := "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\nscrape_configs:" + scrapeConfigs
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
	serveOn(t, node.Listen(t, addr), handler)
}

func serveTLSIn(t *testing.T, node *natlab.Node, addr string, certificate tls.Certificate, handler http.Handler) {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	serveOn(t, tls.NewListener(node.Listen(t, addr), config), handler)
}

func serveOn(t *testing.T, listener net.Listener, handler http.Handler) {
	t.Helper()
	server := &http.Server{Handler: handler, ReadHeaderTimeout: patience}
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
	// canceled gets a value for each that was given up before its end.
	canceled chan struct{}
	text     string
}

func hold(text string) *held {
	return &held{began: make(chan struct{}, 100), end: make(chan struct{}), canceled: make(chan struct{}, 100), text: text}
}

func (h *held) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.began <- struct{}{}
	select {
	case <-h.end:
		expose(textType, h.text)(w, r)
	case <-r.Context().Done():
		h.canceled <- struct{}{}
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

// check checks the status and what the proxy or the agent says that is wrong, "" for nothing,
// and that the answer came at once: long before the scrape's time was up.
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
