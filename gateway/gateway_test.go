package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/promferry/promferry/exposition"
)

// newTest returns a gateway with limits that no test meets by chance, unless change says so.
func newTest(change func(*Config)) *Gateway {
	registry := prometheus.NewRegistry()
	config := Config{
		StoreConfig:  StoreConfig{ForgetAfter: 24 * time.Hour, MaxGroups: 100, MaxSeries: 1000},
		MaxBodyBytes: 1 << 20, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&config)
	}
	return New(config)
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

// TestExpiry follows a node that stops to push: one second too early, and at the time.
func TestExpiry(t *testing.T) {
	for _, test := range []struct {
		name, body    string
		expireDefault time.Duration
	}{
		{"said by the group", "up 1\na 1\npromferry_expires_after_seconds 30\n", 0},
		{"said by the group, before the default", "up 1\na 1\npromferry_expires_after_seconds 30\n", time.Hour},
		{"by default", "up 1\na 1\n", 30 * time.Second},
		{"by default, for what it says is no time", "up 1\na 1\npromferry_expires_after_seconds NaN\n", 30 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newTest(func(c *Config) { c.ExpireDefault = test.expireDefault })
				const group = "/job/node/instance/web-1"
				put(t, g, "/metrics"+group, test.body)
				want(t, ask(g, http.MethodPut, "/metrics/job/batch", "b 1\npromferry_expires_after_seconds 1e300\n"), http.StatusOK)
				pushed := time.Now()
				<-time.After(30*time.Second - 1)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusOK, `a{instance="web-1",job="node"} 1`, "!up{")
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="web-1",job="node"} 1`, `up{instance="web-1",job="node"} 1`)
				<-time.After(1)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusServiceUnavailable,
					"silent since "+time.Now().UTC().Format(time.RFC3339), "the last push, at "+pushed.UTC().Format(time.RFC3339))
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `up{instance="web-1",job="node"} 0`, "!\na{", "!\npromferry_expires_after_seconds{instance=\"web-1",
					fmt.Sprintf(`push_time_seconds{instance="web-1",job="node"} %v`, float64(pushed.Unix())), `b{instance="",job="batch"} 1`,
					`promferry_gateway_groups{state="silent"} 1`)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"instance":"web-1"`)
				<-time.After(24*time.Hour - 1)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"instance":"web-1"`)
				<-time.After(1)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"instance":"web-1"`, `"job":"batch"`)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusNotFound, `{job="node",instance="web-1"}`)
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "!web-1")
				// What it adds then does not come to what it had before.
				want(t, ask(g, http.MethodPost, "/metrics"+group, "c 1\n"), http.StatusOK)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusOK, "c{", "!a{")
			})
		})
	}
}

// TestBack has a node that comes back while it is silent.
func TestBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(nil)
		const body = "a 1\npromferry_expires_after_seconds 30\n"
		put(t, g, "/metrics/job/j", body)
		<-time.After(time.Hour)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable)
		put(t, g, "/metrics/job/j", body)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
		// A push that is refused is no sign of life.
		<-time.After(29 * time.Second)
		want(t, ask(g, http.MethodPut, "/metrics/job/j", "a 1 1\n"), http.StatusBadRequest)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
		<-time.After(time.Second)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable)
	})
}

// TestSweep shows that what is gone takes no memory, and that Run leaves nothing behind.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(func(c *Config) { c.MaxGroups = 3 })
		put(t, g, "/metrics/job/a", "promferry_expires_after_seconds 30\n")
		put(t, g, "/metrics/job/b", "a 1\n")
		want(t, ask(g, http.MethodPut, "/metrics/job/c", "a 1 1\n"), http.StatusBadRequest)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		want(t, ask(g, http.MethodPut, "/metrics/job/d", "a 1\n"), http.StatusTooManyRequests, "--limit.groups")
		<-time.After(24*time.Hour + 30*time.Second + sweepEvery)
		synctest.Wait()
		g.store.mu.RLock()
		got := len(g.store.groups)
		g.store.mu.RUnlock()
		if got != 1 {
			t.Errorf("%d groups, want 1", got)
		}
		want(t, ask(g, http.MethodPut, "/metrics/job/d", "a 1\n"), http.StatusOK)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestDown has a node whose exporter is down for some pushes.
func TestDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(nil)
		const target = "/groups/job/j/metrics"
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 1\na 1\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusOK)
		<-time.After(time.Minute)
		since := time.Now().UTC().Format(time.RFC3339)
		for range 3 {
			put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 0\n")
			want(t, ask(g, http.MethodGet, target, ""), http.StatusServiceUnavailable, "down since "+since, "says up 0")
			want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `up{instance="",job="j"} 0`)
			<-time.After(time.Minute)
		}
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 1\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusOK, "!up{")
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 0\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusServiceUnavailable, "down since "+time.Now().UTC().Format(time.RFC3339))
	})
}

// TestRefused has a group that no push to ever succeeded.
func TestRefused(t *testing.T) {
	g := newTest(nil)
	want(t, ask(g, http.MethodPut, "/metrics/job/j", "a 1 1\n"), http.StatusBadRequest, `family "a"`, "timestamps", `job="j"`)
	want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable, "no push", "ever succeeded")
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

// TestLimits goes beyond each limit. What was there stays, and others go on.
func TestLimits(t *testing.T) {
	g := newTest(func(c *Config) { c.MaxGroups, c.MaxSeries, c.MaxBodyBytes = 2, 3, 1000 })
	const group = "/metrics/job/j"
	put(t, g, group, "a 1\n")
	random := make([]byte, 2000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	noise := gzipText(t, string(random))
	for _, test := range []struct {
		name   string
		answer *httptest.ResponseRecorder
		status int
		part   string
	}{
		{"body", ask(g, http.MethodPut, group, "# "+strings.Repeat("x", 1000)+"\n"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"body unpacked", ask(g, http.MethodPut, group, gzipText(t, "# "+strings.Repeat("x", 1000)+"\n"), "Content-Encoding", "gzip"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"body packed", ask(g, http.MethodPut, group, noise, "Content-Encoding", "gzip"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"series", ask(g, http.MethodPut, group, "a 1\nb 1\nc 1\nd 1\n"), http.StatusUnprocessableEntity, "--limit.group-series"},
		{"series of a protobuf", ask(g, http.MethodPut, group, delimited(t, gauge("a"), gauge("b"), gauge("c"), gauge("d")), "Content-Type", string(expfmt.FmtProtoDelim)), http.StatusUnprocessableEntity, "--limit.group-series"},
		{"series, some of them there", ask(g, http.MethodPost, group, "b 1\nc 1\nd 1\n"), http.StatusUnprocessableEntity, "--limit.group-series"},
	} {
		want(t, test.answer, test.status, test.part)
		if t.Failed() {
			t.Fatal(test.name)
		}
	}
	put(t, g, "/metrics/job/k", "a 1\nb 1\nc 1\n")
	want(t, ask(g, http.MethodPut, "/metrics/job/l", "a 1\n"), http.StatusTooManyRequests, "--limit.groups")
	want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK, `a{instance="",job="j"} 1`, "!b{")
	want(t, ask(g, http.MethodDelete, "/metrics/job/k", ""), http.StatusAccepted)
	put(t, g, "/metrics/job/l", "a 1\n")
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
		g := newTest(nil)
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

// TestFormats asks for a group in each way that a Prometheus may.
func TestFormats(t *testing.T) {
	g := newTest(nil)
	native := &dto.MetricFamily{Name: new("h"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: &dto.Histogram{
		SampleCount: new(uint64(3)), SampleSum: new(4.5), Schema: new(int32(3)), ZeroThreshold: new(0.001), ZeroCount: new(uint64(0)),
		PositiveSpan: []*dto.BucketSpan{{Offset: new(int32(0)), Length: new(uint32(1))}}, PositiveDelta: []int64{3},
	}}}}
	body := delimited(t, native, gauge("up"), gauge("scrape_duration_seconds"), gauge("scrape_interval_of_mine"), gauge("foo.bar", "l.m", "1"))
	want(t, ask(g, http.MethodPut, "/metrics/job/j", body, "Content-Type", string(expfmt.FmtProtoDelim)), http.StatusOK)
	const target = "/groups/job/j/metrics"
	want(t, ask(g, http.MethodGet, target, ""), http.StatusOK, "\nfoo_bar{instance=\"\",job=\"j\",l_m=\"1\"} 1\n", "h_count{", "!\nup{", "!scrape_duration", "scrape_interval_of_mine", "push_time_seconds{")
	const quoting = "text/plain;version=0.0.4;escaping=allow-utf-8"
	want(t, ask(g, http.MethodGet, target, "", "Accept", quoting), http.StatusOK, "{\"foo.bar\",instance=\"\",job=\"j\",\"l.m\"=\"1\"} 1\n", "!foo_bar")
	want(t, ask(g, http.MethodGet, "/metrics", "", "Accept", quoting), http.StatusOK, "{\"foo.bar\",", "\nup{", "scrape_duration_seconds{")
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\nfoo_bar{")
	for _, path := range []string{target, "/metrics"} {
		for range 2 { // The second time it is ready.
			w := ask(g, http.MethodGet, path, "", "Accept-Encoding", "gzip", "Accept", quoting)
			if families := readPage(t, w); w.Header().Get("Content-Encoding") != "gzip" || families["foo.bar"] == nil || families[pushTimeName] == nil {
				t.Errorf("%s: %v", path, families)
			}
		}
		if w := ask(g, http.MethodGet, path, "", "Accept-Encoding", "gzip;q=0"); w.Header().Get("Content-Encoding") != "" {
			t.Errorf("%s: it is gzipped", path)
		}
	}
	w := ask(g, http.MethodGet, target, "", "Accept", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited")
	families, _, err := exposition.Read(t.Context(), w.Body.Bytes(), w.Header().Get("Content-Type"))
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]*dto.MetricFamily)
	for _, f := range families {
		names[f.GetName()] = f
	}
	if len(names["h"].GetMetric()) != 1 || names["h"].GetMetric()[0].GetHistogram().GetPositiveDelta()[0] != 3 || labelOf(names["h"].GetMetric()[0], "job") != "j" {
		t.Errorf("the native histogram is %v", names["h"])
	}
	if names["foo_bar"] == nil || names[pushTimeName] == nil || names["up"] != nil {
		t.Errorf("families %v", names)
	}
}

// TestEscaped has a name that cannot be written as an old Prometheus reads it: that costs the
// family, and not the page.
func TestEscaped(t *testing.T) {
	for _, series := range []string{`a{"x.y"="1",x_y="2"} 1`, `a{"._name__"="1"} 1`} {
		g := newTest(nil)
		put(t, g, "/metrics/job/j", series+"\nb 1\n")
		for _, path := range []string{"/metrics", "/groups/job/j/metrics"} {
			want(t, ask(g, http.MethodGet, path, ""), http.StatusOK, "\nb{", "!\na{", `# Left out: the family "a" of {instance="",job="j"}: without quotes`)
			want(t, ask(g, http.MethodGet, path, "", "Accept", "text/plain;version=0.0.4;escaping=allow-utf-8"), http.StatusOK, "\nb{", "a{", "!# Left out")
		}
	}
	g := newTest(nil)
	put(t, g, "/metrics/job/j", "a{\"x.y\"=\"1\",x_y=\"2\"} 1\nb 1\n")
	w := ask(g, http.MethodGet, "/groups/job/j/metrics", "", "Accept", exposition.Accept)
	families, _, err := exposition.Read(t.Context(), w.Body.Bytes(), w.Header().Get("Content-Type"))
	if err != nil || len(families) != 3 || families[0].GetName() != "b" {
		t.Error(families, err)
	}
	for _, name := range []string{"a\x00b", "a\nb", "\x7f", ""} {
		w := ask(g, http.MethodPut, "/metrics/job/j", delimited(t, gauge(name)), "Content-Type", string(expfmt.FmtProtoDelim))
		want(t, w, http.StatusBadRequest, fmt.Sprintf("family %q: that is no name", name))
		w = ask(g, http.MethodPut, "/metrics/job/j", delimited(t, gauge("a", name, "1")), "Content-Type", string(expfmt.FmtProtoDelim))
		want(t, w, http.StatusBadRequest, fmt.Sprintf("%q is no name of a label", name))
	}
}

// TestDiscovery shows that the targets' paths lead to the groups, whatever their labels are.
func TestDiscovery(t *testing.T) {
	g := newTest(nil)
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
	if last := entries[3].Labels; last["job"] != "d" || len(last) != 1 {
		t.Errorf("labels %v, want only job d", last)
	}
}

// TestAdminAPI shows that nothing is wiped that was not allowed to be.
func TestAdminAPI(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		g := newTest(func(c *Config) { c.AdminAPI = allowed })
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
	g := newTest(nil)
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

// listener accepts the far ends of pipes.
type listener struct {
	net.Listener
	ends chan net.Conn
}

func (l listener) Accept() (net.Conn, error) {
	c, ok := <-l.ends
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (listener) Close() error   { return nil }
func (listener) Addr() net.Addr { return &net.TCPAddr{} }

// TestSlow has clients that stop in the middle: of a body, and of reading a page. Neither is
// waited for longer than its step may take.
func TestSlow(t *testing.T) {
	for _, test := range []struct {
		name, request string
		took          time.Duration
		answer        string
	}{
		{"body", "PUT /metrics/job/j HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\na 1\n", bodyTime, "408 Request Timeout"},
		{"page", "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n", writeTime, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newTest(nil)
				put(t, g, "/metrics/job/j", "a 1\n")
				ends := make(chan net.Conn)
				gone := make(chan time.Duration, 1)
				begin := time.Now()
				server := &http.Server{Handler: g, ReadHeaderTimeout: time.Second, ConnState: func(_ net.Conn, s http.ConnState) {
					if s == http.StateClosed {
						gone <- time.Since(begin)
					}
				}}
				var wg sync.WaitGroup
				wg.Go(func() { _ = server.Serve(listener{ends: ends}) })
				near, far := net.Pipe()
				ends <- far
				_, _ = io.WriteString(near, test.request)
				if test.answer != "" {
					if b, _ := bufio.NewReader(near).ReadString('\n'); !strings.Contains(b, test.answer) {
						t.Errorf("the answer is %q", b)
					}
					wg.Go(func() { _, _ = io.Copy(io.Discard, near) })
				}
				if took := <-gone; took < test.took || took > test.took+time.Second {
					t.Errorf("it took %v, want %v", took, test.took)
				}
				_ = near.Close()
				close(ends)
				wg.Wait()
				_ = server.Close()
			})
		})
	}
}

// TestMetrics checks the names of the gateway's own metrics, and that all results are there
// from the start.
func TestMetrics(t *testing.T) {
	g := newTest(nil)
	problems, err := testutil.GatherAndLint(g.config.Gatherer)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	page := ask(g, http.MethodGet, "/metrics", "")
	for _, result := range results {
		want(t, page, http.StatusOK, fmt.Sprintf("promferry_gateway_pushes_total{result=%q} 0\n", result))
	}
}

// FuzzPush pushes anything: what is taken is exposed so that it can be read, on the page with
// all groups, beside another group, and on its own, in all formats.
func FuzzPush(f *testing.F) {
	const histogram = "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n"
	for _, text := range []string{
		"a 1\n", "a{l=\"\\\\\\\"\\n\"} NaN\n", histogram, "# TYPE s summary\ns{quantile=\"0.5\"} 1\ns_sum 1\ns_count 1\n", "{\"foo.bar\",\"l.m\"=\"1\"} 1\n",
		"# HELP a x\\ny\n# TYPE a counter\na 1e300\n", "# TYPE h gaugehistogram\nh_bucket{le=\"1\"} 1\n", "up 0\na 1\n", "a 1 1\n", "{\"a\\nb\"} 1\n", "a{\"x.y\"=\"1\",x_y=\"2\"} 1\n", "a{\"._name__\"=\"1\"} 1\n", "a{\"b:c\"=\"1\"} 1\n",
	} {
		f.Add([]byte(text), false)
	}
	f.Add([]byte(delimited(f, gauge("a", "l", "\xff"))), true)
	f.Add([]byte(delimited(f, gauge(""), gauge("a.b", "c:d", "1"))), true)
	f.Add([]byte(delimited(f, gauge("a\nb", "c", "1"))), true)
	f.Fuzz(func(t *testing.T, body []byte, protobuf bool) {
		g := newTest(nil)
		put(t, g, "/metrics/job/first", "a 1\n"+histogram)
		headers := []string{"Content-Type", string(expfmt.FmtText)}
		if protobuf {
			headers[1] = string(expfmt.FmtProtoDelim)
		}
		w := ask(g, http.MethodPut, "/metrics/job/j", string(body), headers...)
		if w.Code != http.StatusOK && (w.Code != http.StatusBadRequest || w.Body.Len() < 5) {
			t.Fatalf("status %d: %s", w.Code, w.Body)
		}
		for _, accept := range []string{"", "text/plain;version=0.0.4;escaping=allow-utf-8", "text/plain;version=0.0.4;escaping=dots"} {
			page := readPage(t, ask(g, http.MethodGet, "/metrics", "", "Accept", accept))
			if len(page["a"].GetMetric()) == 0 {
				t.Fatal("the first group is not there")
			}
			if target := ask(g, http.MethodGet, "/groups/job/j/metrics", "", "Accept", accept); target.Code == http.StatusOK {
				readPage(t, target)
			}
		}
		target := ask(g, http.MethodGet, "/groups/job/j/metrics", "", "Accept", exposition.Accept)
		if target.Code == http.StatusOK {
			if _, _, err := exposition.Read(t.Context(), target.Body.Bytes(), target.Header().Get("Content-Type")); err != nil {
				t.Fatal(err)
			}
		}
		want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK, `"job":"first"`)
	})
}
