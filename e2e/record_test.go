//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
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
	"github.com/promferry/promferry/internal/envfile"
)

// TestRecord runs foreign units to their end under a booted systemd, each with the drop-in
// as it is shipped, and reads from a real Pushgateway what was recorded. Its parts share the
// box and follow each other: each begins and ends with a running Pushgateway and an empty
// outbox.
func TestRecord(t *testing.T) {
	n := bootBatchNode(t)
	t.Run("drop-in verifies", n.dropInVerifies)
	t.Run("units", n.unitsEnd)
	t.Run("says nothing", n.saysNothing)
	t.Run("stopped", n.stopped)
	t.Run("second run", n.secondRun)
	t.Run("restarts", n.restarts)
	t.Run("foreign state", n.foreignState)
	t.Run("gateway down", n.gatewayDown)
	t.Run("gateway hangs", n.gatewayHangs)
	t.Run("no network", n.noNetwork)
	t.Run("environment", n.environment)
	t.Run("drop-in of before", n.formerDropIn)
	t.Run("environment file", n.environmentFile)
	t.Run("all services", n.allServices)
}

// TestCronOutbox has root's cron run a job while the Pushgateway is down, and the agent,
// under its own user, deliver what was kept.
func TestCronOutbox(t *testing.T) {
	n := bootBatchNode(t)
	t.Run("before the agent's first start", n.cronBeforeAgent)
	t.Run("beside the agent", n.cronBesideAgent)
}

// TestUnprivilegedOutbox runs jobs as a user who can do nothing else. What is kept is
// theirs, and delivered by their next run.
func TestUnprivilegedOutbox(t *testing.T) {
	const (
		home  = "/tmp/nobody"
		state = home + "/.local/state/promferry"
	)
	n := bootBatchNode(t)
	n.MustRun(t, "install", "--directory", "--owner=nobody", "--group=nogroup", "--mode=0755", home)
	run := func(job string) {
		t.Helper()
		out, err := n.Run(t, "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
			"env", "-i", "HOME="+home, "PATH=/usr/bin:/bin", "promferry", "run", "--job="+job, "--", "true")
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	n.stopGateway(t)
	before := time.Now()
	run("first")
	after := time.Now()
	if _, err := os.Stat(n.Path("/var/lib/promferry-agent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the agent's directory: %v, want %v", err, fs.ErrNotExist)
	}
	n.checkKept(t, state+"/outbox", 1, 65534)

	n.startGateway(t)
	run("second")
	n.checkKept(t, state+"/outbox", 0, 65534)
	g := n.mustJobGroup(t, "first")
	checkTimes(t, g, before, after, 0)
	for _, job := range []string{"first", "second"} {
		checkCounts(t, n.mustJobGroup(t, job), map[string]string{"success": "1"})
	}
}

// A batchNode is a booted node on which units are recorded and jobs are run.
type batchNode struct{ bootedNode }

const (
	recordDropIn = "promferry-record.conf"
	unitDir      = "/etc/systemd/system/"
	agentState   = "/var/lib/promferry-agent"
	agentOutbox  = agentState + "/outbox"
)

// witness writes down what systemd passes to an ExecStopPost=, and what it shows at that
// time. Its drop-in comes before that of promferry.
const (
	witness = `#!/bin/sh
{
	echo "passed=$SERVICE_RESULT/$EXIT_CODE/$EXIT_STATUS"
	/usr/bin/systemctl show --timestamp=us+utc -- "$1"
} >"/run/witness/$1"
`
	witnessDropIn = "[Service]\nExecStopPost=-+/usr/local/bin/witness %n\n"
)

func bootBatchNode(t *testing.T) batchNode {
	t.Helper()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	n := batchNode{bootNode(t)}
	// The drop-in reads the agent's settings: also those that are none of its own.
	n.WriteFile(t, "/etc/default/promferry-agent", []byte("PROMFERRY_PUSH_URLS="+boxGateway+"\nPROMFERRY_PUSH_INTERVAL=1s\n"), 0o644)
	n.CopyFile(t, "/usr/share/promferry/"+recordDropIn, filepath.Join(root, "systemd", recordDropIn), 0o644)
	n.WriteFile(t, "/usr/local/bin/witness", []byte(witness), 0o755)
	if err := os.Mkdir(n.Path("/run/witness"), 0o755); err != nil {
		t.Fatal(err)
	}
	n.startGateway(t)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := n.Run(t, "journalctl", "--no-pager", "--lines=300", "--identifier=promferry")
			t.Log("what promferry logged:\n" + out)
		}
	})
	return n
}

func (n batchNode) stopGateway(t *testing.T) {
	t.Helper()
	n.MustRun(t, "systemctl", "stop", "pushgateway")
}

func (n batchNode) startGateway(t *testing.T) {
	t.Helper()
	n.MustRun(t, "systemctl", "start", "pushgateway")
	n.until(t, patience, func(context.Context) error {
		_, err := n.groups(t)
		return err
	})
}

// unit writes a unit with these lines in [Service], and its drop-ins. systemd has to be
// reloaded then.
func (n batchNode) unit(t *testing.T, file string, lines ...string) {
	t.Helper()
	n.WriteFile(t, unitDir+file, []byte("[Service]\n"+strings.Join(lines, "\n")+"\n"), 0o644)
	n.WriteFile(t, unitDir+file+".d/10-witness.conf", []byte(witnessDropIn), 0o644)
	n.CopyFile(t, unitDir+file+".d/"+recordDropIn, n.Path("/usr/share/promferry/"+recordDropIn), 0o644)
}

