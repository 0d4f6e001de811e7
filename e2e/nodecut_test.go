//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/natlab"
	"github.com/promferry/promferry/e2e/real"
)

// A node's network is cut and heals, in push and in pull mode, and one alert tells of both.

const (
	gatewayAddr = natlab.HubIP + ":9091"
	expireAddr  = "127.0.0.1:9098"

	// nodeDown is the alert of monitoring/alerts.yml that is for nodes in every mode.
	nodeDown = "NodeDown"
)

// All in seconds. slack is for a machine that is busy with other tests.
const (
	forwarded    = 1.0 // the agent's interval
	pushTimeout  = 1.0 // the smaller of 10s and the interval
	expiresAfter = 2*forwarded + pushTimeout
	swept        = 1.0 // the interval of promferry expire
	scraped      = 1.0 // Prometheus's interval, its timeout, and that of its rules
	alertFor     = 2.0 // in the copy of the rules, and the next
	lookBack     = 6.0 // of the alert, for a sign of life
	dateStep     = 1.0 // the Date header's: a Pushgateway's time may be that much behind
	slack        = 3.0
)

// TestNodeCutPush: who is cut off is put down by `promferry expire`, within its expiry, a sweep
// and a scrape, and no sooner.
func TestNodeCutPush(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	startExporterAt(t, lab.Worker, exporterAddr)
	gateway := startPushgatewayIn(t, lab)
	backup := runBackup(t, gateway)
	startExpireIn(t, lab)
	startDaemon(t, lab.Worker, "127.0.0.1:9099", "agent", "--instance=web-1", "--push.interval=1s",
		"--push.target=node=http://"+exporterAddr+"/metrics", "--push.url=http://"+gatewayAddr)
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, `
- job_name: pushgateway
  honor_labels: true
  static_configs: [{targets: ["`+gatewayAddr+`"]}]
`+alerting(t))

	o := cutAndHeal(t, lab, prometheus)
	pushes := changes(t, prometheus, "push_time_seconds"+node, o.cut-3, o.down+0.05) // the step of o.down is the last
	if len(pushes) < 2 {
		t.Fatalf("pushes: %v", pushes)
	}
	last, putDown := pushes[len(pushes)-2].value, pushes[len(pushes)-1].value
	since := changes(t, prometheus, "promferry_silent_since_timestamp_seconds"+node, o.down, o.up)
	o.note(last, "last push of the node")
	o.note(putDown, "expire puts up 0")
	o.tell(t)

	o.between(t, "the put of up 0, after the last push", putDown-last, expiresAfter, expiresAfter+dateStep+swept+slack)
	o.between(t, "up 0, after the cut", o.down-o.cut, 0, expiresAfter+dateStep+swept+scraped+slack)
	o.between(t, "up 1, after the heal", o.up-o.healed, 0, forwarded+pushTimeout+scraped+slack)
	if len(since) < 1 || math.Abs(since[0].value-last) > 1 {
		t.Errorf("promferry_silent_since_timestamp_seconds is %v, the last push was at %f", since, last)
	}
	waitEnded(t, prometheus, "promferry_silent_since_timestamp_seconds"+node)
	backup.check(t)
}

// TestNodeCutPull: who is cut off is down at the next scrape, of which Prometheus awaits the end.
func TestNodeCutPull(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	startExporterAt(t, lab.Worker, exporterAddr)
	proxy := startProxy(t, lab)
	client := startClient(t, lab, []string{"node=http://" + exporterAddr + "/metrics"})
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+alerting(t))

	o := cutAndHeal(t, lab, prometheus)
	o.tell(t)
	o.between(t, "up 0, after the cut", o.down-o.cut, -scraped, 2*scraped+slack)
	// A client that has failed to connect waits 10 s at most, and a SYN that was lost is sent
	// again after 4 s at most in that time.
	o.between(t, "up 1, after the heal", o.up-o.healed, -scraped, 10+4+scraped+slack)

	restarts(t, prometheus, func() {
		if err := client.Stop(); err != nil {
			t.Error(err)
		}
		client.restart(t)
		proxy.waitSum(t, above(0), "promferry_proxy_lines", "kind", "ptth")
	})
}

// An outage is what Prometheus saw of a node's cut and heal: times in Unix seconds.
type outage struct {
	cut, healed                 float64
	down, ended, pending, fired float64
	up, back, resolved          float64
	events                      []event
}

type event struct {
	at   float64
	what string
}

