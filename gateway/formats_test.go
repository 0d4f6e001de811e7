package gateway

import (
	"fmt"
	"net/http"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/promferry/promferry/exposition"
)

// TestFormats asks for a group in each way that a Prometheus may.
func TestFormats(t *testing.T) {
	g := newTest(t, nil)
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
		g := newTest(t, nil)
		put(t, g, "/metrics/job/j", series+"\nb 1\n")
		for _, path := range []string{"/metrics", "/groups/job/j/metrics"} {
			want(t, ask(g, http.MethodGet, path, ""), http.StatusOK, "\nb{", "!\na{", `# Left out: the family "a" of {instance="",job="j"}: without quotes`)
			want(t, ask(g, http.MethodGet, path, "", "Accept", "text/plain;version=0.0.4;escaping=allow-utf-8"), http.StatusOK, "\nb{", "a{", "!# Left out")
		}
	}
	g := newTest(t, nil)
	put(t, g, "/metrics/job/j", "# TYPE \"push.time.seconds\" histogram\n{\"push.time.seconds_count\"} 1\n")
	put(t, g, "/metrics/job/k", "b 1\n")
	for _, path := range []string{"/metrics", "/groups/job/j/metrics"} {
		want(t, ask(g, http.MethodGet, path, ""), http.StatusOK, "\npush_time_seconds{", "!push_time_seconds_count", `# Left out: the family "push.time.seconds"`)
	}
	g = newTest(t, nil)
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
