//go:build e2e

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

const node = `{job="node",instance="web-1"}`

// TestForward goes through the life of a node as Prometheus sees it. The steps share the
// programs and follow each other: each begins with all of them running.
func TestForward(t *testing.T) {
	t.Parallel()
	exporter := startExporter(t)
	gateway := startPushgateway(t)
	prometheus := startPrometheus(t, gateway)
	a := startAgent(t, "--instance=web-1", "--push.target=node="+exporter.URL+"/metrics", "--push.url="+gateway.URL)

	arrives := func(t *testing.T) {
		t.Helper()
		waitQuery(t, prometheus, "node_load1"+node, above(-1))
		waitQuery(t, prometheus, "up"+node, exactly(1))
	}
	ends := func(t *testing.T) {
		t.Helper()
		waitQuery(t, prometheus, "up"+node, exactly(0))
		waitEnded(t, prometheus, "node_load1")
	}
	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"arrives", func(t *testing.T) {
			arrives(t)
			waitQuery(t, prometheus, "scrape_samples_scraped"+node, above(100))
			waitQuery(t, prometheus, "scrape_duration_seconds"+node, above(0))
			waitQuery(t, prometheus, "promferry_expires_after_seconds"+node, exactly(3)) // twice the interval, and the push timeout
			waitQuery(t, prometheus, `promferry_info{job="node",instance="web-1",mode="push"}`, exactly(1))
			// No other series has the name, and nothing had to be renamed.
			waitQuery(t, prometheus, "node_load1", above(-1))
			waitEnded(t, prometheus, `{exported_job!=""}`)
			waitEnded(t, prometheus, `{job="node",instance!="web-1"}`)
		}},
		{"exporter killed and back", func(t *testing.T) {
			exporter.Kill()
			ends(t)
			waitQuery(t, prometheus, `count({job="node",__name__!~"push_.*"})`, exactly(5)) // up and its companions
			if got := a.mustSum(t, "promferry_forwarder_scrape_failures_total", "target", "node", "reason", "connect"); got == 0 {
				t.Error("no scrape failure with the reason connect")
			}
			if err := exporter.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			arrives(t)
		}},
		{"Pushgateway killed and back", func(t *testing.T) {
			gateway.Kill()
			a.waitSum(t, above(0), "promferry_forwarder_put_failures_total", "reason", "refused")
			waitEnded(t, prometheus, `{job="node"}`)
			if err := gateway.Restart(t.Context()); err != nil { // it has forgotten all groups
				t.Fatal(err)
			}
			arrives(t)
		}},
		{"second agent refused", func(t *testing.T) {
			status, _, stderr := runAgent(t, "--state.dir="+a.stateDir, "--web.listen-address=127.0.0.1:0")
			if want := fmt.Sprintf("PID %d\n", a.PID()); status != 75 || !strings.HasSuffix(stderr, want) {
				t.Errorf("status %d, and %q does not end in %q", status, stderr, want)
			}
		}},
		{"agent killed and restarted at once", func(t *testing.T) {
			lock := filepath.Join(a.stateDir, "agent.pid")
			a.Kill()
			if b, err := os.ReadFile(lock); err != nil || string(b) != strconv.Itoa(a.PID())+"\n" {
				t.Errorf("the lock that the killed agent left holds %q, %v", b, err)
			}
			killed := float64(time.Now().UnixMilli()) / 1000
			if err := a.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitQuery(t, prometheus, "push_time_seconds"+node, above(killed))
			arrives(t)
			if b, err := os.ReadFile(lock); err != nil || string(b) != strconv.Itoa(a.PID())+"\n" {
				t.Errorf("the lock holds %q, %v, and the PID is %d", b, err, a.PID())
			}
		}},
		{"agent stopped", func(t *testing.T) {
			a.stop(t)
			ends(t)
			waitEnded(t, prometheus, `{__name__=~"node_.*"}`)
			if _, err := os.Stat(filepath.Join(a.stateDir, "agent.pid")); err != nil {
				t.Errorf("the lock file is gone: %v", err)
			}
		}},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
	}
}

