//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// TestMonitoring runs every alert rule and every query of the dashboards against a Prometheus
// that has all of promferry in it: nodes that are pushed and pulled, some of them down, batch
// jobs, an outbox, the proxy, expire, and a gateway for each way in which one is scraped.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	rules := filepath.Join(root, "monitoring", "alerts.yml")
	p := startMonitored(t, rules)

	t.Run("rules", func(t *testing.T) { checkRules(t, p, rules) })
	t.Run("nodes on gateways", func(t *testing.T) { checkGatewayNodes(t, p) })
	files, err := filepath.Glob(filepath.Join(root, "monitoring", "dashboards", "*.json"))
	if err != nil || len(files) != 4 {
		t.Fatalf("%d dashboards, want 4: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) { checkDashboard(t, p, file) })
	}
}

// startMonitored starts a Prometheus with these rules, and all that it shall see.
func startMonitored(t *testing.T, rules string) *real.PrometheusServer {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	serveFerry := func(args ...string) *real.Server {
		t.Helper()
		s, err := real.Serve(t.Context(), "", real.Command{Path: promferry(t), Args: args})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Kill() })
		return s
	}
	makeCertificates(t, dir)
	httpConfig := write("http.yml", "tls_config: {cert_file: client.crt, key_file: client.key}\n") // not asked for
	webConfig := write("web.yml", "http_server_config: {http2: false}\n")

	gateway := startPushgateway(t)
	away := "http://" + refusing(t)
	exporter := startExporter(t).URL + "/metrics"
	proxy := serveFerry("proxy", "--state.dir="+filepath.Join(dir, "proxy"), "--web.config.file="+webConfig)
	expire := serveFerry("expire", "--push.url="+gateway.URL, "--sweep.interval=1s")
	// One for each way to scrape it.
	targets, page := startGateway(t, "--web.config.file="+webConfig), startGateway(t)

	// web-1 lives, with a target of each kind that is down, a Pushgateway and a proxy that are away.
	agent := startAgent(t, "--instance=web-1", "--fqdn=web-1", "--push.http-config="+httpConfig,
		"--push.target=node="+exporter, "--push.target=broken="+away+"/metrics", "--push.url="+gateway.URL, "--push.url="+away,
		"--pull.target=app="+serve(t, expose(textType, "app 1\n")), "--pull.target=gone="+away+"/metrics",
		"--proxy-url="+proxy.URL, "--proxy-url="+away)
	// web-2 dies.
	dead := startAgent(t, "--instance=web-2", "--push.target=node="+exporter, "--push.url="+gateway.URL, "--push.expires-after=3s")
	dead.waitSum(t, above(0), "promferry_forwarder_puts_total")
	dead.Kill()

	// On each gateway one node lives and one dies, and so does its batch job; another job never
	// has a push taken.
	for prefix, g := range map[string]*real.Gateway{"target-": targets, "page-": page} {
		startAgent(t, "--instance="+prefix+"lives", "--push.url="+g.URL, "--push.target=node="+exporter, "--push.target=broken="+away+"/metrics")
		dies := startAgent(t, "--instance="+prefix+"dies", "--push.url="+g.URL, "--push.target=node="+exporter, "--push.expires-after=3s")
		put(t, g, "/metrics/job/backup/instance/"+prefix+"dies", "batch_job_last_success 1\n")
		put(t, g, "/metrics/job/report", "report_rows 3\n") // Has no instance.
		if status, answer := send(t, http.MethodPut, g.URL+"/metrics/job/never/instance/"+prefix+"dies", "", []byte("never 1 1\n")); status != http.StatusBadRequest {
			t.Fatalf("a push with a timestamp: status %d: %s", status, answer)
		}
		dies.waitSum(t, above(0), "promferry_forwarder_puts_total")
		dies.Kill()
	}
	pushEachSecond(t, targets.URL+"/metrics/job/busy/instance/target-lives", "rows 3\n")

	jobs := batchHost{gateways: []string{gateway.URL, away}, stateDir: agent.stateDir}
	const limits = `echo "batch_job_late_after_seconds 604800" >>"$PROMFERRY_METRICS_FILE"
		echo "batch_job_stuck_after_seconds 3600" >>"$PROMFERRY_METRICS_FILE"`
	for job, command := range map[string]string{"backup": limits, "report": "exit 3"} {
		jobs.ferry(t, "", "run", "--job="+job, "--", "sh", "-c", command)
	}
	hangs, err := real.Start(real.Command{Path: promferry(t), Args: []string{"run", "--job=hangs", "--", "sleep", "600"}, Env: jobs.env()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hangs.Kill)

	p, err := real.Prometheus(t.Context(), dir, fmt.Sprintf(`
- job_name: pushgateway
  honor_labels: true
  static_configs: [{targets: [%q]}]
- job_name: promferry-proxy
  static_configs: [{targets: [%q]}]
- job_name: promferry-expire
  static_configs: [{targets: [%q]}]
- job_name: promferry
  static_configs: [{targets: [%q], labels: {instance: web-1}}]
- job_name: pulled
  proxy_url: %s
  http_sd_configs: [{url: %[5]s/sd, refresh_interval: 1s}]
- job_name: groups
  honor_labels: true
  http_sd_configs: [{url: %[6]s/sd, refresh_interval: 1s}]
- job_name: promferry-gateway
  params: {"match[]": ['{job=""}']}
  static_configs: [{targets: [%[7]q]}]
- job_name: page
  honor_labels: true
  static_configs: [{targets: [%q], labels: {job: promferry-gateway}}]
rule_files: [%q]
`, gateway.Addr, proxy.Addr, expire.Addr, agent.Addr, proxy.URL, targets.URL, targets.Addr, page.Addr, rules))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// pushEachSecond puts a text to a group each second until the test ends, so that there are
// writes to a gateway's disk.
func pushEachSecond(t *testing.T, url, text string) {
	tick := time.NewTicker(time.Second)
	var pushing sync.WaitGroup
	pushing.Go(func() {
		for {
			select {
			case <-tick.C:
			case <-t.Context().Done():
				return
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url, strings.NewReader(text))
			if err != nil {
				t.Error(err)
				return
			}
			// One that fails is missed in the dashboard.
			if resp, err := http.DefaultClient.Do(req); err == nil {
				_ = resp.Body.Close()
			}
		}
	})
	t.Cleanup(func() {
		tick.Stop()
		pushing.Wait()
	})
}

// A rule is what Prometheus tells of one that it has loaded.
type rule struct {
	Name, Type, Query, Health, LastError string

	Annotations map[string]string
	Alerts      []struct {
		Labels, Annotations map[string]string
		State               string
	}
}

func loadedRules(ctx context.Context, p *real.PrometheusServer) ([]rule, error) {
	body, err := p.Get(ctx, "/api/v1/rules")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct{ Groups []struct{ Rules []rule } }
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	var rules []rule
	for _, g := range answer.Data.Groups {
		rules = append(rules, g.Rules...)
	}
	return rules, nil
}

// checkRules checks that all rules of the file are evaluated without an error, that there is
// all that they ask for and a page on what to do, and that one fires.
func checkRules(t *testing.T, p *real.PrometheusServer, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	runbook, err := os.ReadFile(filepath.Join(filepath.Dir(file), "..", "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	written := len(regexp.MustCompile(`(?m)^ +- (alert|record): `).FindAll(text, -1))
	var rules []rule
	wait(t, "evaluated rules", func(ctx context.Context) error {
		rules, err = loadedRules(ctx, p)
		if err == nil && (len(rules) != written || written == 0) {
			err = fmt.Errorf("%d rules are loaded of %d", len(rules), written)
		}
		for _, r := range rules {
			if err == nil && r.Health != "ok" {
				err = fmt.Errorf("%s: health %s: %s", r.Name, r.Health, r.LastError)
			}
		}
		return err
	})
	for _, r := range rules {
		t.Run(r.Name, func(t *testing.T) {
			if r.Type == "alerting" && !strings.Contains(string(runbook), "\n### "+r.Name+"\n") {
				t.Error("docs/operations.md does not tell what to do")
			}
			if _, err := p.Query(t.Context(), r.Query); err != nil {
				t.Error(err)
			}
			labels := map[string]bool{"job": true, "instance": true}
			for _, selector := range selectors(r.Query) {
				for _, s := range waitData(t, p, selector) {
					for name := range s.Labels {
						labels[name] = true
					}
				}
			}
			for _, text := range r.Annotations {
				for _, match := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(text, -1) {
					if !labels[match[1]] {
						t.Errorf("no series has the label %s: %s", match[1], text)
					}
				}
			}
		})
	}

	wait(t, "an alert that fires", func(ctx context.Context) error {
		rules, err := loadedRules(ctx, p)
		if err != nil {
			return err
		}
		for _, r := range rules {
			for _, a := range r.Alerts {
				if r.Name == "BatchJobFailed" && a.State == "firing" && a.Annotations["summary"] == "the last run of report on web-1 failed" {
					return nil
				}
			}
		}
		return fmt.Errorf("the job that failed is not among %+v", rules)
	})
}

// checkGatewayNodes checks which groups of gateways NodeDown, ExporterDown and PushRefused are
// for, however they are scraped: with the expressions of the rules, and 5 s where they have 90.
func checkGatewayNodes(t *testing.T, p *real.PrometheusServer) {
	rules, err := loadedRules(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	const alive = "instance:promferry_alive:group"
	queries := make(map[string]string)
	for _, r := range rules {
		queries[r.Name] = strings.ReplaceAll(r.Query, "[1m30s]", "[5s]")
	}
	for _, test := range []struct {
		name    string
		windows int
		want    []string
	}{
		{"PushRefused", 0, []string{"never page-dies", "never target-dies"}},
		{"NodeDown", 4, []string{"node page-dies", "node target-dies"}},
		{"ExporterDown", 4, []string{"broken page-lives", "broken target-lives"}},
	} {
		promql := strings.ReplaceAll(queries[test.name], alive, "("+queries[alive]+")")
		if promql == "" || strings.Count(promql, "[5s]") != test.windows {
			t.Fatalf("%s: not the windows that were looked for: %s", test.name, promql)
		}
		wait(t, test.name, func(ctx context.Context) error {
			samples, err := p.Query(ctx, promql)
			if err != nil {
				return err
			}
			var got []string
			for _, s := range samples {
				if instance := s.Labels["instance"]; strings.HasPrefix(instance, "target-") || strings.HasPrefix(instance, "page-") {
					got = append(got, s.Labels["job"]+" "+instance)
				}
			}
			if slices.Sort(got); !slices.Equal(got, test.want) {
				return fmt.Errorf("%v, want %v", got, test.want)
			}
			return nil
		})
	}
	// Series of a group without an instance have none, and its target's up has the gateway's.
	waitData(t, p, `report_rows{job="report",instance=""} and on () (up{job="report",instance!=""} == 1)`)
}

var (
	ownSelector  = regexp.MustCompile(`\b((?:up|scrape_\w+|push_\w+|promferry_\w+|batch_job_\w+|instance:\w+:\w+)\b)(\{[^}]*\})?`)
	alternatives = regexp.MustCompile(`(\w+)=~"([\w|]+)"`)
)

// selectors returns what a query selects, each alternative of a regular expression for itself:
// one of them that is misspelt would go unnoticed.
func selectors(promql string) []string {
	var all []string
	for _, match := range ownSelector.FindAllStringSubmatch(promql, -1) {
		name, matchers := match[1], match[2]
		alternative := alternatives.FindStringSubmatch(matchers)
		if alternative == nil {
			all = append(all, name+matchers)
			continue
		}
		for value := range strings.SplitSeq(alternative[2], "|") {
			all = append(all, name+strings.Replace(matchers, alternative[0], fmt.Sprintf("%s=%q", alternative[1], value), 1))
		}
	}
	return all
}

// waitData waits until a query has an answer with a number in it.
func waitData(t *testing.T, p *real.PrometheusServer, promql string) []real.Sample {
	t.Helper()
	var samples []real.Sample
	wait(t, promql, func(ctx context.Context) error {
		var err error
		samples, err = p.Query(ctx, promql)
		if err == nil && !slices.ContainsFunc(samples, func(s real.Sample) bool { return !math.IsNaN(s.Value) }) {
			err = fmt.Errorf("no data: %v", samples)
		}
		return err
	})
	return samples
}

// A dashboard is what these tests read of one.
type dashboard struct {
	UID, Title string
	Panels     []struct {
		ID                       int
		Type, Title, Description string
		Targets                  []struct{ Expr, LegendFormat string }
	}
	Templating struct {
		List []struct {
			Name, Type string
			Definition string
		}
	}
}

// variables are the values with which the queries are run: those that Grafana would put for
// "All", and ranges that fit a scrape each second.
var variables = strings.NewReplacer("$__rate_interval", "10s", "$job", ".*", "$instance", ".*")

// checkDashboard checks that each query of a dashboard returns data, with the labels that its
// legend shows.
func checkDashboard(t *testing.T, p *real.PrometheusServer, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if want := "promferry-" + strings.TrimSuffix(filepath.Base(file), ".json"); d.UID != want {
		t.Errorf("uid %q, want %q", d.UID, want)
	}
	for _, v := range d.Templating.List {
		if v.Type == "datasource" {
			continue
		}
		match := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(v.Definition)
		if match == nil {
			t.Errorf("variable %s: %q", v.Name, v.Definition)
			continue
		}
		checkLabels(t, waitData(t, p, variables.Replace(match[1])), match[2])
	}
	ids := make(map[int]bool)
	for _, panel := range d.Panels {
		if ids[panel.ID] {
			t.Errorf("%s: another panel has id %d", panel.Title, panel.ID)
		}
		ids[panel.ID] = true
		if panel.Type == "row" {
			continue
		}
		t.Run(panel.Title, func(t *testing.T) {
			if panel.Description == "" || len(panel.Targets) == 0 {
				t.Errorf("description %q, %d queries", panel.Description, len(panel.Targets))
			}
			for _, target := range panel.Targets {
				promql := variables.Replace(target.Expr)
				if strings.Contains(promql, "$") {
					t.Errorf("unknown variable in %s", target.Expr)
					continue
				}
				// What is counted to 0 where there is nothing shows nothing of its query.
				samples := waitData(t, p, strings.TrimSuffix(promql, " or vector(0)"))
				for _, match := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(target.LegendFormat, -1) {
					checkLabels(t, samples, match[1])
				}
			}
		})
	}
}

// checkLabels checks that a series has the label.
func checkLabels(t *testing.T, samples []real.Sample, label string) {
	t.Helper()
	if !slices.ContainsFunc(samples, func(s real.Sample) bool { return s.Labels[label] != "" }) {
		t.Errorf("no series has the label %s: %v", label, samples)
	}
}
