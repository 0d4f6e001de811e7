//go:build e2e

package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/pushgw"
)

func newClient(t *testing.T, g *real.Gateway) *pushgw.Client {
	t.Helper()
	u, err := url.Parse(g.URL)
	if err != nil {
		t.Fatal(err)
	}
	return pushgw.New(u, noRedirects)
}

func encode(t *testing.T, families []*dto.MetricFamily, format exposition.Format) pushgw.Body {
	t.Helper()
	b, err := exposition.Encode(families, format)
	if err != nil {
		t.Fatal(err)
	}
	return pushgw.Body{ContentType: format.ContentType(), Gzipped: b}
}

// TestContractKeys puts groups with unusual values to a real Pushgateway, and finds them
// under exactly these labels; and it shows what becomes of those values without care.
func TestContractKeys(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	client := newClient(t, gateway)
	for _, v := range []string{
		"web-1.example:9100", "a b", "a+b", "/var/tmp", "/", "//", ".", "..", "a/../b", "", "ü", "日本", "%2F", "%", "a?b#c", `a"b'c`, `a\b`,
		"=", "@base64", "a@base64", "a;b,c", "a\nb", "\x00", " ", "-_~", "{}", strings.Repeat("long-", 400), strings.Repeat("ü/", 400),
	} {
		keys := []pushgw.GroupingKey{{Job: "contract", Labels: map[string]string{"instance": "i", "v": v}}}
		if v != "" {
			keys = append(keys, pushgw.GroupingKey{Job: v, Labels: map[string]string{"instance": v}})
		}
		for _, key := range keys {
			t.Run(fmt.Sprintf("%.20q in %d labels", v, len(key.Labels)), func(t *testing.T) {
				want := maps.Clone(key.Labels)
				want["job"] = key.Job
				if err := client.Put(t.Context(), key, encode(t, []*dto.MetricFamily{untyped("a")}, exposition.Protobuf)); err != nil {
					t.Fatal(err)
				}
				groups, err := gateway.Groups(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if len(groups) != 1 || !maps.Equal(groups[0].Labels, want) || !groups[0].LastPushSuccessful {
					t.Errorf("groups %+v, want one: %v", groups, want)
				}
				if err := client.Delete(t.Context(), key); err != nil {
					t.Error(err)
				}
				waitGroups(t, gateway, 0)
			})
		}
	}
}

// TestContractPlainPath shows that the percent-encoding that anybody would use does not
// put to a path with a slash: 1.5.1 redirects, and later ones put to another group.
func TestContractPlainPath(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	send(t, http.MethodPut, gateway.URL+"/metrics/job/j/path/%2Fvar%2Ftmp", "", []byte("a 1\n"))
	if g, err := group(t.Context(), gateway, map[string]string{"job": "j", "path": "/var/tmp"}); err == nil {
		t.Errorf("it works: %+v", g)
	}
}

// waitGroups waits until a Pushgateway, which deletes in the background, has n groups.
func waitGroups(t *testing.T, gateway *real.Gateway, n int) {
	t.Helper()
	wait(t, "groups", func(ctx context.Context) error {
		groups, err := gateway.Groups(ctx)
		if err == nil && len(groups) != n {
			err = fmt.Errorf("%d groups, want %d: %+v", len(groups), n, groups)
		}
		return err
	})
}

// TestContractRefusedKeys shows what a Pushgateway does with keys that are not put.
func TestContractRefusedKeys(t *testing.T) {
	t.Parallel()
	const histogram = "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n"
	for _, test := range []struct {
		name  string
		key   pushgw.GroupingKey
		path  string // how a stranger would put it
		check func(t *testing.T, g *real.Gateway, status int, answer string)
	}{
		{
			// Not even others can put any more.
			"value not UTF-8",
			pushgw.GroupingKey{Job: "j", Labels: map[string]string{"v": "\xff\xfe"}},
			"/metrics/job/j/v/%ff%fe",
			func(t *testing.T, g *real.Gateway, status int, _ string) {
				other, _ := send(t, http.MethodPut, g.URL+"/metrics/job/other", "", []byte("a 1\n"))
				page, _ := send(t, http.MethodGet, g.URL+"/metrics", "", nil)
				if status != http.StatusBadRequest || other != http.StatusBadRequest || page != http.StatusInternalServerError {
					t.Errorf("status %d, of another put %d, of /metrics %d", status, other, page)
				}
			},
		},
		{
			"job not UTF-8",
			pushgw.GroupingKey{Job: "\xff"},
			"/metrics/job/%ff",
			func(t *testing.T, _ *real.Gateway, status int, _ string) {
				wantStatus(t, status, http.StatusBadRequest)
			},
		},
		{
			"le",
			pushgw.GroupingKey{Job: "j", Labels: map[string]string{"le": "0.9"}},
			"/metrics/job/j/le/0.9",
			func(t *testing.T, g *real.Gateway, status int, _ string) {
				_, page := send(t, http.MethodGet, g.URL+"/metrics", "", nil)
				if status != http.StatusOK || !strings.Contains(page, `le="0.9",le="1"`) {
					t.Errorf("status %d, and le is not there twice in\n%s", status, page)
				}
			},
		},
		{
			"quantile",
			pushgw.GroupingKey{Job: "j", Labels: map[string]string{"quantile": "0.9"}},
			"/metrics/job/j/quantile/0.9",
			// A histogram is fine with it; a summary is not.
			func(t *testing.T, g *real.Gateway, _ int, _ string) {
				status, _ := send(t, http.MethodPut, g.URL+"/metrics/job/j/quantile/0.9", "", []byte("# TYPE s summary\ns_sum 1\ns_count 1\n"))
				wantStatus(t, status, http.StatusBadRequest)
			},
		},
		{
			"no job",
			pushgw.GroupingKey{Labels: map[string]string{"instance": "i"}},
			"/metrics/job@base64/=/instance/i",
			func(t *testing.T, _ *real.Gateway, status int, _ string) {
				wantStatus(t, status, http.StatusBadRequest)
			},
		},
		{
			"no label name",
			pushgw.GroupingKey{Job: "j", Labels: map[string]string{"my-label": "v"}},
			"/metrics/job/j/my-label/v",
			func(t *testing.T, _ *real.Gateway, status int, _ string) {
				wantStatus(t, status, http.StatusBadRequest)
			},
		},
		{
			"reserved label name",
			pushgw.GroupingKey{Job: "j", Labels: map[string]string{"__foo": "v"}},
			"/metrics/job/j/__foo/v",
			func(t *testing.T, _ *real.Gateway, status int, _ string) {
				wantStatus(t, status, http.StatusBadRequest)
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			gateway := startPushgateway(t)
			if err := newClient(t, gateway).Put(t.Context(), test.key, encode(t, []*dto.MetricFamily{untyped("a")}, exposition.Protobuf)); err == nil {
				t.Error("it was put")
			}
			waitGroups(t, gateway, 0)
			status, answer := send(t, http.MethodPut, gateway.URL+test.path, "", []byte(histogram))
			test.check(t, gateway, status, answer)
		})
	}
}

func wantStatus(t *testing.T, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("status %d, want %d", got, want)
	}
}

