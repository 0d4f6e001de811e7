//go:build e2e

package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/promferry/promferry/e2e/natlab"
)

// TestPullRevoked: with an auth file, who has a token is scraped, scrapes and lists, and nobody else;
// a client whose token is taken away is down within seconds, and up when it is given back.
func TestPullRevoked(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil { // As an operator's tools do it.
			t.Fatal(err)
		}
		return path
	}
	digest := func(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }
	rules := func(names string) string {
		return fmt.Sprintf(`
clients: [{identity: web, names: [%q], token_sha256: [%q]}]
scrapers: [{identity: prometheus, username: prometheus, token_sha256: [%q]}]
listers: [{identity: sd, token_sha256: [%q]}]
`, names, digest("canary-node"), digest("canary-scrape"), digest("canary-list"))
	}
	auth := write("auth.yml", rules("web-*"))
	write("node.token", "canary-node")
	list := write("list.token", "canary-list")
	httpConfig := write("http.yml", "authorization: {credentials_file: node.token}\n")

	serveIn(t, lab.Worker, appAddr, &counting{})
	proxy := startProxy(t, lab, "--auth.file="+auth)
	client := startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"}, "--proxy.http-config="+httpConfig)
	prometheus := startPrometheusIn(t, lab.Hub, prometheusAddr, `
- job_name: promferry
  proxy_url: http://prometheus:canary-scrape@`+proxyAddr+`
  http_sd_configs:
  - url: http://`+proxyAddr+`/sd
    refresh_interval: 1s
    authorization: {type: Bearer, credentials_file: `+list+`}
`)
	waitQuery(t, prometheus, `up{job="app"}`, exactly(1))
	scrape(t, lab, "http://web-1:8000/metrics", patience).check(t, http.StatusProxyAuthRequired, "unauthorized")

	write("auth.yml", rules("other-*"))
	waitQuery(t, prometheus, `up{job="app"}`, exactly(0))
	waitFault(t, prometheus, "app", http.StatusServiceUnavailable)
	client.waitSum(t, above(0), "promferry_client_connect_failures_total", "reason", "unauthorized")
	if text := proxy.Stderr(); !strings.Contains(text, "revoked") {
		t.Error("the proxy's log does not tell of it")
	}
	// It stays listed: it is down, not gone.
	samples, err := prometheus.Query(t.Context(), `up{job="app"}`)
	if err != nil || len(samples) != 1 {
		t.Errorf("%v: %v", samples, err)
	}

	write("auth.yml", rules("web-*"))
	waitQuery(t, prometheus, `up{job="app"}`, exactly(1))
	wait(t, "no token in any log", func(context.Context) error {
		for what, d := range map[string]*daemon{"proxy": proxy, "agent": client} {
			if strings.Contains(d.Stderr(), "canary") {
				return fmt.Errorf("the %s's log has one", what)
			}
		}
		return nil
	})
}
