//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/e2e/systemdbox"
)

// TestAgentUnderSystemd runs the unit, as it is shipped, under a booted systemd, next
// to a real node_exporter and a real Pushgateway on their own ports. Its parts share
// the box and follow each other: each begins and ends with a running agent.
func TestAgentUnderSystemd(t *testing.T) {
	n := bootNode(t)

	// As shipped, before the drop-ins of this test.
	t.Run("unit verifies", n.unitVerifies)
	t.Run("unit is hardened", n.unitIsHardened)
	t.Run("example settings exist", n.exampleSettingsExist)

	n.WriteFile(t, "/etc/systemd/system/promferry-agent.service.d/test.conf",
		[]byte("[Service]\nRestartSec=100ms\nEnvironment=PROMFERRY_PUSH_INTERVAL=1s\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")

	t.Run("active when ready", n.activeWhenReady)
	t.Run("forwards", n.forwards)
	t.Run("sandbox in force", n.sandboxInForce)
	t.Run("reload", n.reload)
	t.Run("second agent", n.secondAgent)
	t.Run("crash", n.crash)
	t.Run("watchdog", n.watchdog)
	t.Run("wrong settings", n.wrongSettings)
	t.Run("credentials", n.credentials)
	t.Run("stop", n.stop)
}

const (
	agentUnit = "promferry-agent.service"
	// agentStopBudget is what the agent promises to end within.
	agentStopBudget = 20 * time.Second
	boxGateway      = "http://127.0.0.1:9091"
)

// A bootedNode is a box that has promferry installed as a package would, and runs a
// node_exporter and a Pushgateway. Its methods are about one unit of promferry's.
type bootedNode struct {
	*systemdbox.Box
	role string // agent, proxy and so on
}

func (n bootedNode) unit() string { return "promferry-" + n.role + ".service" }

// url is where the unit itself listens.
func (n bootedNode) url() string {
	return map[string]string{"agent": "http://127.0.0.1:9099", "gateway": boxGateway}[n.role]
}

func bootNode(t *testing.T) bootedNode {
	t.Helper()
	promferry, err := real.Promferry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := bootedNode{Box: systemdbox.Boot(t)}.install(t, "agent")
	n.CopyFile(t, "/usr/bin/promferry", promferry, 0o755)
	for _, program := range []string{"node_exporter", "pushgateway"} {
		path, err := real.Find(program)
		if err != nil {
			t.Fatal(err)
		}
		n.CopyFile(t, "/usr/local/bin/"+program, path, 0o755)
		n.service(t, program, program)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := n.Run(t, "journalctl", "--no-pager", "--lines=200", "--unit=promferry-*")
			t.Log("journal of promferry-*:\n" + out)
		}
	})
	return n
}

// install copies the unit of a role and its example settings, as they are shipped.
func (n bootedNode) install(t *testing.T, role string) bootedNode {
	t.Helper()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	n.role = role
	n.CopyFile(t, "/usr/lib/systemd/system/"+n.unit(), filepath.Join(root, "systemd", n.unit()), 0o644)
	n.CopyFile(t, "/etc/default/promferry-"+role, filepath.Join(root, "systemd", "promferry-"+role+".default"), 0o644)
	return n
}

// service starts a program of /usr/local/bin as a service of its own.
func (n bootedNode) service(t *testing.T, name, program string, args ...string) {
	t.Helper()
	n.WriteFile(t, "/etc/systemd/system/"+name+".service",
		fmt.Appendf(nil, "[Service]\nExecStart=/usr/local/bin/%s %s\n", program, strings.Join(args, " ")), 0o644)
	n.MustRun(t, "systemctl", "start", name)
}

func (n bootedNode) unitVerifies(t *testing.T) {
	// The status is 0 even for an unknown key: only the silence counts.
	out, err := n.Run(t, "systemd-analyze", "verify", n.unit())
	if err != nil || out != "" {
		t.Errorf("%v: %s", err, out)
	}
}

