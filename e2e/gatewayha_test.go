//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/promferry/promferry/e2e/real"
)

// short is the longest gap, in seconds, in a series that has none: it is scraped each second, if
// not on time.
const short = 4

// TestGatewayPair has two gateways side by side, an agent and batch jobs that push to both, and a
// Prometheus that scrapes both as docs/gateway.md says. One of the two is killed for some seconds:
// the other's series have no gap, what it had it has again, and what a batch job pushes meanwhile
// is on both in the end.
func TestGatewayPair(t *testing.T) {
	t.Parallel()
	a, b := startGateway(t), startGateway(t)
	config := documented(t, "target_label: hub", "hub-a:9091", a.Addr, "hub-b:9091", b.Addr,
		"scrape_configs:\n", "", "\n  ", "\n", "refresh_interval: 10s", "refresh_interval: 1s")
	p, err := real.Prometheus(t.Context(), t.TempDir(), strings.TrimLeft(config, " "))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	host := newBatchHost(t, a.URL, b.URL)
	node := startNode(t, host)

	const labels = `job="node",instance="web-1"`
	on := func(g *real.Gateway, metric, labels string) string {
		return fmt.Sprintf("%s{%s,hub=%q}", metric, labels, g.Addr)
	}
	pushed := func(job string) string { return fmt.Sprintf(`job=%q,instance="web-1"`, job) }
	for _, g := range []*real.Gateway{a, b} {
		waitQuery(t, p, on(g, "up", labels), exactly(1))
		waitQuery(t, p, on(g, "node_load1", labels), above(-1))
	}

	host.mustFerry(t, "run", "--job=before", "--", "true")
	from := now(t, p)
	a.Kill()
	waitQuery(t, p, on(a, "up", labels), exactly(0))
	if status, _, stderr := host.ferry(t, "", "run", "--job=meanwhile", "--", "true"); status != 0 {
		t.Errorf("run: status %d: %s", status, stderr)
	}
	waitQuery(t, p, on(b, "batch_job_last_success", pushed("meanwhile")), exactly(1))
	node.waitCycles(t, "node", 8)
	if err := a.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if before, err := group(t.Context(), a, jobLabels("before")); err != nil || value(before, "batch_job_last_success") != "1" {
		t.Errorf("what it had is %v, %v", before, err)
	}
	waitQuery(t, p, on(a, "up", labels), exactly(1))
	waitQuery(t, p, on(a, "batch_job_last_success", pushed("meanwhile")), exactly(1))
	to := now(t, p)

	if gap := longestGap(stored(t, p, on(a, "node_load1", labels)), from, to); gap < 2*short {
		t.Errorf("a gap of %.1f s for the gateway that was away", gap)
	}
	if gap := longestGap(stored(t, p, on(b, "node_load1", labels)), from, to); gap > short {
		t.Errorf("a gap of %.1f s for the other gateway", gap)
	}
	for _, both := range []string{"max without (hub) (up{" + labels + "}) == 1", "max without (hub) (node_load1{" + labels + "})"} {
		if gap := longestGap(queryRange(t, p, both, from, to, 0.5), from, to); gap > short {
			t.Errorf("a gap of %.1f s in %s", gap, both)
		}
	}
	text, err := p.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, dropped := range []string{"duplicate_timestamp", "out_of_order", "out_of_bounds"} {
		if n, err := sum(text, "prometheus_target_scrapes_sample_"+dropped+"_total"); err != nil || n != 0 {
			t.Errorf("%s: %v, %v", dropped, n, err)
		}
	}
	wait(t, "the same groups on both", func(ctx context.Context) error {
		mine, err := keys(ctx, a)
		others, otherErr := keys(ctx, b)
		if err := errors.Join(err, otherErr); err != nil {
			return err
		}
		if !slices.Equal(mine, others) {
			return fmt.Errorf("%v and %v", mine, others)
		}
		return nil
	})
}

