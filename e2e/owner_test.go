//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// What an agent has put and is no longer configured to put is deleted, and nothing else is.

// waitOnly waits until a Pushgateway has these groups and no others, given as job/instance, and
// with a further label as job/instance/value.
func waitOnly(t *testing.T, g *real.Gateway, want ...string) {
	t.Helper()
	slices.Sort(want)
	wait(t, "the groups of "+g.URL, func(ctx context.Context) error {
		groups, err := g.Groups(ctx)
		if err != nil {
			return err
		}
		have := []string{}
		for _, group := range groups {
			name := group.Labels["job"] + "/" + group.Labels["instance"]
			for _, label := range slices.Sorted(maps.Keys(group.Labels)) {
				if label != "job" && label != "instance" {
					name += "/" + group.Labels[label]
				}
			}
			have = append(have, name)
		}
		slices.Sort(have)
		if !slices.Equal(have, want) {
			return fmt.Errorf("they are %q, want %q", have, want)
		}
		return nil
	})
}

// TestOwnerLeaves changes what an agent is to put, by a new start, after a stop and after a kill.
func TestOwnerLeaves(t *testing.T) {
	t.Parallel()
	target := serve(t, expose(textType, "a 1\n"))
	node, app := "--push.target=node="+target, "--push.target=app="+target
	for _, test := range []struct {
		name          string
		before, after []string // flags
		had, has      []string // groups
	}{
		{
			"instance renamed",
			[]string{node, app, "--instance=web-1"},
			[]string{node, app, "--instance=web-2"},
			[]string{"node/web-1", "app/web-1"},
			[]string{"node/web-2", "app/web-2"},
		},
		{
			"target removed",
			[]string{node, app, "--instance=web-1"},
			[]string{node, "--instance=web-1"},
			[]string{"node/web-1", "app/web-1"},
			[]string{"node/web-1"},
		},
		{
			"label changed",
			[]string{node, "--instance=web-1", "--push.label=env=test"},
			[]string{node, "--instance=web-1", "--push.label=env=prod/eu"},
			[]string{"node/web-1/test"},
			[]string{"node/web-1/prod/eu"},
		},
		{
			"label added",
			[]string{node, "--instance=web-1"},
			[]string{node, "--instance=web-1", "--push.label=env=prod"},
			[]string{"node/web-1"},
			[]string{"node/web-1/prod"},
		},
	} {
		for how, end := range map[string]func(*testing.T, *agent){
			"stopped": func(t *testing.T, a *agent) { a.stop(t) },
			"killed":  func(_ *testing.T, a *agent) { a.Kill() },
		} {
			t.Run(test.name+", "+how, func(t *testing.T) {
				t.Parallel()
				gateway := startPushgateway(t)
				backup := runBackup(t, gateway)
				put(t, gateway, "/metrics/job/node/instance/web-9", nodeGroup("600")) // another's
				others := []string{"backup/web-1", "node/web-9"}
				url := "--push.url=" + gateway.URL
				a := startAgent(t, append(test.before, url)...)
				waitOnly(t, gateway, append(test.had, others...)...)
				end(t, a)
				a = startAgentAt(t, a.stateDir, append(test.after, url)...)
				waitOnly(t, gateway, append(test.has, others...)...)
				a.waitSum(t, exactly(0), "promferry_forwarder_abandoned_groups")

				// And stays so: nobody deletes what is put now, or puts what is deleted.
				since := a.count(t, "node", gateway)
				a.waitCycles(t, "node", 2)
				since.checkEachPut(t)
				waitOnly(t, gateway, append(test.has, others...)...)
				backup.check(t)
			})
		}
	}
}

// TestOwnerOfAGatewayThatWasAway moves an agent away from a Pushgateway that does not answer, and
// kills it twice before that one is back.
func TestOwnerOfAGatewayThatWasAway(t *testing.T) {
	t.Parallel()
	target := "node=" + serve(t, expose(textType, "a 1\n"))
	for name, pull := range map[string]bool{"to another": false, "to pull": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old := startPushgateway(t, "--persistence.file="+filepath.Join(t.TempDir(), "groups"))
			to := startPushgateway(t)
			backup := runBackup(t, old)
			a := startAgent(t, "--instance=web-1", "--push.target="+target, "--push.url="+old.URL)
			waitOnly(t, old, "node/web-1", "backup/web-1")
			a.Kill()
			if err := old.Stop(); err != nil { // saves what it has
				t.Fatal(err)
			}

			after := []string{"--instance=web-1", "--push.target=" + target, "--push.url=" + to.URL}
			if pull {
				after = []string{"--instance=web-1", "--pull.target=" + target, "--fqdn=web-1", "--proxy-url=http://" + refusing(t)}
			}
			for kills := 0; ; kills++ {
				a = startAgentAt(t, a.stateDir, after...)
				a.waitSum(t, above(0), "promferry_forwarder_abandoned_group_deletions_total", "outcome", "failure")
				a.waitSum(t, exactly(1), "promferry_forwarder_abandoned_groups")
				if !pull { // The old one delays nothing.
					since := a.count(t, "node", to)
					a.waitCycles(t, "node", 2)
					since.checkEachPut(t)
				}
				if kills == 2 {
					break
				}
				a.Kill()
			}
			if err := old.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitOnly(t, old, "backup/web-1")
			backup.check(t)
			a.waitSum(t, exactly(0), "promferry_forwarder_abandoned_groups")
			if !pull {
				waitOnly(t, to, "node/web-1")
			}
		})
	}
}