func (n bootedNode) unitIsHardened(t *testing.T) {
	out, err := n.Run(t, "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", n.unit())
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func (n bootedNode) exampleSettingsExist(t *testing.T) {
	example, err := os.ReadFile(n.Path("/etc/default/promferry-" + n.role))
	if err != nil {
		t.Fatal(err)
	}
	help := n.MustRun(t, "promferry", n.role, "--help")
	names := regexp.MustCompile(`(?m)^#(PROMFERRY_\w+)=`).FindAllStringSubmatch(string(example), -1)
	if len(names) == 0 {
		t.Error("no settings found in the example")
	}
	for _, name := range names {
		if !regexp.MustCompile(name[1] + `\b`).MatchString(help) {
			t.Errorf("the example has %s, the help has not:\n%s", name[1], help)
		}
	}
}

// activeWhenReady finds the unit ready, without waiting, when systemd says it started.
func (n bootedNode) activeWhenReady(t *testing.T) {
	n.MustRun(t, "systemctl", "enable", "--now", n.unit())
	if got := n.Show(t, n.unit(), "ActiveState"); got != "active" {
		t.Errorf("ActiveState = %s, want active", got)
	}
	resp, err := n.get(t, n.url()+"/-/ready")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("ready: status %d", resp.StatusCode)
	}
	for property, want := range map[string]string{"UnitFileState": "enabled", "WatchdogUSec": "1min"} {
		if got := n.Show(t, n.unit(), property); got != want {
			t.Errorf("%s = %s, want %s", property, got, want)
		}
	}
}

func (n bootedNode) forwards(t *testing.T) {
	n.waitForwards(t, time.Time{})
	n.waitStatus(t, regexp.MustCompile(`target`))
}

func (n bootedNode) sandboxInForce(t *testing.T) {
	pid := n.Show(t, n.unit(), "MainPID")
	proc := n.Path("/proc/" + pid)

	status := procStatus(t, proc)
	for name, want := range map[string]string{
		"CapInh":     "0000000000000000",
		"CapPrm":     "0000000000000000",
		"CapEff":     "0000000000000000",
		"CapBnd":     "0000000000000000",
		"CapAmb":     "0000000000000000",
		"NoNewPrivs": "1",
		"Seccomp":    "2",
	} {
		if got := status[name]; got != want {
			t.Errorf("%s = %s, want %s", name, got, want)
		}
	}
	uid, err := strconv.Atoi(strings.Fields(status["Uid"])[0])
	if err != nil || uid < 61184 || uid > 65519 { // systemd's range for dynamic users
		t.Errorf("Uid = %s, want a dynamic user's", status["Uid"])
	}

	// Its files, as seen by a root that goes in: what is closed to root, by the mounts
	// alone, is closed to the agent.
	for _, dir := range []string{"/etc", "/usr/bin", "/var/lib", "/var/lib/private", "/var/log"} {
		name := filepath.Join(proc, "root", dir, "probe")
		file, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			file.Close()
		}
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("write to %s: %v, want %v", dir, err, syscall.EROFS)
		}
	}
	for _, name := range []string{"/root/secret", "/tmp/secret", "/dev/secret"} {
		n.WriteFile(t, name, nil, 0o644)
	}
	for _, name := range []string{"/root/secret", "/tmp/secret", "/dev/secret", "/proc/meminfo"} {
		if _, err := os.Stat(n.Path(name)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(proc, "root", name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, want %v", name, err, os.ErrNotExist)
		}
	}

	state := "/var/lib/private/promferry-" + n.role
	info, err := os.Stat(n.Path(state))
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; info.Mode().Perm() != 0o700 || int(owner) != uid {
		t.Errorf("state directory: mode %v, owner %d, want -rwx------ and %d", info.Mode().Perm(), owner, uid)
	}
	lock, err := os.ReadFile(n.Path(state + "/" + n.role + ".pid"))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(lock)); got != pid {
		t.Errorf("lock file has PID %q, want %s", got, pid)
	}
}

