//go:build e2e

package e2e

import (
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestGatewayUnderSystemd has the gateway as a unit in the Pushgateway's place, and an agent that
// puts to it each second, in one booted systemd. Its parts follow each other, as those of
// TestAgentUnderSystemd do.
func TestGatewayUnderSystemd(t *testing.T) {
	n := bootNode(t)
	g := bootedGateway{n.install(t, "gateway")}
	n.MustRun(t, "systemctl", "stop", "pushgateway")

	t.Run("unit verifies", g.unitVerifies)
	t.Run("unit is hardened", g.unitIsHardened)
	t.Run("example settings exist", g.exampleSettingsExist)

	n.WriteFile(t, "/etc/default/promferry-agent", []byte("PROMFERRY_PUSH_INTERVAL=1s\n"), 0o644)
	n.WriteFile(t, "/etc/systemd/system/"+g.unit()+".d/test.conf", []byte("[Service]\nRestartSec=100ms\n"), 0o644)
	n.MustRun(t, "systemctl", "daemon-reload")

	t.Run("active when ready", g.activeWhenReady)
	t.Run("push", g.push)
	n.MustRun(t, "systemctl", "enable", "--now", n.unit())
	t.Run("agent puts to it", n.forwards)
	t.Run("status", g.status)
	t.Run("sandbox in force", g.sandboxInForce)
	t.Run("reload", g.reload)
	t.Run("crash", g.crash)
	t.Run("watchdog", g.watchdog)
	t.Run("wrong setting", g.wrongSetting)
	t.Run("credentials", g.credentials)
	t.Run("stop", g.stop)
}

// gatewayStopBudget is what the gateway promises to end within.
const gatewayStopBudget = 20 * time.Second

// A bootedGateway is a booted node that is about its gateway.
type bootedGateway struct{ bootedNode }

// push pushes as a script does.
func (g bootedGateway) push(t *testing.T) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, g.url()+"/metrics/job/backup", strings.NewReader("backup_size_bytes 42\n"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := g.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status %d", resp.StatusCode)
	}
}

// status finds the group of the push and that of the agent.
func (g bootedGateway) status(t *testing.T) {
	g.waitStatus(t, regexp.MustCompile(`^2 groups, 0 silent$`))
}

func (g bootedGateway) reload(t *testing.T) {
	g.bootedNode.reload(t)
	if n, err := sum(g.page(t), "promferry_gateway_reloads_total", "outcome", "success"); err != nil || n != 1 {
		t.Errorf("%v reloads, %v", n, err)
	}
}

// crash loses nothing that was answered.
func (g bootedGateway) crash(t *testing.T) {
	g.bootedNode.crash(t)
	if size, err := sum(g.page(t), "backup_size_bytes", "job", "backup"); err != nil || size != 42 {
		t.Errorf("what was pushed before is %v, %v", size, err)
	}
}

// page returns the page with all groups.
func (g bootedGateway) page(t *testing.T) []byte {
	t.Helper()
	resp, err := g.get(t, g.url()+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (g bootedGateway) wrongSetting(t *testing.T) {
	g.override(t, "Environment=PROMFERRY_LIMIT_GROUPS=many")
	g.MustRun(t, "systemctl", "stop", g.unit())
	g.refused(t, g.unit(), 2)
	g.waitLog(t, g.unit(), regexp.MustCompile("PROMFERRY_LIMIT_GROUPS"))
	g.MustRun(t, "systemctl", "reset-failed", g.unit())
}

// credentials follows the unit's own advice for secrets, with a password.
func (g bootedGateway) credentials(t *testing.T) {
	g.WriteFile(t, "/etc/promferry/web.yml", []byte( // the password is "ferry"
		"basic_auth_users: {node: $2b$04$um68vJZv8svYEl9Mo1IYverR75rDu5X6DHHveabgwutVQ04FOUp8W}\n"), 0o600)
	g.override(t, "LoadCredential=web.yml:/etc/promferry/web.yml",
		"Environment=PROMFERRY_WEB_CONFIG_FILE=/run/credentials/"+g.unit()+"/web.yml")
	g.MustRun(t, "systemctl", "restart", g.unit())
	for url, want := range map[string]int{g.url(): http.StatusUnauthorized, "http://node:ferry@127.0.0.1:9091": http.StatusOK} {
		resp, err := g.get(t, url+"/metrics")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", url, resp.StatusCode, want)
		}
	}
}

// stop ends it with the agent at work.
func (g bootedGateway) stop(t *testing.T) {
	g.MustRun(t, "systemctl", "restart", g.unit())
	g.waitForwards(t, time.Now())
	begin := time.Now()
	g.MustRun(t, "systemctl", "stop", g.unit())
	if took := time.Since(begin); took > gatewayStopBudget {
		t.Errorf("stop took %v", took)
	}
	for property, want := range map[string]string{
		"ActiveState": "inactive", "Result": "success", "ExecMainCode": "1", "ExecMainStatus": "0",
	} {
		if got := g.Show(t, g.unit(), property); got != want {
			t.Errorf("%s = %s, want %s", property, got, want)
		}
	}
	if resp, err := g.get(t, g.url()+"/-/healthy"); err == nil {
		resp.Body.Close()
		t.Error("it still answers")
	}
}