// TestOnStop shows what is left of a group when the agent has stopped.
func TestOnStop(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	target := serve(t, expose(textType, "a 1\n"))
	for _, test := range []struct {
		onStop string
		check  func(real.Group, error) error
	}{
		{"down", func(g real.Group, err error) error { return errors.Join(err, checkGroup(g, "0")) }},
		{"keep", func(g real.Group, err error) error { return errors.Join(err, checkGroup(g, "1", "a")) }},
		{"delete", func(_ real.Group, err error) error {
			if err == nil {
				return errors.New("the group is there")
			}
			return nil
		}},
	} {
		t.Run(test.onStop, func(t *testing.T) {
			t.Parallel()
			a := startAgent(t, "--instance=web-1", "--push.target="+test.onStop+"="+target, "--push.url="+gateway.URL, "--push.on-stop="+test.onStop)
			a.waitSum(t, above(0), "promferry_forwarder_puts_total")
			a.stop(t)
			if err := test.check(group(t.Context(), gateway, map[string]string{"job": test.onStop, "instance": "web-1"})); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOneGatewayDead shows that a Pushgateway that does not take puts costs another one
// none of its own.
func TestOneGatewayDead(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, reason string
		start        func(t *testing.T) string // returns an address
	}{
		{"refuses", "refused", refusing},
		{"hangs", "timeout", hanging},
		{"fails", "status", func(t *testing.T) string {
			url := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(http.StatusServiceUnavailable)
			}))
			return strings.TrimPrefix(url, "http://")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			alive := startPushgateway(t)
			dead := "http://" + test.start(t)
			exporter := startExporter(t)
			a := startAgent(t, "--instance=web-1", "--push.target=node="+exporter.URL+"/metrics", "--push.url="+dead, "--push.url="+alive.URL)

			since := a.count(t, "node", alive)
			pushed := pushTime(t, alive)
			a.waitCycles(t, "node", 4)
			a.waitSum(t, above(0), "promferry_forwarder_put_failures_total", "gateway", dead, "reason", test.reason)
			if now := pushTime(t, alive); now < pushed+2 {
				t.Errorf("push_time_seconds has gone from %v to %v in four cycles of a second", pushed, now)
			}
			since.checkEachPut(t)
			if puts := a.mustSum(t, "promferry_forwarder_puts_total", "gateway", dead); puts != 0 {
				t.Errorf("%v puts to the dead one", puts)
			}

			a.stop(t)
			g, err := group(t.Context(), alive, map[string]string{"job": "node", "instance": "web-1"})
			if err := errors.Join(err, checkGroup(g, "0")); err != nil {
				t.Errorf("after the stop: %v", err)
			}
		})
	}
}

// TestStopBesideAHangingGateway shows that a put which hangs for longer than the time to
// stop does not keep another Pushgateway from learning of the stop.
func TestStopBesideAHangingGateway(t *testing.T) {
	t.Parallel()
	alive := startPushgateway(t)
	target := serve(t, expose(textType, "a 1\n"))
	a := startAgent(t, "--instance=web-1", "--push.interval=60s", "--push.timeout=60s", "--push.target=node="+target,
		"--push.url=http://"+hanging(t), "--push.url="+alive.URL)
	a.waitSum(t, above(0), "promferry_forwarder_puts_total", "gateway", alive.URL)
	if err := a.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait(t, "up 0", func(ctx context.Context) error {
		g, err := group(ctx, alive, map[string]string{"job": "node", "instance": "web-1"})
		return errors.Join(err, checkGroup(g, "0"))
	})
}