func (n bootedNode) reload(t *testing.T) {
	pid := n.Show(t, n.unit(), "MainPID")
	n.MustRun(t, "systemctl", "reload", n.unit())
	// The unit may be "reloading" for a moment more: kill(1) has returned, READY=1 has
	// not come.
	n.until(t, 5*time.Second, func(context.Context) error {
		if got := n.Show(t, n.unit(), "ActiveState"); got != "active" {
			return fmt.Errorf("ActiveState = %s", got)
		}
		return nil
	})
	if got := n.Show(t, n.unit(), "MainPID"); got != pid {
		t.Errorf("MainPID = %s after the reload, want %s", got, pid)
	}
	n.waitForwards(t, time.Now())
}

// secondAgent starts a copy of the unit with the same state and the same port: it is
// refused for the lock, which comes before the port, and is not tried again.
func (n bootedNode) secondAgent(t *testing.T) {
	const second = "promferry-agent-second.service"
	pid := n.Show(t, agentUnit, "MainPID")
	content, err := os.ReadFile(n.Path("/usr/lib/systemd/system/" + agentUnit))
	if err != nil {
		t.Fatal(err)
	}
	n.WriteFile(t, "/etc/systemd/system/"+second, content, 0o644)
	// Of the same name as the first one's, so that the state stays with that.
	n.WriteFile(t, "/etc/systemd/system/"+second+".d/user.conf", []byte("[Service]\nUser=promferry-agent\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")

	n.refused(t, second, 75)
	n.waitLog(t, second, regexp.MustCompile(`\b`+pid+`\b`))
	if got := n.Show(t, agentUnit, "MainPID"); got != pid {
		t.Errorf("MainPID of the first = %s, want %s", got, pid)
	}
	n.waitForwards(t, time.Now())
}

// crash ends the unit's process in ways that it does not see coming. SIGABRT is how the Go
// runtime ends after a panic.
func (n bootedNode) crash(t *testing.T) {
	for _, signal := range []string{"KILL", "ABRT", "SEGV"} {
		t.Run(signal, func(t *testing.T) {
			pid := n.Show(t, n.unit(), "MainPID")
			n.MustRun(t, "systemctl", "kill", "--kill-whom=main", "--signal="+signal, n.unit())
			n.waitRestarted(t, pid)
			n.waitForwards(t, time.Now())
		})
	}
}

// watchdog stops the unit's process, which then lives, holds its lock, and does
// nothing.
func (n bootedNode) watchdog(t *testing.T) {
	n.override(t, "WatchdogSec=2s")
	n.MustRun(t, "systemctl", "restart", n.unit())
	pid := n.Show(t, n.unit(), "MainPID")

	const fed = "WatchdogTimestampMonotonic"
	for range 2 { // the start counts as the first time
		before := n.Show(t, n.unit(), fed)
		n.until(t, 5*time.Second, func(context.Context) error {
			if n.Show(t, n.unit(), fed) == before {
				return errors.New("the watchdog has not been fed")
			}
			return nil
		})
	}
	if got := n.Show(t, n.unit(), "MainPID"); got != pid {
		t.Fatalf("it was restarted, MainPID %s to %s", pid, got)
	}

	n.MustRun(t, "systemctl", "kill", "--kill-whom=main", "--signal=STOP", n.unit())
	n.waitRestarted(t, pid)
	n.until(t, 5*time.Second, func(context.Context) error {
		// Result itself starts anew with the unit.
		_, err := n.Run(t, "journalctl", "--quiet", "--output=cat", "--grep=.", "--unit="+n.unit(), "UNIT_RESULT=watchdog")
		return err
	})
	n.waitForwards(t, time.Now())
}

func (n bootedNode) wrongSettings(t *testing.T) {
	for name, setting := range map[string]string{
		"unknown name": "PROMFERRY_PUSH_INTERVALL=1s",
		"wrong value":  "PROMFERRY_PUSH_INTERVAL=soon",
		"missing file": "PROMFERRY_PUSH_HTTP_CONFIG=/etc/promferry/none.yml",
	} {
		t.Run(name, func(t *testing.T) {
			n.override(t, "Environment="+setting)
			n.MustRun(t, "systemctl", "stop", agentUnit)
			n.refused(t, agentUnit, 2)
			variable, _, _ := strings.Cut(setting, "=")
			n.waitLog(t, agentUnit, regexp.MustCompile(variable))
		})
	}
	n.MustRun(t, "systemctl", "start", agentUnit)
	n.waitForwards(t, time.Now())
}

// credentials follows the unit's own advice for secrets, with a Pushgateway that asks
// for a password.
func (n bootedNode) credentials(t *testing.T) {
	n.WriteFile(t, "/etc/gateway.yml", []byte( // the password is "ferry"
		"basic_auth_users: {node: $2b$04$um68vJZv8svYEl9Mo1IYverR75rDu5X6DHHveabgwutVQ04FOUp8W}\n"), 0o644)
	n.service(t, "pushgateway-auth", "pushgateway", "--web.listen-address=127.0.0.1:9092", "--web.config.file=/etc/gateway.yml")
	n.WriteFile(t, "/etc/promferry/push.yml", []byte("basic_auth: {username: node, password_file: push.password}\n"), 0o600)
	n.WriteFile(t, "/etc/promferry/push.password", []byte("ferry\n"), 0o600)
	n.override(t, "LoadCredential=push.yml:/etc/promferry/push.yml",
		"LoadCredential=push.password:/etc/promferry/push.password",
		"Environment=PROMFERRY_PUSH_HTTP_CONFIG=/run/credentials/promferry-agent.service/push.yml",
		"Environment=PROMFERRY_PUSH_URLS=http://127.0.0.1:9092")

	n.MustRun(t, "systemctl", "restart", agentUnit)
	n.waitForwardsTo(t, "http://node:ferry@127.0.0.1:9092", time.Time{})
}

func (n bootedNode) stop(t *testing.T) {
	n.MustRun(t, "systemctl", "restart", agentUnit)
	n.waitForwards(t, time.Now())

	begin := time.Now()
	n.MustRun(t, "systemctl", "stop", agentUnit)
	if took := time.Since(begin); took > agentStopBudget {
		t.Errorf("stop took %v", took)
	}
	for property, want := range map[string]string{
		"ActiveState": "inactive", "Result": "success", "ExecMainCode": "1", "ExecMainStatus": "0",
	} {
		if got := n.Show(t, agentUnit, property); got != want {
			t.Errorf("%s = %s, want %s", property, got, want)
		}
	}
	values, err := n.group(t, boxGateway)
	if err != nil {
		t.Fatal(err)
	}
	if values["up"] != "0" {
		t.Errorf("up = %q, want 0", values["up"])
	}
	if value, ok := values["node_load1"]; ok {
		t.Errorf("node_load1 = %s is still there", value)
	}
}

// waitLog waits until a unit has logged a match since its last start.
func (n bootedNode) waitLog(t *testing.T, unit string, re *regexp.Regexp) {
	t.Helper()
	start := "_SYSTEMD_INVOCATION_ID=" + n.Show(t, unit, "InvocationID")
	n.until(t, 5*time.Second, func(context.Context) error {
		if log := n.MustRun(t, "journalctl", "--quiet", "--output=cat", start); !re.MatchString(log) {
			return fmt.Errorf("%s has not logged %q but:\n%s", unit, re, log)
		}
		return nil
	})
}

// override adds settings to the unit's [Service] until the test ends. They come into
// force when the unit is started next.
func (n bootedNode) override(t *testing.T, settings ...string) {
	t.Helper()
	name := "/etc/systemd/system/" + n.unit() + ".d/zz-override.conf"
	n.WriteFile(t, name, []byte("[Service]\n"+strings.Join(settings, "\n")+"\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")
	t.Cleanup(func() {
		if err := os.Remove(n.Path(name)); err != nil {
			t.Error(err)
		}
		n.MustRun(t, "systemctl", "daemon-reload")
	})
}

// refused starts a unit that has to end with an exit status and stay ended.
func (n bootedNode) refused(t *testing.T, unit string, status int) {
	t.Helper()
	if out, err := n.Run(t, "systemctl", "start", unit); err == nil {
		t.Errorf("%s started: %s", unit, out)
	}
	// While systemd means to restart a unit, ActiveState is "activating".
	for property, want := range map[string]string{
		"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": strconv.Itoa(status), "NRestarts": "0",
	} {
		if got := n.Show(t, unit, property); got != want {
			t.Errorf("%s of %s = %s, want %s", property, unit, got, want)
		}
	}
}

// waitRestarted waits until the unit is active as another process than pid.
func (n bootedNode) waitRestarted(t *testing.T, pid string) {
	t.Helper()
	n.until(t, 15*time.Second, func(context.Context) error {
		// Both of one moment.
		now := n.MustRun(t, "systemctl", "show", "--property=ActiveState,MainPID", n.unit())
		if !strings.Contains(now, "ActiveState=active\n") || strings.Contains(now, "MainPID="+pid+"\n") {
			return fmt.Errorf("not restarted: MainPID was %s, now %s", pid, strings.ReplaceAll(now, "\n", " "))
		}
		return nil
	})
}

// waitStatus waits until the unit's STATUS= matches.
func (n bootedNode) waitStatus(t *testing.T, re *regexp.Regexp) {
	t.Helper()
	n.until(t, 15*time.Second, func(context.Context) error {
		if text := n.Show(t, n.unit(), "StatusText"); !re.MatchString(text) {
			return fmt.Errorf("StatusText is %q, want a match for %q", text, re)
		}
		return nil
	})
}

// waitForwards waits until the node's metrics, pushed after since, are in the
// Pushgateway.
func (n bootedNode) waitForwards(t *testing.T, since time.Time) {
	t.Helper()
	n.waitForwardsTo(t, boxGateway, since)
}

func (n bootedNode) waitForwardsTo(t *testing.T, gateway string, since time.Time) {
	t.Helper()
	n.until(t, 15*time.Second, func(context.Context) error {
		values, err := n.group(t, gateway)
		if err != nil {
			return err
		}
		pushed, err := strconv.ParseFloat(values["push_time_seconds"], 64)
		if err != nil {
			return err
		}
		_, load := values["node_load1"]
		if ago := since.Sub(time.UnixMicro(int64(pushed * 1e6))); ago > 0 || values["up"] != "1" || !load {
			return fmt.Errorf("the group: up %q, node_load1 %v, pushed %v too early", values["up"], load, max(ago, 0))
		}
		return nil
	})
}

// group returns the single values of the group that the agent pushes to by default.
func (n bootedNode) group(t *testing.T, gateway string) (map[string]string, error) {
	t.Helper()
	resp, err := n.get(t, gateway+"/api/v1/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Data []map[string]json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("status %d: %w", resp.StatusCode, err)
	}
	for _, group := range answer.Data {
		if string(group["labels"]) != `{"instance":"box","job":"node"}` {
			continue
		}
		values := make(map[string]string)
		for name, raw := range group {
			var family struct{ Metrics []struct{ Value any } }
			// "labels" and "last_push_successful" are no families.
			if json.Unmarshal(raw, &family) == nil && len(family.Metrics) == 1 {
				values[name] = fmt.Sprint(family.Metrics[0].Value)
			}
		}
		return values, nil
	}
	return nil, fmt.Errorf("no group for the node among %d", len(answer.Data))
}

func (n bootedNode) get(t *testing.T, url string) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return n.Client().Do(req)
}

func (bootedNode) until(t *testing.T, timeout time.Duration, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	if err := real.Until(ctx, check); err != nil {
		t.Fatal(err)
	}
}

// procStatus reads /proc/PID/status.
func procStatus(t *testing.T, proc string) map[string]string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	fields := make(map[string]string)
	for line := range strings.Lines(string(content)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	return fields
}
