//go:build e2e

package real

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestServers puts one metric into a real Pushgateway and reads it back through both
// of the APIs that the other tests rely on.
func TestServers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	exporter, err := NodeExporter(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(exporter.Kill)
	gateway, err := Pushgateway(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(gateway.Kill)
	prometheus, err := Prometheus(ctx, t.TempDir(), fmt.Sprintf(`
- job_name: pushgateway
  honor_labels: true
  static_configs: [{targets: [%q]}]
`, gateway.Addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(prometheus.Kill)

	if body, err := exporter.Get(ctx, "/metrics"); err != nil || !strings.Contains(string(body), "\nnode_load1 ") {
		t.Errorf("node_exporter: %v\n%.500s", err, body)
	}

	req, _ := http.NewRequestWithContext(ctx, http.MethodPut, gateway.URL+"/metrics/job/j/instance/i", strings.NewReader("a 7\n"))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	groups, err := gateway.Groups(ctx)
	if err != nil || len(groups) != 1 {
		t.Fatal(groups, err)
	}
	g := groups[0]
	if g.Labels["instance"] != "i" || !g.LastPushSuccessful || g.Families["a"].Type != "UNTYPED" || g.Families["a"].Metrics[0].Value != "7" {
		t.Errorf("group %+v", g)
	}

	err = Until(ctx, func(ctx context.Context) error {
		samples, err := prometheus.Query(ctx, `a{job="j",instance="i"}`)
		if err == nil && (len(samples) != 1 || samples[0].Value != 7) {
			err = fmt.Errorf("samples %v", samples)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	addr := gateway.Addr
	if err := errors.Join(gateway.Stop(), gateway.Restart(ctx)); err != nil {
		t.Fatal(err)
	}
	if groups, err := gateway.Groups(ctx); gateway.Addr != addr || len(groups) != 0 || err != nil {
		t.Errorf("after a restart: %s, was %s; groups %v, %v", gateway.Addr, addr, groups, err)
	}
	if err := errors.Join(exporter.Stop(), gateway.Stop(), prometheus.Stop()); err != nil {
		t.Error(err)
	}
}
