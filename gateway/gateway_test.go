package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
)

// newTest returns a gateway with limits that no test meets by chance, unless change says so.
func newTest(t testing.TB, change func(*Config)) *Gateway {
	t.Helper()
	registry := prometheus.NewRegistry()
	config := Config{
		StoreConfig:  StoreConfig{ForgetAfter: 24 * time.Hour, MaxGroups: 100, MaxSeries: 1000, MaxGroupBytes: 1 << 24, MaxBytes: 1 << 28},
		MaxBodyBytes: 1 << 20, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&config)
	}
	g, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		checkMemory(t, g)
	})
	return g
}

// checkMemory shows that the memory of all groups is counted.
func checkMemory(t testing.TB, g *Gateway) {
	t.Helper()
	memory := 0
	for _, group := range g.store.groups {
		memory += group.now.Load().content.memory()
	}
	if got := g.store.memory.Load(); got != int64(memory) {
		t.Errorf("%d bytes of memory are counted, the groups take %d", got, memory)
	}
}

// ask sends a request, with headers in pairs.
func ask(g *Gateway, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://hub:9091"+path, strings.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	g.ServeHTTP(w, r)
	return w
}

// want checks the status of an answer and parts of its text, and that it has none of those
// that begin with !.
func want(t *testing.T, w *httptest.ResponseRecorder, status int, parts ...string) {
	t.Helper()
	text := w.Body.String()
	if w.Code != status {
		t.Errorf("status %d, want %d: %s", w.Code, status, text)
	}
	for _, part := range parts {
		if not, ok := strings.CutPrefix(part, "!"); ok {
			if strings.Contains(text, not) {
				t.Errorf("there is %q in\n%s", not, text)
			}
		} else if !strings.Contains(text, part) {
			t.Errorf("there is no %q in\n%s", part, text)
		}
	}
}

func put(t *testing.T, g *Gateway, path, body string) {
	t.Helper()
	want(t, ask(g, http.MethodPut, path, body), http.StatusOK)
}

// TestRefused has a group that no push to ever succeeded.
func TestRefused(t *testing.T) {
	g := newTest(t, nil)
	want(t, ask(g, http.MethodPut, "/metrics/job/j", "a 1 1\n"), http.StatusBadRequest, `family "a"`, "timestamps", `job="j"`)
	target := ask(g, http.MethodGet, "/groups/job/j/metrics", "")
	want(t, target, http.StatusOK, "\n"+`push_time_seconds{instance="",job="j"} 0`+"\n", "# No push to the group ever succeeded", "!timestamps")
	families := readPage(t, target)
	if failed := families["push_failure_time_seconds"].GetMetric(); len(families) != 2 || len(failed) != 1 || failed[0].GetGauge().GetValue() <= 0 {
		t.Errorf("not two families, of which push_failure_time_seconds says when:\n%s", target.Body)
	}
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `push_time_seconds{instance="",job="j"} 0`, `promferry_gateway_pushes_total{result="inconsistent"} 1`,
		`promferry_gateway_groups{state="refused"} 1`)
	want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK, `"last_push_successful":false`)
	put(t, g, "/metrics/job/j", "a 1\n")
	want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK, `"last_push_successful":true`)
}

func gzipText(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, text)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func gauge(name string, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: new(1.0)}}
	for i := 0; i < len(labels); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
	}
	return &dto.MetricFamily{Name: &name, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{m}}
}

