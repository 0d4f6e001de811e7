package exposition_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/promferry/promferry/exposition"
)

const protobufType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

// put returns, as text, what is put of an exposition in text, and what is told as left
// out, "family reason series".
func put(t *testing.T, rules exposition.Rules, text string) (string, []string) {
	t.Helper()
	families, left, err := exposition.Read(t.Context(), []byte(text), "text/plain; version=0.0.4")
	if err != nil {
		t.Fatalf("read: %v\n%s", err, text)
	}
	return check(t, rules, families, left)
}

func check(t *testing.T, rules exposition.Rules, families []*dto.MetricFamily, left []exposition.LeftOut) (string, []string) {
	t.Helper()
	families, more := rules.Check(families)
	var b strings.Builder
	if err := exposition.Write(&b, families, exposition.Text); err != nil {
		t.Fatal(err)
	}
	told := []string{}
	for _, l := range append(left, more...) {
		told = append(told, strings.TrimSpace(l.Family+" "+string(l.Reason)+" "+strings.Repeat("#", l.Series)))
	}
	return b.String(), told
}

var node = exposition.Rules{Grouping: []string{"job", "instance"}}

// TestCheckText has the rows of what a Pushgateway refuses, or accepts and breaks on, that
// a text can show.
func TestCheckText(t *testing.T) {
	for _, tc := range []struct {
		name, in, want string
		left           []string
	}{
		{"untouched", "# HELP m Help.\n# TYPE m gauge\nm{a=\"b\"} NaN\nm 1\nm{a=\"c\"} +Inf\n", "# HELP m Help.\n# TYPE m gauge\nm{a=\"b\"} NaN\nm 1\nm{a=\"c\"} +Inf\n", nil},
		{"timestamp", "# TYPE m gauge\nm 1 1700000000000\n", "# TYPE m gauge\nm 1\n", nil},
		{"same series twice", "# TYPE m gauge\nm 1\nm 1\nm{a=\"b\"} 2\n", "# TYPE m gauge\nm 1\nm{a=\"b\"} 2\n", []string{"m duplicate #"}},
		{"other value", "# TYPE m gauge\nm 1\nm 2\nm 3\n# TYPE n gauge\nn 1\n", "# TYPE m gauge\nm 1\n# TYPE n gauge\nn 1\n", []string{"m duplicate ##"}},
		{"other order of labels", "# TYPE m gauge\nm{a=\"1\",b=\"2\"} 1\nm{b=\"2\",a=\"1\"} 2\n", "# TYPE m gauge\nm{a=\"1\",b=\"2\"} 1\n", []string{"m duplicate #"}},
		{"label without a value", "# TYPE m gauge\nm 1\nm{l=\"\"} 2\n", "# TYPE m gauge\nm 1\n", []string{"m duplicate #"}},
		{"several targets in one", "# TYPE m gauge\nm{instance=\"a\"} 1\nm{instance=\"b\"} 2\n", "# TYPE m gauge\nm{exported_instance=\"a\"} 1\nm{exported_instance=\"b\"} 2\n", nil},
		{"exported twice", "# TYPE m gauge\nm{job=\"a\",exported_job=\"b\"} 1\n", "# TYPE m gauge\nm{exported_exported_job=\"a\",exported_job=\"b\"} 1\n", nil},
		{"summary and its count", "# TYPE s summary\ns_sum 1\ns_count 1\n# TYPE s_bucket gauge\ns_bucket 1\n", "# TYPE s summary\ns_sum 1\ns_count 1\n# TYPE s_bucket gauge\ns_bucket 1\n", nil},
		{"a gauge named as the count before it", "# TYPE s_count gauge\ns_count{x=\"y\"} 1\n# TYPE s summary\ns_sum 1\ns_count 1\n# TYPE z gauge\nz 1\n", "# TYPE z gauge\nz 1\n", []string{"s clash", "s_count clash"}},
		{"HELP twice", "# HELP m A.\n# TYPE m gauge\nm 1\n# HELP m B.\n# TYPE m gauge\nm{a=\"b\"} 2\n", "# HELP m A.\n# TYPE m gauge\nm 1\nm{a=\"b\"} 2\n", nil},
		{"two exporters in one", "# TYPE m gauge\nm 1\n# TYPE n gauge\nn 1\n# TYPE m gauge\nm 1\n# TYPE o gauge\no 1\n", "# TYPE m gauge\nm 1\n# TYPE n gauge\nn 1\n# TYPE o gauge\no 1\n", []string{"m duplicate #"}},
		{"two types", "# TYPE m gauge\nm 1\n# TYPE m counter\nm{a=\"b\"} 2\nm{a=\"c\"} 2\nm_other 3\n", "# TYPE m gauge\nm 1\n# TYPE m_other untyped\nm_other 3\n", []string{"m clash ##"}},
		{"TYPE after samples", "m 1\n# TYPE m gauge\nm{a=\"b\"} 2\n", "# TYPE m untyped\nm 1\n", []string{"m clash #"}},
		{"families not in one piece", "# TYPE m gauge\nm 1\nn 1\nm{a=\"b\"} 2\n", "# TYPE m gauge\nm 1\nm{a=\"b\"} 2\n# TYPE n untyped\nn 1\n", nil},
		{
			"ours", "up 7\nscrape_duration_seconds 7\nscrape_foo 7\npromferry_info 7\npromferry_expires_after_seconds 7\npromferry_forwarder_puts_total 7\npromferry_build_info 1\nupper 1\n",
			"# TYPE promferry_build_info untyped\npromferry_build_info 1\n# TYPE promferry_forwarder_puts_total untyped\npromferry_forwarder_puts_total 7\n# TYPE upper untyped\nupper 1\n",
			[]string{"promferry_expires_after_seconds reserved", "promferry_info reserved", "scrape_duration_seconds reserved", "scrape_foo reserved", "up reserved"},
		},
		{"HELP not UTF-8", "# HELP m a\xffb\nm 1\n", "# HELP m a\uFFFDb\n# TYPE m untyped\nm 1\n", nil},
		{"gauge histogram", "# TYPE g gaugehistogram\ng_bucket{le=\"+Inf\"} 1\nn 1\n", "# TYPE n untyped\nn 1\n", []string{"g type #"}},
		{"UTF-8 names", "# TYPE \"foo.bar\" gauge\n{\"foo.bar\"} 1\nm{\"a.b\"=\"c\"} 1\nm 2\n", "# TYPE m untyped\nm 2\n", []string{"foo.bar name", "m label #"}},
		{"reserved label", "m{__x=\"1\"} 1\nm 2\n", "# TYPE m untyped\nm 2\n", []string{"m label #"}},
		{"OpenMetrics leftovers", "# TYPE a counter\n# UNIT a seconds\na_total 1\n# EOF\n", "# TYPE a_total untyped\na_total 1\n", nil},
		{"bucket twice", "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\nm 1\n", "# TYPE m untyped\nm 1\n", []string{"h duplicate #"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, left := put(t, node, tc.in)
			slices.Sort(left)
			if got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
			if !slices.Equal(left, tc.left) && len(left)+len(tc.left) > 0 {
				t.Errorf("left out %q, want %q", left, tc.left)
			}
		})
	}
}