// TestGatewayFailover has an nginx in front of two gateways, as docs/gateway.md says, and a
// Prometheus that knows nothing else. The first gateway is killed: the series go on.
func TestGatewayFailover(t *testing.T) {
	t.Parallel()
	a, b := startGateway(t), startGateway(t)
	address := refusing(t)
	startNginx(t, documented(t, "upstream gateways", "hub-a:9091", a.Addr, "hub-b:9091", b.Addr, "listen 9090", "listen "+address+" reuseport"))
	p, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(`
- job_name: gateway
  honor_labels: true
  http_sd_configs: [{url: "http://%s/sd", refresh_interval: 1s}]
`, address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	node := startNode(t, newBatchHost(t, a.URL, b.URL))
	const up = `up{job="node",instance="web-1"}`
	waitQuery(t, p, up, exactly(1))

	from := now(t, p)
	a.Kill()
	node.waitCycles(t, "node", 8)
	to := now(t, p)
	if gap := longestGap(queryRange(t, p, up+" == 1", from, to, 0.5), from, to); gap > short {
		t.Errorf("a gap of %.1f s", gap)
	}
	node.stop(t)
	waitQuery(t, p, up, exactly(0))
	status, answer := send(t, http.MethodGet, "http://"+address+"/groups/job/node/instance/web-1/metrics", "", nil)
	if status != http.StatusServiceUnavailable || !strings.Contains(answer, "is down since") {
		t.Errorf("the target of a dead node answers %d: %s", status, answer)
	}
}

// documented returns the example in docs/gateway.md that has a text in it, with others in place of
// some of its words: old, new, old, new.
func documented(t *testing.T, text string, oldnew ...string) string {
	t.Helper()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "gateway.md"))
	if err != nil {
		t.Fatal(err)
	}
	before, after, ok := strings.Cut(string(doc), text)
	if !ok {
		t.Fatalf("docs/gateway.md has no %q", text)
	}
	before = before[strings.LastIndex(before, "```"):]
	_, before, _ = strings.Cut(before, "\n") // without the name of the language
	after, _, _ = strings.Cut(after, "```")
	return strings.NewReplacer(oldnew...).Replace(before + text + after)
}

// startNginx starts an nginx with these upstreams and servers. It may not listen yet.
func startNginx(t *testing.T, config string) {
	t.Helper()
	path, err := real.Find("nginx")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(name, []byte(`
daemon off;
master_process off;
error_log stderr;
pid nginx.pid;
events {}
http {
access_log off;
client_body_temp_path client;
proxy_temp_path proxy;
fastcgi_temp_path fastcgi;
uwsgi_temp_path uwsgi;
scgi_temp_path scgi;
`+config+"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	nginx, err := real.Start(real.Command{Path: path, Args: []string{"-p", dir, "-c", name, "-e", "stderr"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nginx.Kill()
		if t.Failed() {
			t.Logf("nginx:\n%s", tail(nginx.Stderr(), 8<<10))
		}
	})
}

// startNode starts the agent of a host on which batch jobs run. It puts a node_exporter each second.
func startNode(t *testing.T, host batchHost) *agent {
	t.Helper()
	exporter := startExporter(t)
	server, err := real.Serve(t.Context(), "", real.Command{
		Path: promferry(t), Env: host.env(),
		Args: []string{"agent", "--push.target=node=" + exporter.URL + "/metrics", "--push.interval=1s", "--push.expires-after=1m"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Kill)
	return &agent{Server: server, stateDir: host.stateDir}
}

// longestGap returns the longest time without a sample, in seconds.
func longestGap(samples []sampled, from, to float64) float64 {
	longest, last := 0.0, from
	for _, s := range samples {
		if s.at >= from && s.at <= to {
			longest, last = max(longest, s.at-last), s.at
		}
	}
	return max(longest, to-last)
}

// keys returns the grouping keys of a gateway, sorted.
func keys(ctx context.Context, g *real.Gateway) ([]string, error) {
	groups, err := g.Groups(ctx)
	all := make([]string, 0, len(groups))
	for _, group := range groups {
		var labels []string
		for _, name := range slices.Sorted(maps.Keys(group.Labels)) {
			labels = append(labels, name+"="+group.Labels[name])
		}
		all = append(all, strings.Join(labels, ","))
	}
	slices.Sort(all)
	return all, err
}
