//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// TestGatewayRestart kills a gateway that a Prometheus scrapes in both ways, with one node alive,
// one dead for a while, one that dies with it, and a batch job's group. When it is back, the
// living node is down in no scrape, the dead one has not vanished, the third falls silent at its
// time, and the batch result was there at once.
func TestGatewayRestart(t *testing.T) {
	t.Parallel()
	gateway := startGateway(t)
	p := scrapeBothWays(t, gateway)
	const node = "# TYPE up gauge\nup 1\nnode_load1 0.5\npromferry_expires_after_seconds %d\n"
	put(t, gateway, "/metrics/job/node/instance/dead", fmt.Sprintf(node, 1))
	put(t, gateway, "/metrics/job/node/instance/dying", fmt.Sprintf(node, 8))
	put(t, gateway, "/metrics/job/backup", "backup_size_bytes 42\n")
	agent := startAgent(t, "--push.url="+gateway.URL, "--push.target=node="+startExporter(t).URL+"/metrics", "--instance=web-1", "--push.interval=3s", "--push.expires-after=8s")
	up := func(instance, way string) string {
		return fmt.Sprintf(`up{job="node",instance=%q,way=%q}`, instance, way)
	}
	for _, way := range []string{"", "page"} {
		waitQuery(t, p, up("web-1", way), exactly(1))
		waitQuery(t, p, up("dead", way), exactly(0))
	}
	const silence = "silent since "
	_, before, _ := strings.Cut(answerOf(t, gateway, "dead", http.StatusServiceUnavailable), silence)

	gateway.Kill()
	if err := gateway.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := unixTime(time.Now())
	_, after, _ := strings.Cut(answerOf(t, gateway, "dead", http.StatusServiceUnavailable), silence)
	if before == "" || after != before {
		t.Errorf("the dead node is silent since %q, and before the restart was since %q", after, before)
	}
	answerOf(t, gateway, "dying", http.StatusOK)
	page, err := gateway.Get(t.Context(), "/metrics")
	if err != nil || !strings.Contains(string(page), "\nbackup_size_bytes{instance=\"\",job=\"backup\"} 42\n") {
		t.Errorf("%v: the batch result is not there:\n%.1000s", err, page)
	}
	for _, way := range []string{"", "page"} {
		waitQuery(t, p, up("dying", way), exactly(0))
		waitQuery(t, p, up("dead", way), exactly(0))
	}
	silent := unixTime(time.Now())
	if took := silent - back; took < 8 {
		t.Errorf("the node that died with the gateway is down after %.1f s, and its push was good for 8", took)
	}
	waitQuery(t, p, `node_load1{job="node",instance="web-1",way="target"}`, above(-1))
	seen := 0
	for _, way := range []string{"", "page"} {
		for _, s := range stored(t, p, up("web-1", way)) {
			// What was scraped in the moment of the restart was refused.
			if s.at > back+0.1 {
				seen++
				if s.value != 1 {
					t.Errorf("the living node's up was %v %.1f s after the restart", s.value, s.at-back)
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d samples of the living node's up", seen)
	}
	if agent.mustSum(t, "promferry_forwarder_puts_total") == 0 {
		t.Error("the agent has put nothing")
	}
}

// answerOf returns what a node's target answers.
func answerOf(t *testing.T, g *real.Gateway, instance string, want int) string {
	t.Helper()
	status, answer := send(t, http.MethodGet, g.URL+"/groups/job/node/instance/"+instance+"/metrics", "", nil)
	wantStatus(t, status, want)
	return answer
}