func family(name string, typ dto.MetricType, metrics ...*dto.Metric) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Type: &typ, Metric: metrics}
}

func gaugeOf(value float64, labels ...string) *dto.Metric {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: &value}}
	for i := 0; i < len(labels); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
	}
	return m
}

func delimited(t *testing.T, families ...*dto.MetricFamily) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := exposition.Write(&b, families, exposition.Protobuf); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestCheckProtobuf has the rows that only protobuf can show.
func TestCheckProtobuf(t *testing.T) {
	const gaugeType = dto.MetricType_GAUGE
	quantile := &dto.Metric{Summary: &dto.Summary{SampleCount: proto.Uint64(1), SampleSum: proto.Float64(1)}, Label: gaugeOf(0, "quantile", "0.5").Label}
	bucket := &dto.Metric{Histogram: &dto.Histogram{SampleCount: proto.Uint64(1), SampleSum: proto.Float64(1)}, Label: gaugeOf(0, "le", "0.5").Label}
	for _, tc := range []struct {
		name string
		in   []*dto.MetricFamily
		want string
		left []string
	}{
		{
			"family repeated",
			[]*dto.MetricFamily{family("m", gaugeType, gaugeOf(1)), family("n", gaugeType, gaugeOf(1)), family("m", gaugeType, gaugeOf(2, "a", "b"))},
			"# TYPE m gauge\nm 1\nm{a=\"b\"} 2\n# TYPE n gauge\nn 1\n", nil,
		},
		{
			"family repeated with another type",
			[]*dto.MetricFamily{family("m", gaugeType, gaugeOf(1)), family("m", dto.MetricType_COUNTER, gaugeOf(2))},
			"# TYPE m gauge\nm 1\n",
			[]string{"m clash"},
		},
		{"family without a name", []*dto.MetricFamily{family("", gaugeType, gaugeOf(1)), family("m", gaugeType, gaugeOf(1))}, "# TYPE m gauge\nm 1\n", []string{"name"}},
		{"value of another type", []*dto.MetricFamily{family("m", dto.MetricType_COUNTER, gaugeOf(1)), family("n", gaugeType, gaugeOf(1))}, "# TYPE n gauge\nn 1\n", []string{"m type #"}},
		{"unknown type", []*dto.MetricFamily{family("m", 99, gaugeOf(1)), family("n", gaugeType, gaugeOf(1))}, "# TYPE n gauge\nn 1\n", []string{"m type #"}},
		{"label twice", []*dto.MetricFamily{family("m", gaugeType, gaugeOf(1, "a", "b", "a", "c"), gaugeOf(2))}, "# TYPE m gauge\nm 2\n", []string{"m label #"}},
		{"label __name__", []*dto.MetricFamily{family("m", gaugeType, gaugeOf(1, "__name__", "b"), gaugeOf(2))}, "# TYPE m gauge\nm 2\n", []string{"m label #"}},
		{"label not UTF-8", []*dto.MetricFamily{family("m", gaugeType, gaugeOf(1, "a", "\xff"), gaugeOf(2))}, "# TYPE m gauge\nm 2\n", []string{"m label #"}},
		{"explicit quantile", []*dto.MetricFamily{family("s", dto.MetricType_SUMMARY, quantile), family("n", gaugeType, gaugeOf(1))}, "# TYPE n gauge\nn 1\n", []string{"s label #"}},
		{"explicit le", []*dto.MetricFamily{family("h", dto.MetricType_HISTOGRAM, bucket), family("n", gaugeType, gaugeOf(1))}, "# TYPE n gauge\nn 1\n", []string{"h label #"}},
		{"empty family", []*dto.MetricFamily{family("m", gaugeType), family("n", gaugeType, gaugeOf(1))}, "# TYPE n gauge\nn 1\n", nil},
		{"histogram's bucket is a family", []*dto.MetricFamily{
			family("h_bucket", gaugeType, gaugeOf(1)),
			family("h", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: &dto.Histogram{SampleCount: proto.Uint64(1), SampleSum: proto.Float64(2)}}),
			family("n", gaugeType, gaugeOf(1)),
		}, "# TYPE n gauge\nn 1\n", []string{"h_bucket clash", "h clash"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			families, left, err := exposition.Read(t.Context(), delimited(t, tc.in...), protobufType)
			if err != nil {
				t.Fatal(err)
			}
			got, told := check(t, node, families, left)
			if got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
			if !slices.Equal(told, tc.left) && len(told)+len(tc.left) > 0 {
				t.Errorf("left out %q, want %q", told, tc.left)
			}
		})
	}
}