// cutAndHeal cuts the node off until the alert fires.
func cutAndHeal(t *testing.T, lab *natlab.Lab, p *real.PrometheusServer) *outage {
	t.Helper()
	// What there is of the node besides up and what comes from Prometheus and us.
	const own = `count({job="node",instance="web-1",__name__=~"node_.*"}) > bool 100`
	waitQuery(t, p, "count_over_time(up"+node+"[1m])", above(3)) // for as long as is looked at
	waitQuery(t, p, "up"+node, exactly(1))
	waitQuery(t, p, own, exactly(1))

	o := &outage{cut: unixTime(time.Now())}
	lab.Cut(t, natlab.HubIP)
	waitQuery(t, p, alertOf("firing"), exactly(1))
	o.healed = unixTime(time.Now())
	lab.Heal(t)
	waitQuery(t, p, "up"+node, exactly(1))
	waitQuery(t, p, own, exactly(1))
	waitEnded(t, p, alertOf("firing"))

	until := now(t, p) + 0.2 // so that the last step of changes is after what was waited for
	next := func(what, promql string, after float64, is func(change) bool) float64 {
		t.Helper()
		all := changes(t, p, promql, o.cut-3, until)
		i := slices.IndexFunc(all, func(c change) bool { return c.at > after && is(c) })
		if i < 0 {
			t.Fatalf("%s: no such change of %s after %f: %v", what, promql, after, all)
		}
		o.note(all[i].at, what)
		return all[i].at
	}
	is := func(value float64) func(change) bool {
		return func(c change) bool { return !c.gone && c.value == value }
	}
	gone := func(c change) bool { return c.gone }
	o.note(o.cut, "the network is cut")
	o.note(o.healed, "the network is healed")
	// A sample's time is the scrape's begin, which may be before the cut.
	o.down = next("up 0", "up"+node, o.cut-scraped, is(0))
	o.ended = next("the node's series have ended", own, o.cut-scraped, gone)
	o.pending = next("alert pending", alertOf("pending"), o.cut-scraped, is(1))
	o.fired = next("alert fires", alertOf("firing"), o.cut, is(1))
	o.up = next("up 1", "up"+node, o.healed-scraped, is(1))
	o.back = next("the node's series are back", own, o.healed-scraped, is(1))
	o.resolved = next("alert resolved", alertOf("firing"), o.healed-scraped, gone)

	if flaps := changes(t, p, "up"+node, o.cut-3, until); len(flaps) != 3 {
		t.Errorf("up was not 1, then 0, then 1 again: %v", flaps)
	}
	if o.ended != o.down || o.back != o.up {
		t.Errorf("the series end %.1f s after up 0 and are back %.1f s after up 1, want the same scrapes", o.ended-o.down, o.back-o.up)
	}
	o.between(t, "the alert, after up 0", o.fired-o.down, alertFor, lookBack+alertFor+2*scraped+slack)
	o.between(t, "its end, after up 1", o.resolved-o.up, 0, 2*scraped+slack)
	return o
}

// alertOf selects the node's alert in a state, "pending" or "firing".
func alertOf(state string) string {
	return fmt.Sprintf(`ALERTS{alertname=%q,job="node",instance="web-1",alertstate=%q}`, nodeDown, state)
}

func (o *outage) note(at float64, what string) { o.events = append(o.events, event{at, what}) }

// tell logs the timeline.
func (o *outage) tell(t *testing.T) {
	t.Helper()
	slices.SortStableFunc(o.events, func(a, b event) int { return int(math.Copysign(1, a.at-b.at)) })
	var text strings.Builder
	for _, e := range o.events {
		fmt.Fprintf(&text, "\n%7.1f s  %s", e.at-o.cut, e.what)
	}
	t.Logf("since the cut:%s", text.String())
}

func (o *outage) between(t *testing.T, what string, took, least, most float64) {
	t.Helper()
	// What changes tells is up to a tenth late.
	if took < least-0.1 || took > most+0.1 {
		t.Errorf("%s: %.1f s, want %.1f to %.1f s", what, took, least, most)
	}
}

