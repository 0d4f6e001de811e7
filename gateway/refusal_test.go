package gateway

import (
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// TestLongRefusals has pushes of which an answer would quote a megabyte. What is answered, logged
// and kept of them is short, and still tells what is wrong.
func TestLongRefusals(t *testing.T) {
	g := newTest(t, func(c *Config) { c.MaxBodyBytes = 16 << 20 })
	long := strings.Repeat("9é", 1<<19)
	name := strings.Repeat("n", 4000)
	put(t, g, "/metrics/job/j", "a 1\n")
	put(t, g, "/metrics/job/j", "# TYPE s summary\ns_sum 1\ns_count 1\n")
	protobuf := string(expfmt.FmtProtoDelim)
	counter := gauge(name)
	counter.Type = dto.MetricType_COUNTER.Enum()
	for _, test := range []struct{ name, typ, body, part string }{
		{"number", "", "a " + long + "\n", "expected float as value"},
		{"timestamp", "", "a 1 " + long + "\n", "expected integer as timestamp"},
		{"type", "", "# TYPE a " + long + "\n", "unknown metric type"},
		{"value", "", "a{l=\"" + long + "\\x\"} 1\n", "invalid escape sequence"},
		{"no value of its type", protobuf, delimited(t, counter), "it is not a counter"},
		{"label name", protobuf, delimited(t, gauge("a", "__"+long, "x")), "is no name of a label"},
		{"label twice", protobuf, delimited(t, gauge("a", long, "x", long, "y")), "comes twice"},
		{"label value", protobuf, delimited(t, gauge("a", "l", long+"\xff")), "not UTF-8"},
		{"series twice", protobuf, delimited(t, gauge("a", "l", long), gauge("a", "l", long)), "collected before"},
		{"types", protobuf, delimited(t, gauge(name), counter), "it comes twice"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := ask(g, http.MethodPut, "/metrics/job/j", test.body, "Content-Type", test.typ)
			want(t, w, http.StatusBadRequest, test.part)
			for what, text := range map[string]string{"answer": w.Body.String(), "reason on the page": g.Status().Groups[0].Failure} {
				if len(text) > maxRefusal+10 || !utf8.ValidString(text) {
					t.Errorf("the %s has %d bytes: %.300q", what, len(text), text)
				}
			}
		})
	}
	w := ask(g, http.MethodDelete, "/api/v1/metrics?"+strings.Repeat(";", 1<<20), "")
	want(t, w, http.StatusBadRequest, "percent-encoded")
	if w.Body.Len() > maxRefusal+10 {
		t.Errorf("the answer to a query has %d bytes", w.Body.Len())
	}
}