func TestKeepAndDrop(t *testing.T) {
	rules := exposition.Rules{Keep: regexp.MustCompile("^(?:node_.*)$"), Drop: regexp.MustCompile("^(?:.*_seconds)$")}
	got, left := put(t, rules, "node_a 1\nnode_a_seconds 1\nother 1\n")
	if got != "# TYPE node_a untyped\nnode_a 1\n" || len(left) > 0 {
		t.Errorf("got %s, left out %q", got, left)
	}
}

func TestReadFails(t *testing.T) {
	huge := protowire.AppendVarint(nil, math.MaxUint64)
	whole := delimited(t, family("m", dto.MetricType_GAUGE, gaugeOf(1)))
	for name, tc := range map[string]struct {
		body, contentType string
		want              error
	}{
		"empty":                     {"", "text/plain", exposition.ErrEmpty},
		"comments only":             {"# HELP m M.\n# TYPE m gauge\n", "text/plain", exposition.ErrEmpty},
		"empty protobuf":            {"", protobufType, exposition.ErrEmpty},
		"protobuf without series":   {string(delimited(t, family("m", dto.MetricType_GAUGE))), protobufType, exposition.ErrEmpty},
		"HTML":                      {"<html><body>It works!</body></html>\n", "text/html", nil},
		"HTML called text":          {"<html><body>It works!</body></html>\n", "text/plain", nil},
		"JSON":                      {"{}", "application/json", nil},
		"OpenMetrics":               {"m 1\n# EOF\n", "application/openmetrics-text; version=1.0.0", nil},
		"cut within a line":         {"m 1\nn", "text/plain", nil},
		"no newline at the end":     {"m 1\nn 1", "text/plain", nil},
		"CRLF":                      {"m 1\r\n", "text/plain", nil},
		"hex float":                 {"m 0x1p4\n", "text/plain", nil},
		"underscores in a number":   {"m 1_000\n", "text/plain", nil},
		"exemplar":                  {"m_bucket{le=\"1\"} 1 # {a=\"b\"} 1\n", "text/plain", nil},
		"OpenMetrics type":          {"# TYPE m unknown\nm 1\n", "text/plain", nil},
		"label not UTF-8":           {"m{a=\"\xff\"} 1\n", "text/plain", nil},
		"protobuf cut":              {string(whole[:len(whole)-1]), protobufType, io.ErrUnexpectedEOF},
		"protobuf, huge length":     {string(huge), protobufType, io.ErrUnexpectedEOF},
		"text called protobuf":      {"metric_a 1\n", protobufType, nil},
		"protobuf called text":      {string(whole), "text/plain", nil},
		"protobuf of another thing": {string(whole), "application/vnd.google.protobuf; proto=other; encoding=delimited", nil},
		"content type is no type":   {"m 1\n", "//", nil},
	} {
		families, left, err := exposition.Read(t.Context(), []byte(tc.body), tc.contentType)
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want an error %v", name, err, tc.want)
		}
		if families != nil || left != nil {
			t.Errorf("%s: an error with %d families", name, len(families))
		}
	}
}