// An accident is an exposition that a Pushgateway refuses, or takes and breaks on.
type accident struct {
	name        string
	contentType string // empty: text
	body        string
	// status is what the Pushgateway answers to it, 400 where it is 0, and answer a part
	// of what it says.
	status int
	answer string
	// breaks looks for what goes wrong where the status is 200.
	breaks func(raw real.Group, page string) bool
	// want are the families that arrive, with their numbers of series, when we put it;
	// nil where it is not read at all.
	want map[string]int
}

// ends tells whether what the Pushgateway exposes ends too soon, for all groups.
func ends(_ real.Group, page string) bool { return !strings.Contains(page, "\npush_time_seconds{") }

var one = map[string]int{"a": 1}

var accidents = []accident{
	{name: "timestamp", body: "a 1 1700000000000\n", answer: "timestamp", want: one},
	{name: "same series twice", body: "a 1\na 1\nb 1\n", answer: "was collected before", want: map[string]int{"a": 1, "b": 1}},
	{name: "same series with another value", body: "a 1\na 2\nb 1\n", answer: "was collected before", want: map[string]int{"a": 1, "b": 1}},
	{name: "other instances", body: "a{instance=\"x\"} 1\na{instance=\"y\"} 1\n", answer: "was collected before", want: map[string]int{"a": 2}},
	{name: "other jobs", body: "a{job=\"x\"} 1\na{job=\"y\"} 1\n", answer: "was collected before", want: map[string]int{"a": 2}},
	{name: "HELP twice", body: "# HELP a A.\na 1\n# HELP a B.\na{l=\"2\"} 2\n", answer: "second HELP", want: map[string]int{"a": 2}},
	{name: "TYPE twice", body: "# TYPE a gauge\na 1\n# TYPE a gauge\na{l=\"2\"} 2\n", answer: "second TYPE", want: map[string]int{"a": 2}},
	{name: "two TYPEs", body: "# TYPE a gauge\na 1\n# TYPE a counter\na{l=\"2\"} 2\nb 1\n", answer: "second TYPE", want: map[string]int{"a": 1, "b": 1}},
	{name: "TYPE after samples", body: "a 1\n# TYPE a gauge\na{l=\"2\"} 2\nb 1\n", answer: "TYPE reported after samples", want: map[string]int{"a": 1, "b": 1}},
	{name: "two exporters", body: strings.Repeat("# HELP a A.\n# TYPE a gauge\na 1\n# TYPE b counter\nb 1\n", 2), answer: "second HELP", want: map[string]int{"a": 1, "b": 1}},
	{name: "summary and its count", body: "# TYPE s summary\ns_sum 1\ns_count 1\n# TYPE s_count gauge\ns_count{l=\"1\"} 1\na 1\n", answer: "second TYPE", want: map[string]int{"a": 1, "s": 1}},
	{name: "count and its summary", body: "# TYPE s_count gauge\ns_count{l=\"1\"} 1\n# TYPE s summary\ns_sum 1\ns_count 1\na 1\n", answer: "collides", want: one},
	{name: "buckets and their histogram", body: "# TYPE h_bucket gauge\nh_bucket 1\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\na 1\n", answer: "collides", want: one},
	{name: "gauge histogram", body: "# TYPE g gaugehistogram\ng_bucket{le=\"+Inf\"} 1\ng_sum 1\ng_count 1\na 1\n", want: one},
	{name: "reserved label", body: "a{__x=\"1\"} 1\nb 1\n", want: map[string]int{"b": 1}},
	{name: "UTF-8 name", body: "{\"foo.bar\"} 1\na 1\n", want: one},
	{name: "UTF-8 label name", body: "a{\"foo.bar\"=\"1\"} 1\nb 1\n", want: map[string]int{"b": 1}},
	{
		name: "label without a value", body: "a 1\na{l=\"\"} 2\n", status: http.StatusOK, want: one,
		breaks: func(raw real.Group, _ string) bool { return len(raw.Families["a"].Metrics) == 2 },
	},
	{
		name: "bucket twice", body: "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\na 1\n", status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return strings.Count(page, `job="raw",le="1"`) == 2 },
	},
	{
		name: "quantile twice", body: "# TYPE s summary\ns{quantile=\"0.5\"} 1\ns{quantile=\"0.5\"} 2\ns_sum 1\ns_count 1\na 1\n", status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return strings.Count(page, `job="raw",quantile="0.5"`) == 2 },
	},
	{
		name: "HELP not UTF-8", body: "# HELP a In \xb0C.\na 1\n", status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return !utf8.ValidString(page) },
	},
	{
		name: "empty", body: "", status: http.StatusOK,
		breaks: func(raw real.Group, _ string) bool { return len(raw.Families) == 2 && raw.LastPushSuccessful },
	},

	{
		name: "protobuf family twice", contentType: protobufType, body: delimited(untyped("a"), untyped("a", "l", "2")), status: http.StatusOK, want: map[string]int{"a": 2},
		breaks: func(raw real.Group, _ string) bool { return len(raw.Families["a"].Metrics) == 1 },
	},
	{
		name: "protobuf without a name", contentType: protobufType, body: delimited(untyped(""), untyped("a")), status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return page == "" },
	},
	{
		name: "protobuf UTF-8 name", contentType: protobufType, body: delimited(untyped("foo.bar"), untyped("a")), status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return strings.Contains(page, "\nfoo.bar{") },
	},
	{name: "protobuf label twice", contentType: protobufType, body: delimited(untyped("a", "l", "1", "l", "2"), untyped("b")), answer: "two or more labels", want: map[string]int{"b": 1}},
	{name: "protobuf value of another type", contentType: protobufType, body: delimited(mistyped("a"), untyped("b")), answer: "is not a COUNTER", want: map[string]int{"b": 1}},
	{name: "protobuf value not UTF-8", contentType: protobufType, body: delimited(untyped("a", "l", "\xff"), untyped("b")), want: map[string]int{"b": 1}},
	{name: "protobuf gauge histogram", contentType: protobufType, body: delimited(&dto.MetricFamily{
		Name: new("g"), Type: dto.MetricType_GAUGE_HISTOGRAM.Enum(),
		Metric: []*dto.Metric{{Histogram: &dto.Histogram{SampleCount: proto.Uint64(1), SampleSum: proto.Float64(1)}}},
	}, untyped("a")), status: http.StatusOK, want: one, breaks: ends},
	{
		name: "protobuf name that is none", contentType: protobufType, body: delimited(untyped("a-b"), untyped("a")), status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return strings.Contains(page, "\na-b{") },
	},
	{name: "protobuf label name that is none", contentType: protobufType, body: delimited(untyped("b", "l-m", "1"), untyped("a")), want: one},
	{
		name: "protobuf HELP not UTF-8", contentType: protobufType, body: delimited(helped("a", "In \xb0C.")), status: http.StatusOK, want: one,
		breaks: func(_ real.Group, page string) bool { return !utf8.ValidString(page) },
	},
	{name: "protobuf timestamp", contentType: protobufType, body: delimited(stamped("a")), answer: "timestamp", want: one},
	{name: "protobuf cut", contentType: protobufType, body: delimited(untyped("a"))[:5]},
	{name: "text called protobuf", contentType: protobufType, body: "a 1\n"},

	// Taken as they are, by the Pushgateway and by us.
	{name: "family in two pieces", body: "a 1\nb 1\na{l=\"2\"} 2\n", status: http.StatusOK, want: map[string]int{"a": 2, "b": 1}},
	{name: "no numbers", body: "a NaN\nb +Inf\nc -Inf\n", status: http.StatusOK, want: map[string]int{"a": 1, "b": 1, "c": 1}},
	{name: "OpenMetrics comments", body: "# UNIT a seconds\na 1\n# EOF\n", status: http.StatusOK, want: one},
	{name: "protobuf empty family", contentType: protobufType, body: delimited(&dto.MetricFamily{Name: new("b"), Type: dto.MetricType_GAUGE.Enum()}, untyped("a")), status: http.StatusOK, want: one},
	{name: "name of the Pushgateway's own", body: "# TYPE push_time_seconds counter\npush_time_seconds{l=\"1\"} 1\na 1\n", status: http.StatusOK, want: one},
	{name: "histogram and summary", body: "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 1\nh_count 2\n# TYPE s summary\ns{quantile=\"0.5\"} 1\ns_sum 1\ns_count 1\n", status: http.StatusOK, want: map[string]int{"h": 1, "s": 1}},

	// Not an exposition: refused by both.
	{name: "no newline at the end", body: "a 1\nb 1", answer: "unexpected end of input stream"},
	{name: "CRLF", body: "a 1\r\n", answer: "expected float as value"},
	{name: "HTML", body: "<html></html>\n", answer: "invalid metric name"},
	{name: "hexadecimal", body: "a 0x1p4\n"},
	{name: "underscore in a number", body: "a 1_000\n"},
	{name: "label not UTF-8", body: "a{l=\"\xff\"} 1\n"},
	{name: "label twice", body: "a{l=\"1\",l=\"2\"} 1\n"},
	{name: "exemplar", body: "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1 # {a=\"b\"} 1\nh_sum 1\nh_count 1\n"},
	{name: "unknown type", body: "# TYPE a unknown\na 1\n", answer: "unknown metric type"},
}