// pushTime returns when the group of the node was last put.
func pushTime(t *testing.T, g *real.Gateway) float64 {
	t.Helper()
	group, err := group(t.Context(), g, map[string]string{"job": "node", "instance": "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	at, err := strconv.ParseFloat(value(group, "push_time_seconds"), 64)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// TestTypeClash shows that what only the Pushgateway can know, that another group or it
// itself has a family of the same name and another type, costs just that family.
func TestTypeClash(t *testing.T) {
	t.Parallel()
	exporter := startExporter(t)
	gateway := startPushgateway(t)
	prometheus := startPrometheus(t, gateway)
	const (
		other  = "/metrics/job/other"
		metric = "promferry_forwarder_refused_families"
	)
	put(t, gateway, other, "# TYPE node_load1 counter\nnode_load1 1\n# TYPE foo_count gauge\nfoo_count 3\n# TYPE baz summary\nbaz_sum 1\nbaz_count 1\n")
	app := serve(t, expose(textType, `# TYPE foo summary
foo_sum 1
foo_count 3
# TYPE baz_count counter
baz_count{text="collected metric \"innocent\" { is not a GAUGE"} 1
# TYPE innocent gauge
innocent 7
# TYPE go_goroutines untyped
go_goroutines 5
`))

	// One cycle is enough for it.
	status, _, stderr := runAgent(t, "--once", "--state.dir="+t.TempDir(), "--instance=once", "--push.url="+gateway.URL, "--push.target=app="+app)
	g, err := group(t.Context(), gateway, map[string]string{"job": "app", "instance": "once"})
	if err := errors.Join(err, checkGroup(g, "1", "innocent")); err != nil || status != 0 {
		t.Errorf("once: status %d, %v\n%s", status, err, stderr)
	}
	if status, body := send(t, http.MethodDelete, gateway.URL+"/metrics/job/app/instance/once", "", nil); status != http.StatusAccepted {
		t.Fatalf("delete: status %d: %s", status, body)
	}

	a := startAgent(t, "--instance=web-1", "--push.url="+gateway.URL,
		"--push.target=node="+exporter.URL+"/metrics", "--push.target=app="+app)

	waitQuery(t, prometheus, "node_load5"+node, above(-1))
	waitQuery(t, prometheus, "up"+node, exactly(1))
	waitEnded(t, prometheus, "node_load1"+node)
	waitQuery(t, prometheus, `innocent{job="app"}`, exactly(7))
	waitQuery(t, prometheus, `up{job="app"}`, exactly(1))
	waitEnded(t, prometheus, `{__name__=~"foo.*|baz.*|go_goroutines",job="app"}`)
	a.waitCycles(t, "app", 3)
	for target, want := range map[string]float64{"node": 1, "app": 3} {
		if got := a.mustSum(t, metric, "target", target); got != want {
			t.Errorf("%s of %s is %v, want %v", metric, target, got, want)
		}
		// One put of each showed it: the rest follows in the same cycle.
		if got := a.mustSum(t, "promferry_forwarder_put_failures_total", "target", target); got != 1 {
			t.Errorf("%v puts of %s failed, want 1", got, target)
		}
	}

	// Everything but that family is there.
	body, err := exporter.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	g, err = group(t.Context(), gateway, map[string]string{"job": "node", "instance": "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	want := familyNames(body)
	delete(want, "node_load1")
	if got := others(g); !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
		t.Errorf("the group has %v, want %v", got, want)
	}

	logged := func(times int) {
		t.Helper()
		for _, family := range []string{"node_load1", "foo", "baz_count", "go_goroutines"} {
			re := regexp.MustCompile(`(?m)^.*level=ERROR .*refuses a family.* family=` + family + ` .*$`)
			if lines := re.FindAllString(a.Stderr(), -1); len(lines) != times {
				t.Errorf("%d lines about %s, want %d: %q", len(lines), family, times, lines)
			}
		}
	}
	logged(1)

	// Tried again after a reload.
	a.reload(t)
	wait(t, "another try of all", func(ctx context.Context) error {
		failed, err := a.sum(ctx, "promferry_forwarder_put_failures_total")
		if err == nil && failed < 4 {
			err = fmt.Errorf("%v puts have failed", failed)
		}
		return err
	})
	a.waitSum(t, exactly(4), metric)
	logged(2)

	// The other group is gone: still left out, then tried again with success.
	if status, body := send(t, http.MethodDelete, gateway.URL+other, "", nil); status != http.StatusAccepted {
		t.Fatalf("delete: status %d: %s", status, body)
	}
	a.waitCycles(t, "node", 2)
	if got := a.mustSum(t, metric); got != 4 {
		t.Errorf("%s is %v without a reload, want 4", metric, got)
	}
	a.reload(t)
	waitQuery(t, prometheus, "node_load1"+node, above(-1))
	waitQuery(t, prometheus, `foo_count{job="app"}`, exactly(3))
	waitQuery(t, prometheus, `baz_count{job="app"}`, exactly(1))
	a.waitCycles(t, "node", 2)
	a.waitSum(t, exactly(1), metric) // go_goroutines is the Pushgateway's for good
	if got := a.mustSum(t, metric, "target", "node"); got != 0 {
		t.Errorf("%s of node is %v, want 0", metric, got)
	}
}

// familyNames returns the names of the families that a text declares, but for those of
// samples that nothing is declared for.
func familyNames(text []byte) map[string]bool {
	names := make(map[string]bool)
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllSubmatch(text, -1) {
		names[string(match[1])] = true
	}
	return names
}

// TestOnce runs one cycle against real programs.
func TestOnce(t *testing.T) {
	t.Parallel()
	exporter := startExporter(t)
	gateway := startPushgateway(t)
	nothing := "http://" + refusing(t)
	const expires = "promferry_expires_after_seconds"

	for _, test := range []struct {
		name     string
		flags    []string
		target   string // empty: the exporter
		gateway  string // empty: the Pushgateway
		status   int
		up       string // empty: no group
		expires  string
		stdout   []string
		stderr   []string
		families bool // are those of the exporter in the group?
	}{
		{name: "works", flags: []string{"--once"}, up: "1", families: true},
		{name: "says for how long", flags: []string{"--once", "--push.expires-after=90s"}, up: "1", expires: "90", families: true},
		{name: "ignores on-stop", flags: []string{"--once", "--push.on-stop=delete"}, up: "1", families: true},
		{name: "no exporter", flags: []string{"--once"}, target: nothing + "/metrics", status: 1, up: "0", stderr: []string{"scrape " + nothing}},
		{name: "no Pushgateway", flags: []string{"--once"}, gateway: nothing, status: 1, stderr: []string{"put " + nothing}},
		{
			name: "dry run", flags: []string{"--dry-run"},
			stdout: []string{"\nnode_load1 ", "\nup 1\n", "\npromferry_expires_after_seconds 3\n", "# put to " + gateway.URL + ", group {", `instance="web-1"`},
		},
		{
			name: "dry run, no exporter", flags: []string{"--dry-run"}, target: nothing + "/metrics", status: 1,
			stdout: []string{"\nup 0\n"}, stderr: []string{"scrape " + nothing},
		},
		{name: "dry run, no Pushgateway", flags: []string{"--dry-run"}, gateway: nothing, stdout: []string{"\nup 1\n"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			job := strings.Map(func(r rune) rune {
				if r == ' ' || r == ',' {
					return '-'
				}
				return r
			}, test.name)
			target, to := test.target, test.gateway
			if target == "" {
				target = exporter.URL + "/metrics"
			}
			if to == "" {
				to = gateway.URL
			}
			status, stdout, stderr := runAgent(t, append([]string{
				"--state.dir=" + t.TempDir(), "--instance=web-1", "--push.interval=1s", "--push.target=" + job + "=" + target, "--push.url=" + to,
			}, test.flags...)...)
			if status != test.status {
				t.Errorf("status %d, want %d\n%s", status, test.status, stderr)
			}
			for _, want := range test.stdout {
				if !strings.Contains(stdout, want) {
					t.Errorf("stdout has no %q:\n%s", want, stdout)
				}
			}
			for _, want := range test.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr has no %q:\n%s", want, stderr)
				}
			}
			if len(test.stdout) == 0 && stdout != "" {
				t.Errorf("stdout is %q", stdout)
			}

			g, err := group(t.Context(), gateway, map[string]string{"job": job, "instance": "web-1"})
			if test.up == "" {
				if err == nil {
					t.Errorf("there is a group %v", g)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, families := g.Families["node_load1"]
			if value(g, "up") != test.up || value(g, expires) != test.expires || families != test.families {
				t.Errorf("up %q, %s %q, node_load1 %t; want %q, %q, %t", value(g, "up"), expires, value(g, expires), families, test.up, test.expires, test.families)
			}
		})
	}
}

// TestOnceBesideAnAgent shows that the two kinds of single cycle leave a running agent alone.
func TestOnceBesideAnAgent(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	target := serve(t, expose(textType, "a 1\n"))
	a := startAgent(t, "--instance=web-1", "--push.target=node="+target, "--push.url="+gateway.URL)
	flags := []string{"--state.dir=" + a.stateDir, "--instance=web-1", "--push.target=node=" + target, "--push.url=" + gateway.URL}
	for flag, want := range map[string]int{"--once": 75, "--dry-run": 0} {
		if status, _, stderr := runAgent(t, append(flags, flag)...); status != want {
			t.Errorf("%s: status %d, want %d: %s", flag, status, want, stderr)
		}
	}
	if err := a.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the agent has ended: %v", err)
	}
}

// The passwords of TestAuth, and their bcrypt hashes of the lowest cost. No output of the
// agent may have the word that both begin with.
const (
	canary         = "canary-7d1f"
	scrapePassword = canary + "-scrape"
	scrapeHash     = "$2a$04$ddqvGADclitHlmuPWOLzk.s4V5pygjj3XXW28EwexPxgUdNY7cjmK"
	pushPassword   = canary + "-push"
	pushHash       = "$2a$04$igx7UEAbocM4qTQ0fW9zvOKvgWATy9KWS2rIrQm/G.Wju0IMVXnfC"
)

// TestAuth has TLS with a CA of its own and basic auth on both ways, and a client
// certificate on the way to the Pushgateway. The steps follow each other: each begins
// and ends with an agent that forwards.
func TestAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(t *testing.T, name, content string) string {
		t.Helper()
		// As those who rotate secrets do: nobody reads half of it.
		if err := os.WriteFile(file("new"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file("new"), file(name)); err != nil {
			t.Fatal(err)
		}
		return file(name)
	}
	trusted := makeCertificates(t, dir)

	const server = "tls_server_config: {cert_file: server.crt, key_file: server.key%s}\nbasic_auth_users: {%s: %q}\n"
	exporter := startExporter(t, "--web.config.file="+write(t, "exporter.yml", fmt.Sprintf(server, "", "scraper", scrapeHash)))
	gateway := startPushgateway(t, "--web.config.file="+write(t, "gateway.yml",
		fmt.Sprintf(server, ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt", "pusher", pushHash)))
	write(t, "scrape.pw", scrapePassword+"\n")
	write(t, "push.pw", pushPassword)
	const client = "basic_auth: {username: %s, password_file: %s.pw}\ntls_config: {ca_file: ca.crt%s}\n"
	scrapeConfig := fmt.Sprintf(client, "scraper", "scrape", "")
	pushConfig := fmt.Sprintf(client, "pusher", "push", ", cert_file: client.crt, key_file: client.key")
	exporterURL, gatewayURL := "https://"+exporter.Addr+"/metrics", "https://"+gateway.Addr
	flags := []string{
		"--instance=web-1", "--push.target=node=" + exporterURL, "--push.url=" + gatewayURL,
		"--scrape.http-config=" + write(t, "scrape.yml", scrapeConfig), "--push.http-config=" + write(t, "push.yml", pushConfig),
	}
	a := startAgent(t, append(flags, "--log.level=debug", "--web.enable-lifecycle")...)
	silent := func(t *testing.T, what, text string) {
		t.Helper()
		for _, secret := range []string{
			canary,
			base64.StdEncoding.EncodeToString([]byte("scraper:" + scrapePassword)),
			base64.StdEncoding.EncodeToString([]byte("pusher:" + pushPassword)),
		} {
			if strings.Contains(text, secret) {
				t.Errorf("%s tells the secret %q:\n%s", what, secret, text)
			}
		}
	}

	waitUp := func(t *testing.T, up float64) {
		t.Helper()
		wait(t, fmt.Sprintf("up %v on the Pushgateway", up), func(ctx context.Context) error {
			page, err := getTLS(ctx, trusted, gatewayURL+"/metrics")
			if err != nil {
				return err
			}
			got, err := sum(page, "up", "job", "node", "instance", "web-1")
			if err == nil && got != up {
				err = fmt.Errorf("it is %v", got)
			}
			return err
		})
	}
	const failed, puts, reloads = "promferry_forwarder_put_failures_total", "promferry_forwarder_puts_total", "promferry_agent_reloads_total"
	forwards := func(t *testing.T) {
		t.Helper()
		a.waitSum(t, above(a.mustSum(t, puts)+1), puts)
		waitUp(t, 1)
	}

	for _, step := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"works", func(t *testing.T) {
			forwards(t)
			page, err := getTLS(t.Context(), trusted, gatewayURL+"/metrics")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := sum(page, "node_load1", "job", "node", "instance", "web-1"); err != nil {
				t.Error(err)
			}
		}},
		{"password of the exporter rotated", func(t *testing.T) {
			write(t, "scrape.pw", canary+"-wrong")
			waitUp(t, 0)
			a.waitSum(t, above(0), "promferry_forwarder_scrape_failures_total", "reason", "status")
			waitLog(t, a, `msg="Scrape failed" .*scrape `+exporterURL+`: unexpected status 401"$`)
			write(t, "scrape.pw", scrapePassword)
			forwards(t)
		}},
		{"password of the Pushgateway rotated", func(t *testing.T) {
			write(t, "push.pw", canary+"-wrong")
			a.waitSum(t, above(1), failed, "reason", "status")
			waitLog(t, a, `msg="Put failed" .*put `+gatewayURL+`/\S+: unexpected status 401`)
			waitUp(t, 1) // The group stays as it was.
			write(t, "push.pw", pushPassword)
			forwards(t)
			waitLog(t, a, `msg="Put succeeded again"`)
		}},
		{"broken files", func(t *testing.T) {
			for _, content := range []string{
				"basic_auth: " + canary + "-misplaced\n",
				"basic_auth: {username: scraper, password: x, password_file: " + canary + "}\n",
				canary + "-misplaced: {a\n",
				"proxy_url: http://u:" + canary + "@[::1\n",
				"tls_config: {ca_file: nothing.crt}\n",
			} {
				write(t, "scrape.yml", content)
				write(t, "push.yml", content)
				before := a.mustSum(t, reloads, "outcome", "failure")
				if err := a.Signal(syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
				a.waitSum(t, above(before), reloads, "outcome", "failure")
				resp, err := http.Post(a.URL+"/-/reload", "", nil) // says why, too
				if err != nil {
					t.Fatal(err)
				}
				answer, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusInternalServerError || !strings.Contains(string(answer), "scrape.yml") || err != nil {
					t.Errorf("reload of %q: status %d, %q, %v", content, resp.StatusCode, answer, err)
				}
				silent(t, "the answer to a reload", string(answer))
			}
			if got := a.mustSum(t, "promferry_agent_last_reload_successful"); got != 0 {
				t.Errorf("promferry_agent_last_reload_successful is %v", got)
			}
			waitLog(t, a, `level=ERROR .*msg="Reload failed, all stays as it was" .*scrape.yml`)
			forwards(t)
			write(t, "scrape.yml", scrapeConfig)
			write(t, "push.yml", pushConfig)
			a.reload(t)
			forwards(t)
			if got := a.mustSum(t, "promferry_agent_last_reload_successful"); got != 1 {
				t.Errorf("promferry_agent_last_reload_successful is %v", got)
			}
		}},
		{"stays silent", func(t *testing.T) {
			page, err := a.Get(t.Context(), "/metrics")
			if err != nil {
				t.Fatal(err)
			}
			silent(t, "/metrics", string(page))
			a.stop(t)
			waitUp(t, 0)
			silent(t, "the log", a.Stderr()+a.Stdout())
		}},
		{"faults of one cycle", func(t *testing.T) {
			write(t, "no-ca.yml", "basic_auth: {username: scraper, password_file: scrape.pw}\n")
			write(t, "no-certificate.yml", fmt.Sprintf(client, "pusher", "push", ""))
			write(t, "inline.yml", "basic_auth: {username: scraper, password: "+canary+"-inline}\ntls_config: {ca_file: ca.crt}\n")
			for _, test := range []struct {
				flag   string
				status int
				want   string
			}{
				{"--scrape.http-config=" + file("no-ca.yml"), 1, "certificate signed by unknown authority"},
				{"--push.http-config=" + file("no-ca.yml"), 1, "certificate signed by unknown authority"},
				// With TLS 1.3 the refusal comes after the handshake: more often than not the
				// write that it interrupts is what is told.
				{"--push.http-config=" + file("no-certificate.yml"), 1, "put " + gatewayURL + "/"},
				{"--scrape.http-config=" + file("inline.yml"), 1, "unexpected status 401"},
				{"--scrape.http-config=" + file("none.yml"), 2, "--scrape.http-config: "},
			} {
				settings := map[string]string{}
				for _, flag := range append(slices.Clone(flags), test.flag) {
					name, value, _ := strings.Cut(flag, "=")
					settings[name] = value
				}
				args := []string{"--once", "--push.interval=1s", "--state.dir=" + t.TempDir()}
				for name, value := range settings {
					args = append(args, name+"="+value)
				}
				status, stdout, stderr := runAgent(t, args...)
				if status != test.status || !strings.Contains(stderr, test.want) {
					t.Errorf("%s: status %d, want %d, and %q in\n%s", test.flag, status, test.status, test.want, stderr)
				}
				silent(t, "the output of "+test.flag, stdout+stderr)
			}
			for flag, value := range map[string]string{
				"--push.url": "http://u:" + canary + "@127.0.0.1:1", "--push.target": "x=http://u:" + canary + "@127.0.0.1:1/metrics?token=" + canary,
			} {
				status, stdout, stderr := runAgent(t, "--once", "--state.dir="+t.TempDir(), flag+"="+value)
				if status != 2 || !strings.Contains(stderr, flag+": ") {
					t.Errorf("%s: status %d\n%s", flag, status, stderr)
				}
				silent(t, "the output of "+flag, stdout+stderr)
			}
		}},
	} {
		if !t.Run(step.name, step.run) {
			return
		}
	}
}

func waitLog(t *testing.T, a *agent, re string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := a.WaitLog(ctx, regexp.MustCompile(re)); err != nil {
		t.Error(err)
	}
}

func getTLS(ctx context.Context, trusted *tls.Config, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth("pusher", pushPassword)
	transport := &http.Transport{TLSClientConfig: trusted, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return body, err
}

// makeCertificates writes ca.crt, and of it server.crt and client.crt with their keys,
// and returns a client's configuration with them.
func makeCertificates(t *testing.T, dir string) *tls.Config {
	t.Helper()
	encode := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if ca == nil {
			template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
			ca, caKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		encode(name+".crt", "CERTIFICATE", der)
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		encode(name+".key", "PRIVATE KEY", keyDER)
		if name == "ca" {
			if ca, err = x509.ParseCertificate(der); err != nil {
				t.Fatal(err)
			}
		}
	}
	client, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{client}}
}
