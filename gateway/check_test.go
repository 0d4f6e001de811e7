package gateway

import (
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

const pushGroup = "/metrics/job/j"

func pushProtobuf(t *testing.T, g *Gateway, method string, families ...*dto.MetricFamily) (status int) {
	t.Helper()
	return ask(g, method, pushGroup, delimited(t, families...), "Content-Type", string(expfmt.FmtProtoDelim)).Code
}

// TestTwice has numbers that are the same in a text.
func TestTwice(t *testing.T) {
	otherNaN := math.Float64frombits(0x7ff8000000000002)
	for _, test := range []struct {
		a, b   float64
		status int
	}{
		{1, 2, http.StatusOK},
		{1, 1, http.StatusBadRequest},
		{0, math.Copysign(0, -1), http.StatusBadRequest},
		{math.NaN(), math.NaN(), http.StatusBadRequest},
		{math.NaN(), otherNaN, http.StatusBadRequest},
		{math.Inf(1), math.Inf(1), http.StatusBadRequest},
	} {
		histogram := &dto.MetricFamily{Name: new("h"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: &dto.Histogram{
			Bucket: []*dto.Bucket{{UpperBound: new(test.a)}, {UpperBound: new(test.b)}},
		}}}}
		summary := &dto.MetricFamily{Name: new("s"), Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{{Summary: &dto.Summary{
			Quantile: []*dto.Quantile{{Quantile: new(test.a)}, {Quantile: new(test.b)}},
		}}}}
		for _, family := range []*dto.MetricFamily{histogram, summary} {
			if status := pushProtobuf(t, newTest(t, nil), http.MethodPut, family); status != test.status {
				t.Errorf("%s, %v and %v: status %d, want %d", family.GetName(), test.a, test.b, status, test.status)
			}
		}
	}
}

// TestReplacedLabel has a label that is wrong, and that the grouping key replaces.
func TestReplacedLabel(t *testing.T) {
	g := newTest(t, nil)
	if status := pushProtobuf(t, g, http.MethodPut, gauge("a", "job", "\xff")); status != http.StatusOK {
		t.Errorf("status %d", status)
	}
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\na{instance=\"\",job=\"j\"} 1\n")
	if status := pushProtobuf(t, g, http.MethodPut, gauge("a", "job", "1", "job", "2")); status != http.StatusBadRequest {
		t.Errorf("it comes twice: status %d", status)
	}
}

// TestEmptyFamily has families without series: they are checked, and replace those of their
// name, as in a push that has others as well.
func TestEmptyFamily(t *testing.T) {
	g := newTest(t, nil)
	put(t, g, pushGroup, "a 1\nb 1\n")
	empty := func(name string, typ dto.MetricType) *dto.MetricFamily {
		return &dto.MetricFamily{Name: &name, Type: typ.Enum()}
	}
	for _, wrong := range []*dto.MetricFamily{empty("", dto.MetricType_GAUGE), empty("g", dto.MetricType_GAUGE_HISTOGRAM)} {
		if status := pushProtobuf(t, g, http.MethodPost, wrong); status != http.StatusBadRequest {
			t.Errorf("%v: status %d", wrong, status)
		}
	}
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\na{", "\nb{")
	if status := pushProtobuf(t, g, http.MethodPost, empty("a", dto.MetricType_GAUGE)); status != http.StatusOK {
		t.Errorf("status %d", status)
	}
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "!\na{", "\nb{")
	for _, families := range [][]*dto.MetricFamily{
		{empty("x", dto.MetricType_HISTOGRAM), gauge("x_sum")},
		{empty("b_sum", dto.MetricType_GAUGE), {Name: new("b"), Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{{Summary: &dto.Summary{}}}}},
	} {
		if status := pushProtobuf(t, g, http.MethodPut, families...); status != http.StatusOK {
			t.Errorf("%v: status %d", families, status)
		}
	}
}

// TestEscapedAt has clients that escape the @ in a path.
func TestEscapedAt(t *testing.T) {
	g := newTest(t, nil)
	put(t, g, "/metrics/job%40base64/YS9i/l%40base64/Yy9k", "a 1\n")
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\na{instance=\"\",job=\"a/b\",l=\"c/d\"} 1\n")
	want(t, ask(g, http.MethodGet, "/groups/job@base64/YS9i/l@base64/Yy9k/metrics", ""), http.StatusOK, "\na{")
	for _, path := range []string{"/metrics/job%40base65/YS9i", "/metrics/jobs/j", "/metrics/job%2Fj", "/metrics/job"} {
		want(t, ask(g, http.MethodPut, path, "a 1\n"), http.StatusNotFound)
	}
}

// TestUnescaped has a client that does not escape what it should, beside a slash that it does.
func TestUnescaped(t *testing.T) {
	for _, raw := range []string{"#", "{", "ü", `"`} {
		g := newTest(t, nil)
		r := httptest.NewRequest(http.MethodPut, "http://hub/", strings.NewReader("a 1\n"))
		u, err := url.ParseRequestURI("/metrics/job/a%2Fb/l/" + raw)
		if err != nil {
			t.Fatal(err)
		}
		r.URL = u
		w := httptest.NewRecorder()
		g.ServeHTTP(w, r)
		want(t, w, http.StatusOK)
		want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="",job="a/b",l="`+escapeValue.Replace(raw)+`"} 1`)
	}
}

// TestLabels has as many labels as there may be, and more, in each way that they can come.
func TestLabels(t *testing.T) {
	for n, status := range map[int]int{maxLabels - 1: http.StatusOK, maxLabels: http.StatusUnprocessableEntity, maxLabels + 1: http.StatusUnprocessableEntity, 10000: http.StatusUnprocessableEntity} {
		var text, quoted strings.Builder
		family := gauge("a")
		for i := range n {
			fmt.Fprintf(&text, ",l%d= \"\\\"=\\\\\"", i)
			fmt.Fprintf(&quoted, ",\"l.%d\"=\"1\"", i)
			family.Metric[0].Label = append(family.Metric[0].Label, &dto.LabelPair{Name: new(fmt.Sprint("l", i)), Value: new("1")})
		}
		for _, line := range []string{"a{" + text.String()[1:] + "} 1\n", "{\"a.b\"" + quoted.String() + "} 1\n"} {
			want(t, ask(newTest(t, nil), http.MethodPut, pushGroup, line), status)
			if err := checkLines([]byte(line), 1); (err == nil) != (n <= maxLabels) {
				t.Errorf("%d labels, before they are read: %v", n, err)
			}
		}
		if got := pushProtobuf(t, newTest(t, nil), http.MethodPut, family); got != status {
			t.Errorf("%d labels in protobuf: status %d, want %d", n, got, status)
		}
	}
	g := newTest(t, nil)
	put(t, g, "/metrics/job/"+strings.Repeat("j", maxKeyBytes-len("/job/")), "a 1\n")
	w := ask(g, http.MethodPut, "/metrics/job/"+strings.Repeat("j", maxKeyBytes-len("/job/")+1), "a 1\n")
	want(t, w, http.StatusRequestURITooLong, "4097 bytes in the path, and may have 4096")
}