// loadUnit is unit for a single one.
func (n batchNode) loadUnit(t *testing.T, file string, lines ...string) {
	t.Helper()
	n.unit(t, file, lines...)
	n.MustRun(t, "systemctl", "daemon-reload")
}

// An ending is how a unit ended, as systemd has it.
type ending struct {
	before, after time.Time
	// good is what systemctl says of it.
	good bool
	// seen is what the witness saw: what systemd passed, and all properties.
	seen map[string]string
}

// end starts a unit and waits until it has ended.
func (n batchNode) end(t *testing.T, unit string) ending {
	t.Helper()
	return n.ended(t, unit, func() error {
		_, err := n.Run(t, "systemctl", "start", "--wait", unit)
		return err
	})
}

// ended has run start a unit and wait until it has ended.
func (n batchNode) ended(t *testing.T, unit string, run func() error) ending {
	t.Helper()
	_ = os.Remove(n.Path("/run/witness/" + unit))
	e := ending{before: time.Now(), seen: make(map[string]string)}
	e.good = run() == nil
	e.after = time.Now()
	content, err := os.ReadFile(n.Path("/run/witness/" + unit))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			e.seen[name] = value
		}
	}
	t.Logf("%s: passed %s; ExecMainStart %q, ExecMainExit %q, InactiveExit %q, CPUUsageNSec %q, MemoryPeak %q", unit, e.seen["passed"],
		e.seen["ExecMainStartTimestamp"], e.seen["ExecMainExitTimestamp"], e.seen["InactiveExitTimestamp"], e.seen["CPUUsageNSec"], e.seen["MemoryPeak"])
	return e
}