func delimited(t testing.TB, families ...*dto.MetricFamily) string {
	t.Helper()
	var b bytes.Buffer
	for _, f := range families {
		if _, err := protodelim.MarshalTo(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// TestClash has groups that cannot stand together on one page: the older one does, and each
// is whole as a target.
func TestClash(t *testing.T) {
	for _, test := range []struct{ first, second, name string }{
		{"# TYPE a gauge\na 1\n", "# TYPE a counter\na 2\nb 1\n", "a"},
		{"# TYPE s summary\ns_sum 1\ns_count 1\n", "# TYPE s_count gauge\ns_count 2\nb 1\n", "s_count"},
		{"# TYPE s_sum gauge\ns_sum 1\n", "# TYPE s summary\ns_sum 2\ns_count 2\nb 1\n", "s"},
		{"# TYPE s_bucket gauge\ns_bucket 1\n", "# TYPE s histogram\ns_bucket{le=\"+Inf\"} 2\ns_sum 2\ns_count 2\nb 1\n", "s"},
	} {
		g := newTest(t, nil)
		put(t, g, "/metrics/job/z", test.first)
		put(t, g, "/metrics/job/b", test.second)
		for range 2 {
			page := ask(g, http.MethodGet, "/metrics", "")
			want(t, page, http.StatusOK, `b{instance="",job="b"} 1`, fmt.Sprintf(`# Left out: the family %q of {instance="",job="b"}`, test.name))
			families := readPage(t, page)
			for _, m := range families[test.name].GetMetric() {
				if labelOf(m, "job") == "b" {
					t.Errorf("%s of the second group is there:\n%s", test.name, page.Body)
				}
			}
			want(t, ask(g, http.MethodGet, "/groups/job/b/metrics", ""), http.StatusOK, test.name)
		}
		if got := testutil.ToFloat64(g.metrics.leftOut); got != 1 {
			t.Errorf("%v families are left out, want 1", got)
		}
		// With the older one gone, it stands there.
		want(t, ask(g, http.MethodDelete, "/metrics/job/z", ""), http.StatusAccepted)
		want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "!# Left out", test.name)
	}
}

func labelOf(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// readPage reads a page as strictly as Prometheus does.
func readPage(t testing.TB, w *httptest.ResponseRecorder) map[string]*dto.MetricFamily {
	t.Helper()
	var body io.Reader = w.Body
	text := w.Body.Bytes()
	if w.Header().Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(body)
		if err == nil {
			text, err = io.ReadAll(z)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil || !bytes.Equal(text, bytes.ToValidUTF8(text, []byte("!"))) {
		t.Fatalf("%v in\n%q", err, text)
	}
	return families
}

// TestDiscovery shows that the targets' paths lead to the groups, whatever their labels are.
func TestDiscovery(t *testing.T) {
	g := newTest(t, nil)
	for _, path := range []string{"/job/a/instance/web-1", "/job@base64/L3Zhci90bXA/x@base64/YSBi", "/job/b/l/%C3%BC%2F..%22", "/job/c/l/..", "/job/d/l@base64/="} {
		put(t, g, "/metrics"+path, "a 1\n")
	}
	var entries []targetGroup
	if err := json.Unmarshal(ask(g, http.MethodGet, "/sd", "").Body.Bytes(), &entries); err != nil || len(entries) != 5 {
		t.Fatal(entries, err)
	}
	for _, entry := range entries {
		path := entry.Labels[model.MetricsPathLabel]
		delete(entry.Labels, model.MetricsPathLabel)
		families := readPage(t, ask(g, http.MethodGet, path, ""))
		for name, value := range entry.Labels {
			if got := labelOf(families["a"].GetMetric()[0], name); got != value {
				t.Errorf("%s: label %s is %q, want %q", path, name, got, value)
			}
		}
		if len(entry.Targets) != 1 || entry.Targets[0] != "hub:9091" {
			t.Errorf("targets %q", entry.Targets)
		}
	}
	nowhere := httptest.NewRequest(http.MethodGet, "/sd", nil)
	nowhere.Host = ""
	w := httptest.NewRecorder()
	g.ServeHTTP(w, nowhere)
	want(t, w, http.StatusBadRequest, "no Host")
	if last := entries[3].Labels; last["job"] != "d" || len(last) != 1 {
		t.Errorf("labels %v, want only job d", last)
	}
}

// TestAdminAPI shows that nothing is wiped that was not allowed to be.
func TestAdminAPI(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		g := newTest(t, func(c *Config) { c.AdminAPI = allowed })
		put(t, g, "/metrics/job/j", "a 1\n")
		status, left := http.StatusNotFound, http.StatusOK
		if allowed {
			status, left = http.StatusAccepted, http.StatusNotFound
		}
		want(t, ask(g, http.MethodPut, "/api/v1/admin/wipe", ""), status)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), left)
	}
}

// TestConcurrent has everything happen at once; each page and each group is whole.
func TestConcurrent(t *testing.T) {
	g := newTest(t, nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			group := fmt.Sprintf("/job/j/instance/%d", i%4)
			for n := range 50 {
				value := i*1000 + n
				put(t, g, "/metrics"+group, fmt.Sprintf("a %d\nb %d\npromferry_expires_after_seconds 1e9\n", value, value))
				want(t, ask(g, http.MethodPost, "/metrics"+group, fmt.Sprintf("c %d\n", value)), http.StatusOK)
				if n%10 == i {
					want(t, ask(g, http.MethodDelete, "/metrics"+group, ""), http.StatusAccepted)
				}
			}
		})
		wg.Go(func() {
			for range 20 {
				families := readPage(t, ask(g, http.MethodGet, "/metrics", "", "Accept-Encoding", "gzip"))
				values := make(map[string]float64)
				for _, m := range families["a"].GetMetric() {
					values[labelOf(m, "instance")] = m.GetUntyped().GetValue()
				}
				for _, m := range families["b"].GetMetric() {
					if got := values[labelOf(m, "instance")]; got != m.GetUntyped().GetValue() {
						t.Errorf("a is %v, and b %v", got, m.GetUntyped().GetValue())
					}
				}
				if w := ask(g, http.MethodGet, fmt.Sprintf("/groups/job/j/instance/%d/metrics", i%4), "", "Accept-Encoding", "gzip"); w.Code == http.StatusOK {
					readPage(t, w)
				}
				g.store.sweep()
				_ = g.Summary()
				want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK)
			}
		})
	}
	wg.Wait()
}

// TestMetrics checks the names of the gateway's own metrics, and that all results are there
// from the start.
func TestMetrics(t *testing.T) {
	g := newTest(t, nil)
	problems, err := testutil.GatherAndLint(g.config.Gatherer)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	page := ask(g, http.MethodGet, "/metrics", "")
	for _, result := range results {
		want(t, page, http.StatusOK, fmt.Sprintf("promferry_gateway_pushes_total{result=%q} 0\n", result))
	}
}