// TestContractExpositions puts each accident to a real Pushgateway as it is, and then
// what becomes of it on its way through promferry, in both formats.
func TestContractExpositions(t *testing.T) {
	t.Parallel()
	for _, test := range accidents {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			gateway := startPushgateway(t)
			test.raw(t, gateway)
			test.forwarded(t, gateway)
		})
	}
}

// raw shows what the Pushgateway does with the accident, and leaves no group there.
func (a accident) raw(t *testing.T, gateway *real.Gateway) {
	const path = "/metrics/job/raw/instance/i"
	contentType := a.contentType
	if contentType == "" {
		contentType = textType
	}
	status, answer := send(t, http.MethodPut, gateway.URL+path, contentType, []byte(a.body))
	want := a.status
	if want == 0 {
		want = http.StatusBadRequest
	}
	if status != want || !strings.Contains(answer, a.answer) {
		t.Errorf("as it is: status %d, %q; want %d, %q", status, answer, want, a.answer)
	}
	if a.breaks != nil {
		groups, err := gateway.Groups(t.Context())
		if err != nil || len(groups) != 1 {
			t.Fatal(groups, err)
		}
		if _, page := send(t, http.MethodGet, gateway.URL+"/metrics", "", nil); !a.breaks(groups[0], page) {
			t.Errorf("as it is: nothing is wrong with the group %+v and with\n%.300s", groups[0], page)
		}
	}
	send(t, http.MethodDelete, gateway.URL+path, "", nil)
	waitGroups(t, gateway, 0)
}