// groups returns what the Pushgateway holds.
func (n batchNode) groups(t *testing.T) ([]real.Group, error) {
	t.Helper()
	resp, err := n.get(t, boxGateway+"/api/v1/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct{ Data []map[string]json.RawMessage }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("status %d: %w", resp.StatusCode, err)
	}
	groups := make([]real.Group, 0, len(answer.Data))
	for _, fields := range answer.Data {
		g := real.Group{Families: make(map[string]real.Family)}
		for name, raw := range fields {
			switch name {
			case "labels":
				err = json.Unmarshal(raw, &g.Labels)
			case "last_push_successful":
				err = json.Unmarshal(raw, &g.LastPushSuccessful)
			default:
				var f real.Family
				err = json.Unmarshal(raw, &f)
				g.Families[name] = f
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		groups = append(groups, g)
	}
	return groups, nil
}

// jobGroup returns the group of a job on this node, which has to be the job's only one.
func (n batchNode) jobGroup(t *testing.T, job string) (real.Group, error) {
	t.Helper()
	groups, err := n.groups(t)
	if err != nil {
		return real.Group{}, err
	}
	var found []real.Group
	var all []map[string]string
	for _, g := range groups {
		if g.Labels["job"] == job {
			found = append(found, g)
		}
		all = append(all, g.Labels)
	}
	if len(found) != 1 || !maps.Equal(found[0].Labels, map[string]string{"job": job, "instance": "box"}) {
		return real.Group{}, fmt.Errorf("want one group of the job %s, on the instance box, among %v", job, all)
	}
	return found[0], nil
}

func (n batchNode) mustJobGroup(t *testing.T, job string) real.Group {
	t.Helper()
	g, err := n.jobGroup(t, job)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// noJobGroup checks that the Pushgateway has no group of a job.
func (n batchNode) noJobGroup(t *testing.T, job string) {
	t.Helper()
	groups, err := n.groups(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		if g.Labels["job"] == job {
			t.Errorf("there is a group %v", g.Labels)
		}
	}
}

// familyNumber returns the value of a family's only series.
func familyNumber(t *testing.T, g real.Group, family string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(value(g, family), 64)
	if err != nil {
		t.Errorf("%s of %v: %v", family, g.Labels, err)
	}
	return v
}

// checkCounts checks how many runs there were by outcome; want is without the zeros.
func checkCounts(t *testing.T, g real.Group, want map[string]string) {
	t.Helper()
	f := g.Families["batch_job_runs_total"]
	got := make(map[string]string)
	for _, m := range f.Metrics {
		if m.Value != "0" {
			got[m.Labels["outcome"]] = m.Value
		}
	}
	if f.Type != "COUNTER" || len(f.Metrics) != 4 || !maps.Equal(got, want) {
		t.Errorf("batch_job_runs_total of %v: %+v, want %v", g.Labels, f, want)
	}
}

// A recorded is what is to be recorded of a unit.
type recorded struct {
	// passed matches $SERVICE_RESULT/$EXIT_CODE/$EXIT_STATUS.
	passed string
	// outcome is the label's value, and also tells whether the run was a success.
	outcome string
	status  float64
	// atLeast is how many seconds the unit takes, until its main process has ended.
	atLeast float64
}

func (n batchNode) dropInVerifies(t *testing.T) {
	n.loadUnit(t, "verified.service", "Type=oneshot", "ExecStart=/bin/true")
	// The status is 0 even for an unknown key: only the silence counts.
	out, err := n.Run(t, "systemd-analyze", "verify", "verified.service")
	if err != nil || out != "" {
		t.Errorf("%v: %s", err, out)
	}
}

func (n batchNode) unitsEnd(t *testing.T) {
	const oneshot = "Type=oneshot\n"
	units := []struct {
		name, lines string
		recorded
	}{
		{"good.service", oneshot + "ExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"good-simple.service", "ExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"bad.service", oneshot + "ExecStart=/bin/sh -c 'exit 7'", recorded{"exit-code/exited/7", "failure", 7, 0}},
		{"bad-simple.service", "ExecStart=/bin/sh -c 'exit 7'", recorded{"exit-code/exited/7", "failure", 7, 0}},
		{"also-success.service", oneshot + "SuccessExitStatus=7\nExecStart=/bin/sh -c 'exit 7'", recorded{"success/exited/7", "success", 7, 0}},
		{"several.service", oneshot + "ExecStart=/bin/sleep 1\nExecStart=/bin/true", recorded{"success/exited/0", "success", 0, 1}},

		{"kill.service", "ExecStart=/bin/sh -c 'kill -KILL $$$$'", recorded{"signal/killed/KILL", "failure", 137, 0}},
		{"term.service", oneshot + "ExecStart=/bin/sh -c 'kill -TERM $$$$'", recorded{"signal/killed/TERM", "failure", 143, 0}},
		// For a daemon, unlike a oneshot, this is a regular end.
		{"hup.service", "ExecStart=/bin/sh -c 'kill -HUP $$$$'", recorded{"success/killed/HUP", "success", 129, 0}},
		{"real-time.service", "ExecStart=/bin/sh -c 'kill -37 $$$$'", recorded{`signal/killed/RTMIN\+3`, "failure", 165, 0}},
		// Whether a core is dumped depends on the kernel's core_pattern as well.
		{"core.service", "LimitCORE=infinity\nExecStart=/bin/sh -c 'kill -ABRT $$$$'", recorded{"(core-dump/dumped|signal/killed)/ABRT", "failure", 134, 0}},
		{"no-core.service", "LimitCORE=0\nExecStart=/bin/sh -c 'kill -ABRT $$$$'", recorded{"(core-dump/dumped|signal/killed)/ABRT", "failure", 134, 0}},
		// With the memory controller of cgroup v1 systemd does not learn why.
		{"memory.service", "MemoryMax=16M\nMemorySwapMax=0\nExecStart=/bin/dd if=/dev/zero of=/dev/null bs=256M count=1", recorded{"(oom-kill|signal)/killed/KILL", "failure", 137, 0}},

		{"too-long.service", "RuntimeMaxSec=1\nExecStart=/bin/sleep 60", recorded{"timeout/killed/TERM", "timeout", 124, 1}},
		{"too-long-start.service", oneshot + "TimeoutStartSec=1\nExecStart=/bin/sleep 60", recorded{"timeout/killed/TERM", "timeout", 124, 1}},
		{"watchdog.service", "WatchdogSec=1\nNotifyAccess=all\nExecStart=/bin/sleep 60", recorded{"watchdog/(dumped|killed)/ABRT", "failure", 134, 1}},
		{"protocol.service", "Type=notify\nExecStart=/bin/true", recorded{"protocol/exited/0", "failure", 0, 0}},

		{"never-started.service", oneshot + "ExecStartPre=/bin/sh -c 'sleep 1; exit 3'\nExecStart=/bin/true", recorded{"exit-code//", "failure", 125, 1}},
		{"missing.service", oneshot + "ExecStart=/usr/bin/there-is-none", recorded{"exit-code/exited/203", "failure", 203, 0}},
		{"condition.service", oneshot + "ExecCondition=/bin/false\nExecStart=/bin/true", recorded{"exec-condition//", "skipped", 0, 0}},

		{"batch@7.service", oneshot + "ExecStart=/bin/sh -c 'exit %i'", recorded{"exit-code/exited/7", "failure", 7, 0}},
		{`escaped@a-b\x2dc.service`, oneshot + "ExecStart=/bin/true", recorded{"success/exited/0", "success", 0, 0}},

		{"dynamic.service", oneshot + "DynamicUser=yes\nExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"sandboxed.service", oneshot + "User=nobody\nProtectSystem=strict\nProtectHome=yes\nPrivateTmp=yes\nPrivateDevices=yes\n" +
			"InaccessiblePaths=/run/dbus /var/lib\nNoNewPrivileges=yes\nCapabilityBoundingSet=\nRestrictAddressFamilies=none\n" +
			"SystemCallFilter=@system-service\nMemoryDenyWriteExecute=yes\nUMask=0777\nExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"path.service", oneshot + "Environment=PATH=/opt/none\nExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"locale.service", oneshot + "Environment=TZ=Asia/Tokyo LC_ALL=de_DE.UTF-8\nExecStart=/bin/sleep 1", recorded{"success/exited/0", "success", 0, 1}},
		{"accounted.service", oneshot + "CPUAccounting=yes\nMemoryAccounting=yes\n" +
			"ExecStart=/bin/sh -c 'i=0; while [ $$i -lt 100000 ]; do i=$$((i+1)); done'", recorded{"success/exited/0", "success", 0, 0}},
	}
	for _, u := range units {
		file := u.name
		if template, _, ok := strings.Cut(u.name, "@"); ok {
			file = template + "@.service"
		}
		n.unit(t, file, u.lines)
	}
	n.MustRun(t, "systemctl", "daemon-reload")
	for _, u := range units {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			e := n.end(t, u.name)
			g := n.mustJobGroup(t, strings.TrimSuffix(u.name, ".service"))
			checkRecorded(t, g, e, u.recorded)
			checkFamilies(t, g, e, u.outcome)
			checkCounts(t, g, map[string]string{u.outcome: "1"})
		})
	}
}

// saysNothing has it that nothing was logged for all those units.
func (n batchNode) saysNothing(t *testing.T) {
	if out, err := n.Run(t, "journalctl", "--quiet", "--sync"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, _ := n.Run(t, "journalctl", "--quiet", "--identifier=promferry"); out != "" {
		t.Errorf("logged:\n%s", out)
	}
}

// checkRecorded checks what was recorded of a unit, but for how many runs there were, and
// that the unit ended as if nothing were recorded.
func checkRecorded(t *testing.T, g real.Group, e ending, want recorded) {
	t.Helper()
	if !regexp.MustCompile("^(" + want.passed + ")$").MatchString(e.seen["passed"]) {
		t.Errorf("systemd passed %s, want %s", e.seen["passed"], want.passed)
	}
	if wellEnded := want.outcome == "success" || want.outcome == "skipped"; e.good != wellEnded {
		t.Errorf("the unit ended well: %v, want %v", e.good, wellEnded)
	}
	if !g.LastPushSuccessful {
		t.Error("the last push has failed")
	}
	if want.outcome == "skipped" {
		return
	}
	success := 0.0
	if want.outcome == "success" {
		success = 1
		if at, end := familyNumber(t, g, "batch_job_last_success_timestamp_seconds"), familyNumber(t, g, "batch_job_last_completion_timestamp_seconds"); at != end {
			t.Errorf("last success at %f, completion at %f", at, end)
		}
	}
	for family, want := range map[string]float64{
		"batch_job_last_exit_code": want.status, "batch_job_last_success": success, "batch_job_running": 0,
	} {
		if got := familyNumber(t, g, family); got != want {
			t.Errorf("%s is %v, want %v", family, got, want)
		}
	}
	checkTimes(t, g, e.before, e.after, want.atLeast)
}

// checkFamilies checks that a group has those families that a first run pushes, and no
// others: what systemd has no figures for is left out.
func checkFamilies(t *testing.T, g real.Group, e ending, outcome string) {
	t.Helper()
	want := []string{"batch_job_runs_total"}
	if outcome != "skipped" {
		want = append(want, "batch_job_last_start_timestamp_seconds", "batch_job_last_completion_timestamp_seconds",
			"batch_job_last_duration_seconds", "batch_job_last_exit_code", "batch_job_last_success", "batch_job_running")
		// The witness asked before; what it and promferry itself take is the unit's as well.
		if least, ok := figure(e.seen["CPUUsageNSec"]); ok {
			want = append(want, "batch_job_last_cpu_seconds")
			if got := familyNumber(t, g, "batch_job_last_cpu_seconds"); got < least/1e9 || got > least/1e9+2 {
				t.Errorf("CPU time %v s, at the unit's end %v s", got, least/1e9)
			}
		}
		if least, ok := figure(e.seen["MemoryPeak"]); ok {
			want = append(want, "batch_job_last_max_rss_bytes")
			if got := familyNumber(t, g, "batch_job_last_max_rss_bytes"); got < least {
				t.Errorf("memory %v, at the unit's end %v", got, least)
			}
		}
	}
	if outcome == "success" {
		want = append(want, "batch_job_last_success_timestamp_seconds")
	}
	slices.Sort(want)
	if got := others(g); !slices.Equal(got, want) {
		t.Errorf("families %v, want %v", got, want)
	}
}

// figure returns a figure that systemd has. Without one it shows nothing, or
// "[not set]", or, in some versions, the largest number that there is.
func figure(property string) (float64, bool) {
	v, err := strconv.ParseFloat(property, 64)
	return v, err == nil && property != "18446744073709551615"
}

// checkTimes checks that a run began and ended between two times, and took as long as it
// should: so many seconds, and less than two more.
func checkTimes(t *testing.T, g real.Group, before, after time.Time, atLeast float64) {
	t.Helper()
	start := familyNumber(t, g, "batch_job_last_start_timestamp_seconds")
	end := familyNumber(t, g, "batch_job_last_completion_timestamp_seconds")
	duration := familyNumber(t, g, "batch_job_last_duration_seconds")
	if epoch(before) > start || start > end || end > epoch(after) {
		t.Errorf("started at %f, ended at %f, want both in this order between %f and %f", start, end, epoch(before), epoch(after))
	}
	if duration < max(0, atLeast-0.1) || duration > atLeast+2 {
		t.Errorf("took %f s, want %v s or somewhat more", duration, atLeast)
	}
	if d := end - start - duration; d < -0.1 || d > 0.1 {
		t.Errorf("took %f s, but from start to end it is %f s", duration, end-start)
	}
}

// epoch returns a time as metrics have it, in Unix time and to the microsecond.
func epoch(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }

// stopped are units that would go on, or stay active, until somebody stops them.
func (n batchNode) stopped(t *testing.T) {
	n.unit(t, "stopped.service", "Type=exec", "ExecStart=/bin/sleep 60")
	n.unit(t, "stubborn.service", "Type=exec", "KillSignal=SIGCONT", "TimeoutStopSec=1", "ExecStart=/bin/sleep 60")
	n.unit(t, "stays.service", "Type=oneshot", "RemainAfterExit=yes", "ExecStart=/bin/true")
	n.MustRun(t, "systemctl", "daemon-reload")
	for unit, want := range map[string]recorded{
		"stopped.service":  {"success/killed/TERM", "success", 143, 0},
		"stubborn.service": {"timeout/killed/KILL", "timeout", 124, 1},
		"stays.service":    {"success/exited/0", "success", 0, 0},
	} {
		t.Run(unit, func(t *testing.T) {
			var active time.Time
			e := n.ended(t, unit, func() error {
				n.MustRun(t, "systemctl", "start", unit)
				active = time.Now()
				n.noJobGroup(t, strings.TrimSuffix(unit, ".service"))
				n.MustRun(t, "systemctl", "stop", unit)
				if n.Show(t, unit, "ActiveState") == "failed" {
					return errors.New("failed")
				}
				return nil
			})
			if unit == "stays.service" { // It ended before it was stopped.
				e.after = active
			}
			g := n.mustJobGroup(t, strings.TrimSuffix(unit, ".service"))
			checkRecorded(t, g, e, want)
			checkCounts(t, g, map[string]string{want.outcome: "1"})
		})
	}
}

// secondRun is what becomes of the first run's metrics.
func (n batchNode) secondRun(t *testing.T) {
	const flag = "/run/second"
	n.unit(t, "then-bad.service", "Type=oneshot", "ExecStart=/usr/bin/test ! -e "+flag)
	n.unit(t, "then-not-started.service", "Type=oneshot", "ExecStartPre=/usr/bin/test ! -e "+flag, "ExecStart=/bin/sh -c 'exit 7'")
	n.unit(t, "then-skipped.service", "Type=oneshot", "ExecCondition=/usr/bin/test ! -e "+flag, "ExecStart=/bin/sh -c 'exit 7'")
	n.MustRun(t, "systemctl", "daemon-reload")
	first := make(map[string]real.Group)
	for unit, want := range map[string]recorded{
		"then-bad":         {"success/exited/0", "success", 0, 0},
		"then-not-started": {"exit-code/exited/7", "failure", 7, 0},
		"then-skipped":     {"exit-code/exited/7", "failure", 7, 0},
	} {
		e := n.end(t, unit+".service")
		first[unit] = n.mustJobGroup(t, unit)
		checkRecorded(t, first[unit], e, want)
	}
	n.WriteFile(t, flag, nil, 0o644)

	t.Run("bad", func(t *testing.T) {
		e := n.end(t, "then-bad.service")
		g := n.mustJobGroup(t, "then-bad")
		checkRecorded(t, g, e, recorded{"exit-code/exited/1", "failure", 1, 0})
		checkCounts(t, g, map[string]string{"success": "1", "failure": "1"})
		const family = "batch_job_last_success_timestamp_seconds"
		if was, is := value(first["then-bad"], family), value(g, family); was != is {
			t.Errorf("%s was %s, is %s", family, was, is)
		}
	})
	// The first run's exit status and times must not be taken for the second's.
	t.Run("not started", func(t *testing.T) {
		e := n.end(t, "then-not-started.service")
		g := n.mustJobGroup(t, "then-not-started")
		checkRecorded(t, g, e, recorded{"exit-code//", "failure", 125, 0})
		checkCounts(t, g, map[string]string{"failure": "2"})
	})
	t.Run("skipped", func(t *testing.T) {
		e := n.end(t, "then-skipped.service")
		g := n.mustJobGroup(t, "then-skipped")
		checkRecorded(t, g, e, recorded{"exec-condition//", "skipped", 0, 0})
		checkCounts(t, g, map[string]string{"failure": "1", "skipped": "1"})
		for _, family := range others(g) {
			if was, is := value(first["then-skipped"], family), value(g, family); was != is {
				t.Errorf("%s was %s, is %s", family, was, is)
			}
		}
	})
}

// restarts counts each time that systemd tries.
func (n batchNode) restarts(t *testing.T) {
	const unit = "restarts.service"
	n.unit(t, unit, "Type=oneshot", "Restart=on-failure", "RestartSec=100ms", "ExecStart=/bin/sh -c 'exit 7'")
	n.WriteFile(t, unitDir+unit+".d/20-limit.conf", []byte("[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=3\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")
	e := n.ended(t, unit, func() error {
		_, err := n.Run(t, "systemctl", "start", unit)
		n.until(t, patience, func(context.Context) error {
			if state := n.Show(t, unit, "ActiveState"); state != "failed" {
				return fmt.Errorf("ActiveState = %s", state)
			}
			return nil
		})
		return err
	})
	g := n.mustJobGroup(t, "restarts")
	checkRecorded(t, g, e, recorded{"exit-code/exited/7", "failure", 7, 0})
	checkCounts(t, g, map[string]string{"failure": "3"})
}

// foreignState are units with a state directory of their own, which $STATE_DIRECTORY names.
func (n batchNode) foreignState(t *testing.T) {
	n.unit(t, "state.service", "Type=oneshot", "User=nobody", "StateDirectory=foreign", "ExecStart=/bin/sh -c 'echo mine >$$STATE_DIRECTORY/mine'")
	n.unit(t, "state-dynamic.service", "Type=oneshot", "DynamicUser=yes", "StateDirectory=dynamic", "ExecStart=/bin/sh -c 'echo mine >$$STATE_DIRECTORY/mine'")
	n.MustRun(t, "systemctl", "daemon-reload")
	for unit, dir := range map[string]string{"state": "/var/lib/foreign", "state-dynamic": "/var/lib/private/dynamic"} {
		t.Run(unit, func(t *testing.T) {
			e := n.end(t, unit+".service")
			checkRecorded(t, n.mustJobGroup(t, unit), e, recorded{"success/exited/0", "success", 0, 0})
			files, err := os.ReadDir(n.Path(dir))
			if err != nil {
				t.Fatal(err)
			}
			if len(files) != 1 || files[0].Name() != "mine" {
				t.Errorf("the unit's state directory has %v, want only its own file", files)
			}
		})
	}
	n.checkKept(t, agentOutbox, 0, 0)
}

// checkKept checks how many pushes wait in an outbox, that they are the owner's alone, and
// that none was refused.
func (n batchNode) checkKept(t *testing.T, dir string, want, owner int) {
	t.Helper()
	kept := 0
	err := filepath.WalkDir(n.Path(dir), func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o600)
		if entry.IsDir() {
			mode = 0o700
		}
		if uid := int(info.Sys().(*syscall.Stat_t).Uid); info.Mode().Perm() != mode || uid != owner {
			t.Errorf("%s: mode %v, owner %d, want %v and %d", path, info.Mode().Perm(), uid, mode, owner)
		}
		switch {
		case entry.IsDir() || entry.Name() == "lock":
		case filepath.Dir(path) == n.Path(dir):
			kept++
		default:
			t.Errorf("set aside: %s", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if kept != want {
		t.Errorf("%s has %d pushes, want %d", dir, kept, want)
	}
}

// deliverKept has a unit end while the Pushgateway works, which delivers all that waits.
func (n batchNode) deliverKept(t *testing.T) {
	t.Helper()
	n.loadUnit(t, "deliverer.service", "Type=oneshot", "ExecStart=/bin/true")
	if e := n.end(t, "deliverer.service"); !e.good {
		t.Error("the unit failed")
	}
	n.checkKept(t, agentOutbox, 0, 0)
}

func (n batchNode) gatewayDown(t *testing.T) {
	n.unit(t, "down-good.service", "Type=oneshot", "ExecStart=/bin/sleep 1")
	n.unit(t, "down-bad.service", "Type=oneshot", "ExecStart=/bin/sh -c 'exit 7'")
	n.MustRun(t, "systemctl", "daemon-reload")
	n.stopGateway(t)
	good := n.end(t, "down-good.service")
	bad := n.end(t, "down-bad.service")
	n.checkKept(t, agentOutbox, 2, 0)
	for property, want := range map[string]string{"Result": "exit-code", "ExecMainStatus": "7"} {
		if got := n.Show(t, "down-bad.service", property); got != want {
			t.Errorf("%s = %s, want %s", property, got, want)
		}
	}
	n.startGateway(t)
	n.deliverKept(t)
	checkRecorded(t, n.mustJobGroup(t, "down-good"), good, recorded{"success/exited/0", "success", 0, 1})
	checkRecorded(t, n.mustJobGroup(t, "down-bad"), bad, recorded{"exit-code/exited/7", "failure", 7, 0})
}

// gatewayHangs has a Pushgateway that accepts connections and never answers. For systemd
// the drop-in's "-" is no excuse for taking longer than TimeoutStopSec=.
func (n batchNode) gatewayHangs(t *testing.T) {
	for unit, command := range map[string]string{"hangs.service": "/bin/true", "hangs-bad.service": "/bin/sh -c 'exit 7'"} {
		n.unit(t, unit, "Type=oneshot", "ExecStart="+command)
		n.WriteFile(t, unitDir+unit+".d/"+recordDropIn, []byte("[Service]\nExecStopPost=-+/usr/bin/promferry record --push.timeout=1s %n\n"), 0o644)
	}
	n.unit(t, "hurries.service", "Type=oneshot", "TimeoutStopSec=3", "ExecStart=/bin/true")
	n.MustRun(t, "systemctl", "daemon-reload")
	units := map[string]recorded{
		"hangs":     {"success/exited/0", "success", 0, 0},
		"hangs-bad": {"exit-code/exited/7", "failure", 7, 0},
		"hurries":   {"success/exited/0", "success", 0, 0},
	}
	n.MustRun(t, "systemctl", "kill", "--signal=STOP", "pushgateway")
	endings := make(map[string]ending)
	for unit := range units {
		endings[unit] = n.end(t, unit+".service")
		if took := endings[unit].after.Sub(endings[unit].before); took > 5*time.Second {
			t.Errorf("%s took %v", unit, took)
		}
	}
	n.checkKept(t, agentOutbox, len(units), 0)
	n.MustRun(t, "systemctl", "kill", "--signal=CONT", "pushgateway")
	n.deliverKept(t)
	for unit, want := range units {
		t.Run(unit, func(t *testing.T) {
			g := n.mustJobGroup(t, unit)
			checkRecorded(t, g, endings[unit], want)
			checkCounts(t, g, map[string]string{want.outcome: "1"})
		})
	}
}

// noNetwork is a unit in a network namespace of its own, which the drop-in's "+" does not
// lift: the Pushgateway is out of reach, and the outbox is not.
func (n batchNode) noNetwork(t *testing.T) {
	n.loadUnit(t, "no-network.service", "Type=oneshot", "PrivateNetwork=yes", "ExecStart=/bin/sleep 1")
	e := n.end(t, "no-network.service")
	n.checkKept(t, agentOutbox, 1, 0)
	n.noJobGroup(t, "no-network")
	n.deliverKept(t)
	checkRecorded(t, n.mustJobGroup(t, "no-network"), e, recorded{"success/exited/0", "success", 0, 1})
}

// environment has units whose environment would lead root elsewhere.
func (n batchNode) environment(t *testing.T) {
	const planted = "/var/tmp/planted"
	n.MustRun(t, "install", "--directory", "--owner=nobody", "--group=nogroup", planted)
	n.WriteFile(t, planted+"/systemctl", []byte("#!/bin/sh\nid -u >"+planted+"/ran\n"), 0o755)
	n.loadUnit(t, "environment.service", "Type=oneshot", "User=nobody", "ExecStart=/bin/true",
		"Environment=PATH="+planted+":/usr/bin:/bin LD_PRELOAD="+planted+"/evil.so SYSTEMD_PAGER="+planted+"/systemctl",
		"Environment=PROMFERRY_PUSH_URLS=http://127.0.0.1:1 PROMFERRY_PUSH_HTTP_CONFIG="+planted+"/http.yml",
		"Environment=PROMFERRY_STATE_DIR="+planted+"/state PROMFERRY_TEXTFILE="+planted+" PROMFERRY_JOB=other PROMFERRY_INSTANCE=other",
		"Environment=HTTP_PROXY=http://127.0.0.1:1 XDG_STATE_HOME="+planted+" HOME="+planted+" TMPDIR="+planted+" SSL_CERT_FILE="+planted+"/ca")
	e := n.end(t, "environment.service")
	checkRecorded(t, n.mustJobGroup(t, "environment"), e, recorded{"success/exited/0", "success", 0, 0})
	n.noJobGroup(t, "other")
	n.checkKept(t, agentOutbox, 0, 0)
	files, err := os.ReadDir(n.Path(planted))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 || files[0].Name() != "systemctl" {
		t.Errorf("%s has %v, want only what was planted", planted, files)
	}
	out := n.MustRun(t, "journalctl", "--no-pager", "--output=cat", "--unit=environment.service", "--identifier=promferry")
	if !strings.Contains(out, "ignored in the unit's environment: PROMFERRY_INSTANCE, PROMFERRY_JOB, ") {
		t.Errorf("the journal does not name what was ignored:\n%s", out)
	}
}

// formerDropIn has the drop-in that was shipped before: it reads the agent's settings by
// EnvironmentFile=.
func (n batchNode) formerDropIn(t *testing.T) {
	const unit = "former.service"
	n.unit(t, unit, "Type=oneshot", "ExecStart=/bin/true")
	n.WriteFile(t, unitDir+unit+".d/"+recordDropIn,
		[]byte("[Service]\nEnvironmentFile=-/etc/default/promferry-agent\nExecStopPost=-+/usr/bin/promferry record %n\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")
	e := n.end(t, unit)
	checkRecorded(t, n.mustJobGroup(t, "former"), e, recorded{"success/exited/0", "success", 0, 0})
	if out := n.MustRun(t, "journalctl", "--no-pager", "--output=cat", "--unit="+unit, "--identifier=promferry"); strings.TrimSpace(out) != "" {
		t.Errorf("promferry said:\n%s", out)
	}
}

// environmentFile has systemd itself read made-up files as EnvironmentFile=, which record reads
// on its own.
func (n batchNode) environmentFile(t *testing.T) {
	const (
		unit = "environment-file.service"
		file = "/etc/default/made-up"
		dump = "/run/witness/environ"
	)
	n.WriteFile(t, unitDir+unit, []byte("[Service]\nType=oneshot\nEnvironmentFile="+file+"\nExecStart=/bin/cp /proc/self/environ "+dump+"\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")
	const seed = 1
	random := rand.New(rand.NewPCG(seed, seed))
	tokens := []string{"\nA=", "\nB1=", "\n_C=", "\n A =", "A=", "=", "\n", " ", "\t", "#", ";", `"`, "'", `\`, "$", "`", "x", "y z", "export ", "1", "\\\n", `\"`, "\r\n"}
	variables := 0
	for range 200 {
		var b strings.Builder
		for range 1 + random.IntN(40) {
			b.WriteString(tokens[random.IntN(len(tokens))])
		}
		n.WriteFile(t, file, []byte(b.String()), 0o644)
		n.MustRun(t, "systemctl", "start", unit)
		environ, err := os.ReadFile(n.Path(dump))
		if err != nil {
			t.Fatal(err)
		}
		want := make(map[string]string)
		for variable := range strings.SplitSeq(string(environ), "\x00") {
			name, value, ok := strings.Cut(variable, "=")
			if ok && slices.Contains([]string{"A", "B1", "_C", "x"}, name) {
				want[name] = value
				variables++
			}
		}
		got := envfile.Parse(b.String())
		maps.DeleteFunc(got, func(name, _ string) bool { return !slices.Contains([]string{"A", "B1", "_C", "x"}, name) })
		if !maps.Equal(got, want) {
			t.Errorf("%q: got %q, systemd %q", b.String(), got, want)
		}
	}
	if variables < 300 {
		t.Errorf("only %d variables in all: the files are no test", variables)
	}
}

// allServices has the drop-in at the top level, where it is for promferry's own units too.
func (n batchNode) allServices(t *testing.T) {
	n.WriteFile(t, unitDir+"service.d/10-witness.conf", []byte(witnessDropIn), 0o644)
	n.CopyFile(t, unitDir+"service.d/"+recordDropIn, n.Path("/usr/share/promferry/"+recordDropIn), 0o644)
	n.WriteFile(t, unitDir+"plain.service", []byte("[Service]\nType=oneshot\nExecStart=/bin/true\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")

	e := n.ended(t, agentUnit, func() error {
		n.MustRun(t, "systemctl", "start", agentUnit)
		n.waitForwards(t, time.Now())
		n.MustRun(t, "systemctl", "stop", agentUnit)
		return nil
	})
	if e.seen["passed"] != "success/exited/0" {
		t.Errorf("systemd passed %s of the agent", e.seen["passed"])
	}
	if got := n.Show(t, agentUnit, "Result"); got != "success" {
		t.Errorf("Result of the agent = %s", got)
	}
	e = n.end(t, "plain.service")
	g := n.mustJobGroup(t, "plain")
	checkRecorded(t, g, e, recorded{"success/exited/0", "success", 0, 0})
	checkCounts(t, g, map[string]string{"success": "1"})

	groups, err := n.groups(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		if strings.HasPrefix(g.Labels["job"], "promferry") {
			t.Errorf("there is a group %v", g.Labels)
		}
	}
	counts, err := filepath.Glob(n.Path(agentState + "/jobs/promferry*"))
	if err != nil || len(counts) > 0 {
		t.Errorf("runs of promferry are counted: %v, %v", counts, err)
	}
}

// cronRun runs a job as root's cron does while the Pushgateway is down, and returns between
// which times.
func (n batchNode) cronRun(t *testing.T) (before, after time.Time) {
	t.Helper()
	before = time.Now()
	// Not MustRun: promferry may tell that it keeps the push.
	out, err := n.Run(t, "env", "-i", "HOME=/root", "SHELL=/bin/sh", "PATH=/usr/bin:/bin", "promferry", "run", "--job=cron", "--", "true")
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	return before, time.Now()
}

// cronBeforeAgent has root make the state directory, which systemd then gives to the
// agent's user.
func (n batchNode) cronBeforeAgent(t *testing.T) {
	n.stopGateway(t)
	before, after := n.cronRun(t)
	n.checkKept(t, agentOutbox, 1, 0)

	n.MustRun(t, "systemctl", "start", agentUnit)
	target, err := os.Readlink(n.Path(agentState))
	if err != nil || target != "private/promferry-agent" {
		t.Errorf("%s is a link to %q, %v", agentState, target, err)
	}
	n.checkKept(t, "/var/lib/private/promferry-agent/outbox", 1, n.agentUser(t))
	n.agentDelivers(t, before, after, "1")
}

func (n batchNode) cronBesideAgent(t *testing.T) {
	n.stopGateway(t)
	before, after := n.cronRun(t)
	n.checkKept(t, "/var/lib/private/promferry-agent/outbox", 1, n.agentUser(t))
	n.agentDelivers(t, before, after, "2")
}

// agentUser returns the user of the running agent, which is none that others can have.
func (n batchNode) agentUser(t *testing.T) int {
	t.Helper()
	status := procStatus(t, n.Path("/proc/"+n.Show(t, agentUnit, "MainPID")))
	uid, err := strconv.Atoi(strings.Fields(status["Uid"])[0])
	if err != nil || uid < 61184 || uid > 65519 { // systemd's range for dynamic users
		t.Fatalf("Uid = %s, want a dynamic user's", status["Uid"])
	}
	return uid
}

// agentDelivers starts the Pushgateway and waits until the agent has delivered a push that
// tells of a run between two times, the last of so many.
func (n batchNode) agentDelivers(t *testing.T, before, after time.Time, runs string) {
	t.Helper()
	const delivered = "promferry_outbox_delivered_pushes_total"
	was := n.agentSum(t, delivered)
	n.startGateway(t)
	n.until(t, patience, func(context.Context) error {
		if is := n.agentSum(t, delivered); is != was+1 {
			return fmt.Errorf("%s is %v, was %v", delivered, is, was)
		}
		return nil
	})
	g := n.mustJobGroup(t, "cron")
	checkTimes(t, g, before, after, 0)
	checkCounts(t, g, map[string]string{"success": runs})
	if pushed := familyNumber(t, g, "push_time_seconds"); pushed < epoch(after) {
		t.Errorf("pushed at %f, before the run had ended at %f", pushed, epoch(after))
	}
	if waiting := n.agentSum(t, "promferry_outbox_waiting_pushes"); waiting != 0 {
		t.Errorf("%v pushes wait", waiting)
	}
	n.checkKept(t, "/var/lib/private/promferry-agent/outbox", 0, n.agentUser(t))
}

// agentSum returns the sum of all series of one of the agent's own metrics.
func (n batchNode) agentSum(t *testing.T, name string) float64 {
	t.Helper()
	resp, err := n.get(t, "http://127.0.0.1:9099/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	total, err := sum(body, name)
	if err != nil {
		t.Fatal(err)
	}
	return total
}
