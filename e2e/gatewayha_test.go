//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/promferry/promferry/e2e/real"
)

// TestGatewayPair has two gateways side by side, an agent and batch jobs that push to both, and a
// Prometheus that scrapes both as docs/gateway.md says. One of the two is killed for some seconds:
// the other's series have no gap, and what a batch job pushes meanwhile is on both in the end.
func TestGatewayPair(t *testing.T) {
	t.Parallel()
	a, b := startGateway(t), startGateway(t)
	p, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(`
- job_name: gateway
  honor_labels: true
  http_sd_configs:
    - {url: %q, refresh_interval: 1s}
    - {url: %q, refresh_interval: 1s}
  relabel_configs:
    - source_labels: [__address__]
      target_label: hub
`, a.URL+"/sd", b.URL+"/sd"))
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

	from := now(t, p)
	a.Kill()
	waitQuery(t, p, on(a, "up", labels), exactly(0))
	if status, _, stderr := host.ferry(t, "", "run", "--job=meanwhile", "--", "true"); status != 0 {
		t.Errorf("run: status %d: %s", status, stderr)
	}
	waitQuery(t, p, on(b, "batch_job_last_success", pushed("meanwhile")), exactly(1))
	node.waitCycles(t, "node", 5)
	if err := a.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitQuery(t, p, on(a, "up", labels), exactly(1))
	waitQuery(t, p, on(a, "batch_job_last_success", pushed("meanwhile")), exactly(1))
	to := now(t, p)

	// Scraped each second, if not on time.
	const short, long = 3, 4
	if gap := longestGap(t, p, on(a, "node_load1", labels), from, to); gap < long {
		t.Errorf("a gap of %.1f s for the gateway that was away", gap)
	}
	if gap := longestGap(t, p, on(b, "node_load1", labels), from, to); gap > short {
		t.Errorf("a gap of %.1f s for the other gateway", gap)
	}
	for _, s := range queryRange(t, p, "max without (hub) (up{"+labels+"})", from, to, 0.5) {
		if s.value != 1 {
			t.Errorf("both together: up is %v at %.1f", s.value, s.at-from)
		}
	}
	if graph := queryRange(t, p, "max without (hub) (node_load1{"+labels+"})", from, to, 0.5); len(graph) < int(2*(to-from)) {
		t.Errorf("both together: %d points in %.1f s", len(graph), to-from)
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

// startNode starts the agent of a host on which batch jobs run. It puts a node_exporter each second.
func startNode(t *testing.T, host batchHost) *agent {
	t.Helper()
	exporter := startExporter(t)
	server, err := real.Serve(t.Context(), "", real.Command{
		Path: promferry(t), Args: []string{"agent", "--push.target=node=" + exporter.URL + "/metrics", "--push.interval=1s"}, Env: host.env(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Kill)
	return &agent{Server: server, stateDir: host.stateDir}
}

// longestGap returns the longest time without a sample of a series, in seconds.
func longestGap(t *testing.T, p *real.PrometheusServer, selector string, from, to float64) float64 {
	t.Helper()
	longest, last := 0.0, from
	for _, s := range append(stored(t, p, selector), sampled{at: to}) {
		if s.at >= from && s.at <= to {
			longest, last = max(longest, s.at-last), s.at
		}
	}
	return longest
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