// forwarded puts the accident as the agent does.
func (a accident) forwarded(t *testing.T, gateway *real.Gateway) {
	rules := exposition.Rules{Grouping: []string{"job", "instance"}}
	for _, format := range []exposition.Format{exposition.Protobuf, exposition.Text} {
		families, _, err := exposition.Read(t.Context(), []byte(a.body), a.contentType)
		if (err != nil) != (a.want == nil) {
			t.Fatalf("read: %v", err)
		}
		if err != nil {
			return // and so nothing is put
		}
		families, _ = rules.Check(families)
		key := pushgw.GroupingKey{Job: string(format), Labels: map[string]string{"instance": "i"}}
		if err := newClient(t, gateway).Put(t.Context(), key, encode(t, families, format)); err != nil {
			t.Errorf("in %s: %v", format, err)
			continue
		}
		g, err := group(t.Context(), gateway, map[string]string{"job": string(format), "instance": "i"})
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[string]int)
		for _, name := range others(g) {
			got[name] = len(g.Families[name].Metrics)
		}
		if !maps.Equal(got, a.want) {
			t.Errorf("in %s: the group has %v, want %v", format, got, a.want)
		}
		// It exposes all that was put, in a way that can be read.
		page, err := gateway.Get(t.Context(), "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		exposed, err := readAsPrometheus(page)
		if err != nil {
			t.Errorf("in %s: the Pushgateway exposes what cannot be read: %v", format, err)
		}
		for name, series := range a.want {
			n := 0
			for _, m := range exposed[name].GetMetric() {
				for _, l := range m.GetLabel() {
					if l.GetName() == "job" && l.GetValue() == string(format) {
						n++
					}
				}
			}
			if n != series {
				t.Errorf("in %s: the Pushgateway exposes %d series of %s, want %d", format, n, name, series)
			}
		}
	}
}

