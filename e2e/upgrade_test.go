//go:build e2e

package e2e

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/promferry/promferry/e2e/real"
)

// TestMetricsKept checks that each daemon still has the metrics of the previous version, with
// the same types: testdata/previous-metrics.txt holds what that version exposed when it was
// started as here.
func TestMetricsKept(t *testing.T) {
	t.Parallel()
	previous, err := os.ReadFile("testdata/previous-metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	for role, flags := range map[string][]string{
		"agent": {
			"--push.url=http://127.0.0.1:1", "--push.target=node=http://127.0.0.1:1/metrics", "--proxy-url=http://127.0.0.1:1",
			"--pull.target=batch=http://127.0.0.1:1/batch", "--fqdn=web-1", "--state.dir=" + t.TempDir(),
		},
		"proxy":   {"--state.dir=" + t.TempDir()},
		"gateway": {"--state.dir=" + t.TempDir()},
		"expire":  {"--push.url=http://127.0.0.1:1"},
	} {
		t.Run(role, func(t *testing.T) {
			s, err := real.Serve(t.Context(), "", real.Command{Path: promferry(t), Args: append([]string{role}, flags...)})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Kill() })
			page, err := s.Get(t.Context(), "/metrics")
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(string(page), "\n")
			checked := 0
			for line := range strings.Lines(string(previous)) {
				metric, ours := strings.CutPrefix(strings.TrimSpace(line), role+" ")
				if !ours {
					continue
				}
				checked++
				if !slices.Contains(lines, "# TYPE "+metric) {
					t.Errorf("metric %s is no longer there: keep it for one release beside its new name", metric)
				}
			}
			if checked == 0 {
				t.Error("no metric of this role is listed")
			}
		})
	}
}
