//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// startExpire starts a `promferry expire` that sweeps a Pushgateway each second.
func startExpire(t *testing.T, gateway *real.Gateway, flags ...string) *agent {
	t.Helper()
	server, err := real.Serve(t.Context(), "", real.Command{
		Path: promferry(t), Args: append([]string{"expire", "--push.url=" + gateway.URL, "--sweep.interval=1s"}, flags...),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		if t.Failed() {
			t.Logf("the log of promferry expire:\n%s", tail(server.Stderr(), 8<<10))
		}
	})
	return &agent{Server: server}
}

// startAlerting starts a Prometheus that has the alert rules.
func startAlerting(t *testing.T, gateway *real.Gateway) *real.PrometheusServer {
	t.Helper()
	p, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(
		"- job_name: pushgateway\n  honor_labels: true\n  static_configs: [{targets: [%q]}]\n", gateway.Addr)+alerting(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// checkNoAlert checks that since a time no alert told of the node, or was about to.
func checkNoAlert(t *testing.T, p *real.PrometheusServer, since float64) {
	t.Helper()
	for _, state := range []string{"pending", "firing"} {
		for _, s := range stored(t, p, alertOf(state)) {
			if s.at >= since {
				t.Errorf("the alert was %s at %f, %.1f s after", state, s.at, s.at-since)
			}
		}
	}
}

// waitSweeps waits until n more sweeps have begun and succeeded.
func waitSweeps(t *testing.T, expire *agent, n float64) {
	t.Helper()
	const sweeps = "promferry_expiry_sweeps_total"
	// One may be in the middle.
	expire.waitSum(t, above(expire.mustSum(t, sweeps, "result", "success")+n), sweeps, "result", "success")
}

// runExpire runs a `promferry expire` that ends by itself.
func runExpire(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, err := real.Start(real.Command{Path: promferry(t), Args: append([]string{"expire"}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	if status, err = p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return status, p.Stdout(), p.Stderr()
}

const (
	silentSince = "promferry_silent_since_timestamp_seconds"
	expires     = "promferry_expires_after_seconds"
)

// checkDown checks that a group is as `promferry expire` leaves it: up 0, and since when.
func checkDown(g real.Group, expiresAfter string) error {
	if value(g, "up") != "0" || value(g, expires) != expiresAfter || !slices.Equal(others(g), []string{silentSince}) {
		return fmt.Errorf("group %v: up %q, %s %q, others %v", g.Labels, value(g, "up"), expires, value(g, expires), others(g))
	}
	return nil
}

// nodeGroup is what a node puts that says for how long it is good, in seconds.
func nodeGroup(expiresAfter string) string {
	return "# TYPE up gauge\nup 1\n# TYPE " + expires + " gauge\n" + expires + " " + expiresAfter + "\n# TYPE node_load1 gauge\nnode_load1 0.5\n"
}

// waitAge waits until some time has passed: here that is not for something to happen, but what
// makes a group old, or an outage long.
func waitAge(t *testing.T, since time.Time, age time.Duration) {
	t.Helper()
	select {
	case <-time.After(time.Until(since.Add(age))):
	case <-t.Context().Done():
	}
}

// TestExpireAgentStops stops and starts agents next to a `promferry expire`. The steps share the
// programs and follow each other: each begins with an agent that forwards.
func TestExpireAgentStops(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	backup := runBackup(t, gateway)
	startExpire(t, gateway)
	startExpire(t, gateway) // Two do no harm to each other.
	exporter := startExporter(t)
	prometheus := startAlerting(t, gateway)
	flags := []string{"--push.target=node=" + exporter.URL + "/metrics", "--push.url=" + gateway.URL}
	a := startAgent(t, append(flags, "--instance=web-1")...)
	startAgent(t, append(flags, "--instance=web-2")...) // lives all the time
	arrives := func(t *testing.T) {
		t.Helper()
		waitQuery(t, prometheus, "up"+node, exactly(1))
		waitQuery(t, prometheus, "node_load1"+node, above(-1))
	}
	// goesDown ends the agent and returns how long after that up is 0, in seconds.
	goesDown := func(t *testing.T, end func()) float64 {
		t.Helper()
		arrives(t)
		began := unixTime(time.Now())
		end()
		waitQuery(t, prometheus, "up"+node, exactly(0))
		waitEnded(t, prometheus, `{__name__=~"node_.*",instance="web-1"}`)
		all := changes(t, prometheus, "up"+node, began-1, now(t, prometheus)+0.2)
		last := all[len(all)-1]
		if last.gone || last.value != 0 {
			t.Fatalf("up was %v, and not 0 at last", all)
		}
		return last.at - began
	}
	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"stopped", func(t *testing.T) {
			took := goesDown(t, func() { a.stop(t) })
			t.Logf("up 0 after %.1f s", took)
			if took > scraped+slack/3 { // sooner than its expiry
				t.Errorf("up is 0 after %.1f s, want a scrape", took)
			}
			// Its silence is noted as any other's.
			waitGroup(t, gateway, jobLabels("node"), func(g real.Group) error { return checkDown(g, "3") })
			if err := a.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			arrives(t)
			waitEnded(t, prometheus, silentSince+node)
		}},
		{"killed", func(t *testing.T) {
			took := goesDown(t, a.Kill)
			t.Logf("up 0 after %.1f s", took)
			if took < expiresAfter-forwarded-0.2 || took > expiresAfter+dateStep+swept+scraped+slack {
				t.Errorf("up is 0 after %.1f s, want its expiry of %v s, a sweep and a scrape", took, expiresAfter)
			}
			if err := a.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			arrives(t)
		}},
		{"restarted", func(t *testing.T) {
			puts := pushTime(t, gateway)
			restarts(t, prometheus, func() {
				a.stop(t)
				if err := a.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				waitGroup(t, gateway, jobLabels("node"), func(g real.Group) error {
					if value(g, "up") != "1" || number(t, g, "push_time_seconds") <= puts {
						return errors.New("not put since the restart")
					}
					return nil
				})
			})
		}},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
		backup.check(t)
	}
	for _, s := range stored(t, prometheus, `up{job="node",instance="web-2"}`) {
		if s.value != 1 {
			t.Errorf("the other agent was %v at %f", s.value, s.at)
		}
	}
	// It says so at each scrape where two groups have a metric with another HELP each.
	if line := regexp.MustCompile(`inconsistent help.*name:\W+(up|scrape_\w+|promferry_\w+)\W.*`).FindString(gateway.Stderr()); line != "" {
		t.Errorf("the Pushgateway's log: %s", line)
	}
}

// restarts checks that while a node's agent is restarted, and for longer than what it puts is
// good, up is 0 in no scrape but those that restart took, and one at most when it took no longer.
func restarts(t *testing.T, p *real.PrometheusServer, restart func()) {
	t.Helper()
	began := now(t, p)
	restart()
	back := now(t, p)
	after := fmt.Sprintf("timestamp(up%s) > %f", node, back+expiresAfter+dateStep+swept)
	waitQuery(t, p, after, above(back))
	took, downs := back-began, 0
	for _, s := range stored(t, p, "up"+node) {
		if s.at < began || s.value == 1 {
			continue
		}
		downs++
		if s.at > back {
			t.Errorf("up was 0 again %.1f s after the restart", s.at-back)
		}
	}
	checkNoAlert(t, p, began)
	t.Logf("a restart that took %.1f s: up was 0 in %d scrapes", took, downs)
	if most := int(math.Ceil(took / scraped)); downs > most {
		t.Errorf("a restart that took %.1f s: up was 0 in %d scrapes, want %d at most", took, downs, most)
	}
}

// TestExpireGatewayRestart shows that an outage of the Pushgateway that is longer than any expiry
// marks nobody down who lives, and hides nobody who died.
func TestExpireGatewayRestart(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name       string
		persistent bool
	}{{"with persistence", true}, {"without persistence", false}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var flags []string
			if test.persistent {
				flags = append(flags, "--persistence.file="+filepath.Join(t.TempDir(), "groups"))
			}
			gateway := startPushgateway(t, flags...)
			backup := runBackup(t, gateway)
			expire := startExpire(t, gateway)
			prometheus := startAlerting(t, gateway)
			startAgent(t, "--instance=web-1", "--push.target=node="+serve(t, expose(textType, "a 1\n")), "--push.url="+gateway.URL)
			waitQuery(t, prometheus, "up"+node, exactly(1))

			// These are put by hand, so that none comes back before a sweep.
			dead := map[string]string{"job": "by-hand", "instance": "dead"}
			living := map[string]string{"job": "by-hand", "instance": "living"}
			dying := map[string]string{"job": "by-hand", "instance": "dying"}
			put(t, gateway, "/metrics/job/by-hand/instance/dead", nodeGroup("1"))
			down := waitGroup(t, gateway, dead, func(g real.Group) error { return checkDown(g, "1") })
			put(t, gateway, "/metrics/job/by-hand/instance/living", nodeGroup("4"))
			put(t, gateway, "/metrics/job/by-hand/instance/dying", nodeGroup("4"))
			last := time.Now()
			if err := gateway.Stop(); err != nil {
				t.Fatal(err)
			}
			waitAge(t, last, 6*time.Second)
			restarted := unixTime(time.Now())
			if err := gateway.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitSweeps(t, expire, 1)

			if test.persistent {
				for _, labels := range []map[string]string{living, dying} {
					if g, err := group(t.Context(), gateway, labels); err != nil || checkGroup(g, "1", "node_load1") != nil || number(t, g, "push_time_seconds") > restarted {
						t.Errorf("%v, whose last push is older than its expiry, but not the Pushgateway's start: %v, %v", labels, g, err)
					}
				}
				put(t, gateway, "/metrics/job/by-hand/instance/living", nodeGroup("600"))
				g := waitGroup(t, gateway, dying, func(g real.Group) error { return checkDown(g, "4") })
				if after := number(t, g, "push_time_seconds") - restarted; after < 4 || after > 4+dateStep+swept+slack {
					t.Errorf("who did not come back was put down %.1f s after the restart, want 4 s and a sweep", after)
				}
				if since := number(t, g, silentSince); math.Abs(since-unixTime(last)) > 1 {
					t.Errorf("it is silent since %f, want its last push, %f", since, unixTime(last))
				}
				if g, err := group(t.Context(), gateway, living); err != nil || checkGroup(g, "1", "node_load1") != nil {
					t.Errorf("who came back: %v, %v", g, err)
				}
				if g, err := group(t.Context(), gateway, dead); err != nil || !reflect.DeepEqual(g, down) {
					t.Errorf("who was down before: %v, %v; it was %v", g, err, down)
				}
				backup.check(t)
			} else {
				waitGroup(t, gateway, jobLabels("node"), func(g real.Group) error { return checkGroup(g, "1", "a") })
				waitSweeps(t, expire, 2)
				if groups, err := gateway.Groups(t.Context()); err != nil || len(groups) != 1 {
					t.Errorf("groups %v, %v; want that of the agent alone", groups, err)
				}
			}
			since := now(t, prometheus)
			waitQuery(t, prometheus, fmt.Sprintf("timestamp(up%s) > %f", node, since), above(since))
			for _, s := range stored(t, prometheus, "up"+node) {
				if s.value != 1 {
					t.Errorf("the agent, which lived all the time, was %v at %f, %.1f s after the restart", s.value, s.at, s.at-restarted)
				}
			}
			checkNoAlert(t, prometheus, 0)
			if all := stored(t, prometheus, silentSince+node); len(all) != 0 {
				t.Errorf("the agent was put down: %v", all)
			}
		})
	}
}