// readAsPrometheus reads a text, and refuses all that Prometheus refuses, and with it
// everything that the Pushgateway exposes: text that is not UTF-8, even in a HELP, and a
// TYPE that is none of the five.
func readAsPrometheus(page []byte) (map[string]*dto.MetricFamily, error) {
	if !utf8.Valid(page) {
		return nil, errors.New("it is not UTF-8")
	}
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+) (.*)$`).FindAllSubmatch(page, -1) {
		if !slices.Contains([]string{"counter", "gauge", "histogram", "summary", "untyped"}, string(match[2])) {
			return nil, fmt.Errorf("%s has the type %q", match[1], match[2])
		}
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	return parser.TextToMetricFamilies(bytes.NewReader(page))
}

// mistyped returns a counter whose value is that of an untyped metric.
func mistyped(name string) *dto.MetricFamily {
	family := untyped(name)
	family.Type = dto.MetricType_COUNTER.Enum()
	return family
}

// helped returns a family with a HELP.
func helped(name, help string) *dto.MetricFamily {
	family := untyped(name)
	family.Help = &help
	return family
}

// stamped returns a family with a timestamp.
func stamped(name string) *dto.MetricFamily {
	family := untyped(name)
	family.Metric[0].TimestampMs = proto.Int64(1_700_000_000_000)
	return family
}

// TestNativeHistogram forwards the native histogram of a client_golang program.
func TestNativeHistogram(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	histogram := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "h", Help: "H.", NativeHistogramBucketFactor: 1.1})
	registry.MustRegister(histogram)
	for i := range 100 {
		histogram.Observe(float64(i) / 10)
	}
	metrics, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	want := metrics[0].GetMetric()[0].GetHistogram()
	target := serve(t, promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))

	// Debian's Pushgateway knows no native histograms and takes them; what it was sent
	// only a receiver of our own can tell.
	gateway := startPushgateway(t)
	puts := make(chan []byte, 1)
	receiver := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		unzipped, err := gzip.NewReader(r.Body)
		if err != nil {
			return
		}
		body, err := io.ReadAll(unzipped)
		if err != nil || r.Method != http.MethodPut || r.URL.Path != "/metrics/job/app/instance/web-1" ||
			!strings.HasPrefix(r.Header.Get("Content-Type"), "application/vnd.google.protobuf") {
			return
		}
		select {
		case puts <- body:
		default:
		}
	}))
	a := startAgent(t, "--instance=web-1", "--push.target=app="+target, "--push.url="+gateway.URL, "--push.url="+receiver)

	var body []byte
	wait(t, "a put", func(context.Context) error {
		select {
		case body = <-puts:
			return nil
		default:
			return errors.New("none")
		}
	})
	families, _, err := exposition.Read(t.Context(), body, protobufType)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(families, func(family *dto.MetricFamily) bool { return family.GetName() == "h" })
	if i < 0 {
		t.Fatalf("no histogram in %v", families)
	}
	got := families[i].GetMetric()[0].GetHistogram()
	if len(want.GetPositiveSpan()) == 0 || !slices.EqualFunc(got.GetPositiveSpan(), want.GetPositiveSpan(), func(a, b *dto.BucketSpan) bool { return proto.Equal(a, b) }) ||
		!slices.Equal(got.GetPositiveDelta(), want.GetPositiveDelta()) || got.GetSchema() != want.GetSchema() || got.GetSampleCount() != 100 {
		t.Errorf("put %v\nwant %v", got, want)
	}
	if !bytes.Contains(body, []byte("scrape_samples_scraped")) {
		t.Error("the put has no companions")
	}

	a.waitSum(t, above(0), "promferry_forwarder_puts_total", "gateway", gateway.URL)
	g, err := group(t.Context(), gateway, map[string]string{"job": "app", "instance": "web-1"})
	if err := errors.Join(err, checkGroup(g, "1", "h")); err != nil {
		t.Error(err)
	}
	page, err := gateway.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readAsPrometheus(page); err != nil {
		t.Errorf("the Pushgateway exposes what cannot be read: %v", err)
	}
	if got := g.Families["h"].Metrics; len(got) != 1 || got[0].Count != "100" {
		t.Errorf("the Pushgateway holds %+v", got)
	}
}