// TestOwnerOfAGatewayWithTwoNames: what is deleted at the old URL is what is put at the new one.
func TestOwnerOfAGatewayWithTwoNames(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	prometheus := startPrometheus(t, gateway)
	_, port, _ := strings.Cut(gateway.Addr, ":")
	flags := []string{"--instance=web-1", "--push.target=node=" + serve(t, expose(textType, "a 1\n"))}
	a := startAgent(t, append(flags, "--push.url="+gateway.URL)...)
	waitQuery(t, prometheus, "up"+node, exactly(1))
	a.Kill()
	a = startAgentAt(t, a.stateDir, append(flags, "--push.url=http://localhost:"+port)...)
	a.waitSum(t, exactly(1), "promferry_forwarder_abandoned_group_deletions_total", "outcome", "success")
	a.waitCycles(t, "node", 2)
	waitOnly(t, gateway, "node/web-1")
	waitQuery(t, prometheus, "a"+node, exactly(1))
}

// switched is the interval of TestOwnerSwitchesToPull, in seconds. Prometheus (2.42) takes up to
// five seconds to scrape what it has discovered, and then up to an interval: only with more than
// that is two intervals enough. That is so with 15 s, and with a refresh_interval that is short.
const switched = 8

// TestOwnerSwitchesToPull moves a target from push to pull by one restart of the agent.
func TestOwnerSwitchesToPull(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		end  func(*testing.T, *agent)
		url  bool // is the Pushgateway still configured?
	}{
		{"stopped", func(t *testing.T, a *agent) { a.stop(t) }, true},
		{"killed", func(_ *testing.T, a *agent) { a.Kill() }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			gateway := startPushgateway(t)
			backup := runBackup(t, gateway)
			startExpire(t, gateway)
			exporter := startExporter(t)
			proxy, err := real.Serve(t.Context(), "", real.Command{
				Path: promferry(t), Args: []string{"proxy", "--state.dir=" + filepath.Join(t.TempDir(), "proxy")},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(proxy.Kill)
			prometheus, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(`
- job_name: pushgateway
  honor_labels: true
  scrape_interval: %[1]ds
  static_configs: [{targets: [%[2]q]}]
- job_name: promferry
  scrape_interval: %[1]ds
  proxy_url: %[3]s
  http_sd_configs: [{url: %[3]s/sd, refresh_interval: 1s}]
`, switched, gateway.Addr, proxy.URL))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(prometheus.Kill)

			target := "node=" + exporter.URL + "/metrics"
			flags := []string{"--instance=web-1", "--push.label=env=prod", fmt.Sprintf("--push.interval=%ds", switched)}
			a := startAgent(t, append(flags, "--push.target="+target, "--push.url="+gateway.URL)...)
			const dashboard = `node_load1{job="node",instance="web-1"}`
			waitQuery(t, prometheus, dashboard, above(-1))
			before, err := prometheus.Query(t.Context(), dashboard)
			if err != nil {
				t.Fatal(err)
			}

			test.end(t, a)
			began := unixTime(time.Now())
			flags = append(flags, "--pull.target="+target, "--proxy-url="+proxy.URL, "--fqdn=web-1")
			if test.url {
				flags = append(flags, "--push.url="+gateway.URL)
			}
			a = startAgentAt(t, a.stateDir, flags...)
			waitOnly(t, gateway, "backup/web-1")
			// Until the Pushgateway was scraped without the group, which ends its series, and the
			// target after that. Prometheus writes this metric of what it scrapes itself.
			const scrapes = `timestamp(scrape_samples_post_metric_relabeling{job="%s"}) > %f`
			waitQuery(t, prometheus, fmt.Sprintf(scrapes, "pushgateway", began+1), above(began))
			waitQuery(t, prometheus, fmt.Sprintf(scrapes, "node", now(t, prometheus)), above(began))
			waitQuery(t, prometheus, dashboard, above(-1))
			after, err := prometheus.Query(t.Context(), dashboard)
			if err != nil || len(before) != 1 || len(after) != 1 || !maps.Equal(before[0].Labels, after[0].Labels) {
				t.Errorf("pushed %v, pulled %v, %v; want the same labels", before, after, err)
			}
			checkGap(t, prometheus, dashboard, began-switched)
			backup.check(t)
			a.stop(t)
		})
	}
}

// checkGap checks that the graph of a query, which has points until now, has no gap longer than
// two intervals.
func checkGap(t *testing.T, p *real.PrometheusServer, promql string, from float64) {
	t.Helper()
	points := queryRange(t, p, promql, from, now(t, p)+1, 1) // with a point of the last sample
	longest := 0.0
	for i := 1; i < len(points); i++ {
		longest = max(longest, points[i].at-points[i-1].at-1)
	}
	t.Logf("the longest gap is %.0f s, of an interval of %d s", longest, switched)
	if len(points) < 2 || longest > 2*switched {
		t.Errorf("a gap of %.0f s in %v", longest, points)
	}
}