// TestExpireForgets: who stays away is deleted, and there again at once when it is back.
func TestExpireForgets(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	backup := runBackup(t, gateway)
	startExpire(t, gateway, "--forget-after=4s")
	prometheus := startPrometheus(t, gateway)
	a := startAgent(t, "--instance=web-1", "--push.target=node="+serve(t, expose(textType, "a 1\n")), "--push.url="+gateway.URL)
	waitQuery(t, prometheus, "up"+node, exactly(1))
	a.Kill()
	down := waitGroup(t, gateway, jobLabels("node"), func(g real.Group) error { return checkDown(g, "3") })
	waitGone(t, gateway, jobLabels("node"))
	gone := unixTime(time.Now())
	if stood := gone - number(t, down, "push_time_seconds"); stood < 4 || stood > 4+dateStep+swept+slack {
		t.Errorf("it was deleted %.1f s after it was put down, want 4 s and a sweep", stood)
	}
	waitEnded(t, prometheus, `{job="node"}`)
	if err := a.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitQuery(t, prometheus, "a"+node, exactly(1))
	waitQuery(t, prometheus, "up"+node, exactly(1))
	backup.check(t)
}

// TestExpireAuth has TLS, a password and a client certificate before a Pushgateway under a prefix.
func TestExpireAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	trusted := makeCertificates(t, dir)
	write := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name)
	}
	gateway := startPushgateway(t, "--web.route-prefix=/push", "--web.config.file="+write("gateway.yml", fmt.Sprintf(
		"tls_server_config: {cert_file: server.crt, key_file: server.key, client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt}\n"+
			"basic_auth_users: {pusher: %q}\n", pushHash)))
	const client = "basic_auth: {username: pusher, password_file: %s}\ntls_config: {ca_file: ca.crt, cert_file: client.crt, key_file: client.key}\n"
	write("right.pw", pushPassword)
	write("wrong.pw", canary+"-wrong")
	to := "--push.url=https://" + gateway.Addr + "/push"
	right := "--push.http-config=" + write("right.yml", fmt.Sprintf(client, "right.pw"))
	wrong := "--push.http-config=" + write("wrong.yml", fmt.Sprintf(client, "wrong.pw"))

	if status, _, stderr := runAgent(t, "--once", "--state.dir="+t.TempDir(), to, right, "--instance=web-1", "--push.interval=1s",
		"--push.expires-after=1s", "--push.target=node="+serve(t, expose(textType, "a 1\n"))); status != 0 {
		t.Fatalf("put: status %d: %s", status, stderr)
	}
	up := func() float64 {
		t.Helper()
		page, err := getTLS(t.Context(), trusted, "https://"+gateway.Addr+"/push/metrics")
		if err != nil {
			t.Fatal(err)
		}
		value, err := sum(page, "up", "job", "node", "instance", "web-1")
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	waitAge(t, time.Now(), 3*time.Second)
	status, stdout, stderr := runExpire(t, to, wrong, "--once")
	if status != 1 || !strings.Contains(stderr, "401") || strings.Contains(stdout+stderr, canary) || up() != 1 {
		t.Errorf("a wrong password: status %d: %s", status, stderr)
	}
	if status, _, stderr := runExpire(t, to, right, "--once"); status != 0 || up() != 0 {
		t.Errorf("status %d, up %v: %s", status, up(), stderr)
	}
}