// TestReadCutsItsErrors has expositions of which an error would quote megabytes.
func TestReadCutsItsErrors(t *testing.T) {
	const most = 500
	long := strings.Repeat("9é", 1<<19)
	for name, tc := range map[string]struct{ body, contentType string }{
		"number":       {"m " + long + "\n", "text/plain"},
		"timestamp":    {"m 1 " + long + "\n", "text/plain"},
		"type":         {"# TYPE m " + long + "\n", "text/plain"},
		"name":         {strings.Repeat("m", 1<<20) + "{l} 1\n", "text/plain"},
		"content type": {"m 1\n", "text/" + long},
	} {
		_, _, err := exposition.Read(t.Context(), []byte(tc.body), tc.contentType)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		if text := err.Error(); len(text) > most || !utf8.ValidString(text) {
			t.Errorf("%s: an error of %d bytes: %.300q", name, len(text), text)
		}
		if fault := exposition.FaultOf(err); fault != nil && (len(fault.Error()) > most || fault.Line != 1) {
			t.Errorf("%s: a fault of %d bytes in line %d", name, len(fault.Error()), fault.Line)
		}
	}
	text := []byte(strings.Repeat("m", 1<<20) + "{__l" + strings.Repeat("l", 1<<20) + "=\"1\"} 1\n")
	families, _, err := exposition.Read(t.Context(), text, "")
	if err != nil {
		t.Fatal(err)
	}
	_, left := node.Check(families)
	if len(left) != 1 {
		t.Fatal(left)
	}
	if fault := exposition.Explain(text, left[0]).Error(); len(fault) > most || !strings.Contains(fault, "has a label") {
		t.Errorf("an explanation of %d bytes: %.300q", len(fault), fault)
	}
}

// TestReadEndsWithItsContext reads a series of so many labels that the parser would need
// minutes for it.
func TestReadEndsWithItsContext(t *testing.T) {
	var b strings.Builder
	b.WriteString("m{a0=\"b\"")
	for i := range 200_000 {
		fmt.Fprintf(&b, ",a%d=\"b\"", i+1)
	}
	b.WriteString("} 1\n")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	families, _, err := exposition.Read(ctx, []byte(b.String()), "text/plain")
	if !errors.Is(err, context.DeadlineExceeded) || families != nil {
		t.Errorf("got %d families, %v", len(families), err)
	}
}