// alerting is the part of a Prometheus configuration that loads a copy of the alert rules, in
// which only the times are shorter: for scrapes of a second, and not of 15.
func alerting(t *testing.T) string {
	t.Helper()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "monitoring", "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	text = regexp.MustCompile(`\[90s\]`).ReplaceAll(text, fmt.Appendf(nil, "[%vs]", lookBack))
	text = regexp.MustCompile(`(?m)^(\s*for:).*`).ReplaceAll(text, fmt.Appendf(nil, "${1} %vs", alertFor))
	text = regexp.MustCompile(`(?m)^(\s*(?:interval|keep_firing_for):).*`).ReplaceAll(text, []byte("${1} 1s"))
	path := filepath.Join(t.TempDir(), "alerts.yml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return "rule_files: [" + path + "]\n"
}

// A change is when the answer to a query became another.
type change struct {
	at    float64 // Unix seconds
	value float64
	gone  bool // it has no series
}

// changes returns how the answer to a query, which must have one series at most, changed, to a
// tenth of a second. The first is what it was at from.
func changes(t *testing.T, p *real.PrometheusServer, promql string, from, to float64) []change {
	t.Helper()
	const step = 0.1
	values := make(map[int]float64)
	for _, s := range queryRange(t, p, promql, from, to, step) {
		values[int(math.Round((s.at-from)/step))] = s.value
	}
	var all []change
	for i := range int((to-from)/step) + 1 {
		value, there := values[i]
		now := change{from + float64(i)*step, value, !there}
		if len(all) == 0 || all[len(all)-1].value != now.value || all[len(all)-1].gone != now.gone {
			all = append(all, now)
		}
	}
	return all
}

// A sampled is a value at a time, in Unix seconds.
type sampled struct{ at, value float64 }

// queryRange asks for the values of an expression of one series at most.
func queryRange(t *testing.T, p *real.PrometheusServer, promql string, from, to, step float64) []sampled {
	t.Helper()
	return onlySeries(t, p, "/api/v1/query_range?"+url.Values{
		"query": {promql}, "start": {fmt.Sprintf("%.3f", from)}, "end": {fmt.Sprintf("%.3f", to)}, "step": {fmt.Sprint(step)},
	}.Encode())
}

// stored returns the samples of a selector's only series, as they were scraped in the last ten minutes.
func stored(t *testing.T, p *real.PrometheusServer, selector string) []sampled {
	t.Helper()
	return onlySeries(t, p, "/api/v1/query?"+url.Values{"query": {selector + "[10m]"}}.Encode())
}

func onlySeries(t *testing.T, p *real.PrometheusServer, path string) []sampled {
	t.Helper()
	body, err := p.Get(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Data struct {
			ResultType string
			Result     []struct{ Values [][2]any } // time, value as a string
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil || answer.Data.ResultType != "matrix" || len(answer.Data.Result) > 1 {
		t.Fatalf("%s: %v: %s", path, err, body)
	}
	var all []sampled
	for _, series := range answer.Data.Result {
		for _, v := range series.Values {
			at, _ := v[0].(float64)
			value, err := strconv.ParseFloat(fmt.Sprint(v[1]), 64)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, sampled{at, value})
		}
	}
	return all
}

func unixTime(at time.Time) float64 { return float64(at.UnixMilli()) / 1000 }

// startPushgatewayIn starts a Pushgateway on the hub. It must not be restarted.
func startPushgatewayIn(t *testing.T, lab *natlab.Lab) *real.Gateway {
	t.Helper()
	path, err := real.Find("pushgateway")
	if err != nil {
		t.Fatal(err)
	}
	return &real.Gateway{Server: lab.Hub.Serve(t, gatewayAddr, real.Command{Path: path, Args: []string{"--persistence.file="}}).Server}
}

// startExpireIn starts a `promferry expire` on the hub.
func startExpireIn(t *testing.T, lab *natlab.Lab) {
	t.Helper()
	server := lab.Hub.Serve(t, expireAddr, real.Command{
		Path: promferry(t), Args: []string{"expire", "--push.url=http://" + gatewayAddr, "--sweep.interval=1s"},
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log of promferry expire:\n%s", tail(server.Stderr(), 8<<10))
		}
	})
}

// A backup is a batch job's group, which is nobody's but the job's.
type backup struct {
	gateway *real.Gateway
	was     real.Group
}

// runBackup runs the job once, with promferry run.
func runBackup(t *testing.T, gateway *real.Gateway) *backup {
	t.Helper()
	newBatchHost(t, gateway.URL).mustFerry(t, "run", "--job=backup", "--", "true")
	b := &backup{gateway: gateway}
	var err error
	if b.was, err = group(t.Context(), gateway, jobLabels("backup")); err != nil {
		t.Fatal(err)
	}
	if value(b.was, "batch_job_last_success") != "1" {
		t.Fatalf("the batch job's group is %v", b.was)
	}
	return b
}

// check checks that the group is as it was, to the time of its last push.
func (b *backup) check(t *testing.T) {
	t.Helper()
	is, err := group(t.Context(), b.gateway, jobLabels("backup"))
	if err != nil || !reflect.DeepEqual(is, b.was) {
		t.Errorf("the batch job's group is %v, %v; it was %v", is, err, b.was)
	}
}

// waitGroup waits until a group is as check wants it.
func waitGroup(t *testing.T, g *real.Gateway, labels map[string]string, check func(real.Group) error) real.Group {
	t.Helper()
	var found real.Group
	wait(t, fmt.Sprintf("the group %v", labels), func(ctx context.Context) (err error) {
		if found, err = group(ctx, g, labels); err == nil {
			err = check(found)
		}
		return err
	})
	return found
}