// groupsOf returns all groups of a Pushgateway, by their labels.
func groupsOf(t *testing.T, g *real.Gateway) map[string]real.Group {
	t.Helper()
	groups, err := g.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]real.Group)
	for _, group := range groups {
		all[fmt.Sprint(group.Labels)] = group
	}
	return all
}

// checkOnly checks that of the groups before, only one has changed, or is gone.
func checkOnly(t *testing.T, before, after map[string]real.Group, changed ...map[string]string) {
	t.Helper()
	for labels, is := range after {
		if was, there := before[labels]; !there {
			t.Errorf("group %s is new", labels)
		} else if !reflect.DeepEqual(is, was) && !slices.ContainsFunc(changed, func(c map[string]string) bool { return fmt.Sprint(c) == labels }) {
			t.Errorf("group %s is %v, was %v", labels, is, was)
		}
	}
	for labels := range before {
		if _, there := after[labels]; !there && !slices.ContainsFunc(changed, func(c map[string]string) bool { return fmt.Sprint(c) == labels }) {
			t.Errorf("group %s is gone", labels)
		}
	}
}

// TestExpireOnce runs single sweeps and prunes against a real Pushgateway. The steps follow each
// other.
func TestExpireOnce(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	runBackup(t, gateway)
	to := "--push.url=" + gateway.URL
	silent := map[string]string{"job": "node", "instance": "silent"}
	put(t, gateway, "/metrics/job/node/instance/silent", nodeGroup("1"))
	put(t, gateway, "/metrics/job/node/instance/live", nodeGroup("3600"))
	put(t, gateway, "/metrics/job/node/instance/cron", "# TYPE node_load1 gauge\nnode_load1 1\n")
	put(t, gateway, "/metrics/job/node/instance/odd", strings.Replace(nodeGroup("NaN"), "node_load1", "node_load5", 2))
	put(t, gateway, "/metrics/job/other/path@base64/L3Zhci90bXA/instance/a", "a 1\n")
	old := time.Now()
	begin := groupsOf(t, gateway)
	waitAge(t, old, 3*time.Second) // its expiry, and what the Pushgateway's time may be behind

	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"dry run", func(t *testing.T) {
			status, stdout, stderr := runExpire(t, to, "--dry-run", "--once")
			if said := stdout + stderr; status != 0 || !strings.Contains(said, "silent") || strings.Contains(said, "cron") {
				t.Errorf("status %d: %s\n%s", status, stdout, stderr)
			}
			checkOnly(t, begin, groupsOf(t, gateway))
		}},
		{"once", func(t *testing.T) {
			if status, _, stderr := runExpire(t, to, "--once"); status != 0 {
				t.Errorf("status %d: %s", status, stderr)
			}
			g := waitGroup(t, gateway, silent, func(g real.Group) error { return checkDown(g, "1") })
			if was, since := number(t, begin[fmt.Sprint(silent)], "push_time_seconds"), number(t, g, silentSince); math.Abs(since-was) > 1 {
				t.Errorf("silent since %f, the last push was at %f", since, was)
			}
			checkOnly(t, begin, groupsOf(t, gateway), silent)
		}},
		{"once again", func(t *testing.T) {
			before := groupsOf(t, gateway)
			if status, _, stderr := runExpire(t, to, "--once"); status != 0 {
				t.Errorf("status %d: %s", status, stderr)
			}
			checkOnly(t, before, groupsOf(t, gateway))
		}},
		{"forgotten", func(t *testing.T) {
			g, err := group(t.Context(), gateway, silent)
			if err != nil {
				t.Fatal(err)
			}
			waitAge(t, time.Unix(int64(number(t, g, "push_time_seconds")), 0), 3*time.Second) // since it was put down
			if status, _, stderr := runExpire(t, to, "--once", "--forget-after=1m"); status != 0 {
				t.Errorf("status %d: %s", status, stderr)
			}
			checkOnly(t, begin, groupsOf(t, gateway), silent)
			if _, err := group(t.Context(), gateway, silent); err != nil {
				t.Errorf("too soon: %v", err)
			}
			if status, _, stderr := runExpire(t, to, "--once", "--forget-after=1s"); status != 0 {
				t.Errorf("status %d: %s", status, stderr)
			}
			waitGone(t, gateway, silent)
			checkOnly(t, begin, groupsOf(t, gateway), silent)
		}},
		{"no Pushgateway", func(t *testing.T) {
			if status, _, stderr := runExpire(t, "--push.url=http://"+refusing(t), "--once"); status != 1 || !strings.Contains(stderr, "refused") {
				t.Errorf("status %d: %s", status, stderr)
			}
		}},
		{"prune", func(t *testing.T) { prune(t, gateway, old) }},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
	}
}

