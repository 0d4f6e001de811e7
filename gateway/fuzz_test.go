package gateway

import (
	"encoding/json"
	"net/http"
	"reflect"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"

	"github.com/promferry/promferry/exposition"
)

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
		g := newTest(t, nil)
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
		// What would be on disk is what is in memory, family by family.
		for _, s := range g.store.states(time.Now()) {
			if s.content == nil {
				continue
			}
			var r record
			if err := json.Unmarshal(s.record(time.Now()).record, &r); err != nil || r.Content == nil != !s.durable {
				t.Fatal(err)
			}
			families := familiesOf(t, s.content)
			if r.Content == nil {
				continue
			}
			again, err := r.Content.restored()
			if err != nil {
				t.Fatal(err)
			}
			if got := familiesOf(t, again); !reflect.DeepEqual(got, families) || len(again.clashing) != len(s.content.clashing) {
				t.Fatalf("%v is kept as %v", families, got)
			}
		}
	})
}
