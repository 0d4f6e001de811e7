//go:build e2e

package e2e

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

const proxyUnit = "promferry-proxy.service"

// TestProxyUnderSystemd has the proxy and an agent as units in one booted systemd.
func TestProxyUnderSystemd(t *testing.T) {
	n := bootNode(t).install(t, "proxy")
	n.unitVerifies(t)
	n.unitIsHardened(t)
	n.exampleSettingsExist(t)

	n.MustRun(t, "systemctl", "enable", "--now", proxyUnit)
	n.WriteFile(t, "/etc/default/promferry-agent", []byte("PROMFERRY_PROXY_URLS=http://127.0.0.1:8080\nPROMFERRY_FQDN=web-1\nPROMFERRY_INSTANCE=web-1\n"), 0o644)
	n.MustRun(t, "systemctl", "enable", "--now", agentUnit)
	has := func(what, want string, command ...string) {
		t.Helper()
		wait(t, what, func(context.Context) error {
			if out, err := n.Run(t, command...); err != nil || !strings.Contains(out, want) {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
	}
	hub := "http://127.0.0.1:8080"
	through := n.Client().Transport.(*http.Transport).Clone()
	through.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(hub) }
	fetch := func(transport http.RoundTripper, address string) (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
		if err != nil {
			return "", err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	answers := func(what, want string, transport http.RoundTripper, address string) {
		t.Helper()
		wait(t, what, func(context.Context) error {
			if out, err := fetch(transport, address); err != nil || !strings.Contains(out, want) {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
	}
	direct := n.Client().Transport
	// With a proxy and no target named, node_exporter is what it may scrape.
	answers("service discovery", `[{"targets":["web-1:9100"],"labels":{"__metrics_path__":"/metrics","instance":"web-1","job":"node"}}]`, direct, hub+"/sd")
	answers("the scrape", "node_exporter_build_info", through, "http://web-1:9100/metrics")
	has("the proxy's status", `Status: "1 clients connected, 0 away"`, "systemctl", "status", "--no-pager", proxyUnit)
	has("the agent's status", "Connected to 1 of 1 proxies", "systemctl", "status", "--no-pager", agentUnit)

	n.MustRun(t, "systemctl", "reload", proxyUnit)
	answers("the reload", `promferry_proxy_reloads_total{outcome="success"} 1`, direct, hub+"/metrics")
	// A restart forgets nothing, and costs no client.
	n.MustRun(t, "systemctl", "restart", proxyUnit)
	answers("service discovery after a restart", "web-1:9100", direct, hub+"/sd")
	answers("the scrape after a restart", "node_exporter_build_info", through, "http://web-1:9100/metrics")

	// An agent that stops is away at once, and stays listed.
	n.MustRun(t, "systemctl", "stop", agentUnit)
	out, err := fetch(through, "http://web-1:9100/metrics")
	if err != nil || !strings.Contains(out, "not connected") {
		t.Errorf("after the agent's stop: %v: %s", err, out)
	}
	answers("service discovery after the agent's stop", "web-1:9100", direct, hub+"/sd")
	n.MustRun(t, "systemctl", "stop", proxyUnit)
	if out := n.MustRun(t, "systemctl", "show", "--property=Result", proxyUnit); strings.TrimSpace(out) != "Result=success" {
		t.Errorf("after the stop: %s", out)
	}
}
