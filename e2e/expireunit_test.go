//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

const expireUnit = "promferry-expire.service"

// TestExpireUnderSystemd has `promferry expire` as a unit next to a Pushgateway, in a booted systemd.
func TestExpireUnderSystemd(t *testing.T) {
	n := bootNode(t).install(t, "expire")
	n.unitVerifies(t)
	n.unitIsHardened(t)
	n.exampleSettingsExist(t)

	n.WriteFile(t, "/etc/default/promferry-expire", []byte("PROMFERRY_SWEEP_INTERVAL=1s\n"), 0o644)
	n.MustRun(t, "systemctl", "enable", "--now", expireUnit)
	if got := n.Show(t, expireUnit, "ActiveState"); got != "active" {
		t.Errorf("ActiveState = %s, want active", got)
	}
	if got := n.Show(t, expireUnit, "WatchdogUSec"); got != "1min" {
		t.Errorf("WatchdogUSec = %s, want 1min", got)
	}
	const own = "http://" + expireAddr
	fetch := func(ctx context.Context, method, url, body string) (string, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
		if err != nil {
			return "", err
		}
		resp, err := n.Client().Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: status %d", url, resp.StatusCode)
		}
		return string(b), err
	}
	answers := func(what, url string, want string) {
		t.Helper()
		wait(t, what, func(ctx context.Context) error {
			out, err := fetch(ctx, http.MethodGet, url, "")
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("no %q in %s", want, out)
			}
			return err
		})
	}
	putDown := func(instance string) {
		t.Helper()
		wait(t, "a put", func(ctx context.Context) error {
			_, err := fetch(ctx, http.MethodPut, boxGateway+"/metrics/job/node/instance/"+instance, nodeGroup("1"))
			return err
		})
		answers(instance+" down", boxGateway+"/metrics", `up{instance="`+instance+`",job="node"} 0`)
	}
	putDown("web-1")
	status := func(want string) {
		t.Helper()
		wait(t, "the unit's status", func(context.Context) error {
			if out, err := n.Run(t, "systemctl", "status", "--no-pager", expireUnit); err != nil || !strings.Contains(out, want) {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
	}
	status(`Status: "Sweeping ` + boxGateway)

	pid := n.Show(t, expireUnit, "MainPID")
	n.MustRun(t, "systemctl", "reload", expireUnit)
	answers("the reload", own+"/metrics", `promferry_expiry_reloads_total{outcome="success"} 1`)

	// A Pushgateway that is away is no reason to end.
	n.MustRun(t, "systemctl", "stop", "pushgateway")
	wait(t, "a sweep that fails", func(ctx context.Context) error {
		out, err := fetch(ctx, http.MethodGet, own+"/metrics", "")
		if err != nil {
			return err
		}
		failed, err := sum([]byte(out), "promferry_expiry_sweeps_total", "result", "failure")
		if err == nil && failed == 0 {
			err = errors.New("none has failed")
		}
		return err
	})
	n.MustRun(t, "systemctl", "start", "pushgateway")
	putDown("web-2")
	if got := n.Show(t, expireUnit, "MainPID"); got != pid || got == "0" {
		t.Errorf("MainPID = %s, was %s", got, pid)
	}

	n.MustRun(t, "systemctl", "stop", expireUnit)
	if got := n.Show(t, expireUnit, "Result"); got != "success" {
		t.Errorf("Result = %s after the stop, want success", got)
	}
}
