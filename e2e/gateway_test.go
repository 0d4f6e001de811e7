//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/pushgw"
)

// TestGatewayWithPrometheus has an agent put to a gateway that a Prometheus scrapes in both
// ways. The agent is killed, so that nobody says that it is gone: both ways show it as down,
// and its series have ended, while a group that says nothing of expiry stays. It comes back.
func TestGatewayWithPrometheus(t *testing.T) {
	t.Parallel()
	gateway := startGateway(t)
	p := scrapeBothWays(t, gateway)
	exporter := startExporter(t)
	put(t, gateway, "/metrics/job/backup/shard/a", "backup_size_bytes 42\n")
	flags := []string{"--push.url=" + gateway.URL, "--push.target=node=" + exporter.URL + "/metrics", "--instance=web-1", "--push.expires-after=3s"}
	agent := startAgent(t, flags...)
	// Prometheus makes up of a target itself, and the agent that of the page.
	const upOfTarget, upOfPage = `up{job="node",instance="web-1",way=""}`, `up{job="node",instance="web-1",way="page"}`
	for _, up := range []string{upOfTarget, upOfPage} {
		waitQuery(t, p, up, exactly(1))
	}
	for _, way := range []string{"target", "page"} {
		waitQuery(t, p, fmt.Sprintf(`count(node_load1{job="node",instance="web-1",way=%q})`, way), exactly(1))
		waitQuery(t, p, fmt.Sprintf(`backup_size_bytes{job="backup",shard="a",instance="",way=%q}`, way), exactly(42))
	}
	waitQuery(t, p, `scrape_samples_scraped{job="node",instance="web-1",way=""}`, above(100))

	agent.Kill()
	for _, up := range []string{upOfTarget, upOfPage} {
		waitQuery(t, p, up, exactly(0))
	}
	waitEnded(t, p, `node_load1{job="node"}`)
	for _, way := range []string{"target", "page"} {
		waitQuery(t, p, fmt.Sprintf(`backup_size_bytes{way=%q}`, way), exactly(42))
	}
	status, answer := send(t, http.MethodGet, gateway.URL+"/groups/job/node/instance/web-1/metrics", "", nil)
	wantStatus(t, status, http.StatusServiceUnavailable)
	t.Log(answer)

	startAgent(t, flags...)
	for _, up := range []string{upOfTarget, upOfPage} {
		waitQuery(t, p, up, exactly(1))
	}
}

// scrapeBothWays starts a Prometheus that scrapes each group of a gateway as a target of its own
// (its series have way="target", up and what else Prometheus makes has none), and the page with all
// of them (way="page").
func scrapeBothWays(t *testing.T, gateway *real.Gateway) *real.PrometheusServer {
	t.Helper()
	p, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(`
- job_name: targets
  honor_labels: true
  http_sd_configs: [{url: %q, refresh_interval: 1s}]
  metric_relabel_configs: [{target_label: way, replacement: target}]
- job_name: page
  honor_labels: true
  static_configs: [{targets: [%q]}]
  metric_relabel_configs: [{target_label: way, replacement: page}]
`, gateway.URL+"/sd", gateway.Addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// TestGatewayPromtool puts each accident, and a real exporter's answer, to a group of its own:
// promtool reads the page with all that was taken.
func TestGatewayPromtool(t *testing.T) {
	t.Parallel()
	gateway := startGateway(t)
	exporter := startExporter(t)
	exposed, err := exporter.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		put(t, gateway, fmt.Sprintf("/metrics/job/node/instance/%d", i), string(exposed))
	}
	for i, a := range accidents {
		send(t, http.MethodPut, fmt.Sprintf("%s/metrics/job/accident/instance/%d", gateway.URL, i), a.contentType, []byte(a.body))
	}
	put(t, gateway, "/metrics/job/clash", "# TYPE node_load1 counter\nnode_load1 1\n# TYPE h_count counter\nh_count 1\n")
	promtool, err := real.Find("promtool")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/metrics", "/groups/job/node/instance/1/metrics", "/groups/job/clash/metrics"} {
		page, err := gateway.Get(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		command := exec.CommandContext(t.Context(), promtool, "check", "metrics")
		command.Stdin = bytes.NewReader(page)
		// 3 is for names that are no good style.
		if out, err := command.CombinedOutput(); err != nil && command.ProcessState.ExitCode() != 3 {
			t.Errorf("%s: %v: %.2000s", path, err, out)
		}
	}
}

// TestGatewayListing lists the groups of a gateway with the client that promferry expire has.
func TestGatewayListing(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	gateway := startGateway(t)
	client := newClient(t, gateway)
	for _, v := range []string{"web-1.example:9100", "a b", "/var/tmp", "..", "ü", `a"b'c`, `a\b`, "a\nb", "\x00", "<&>", "{}", "\u2028", strings.Repeat("ü/", 400)} {
		key := pushgw.GroupingKey{Job: "contract", Labels: map[string]string{"v": v}}
		const text = "# HELP a Has \"quotes\", \\\\ and {braces}]}\n# TYPE a gauge\na{l=\"\\\"}],{[\\\\\"} 1\npromferry_expires_after_seconds 40.5\n"
		put(t, gateway, key.Path(), text)
		g, ok := list(t, client)[key.String()]
		if !ok || !maps.Equal(g.Key.Labels, key.Labels) {
			t.Fatalf("%q is not listed: %v", v, list(t, client))
		}
		if g.Families != 4 || g.ExpiresAfter != 40.5 || g.Pushed.Before(begin) || g.Pushed.After(time.Now()) {
			t.Errorf("%q: %+v", v, g)
		}
		if err := client.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if groups := list(t, client); len(groups) != 0 {
			t.Errorf("deleted, and listed: %v", groups)
		}
	}
	status, err := client.Status(t.Context())
	if err != nil || status.Started.After(time.Now()) || status.Now.Before(begin.Truncate(time.Second)) {
		t.Error(status, err)
	}
}