// prune removes old groups of the job node.
func prune(t *testing.T, gateway *real.Gateway, old time.Time) {
	const age = 4 * time.Second
	waitAge(t, old, age+2*time.Second)
	put(t, gateway, "/metrics/job/node/instance/young", "# TYPE node_load1 gauge\nnode_load1 1\n")
	before := groupsOf(t, gateway)
	flags := []string{"prune", "--push.url=" + gateway.URL, "--older-than=" + age.String()}
	for _, test := range []struct {
		flags  []string
		status int
	}{
		{nil, 2},                          // all of them?
		{[]string{"--match=job=node"}, 2}, // nobody to ask
		{[]string{"--match=job=node", "--dry-run"}, 0},
		{[]string{"--match=job=nod", "--yes"}, 0},
	} {
		status, stdout, stderr := runExpire(t, append(slices.Clone(flags), test.flags...)...)
		if status != test.status {
			t.Errorf("%v: status %d, want %d: %s\n%s", test.flags, status, test.status, stdout, stderr)
		}
		checkOnly(t, before, groupsOf(t, gateway))
	}

	status, stdout, stderr := runExpire(t, append(slices.Clone(flags), "--match=job=node", "--yes")...)
	if status != 0 {
		t.Errorf("status %d: %s\n%s", status, stdout, stderr)
	}
	var gone []map[string]string
	for _, instance := range []string{"live", "cron", "odd"} {
		if !strings.Contains(stdout, instance) {
			t.Errorf("the list has no %q:\n%s", instance, stdout)
		}
		gone = append(gone, map[string]string{"job": "node", "instance": instance})
		waitGone(t, gateway, gone[len(gone)-1])
	}
	if strings.Contains(stdout, "young") || strings.Contains(stdout, "backup") {
		t.Errorf("the list has what is young, or another job's:\n%s", stdout)
	}
	checkOnly(t, before, groupsOf(t, gateway), gone...)

	if status, stdout, stderr := runExpire(t, append(slices.Clone(flags), "--match=path=/var/tmp", "--yes")...); status != 0 {
		t.Errorf("status %d: %s\n%s", status, stdout, stderr)
	}
	waitGone(t, gateway, map[string]string{"job": "other", "path": "/var/tmp", "instance": "a"})
}

// waitGone waits until a group is gone.
func waitGone(t *testing.T, g *real.Gateway, labels map[string]string) {
	t.Helper()
	wait(t, fmt.Sprintf("the end of the group %v", labels), func(ctx context.Context) error {
		if _, err := g.Groups(ctx); err != nil {
			return err
		}
		if _, err := group(ctx, g, labels); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
}