// TestReadRefusesMoreThanItCanHold has expositions of few bytes and many series.
func TestReadRefusesMoreThanItCanHold(t *testing.T) {
	series := bytes.Repeat([]byte{0x22, 0}, 8_000_001) // Field 4, metric, empty.
	for name, tc := range map[string]struct {
		contentType string
		body        []byte
	}{
		"series":   {protobufType, append(protowire.AppendVarint(nil, uint64(len(series))), series...)},
		"families": {protobufType, make([]byte, 8_000_001)},
		"text":     {"text/plain", bytes.Repeat([]byte("a 1\n"), 2_000_001)},
	} {
		if _, _, err := exposition.Read(t.Context(), tc.body, tc.contentType); !errors.Is(err, exposition.ErrTooLarge) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestReadWithoutContentType(t *testing.T) {
	families, _, err := exposition.Read(t.Context(), []byte("m 1\n"), "")
	if err != nil || len(families) != 1 {
		t.Errorf("got %v, %v", families, err)
	}
}

func TestSamples(t *testing.T) {
	for text, want := range map[string]int{
		"m 1\nn{a=\"b\"} 1\nn 1\n": 3,
		"# TYPE s summary\ns{quantile=\"0.5\"} 1\ns{quantile=\"0.9\"} 1\ns_sum 1\ns_count 1\n":    4,
		"# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n": 4,
	} {
		families, _, err := exposition.Read(t.Context(), []byte(text), "")
		if err != nil {
			t.Fatal(err)
		}
		if got := exposition.Samples(families); got != want {
			t.Errorf("%d samples, want %d, in\n%s", got, want, text)
		}
	}
	// In protobuf the +Inf bucket may be left to the count (metrics.proto).
	implicit := family("h", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: &dto.Histogram{
		SampleCount: proto.Uint64(1), Bucket: []*dto.Bucket{{UpperBound: proto.Float64(1), CumulativeCount: proto.Uint64(1)}},
	}})
	if got := exposition.Samples([]*dto.MetricFamily{implicit}); got != 4 {
		t.Errorf("histogram with an implicit +Inf bucket: %d samples, want 4", got)
	}
	if got := exposition.Samples([]*dto.MetricFamily{native()}); got != 1 {
		t.Errorf("native histogram: %d samples, want 1", got)
	}
}

func native() *dto.MetricFamily {
	return family("n", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: &dto.Histogram{
		SampleCount: proto.Uint64(3), SampleSum: proto.Float64(6), Schema: proto.Int32(3), ZeroThreshold: new(1e-128),
		PositiveSpan: []*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(2)}}, PositiveDelta: []int64{1, 1},
	}})
}

func gunzip(t *testing.T, b []byte) []byte {
	t.Helper()
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestNativeHistogramSurvives(t *testing.T) {
	families, _, err := exposition.Read(t.Context(), delimited(t, native()), protobufType)
	if err != nil {
		t.Fatal(err)
	}
	families, left := node.Check(families)
	if len(left) > 0 {
		t.Fatalf("left out %v", left)
	}
	gzipped, err := exposition.Encode(families, exposition.Protobuf)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := exposition.Read(t.Context(), gunzip(t, gzipped), exposition.Protobuf.ContentType())
	if err != nil {
		t.Fatal(err)
	}
	if len(again) != 1 || !proto.Equal(again[0], native()) {
		t.Errorf("got %v, want %v", again, native())
	}
}

// FuzzRoundTrip checks that whatever is read and checked is written, in either format, so
// that reading it again finds nothing to leave out, and the same series.
func FuzzRoundTrip(f *testing.F) {
	for _, text := range []string{
		"m 1\n", "# TYPE m gauge\nm{a=\"b\\n\\\"\"} 1 5\nm{a=\"c\",job=\"x\"} NaN\n",
		"# HELP s A\\\\b.\n# TYPE s summary\ns{quantile=\"0.5\"} 1\ns_sum 1\ns_count 1\n",
		"# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n",
		"m 1\n# TYPE m gauge\nm 2\n", "{\"foo.bar\",a=\"b\"} 1\n",
	} {
		f.Add([]byte(text), "text/plain")
	}
	var b bytes.Buffer
	gauges := family("m", dto.MetricType_GAUGE, gaugeOf(1, "job", "x"), gaugeOf(2))
	if err := exposition.Write(&b, []*dto.MetricFamily{gauges, native(), gauges}, exposition.Protobuf); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes(), protobufType)
	f.Fuzz(func(t *testing.T, body []byte, contentType string) {
		families, _, err := exposition.Read(t.Context(), body, contentType)
		if err != nil {
			return
		}
		families, _ = node.Check(families)
		want := series(families)
		for _, format := range []exposition.Format{exposition.Protobuf, exposition.Text} {
			var b bytes.Buffer
			if err := exposition.Write(&b, families, format); err != nil {
				if format == exposition.Protobuf {
					t.Fatal(err)
				}
				continue
			}
			again, left, err := exposition.Read(t.Context(), b.Bytes(), format.ContentType())
			if errors.Is(err, exposition.ErrEmpty) && len(families) == 0 {
				continue
			}
			if err != nil {
				t.Fatalf("%s: read again: %v\n%q", format, err, b.Bytes())
			}
			again, more := node.Check(again)
			if left = append(left, more...); len(left) > 0 {
				t.Fatalf("%s: left out the second time: %v", format, left)
			}
			if got := series(again); !maps.Equal(got, want) {
				t.Fatalf("%s: series %v, want %v", format, got, want)
			}
		}
	})
}

// series counts the series of each family.
func series(families []*dto.MetricFamily) map[string]int {
	n := make(map[string]int)
	for _, family := range families {
		n[family.GetName()] = len(family.GetMetric())
	}
	return n
}
