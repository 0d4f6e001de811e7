//go:build e2e

package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/e2e/real"
)

// gatewayDifferences are all differences between promferry gateway and a Pushgateway 1.5.1, as
// docs/gateway.md has them.
var gatewayDifferences = map[string]string{
	"slash":       "A slash that is written %2F belongs to the value.",
	"segments":    "Paths are never cleaned, and nothing is redirected.",
	"utf8":        "A value in the path that is not UTF-8 is refused, and that is all.",
	"le":          "A grouping label `le` is refused with a histogram.",
	"across":      "Groups do not refuse each other's families.",
	"own":         "Families of the gateway's own refuse nobody.",
	"match":       "Groups can be deleted by matchers.",
	"empty":       "A label without a value is no label.",
	"twice":       "A bucket or a quantile that comes twice is refused.",
	"merged":      "A protobuf family that comes twice is kept whole.",
	"nameless":    "A family without a name is refused.",
	"gaugehisto":  "Gauge histograms are refused in protobuf as they are in text.",
	"names":       "Names are UTF-8, in text and protobuf.",
	"negative":    "A histogram with a negative count is refused.",
	"fractions":   "Counts of a histogram may be fractions.",
	"help":        "A HELP that is not UTF-8 is mended.",
	"snappy":      "Snappy is unpacked, and encodings are known in capitals.",
	"base64":      "A job in bad base64 blocks nobody.",
	"cut":         "A body that is cut is refused.",
	"empty push":  "A family without series is not kept.",
	"duplicates":  "A series may stand in two groups.",
	"labelsnamed": "A family called labels does not hide the labels of its group in /api/v1/metrics.",
}

// TestGatewayDifferencesDocumented checks that the page for users has each difference.
func TestGatewayDifferencesDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "docs", "gateway.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, sentence := range gatewayDifferences {
		if !strings.Contains(string(page), "**"+sentence+"**") {
			t.Errorf("docs/gateway.md has no **%s**", sentence)
		}
	}
	if got := strings.Count(string(page), "\n- **"); got != len(gatewayDifferences) {
		t.Errorf("docs/gateway.md has %d differences, and the contract test knows %d", got, len(gatewayDifferences))
	}
}

// A gatewayRequest is sent to both gateways.
type gatewayRequest struct {
	method   string // empty: PUT
	path     string // empty: that of a group
	typ      string
	encoding string
	body     string
	chunked  bool // sent without its length
}

// A gatewayCase is a conversation with both gateways, which begin without groups.
type gatewayCase struct {
	name     string
	requests []gatewayRequest
	// status is that of the last request to a Pushgateway 1.5.1.
	status int
	// differs names the difference that there is, one of gatewayDifferences; ours is then what
	// we answer. Empty: we answer the same, and have the same groups.
	differs string
	ours    int
}

const contractGroup = "/metrics/job/raw/instance/i"

func packedWith(t *testing.T, w io.WriteCloser, b *bytes.Buffer, text string) string {
	t.Helper()
	_, err := io.WriteString(w, text)
	if closeErr := w.Close(); err != nil || closeErr != nil {
		t.Fatal(err, closeErr)
	}
	return b.String()
}

func put1(path, body string) []gatewayRequest { return []gatewayRequest{{path: path, body: body}} }

func ask1(method, path string) []gatewayRequest {
	return []gatewayRequest{{method: method, path: path, body: "a 1\n"}}
}

// gatewayCases are all rows that facts about a Pushgateway were measured in.
func gatewayCases(t *testing.T) []gatewayCase {
	var b bytes.Buffer
	gzipped := packedWith(t, gzip.NewWriter(&b), &b, "a 1\nb 1\n")
	b.Reset()
	snappied := packedWith(t, snappy.NewBufferedWriter(&b), &b, "a 1\n")
	const histogram = "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n"
	const summary = "# TYPE s summary\ns_sum 1\ns_count 1\n"
	cases := []gatewayCase{
		{name: "group by job only", requests: put1("/metrics/job/j", "a 1\n"), status: 200},
		{name: "second group", requests: []gatewayRequest{{path: "/metrics/job/j", body: "a 1\n"}, {path: "/metrics/job/k", body: "a 2\n"}}, status: 200},
		{name: "gzip", requests: []gatewayRequest{{encoding: "gzip", body: gzipped}}, status: 200},
		{name: "GZIP", requests: []gatewayRequest{{encoding: "GZIP", body: gzipped}}, status: 400, differs: "snappy", ours: 200},
		{name: "gzip header, plain body", requests: []gatewayRequest{{encoding: "gzip", body: "a 1\n"}}, status: 400},
		{name: "gzip body, no header", requests: []gatewayRequest{{body: gzipped}}, status: 400},
		{name: "gzip cut", requests: []gatewayRequest{{encoding: "gzip", body: gzipped[:5]}}, status: 400},
		{name: "gzip cut at its end", requests: []gatewayRequest{{encoding: "gzip", body: gzipped[:len(gzipped)-9]}}, status: 200, differs: "cut", ours: 400},
		{name: "unknown encoding", requests: []gatewayRequest{{encoding: "zstd", body: gzipped}}, status: 400},
		{name: "unknown encoding, plain body", requests: []gatewayRequest{{encoding: "identity", body: "a 1\n"}}, status: 200},
		{name: "chunked", requests: []gatewayRequest{{body: "a 1\n", chunked: true}}, status: 200},
		{name: "snappy", requests: []gatewayRequest{{encoding: "snappy", body: snappied}}, status: 400, differs: "snappy", ours: 200},
		{name: "GET of a group", requests: ask1("GET", contractGroup), status: 405},
		{name: "HEAD of a group", requests: ask1("HEAD", contractGroup), status: 405},
		{name: "PATCH of a group", requests: ask1("PATCH", contractGroup), status: 405},
		{name: "OPTIONS of a group", requests: ask1("OPTIONS", contractGroup), status: 200},
		{name: "PUT of all", requests: ask1("PUT", "/metrics"), status: 405},
		{name: "PUT of the listing", requests: ask1("PUT", "/api/v1/metrics"), status: 405, differs: "match", ours: 405},
		{name: "DELETE by match", requests: append(put1("/metrics/job/a/instance/x", "a 1\n"), put1("/metrics/job/b", "a 1\n")[0],
			gatewayRequest{method: "DELETE", path: `/api/v1/metrics?match[]={job="a"}`}), status: 405, differs: "match", ours: 200},
		{name: "POST of wipe", requests: ask1("POST", "/api/v1/admin/wipe"), status: 405},
		{name: "wipe", requests: append(put1("/metrics/job/j", "a 1\n"), gatewayRequest{path: "/api/v1/admin/wipe"}), status: 202},
		{name: "status", requests: ask1("GET", "/api/v1/status"), status: 200},
		{name: "healthy", requests: ask1("GET", "/-/healthy"), status: 200},
		{name: "ready", requests: ask1("GET", "/-/ready"), status: 200},
		{name: "trailing slash", requests: put1(contractGroup+"/", "a 1\n"), status: 400},
		{name: "odd components", requests: put1("/metrics/job/j/instance", "a 1\n"), status: 400},
		{name: "no job first", requests: put1("/metrics/instance/i", "a 1\n"), status: 404},
		{name: "wrong prefix", requests: put1("/push/job/j", "a 1\n"), status: 404},
		{name: "job without a value", requests: put1("/metrics/job/", "a 1\n"), status: 307, differs: "segments", ours: 400},
		{name: "two slashes", requests: put1("/metrics/job/j/l//m/v", "a 1\n"), status: 301, differs: "segments", ours: 400},
		{name: "dot", requests: put1("/metrics/job/j/l/.", "a 1\n"), status: 301, differs: "segments", ours: 200},
		{name: "dots", requests: put1("/metrics/job/j/l/..", "a 1\n"), status: 301, differs: "segments", ours: 200},
		{name: "empty job", requests: put1("/metrics/job@base64/=", "a 1\n"), status: 400},
		{name: "bad base64", requests: put1("/metrics/job/j/l@base64/a$b", "a 1\n"), status: 400},
		{name: "base64 of the other alphabet", requests: put1("/metrics/job/j/l@base64/+++-", "a 1\n"), status: 400},
		{name: "no label name", requests: put1("/metrics/job/j/my-label/v", "a 1\n"), status: 400},
		{name: "reserved label name", requests: put1("/metrics/job/j/__foo/v", "a 1\n"), status: 400},
		{name: "name as a label", requests: put1("/metrics/job/j/__name__/v", "a 1\n"), status: 400},
		{name: "label twice in the path", requests: put1("/metrics/job/j/l/1/l/2", "a 1\n"), status: 200},
		{name: "job twice in the path", requests: put1("/metrics/job/j/job/k", "a 1\n"), status: 200},
		{name: "slash in percent", requests: put1("/metrics/job/j/path/%2Fvar%2Ftmp", "a 1\n"), status: 301, differs: "slash", ours: 200},
		{name: "percent", requests: put1("/metrics/job/j/l/a%20b%C3%BC", "a 1\n"), status: 200},
		{name: "base64", requests: put1("/metrics/job@base64/L3Zhci90bXA/path@base64/L3Zhci90bXA=", "a 1\n"), status: 200},
		{name: "@ in percent", requests: put1("/metrics/job%40base64/YWJj/l%40base64/L3Zhci90bXA", "a 1\n"), status: 200},
		{name: "empty value", requests: put1("/metrics/job/j/l@base64/=", "a 1\n"), status: 200, differs: "empty", ours: 200},
		{name: "value not UTF-8", requests: put1("/metrics/job/j/l/%ff%fe", "a 1\n"), status: 400, differs: "utf8", ours: 400},
		{name: "job not UTF-8", requests: put1("/metrics/job/%ff", "a 1\n"), status: 400, differs: "utf8", ours: 400},

		{name: "PUT replaces", requests: []gatewayRequest{{body: "a 1\nb 1\n"}, {body: "c 1\n"}}, status: 200},
		{name: "POST replaces families", requests: []gatewayRequest{{body: "a{k=\"1\"} 1\nb 1\n"}, {method: "POST", body: "a{k=\"2\"} 1\n"}}, status: 200},
		{name: "POST makes a group", requests: []gatewayRequest{{method: "POST", body: "a 1\n"}}, status: 200},
		{name: "DELETE", requests: append(put1(contractGroup, "a 1\n"), gatewayRequest{method: "DELETE"}), status: 202},
		{name: "DELETE of nothing", requests: []gatewayRequest{{method: "DELETE"}}, status: 202},
		{name: "DELETE of another key", requests: append(put1(contractGroup, "a 1\n"), gatewayRequest{method: "DELETE", path: "/metrics/job/raw"}), status: 202},
		{name: "empty POST", requests: append(put1(contractGroup, "a 1\n"), gatewayRequest{method: "POST"}), status: 200},
		{name: "refused push keeps the group", requests: append(put1(contractGroup, "a 1\n"), gatewayRequest{body: "a 1 1700000000000\n"}), status: 400},
		{name: "labels of the key replace those of series", requests: put1(contractGroup, "a{job=\"x\",instance=\"y\",l=\"z\"} 1\n"), status: 200},
		{name: "instance of the body", requests: put1("/metrics/job/j", "a{instance=\"x\"} 1\n"), status: 200},

		{name: "another type in another group", requests: []gatewayRequest{{path: "/metrics/job/j", body: "# TYPE a gauge\na 1\n"}, {body: "# TYPE a counter\na 1\n"}}, status: 400, differs: "across", ours: 200},
		{name: "no type in another group", requests: []gatewayRequest{{path: "/metrics/job/j", body: "# TYPE a gauge\na 1\n"}, {body: "a 1\n"}}, status: 400, differs: "across", ours: 200},
		{name: "another type by POST", requests: []gatewayRequest{{path: "/metrics/job/j", body: "# TYPE a gauge\na 1\n"}, {body: "# TYPE a gauge\na 1\n"}, {method: "POST", body: "# TYPE a counter\na 1\n"}}, status: 400, differs: "across", ours: 200},
		{name: "another type by PUT", requests: []gatewayRequest{{body: "# TYPE a gauge\na 1\n"}, {body: "# TYPE a counter\na 1\n"}}, status: 200},
		{name: "family of the gateway's own", requests: put1(contractGroup, "go_goroutines 1\n"), status: 400, differs: "own", ours: 200},
		{name: "summary, and its count in another group", requests: []gatewayRequest{{path: "/metrics/job/j", body: summary}, {body: "# TYPE s_count gauge\ns_count 1\n"}}, status: 400, differs: "across", ours: 200},
		{name: "histogram, and its buckets in another group", requests: []gatewayRequest{{path: "/metrics/job/j", body: "# TYPE h_bucket gauge\nh_bucket 1\n"}, {body: histogram}}, status: 400, differs: "across", ours: 200},
		{name: "summary, and its count by POST", requests: []gatewayRequest{{body: summary}, {method: "POST", body: "# TYPE s_count gauge\ns_count 1\n"}}, status: 400},
		{name: "another HELP", requests: []gatewayRequest{{path: "/metrics/job/j", body: "# HELP a A.\na 1\n"}, {body: "# HELP a B.\na 1\n"}}, status: 200},
		{name: "series of another group", requests: []gatewayRequest{{path: "/metrics/job/j", body: "a{l=\"1\"} 1\n"}, {path: "/metrics/job/j/l/1", body: "a 1\n"}}, status: 400, differs: "duplicates", ours: 200},
		{name: "quantile and a summary", requests: put1("/metrics/job/j/quantile/0.9", summary), status: 400},
		{name: "quantile and a gauge", requests: put1("/metrics/job/j/quantile/0.9", "a 1\n"), status: 200},
		{name: "le and a histogram", requests: put1("/metrics/job/j/le/0.9", histogram), status: 200, differs: "le", ours: 400},
		{name: "le and a gauge", requests: put1("/metrics/job/j/le/0.9", "a 1\n"), status: 200},
		{name: "negative count", requests: put1(contractGroup, "# TYPE h histogram\nh_bucket{le=\"+Inf\"} -1\nh_count -1\n"), status: 200, differs: "negative", ours: 400},
		{name: "fractional count", requests: put1(contractGroup, "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3.5\nh_count 3.5\n"), status: 200, differs: "fractions", ours: 200},
		{name: "family called labels", requests: put1(contractGroup, "labels 1\n"), status: 200, differs: "labelsnamed", ours: 200},
		{name: "partial content type", requests: []gatewayRequest{{typ: "application/vnd.google.protobuf", body: delimited(untyped("a"))}}, status: 400},
		{name: "protobuf", requests: []gatewayRequest{{typ: protobufType, body: delimited(untyped("a"), untyped("b"))}}, status: 200},
		{name: "protobuf duplicate", requests: []gatewayRequest{{typ: protobufType, body: delimited(&dto.MetricFamily{
			Name: new("a"), Type: dto.MetricType_UNTYPED.Enum(), Metric: append(untyped("a").Metric, untyped("a").Metric...),
		})}}, status: 400},
		{name: "protobuf empty family by POST", requests: append(put1(contractGroup, "a 1\nb 1\n"), gatewayRequest{method: "POST", typ: protobufType, body: delimited(&dto.MetricFamily{Name: new("a")})}), status: 200, differs: "empty push", ours: 200},
		{name: "JSON is text", requests: []gatewayRequest{{typ: "application/json", body: "a 1\n"}}, status: 200},
		{name: "protobuf label name with a colon", requests: []gatewayRequest{{typ: protobufType, body: delimited(untyped("a", "b:c", "1"))}}, status: 400},
	}
	// The same accidents as on the way through the agent; each as it is.
	differ := map[string]gatewayCase{
		"label without a value":            {differs: "empty", ours: 400},
		"bucket twice":                     {differs: "twice", ours: 400},
		"quantile twice":                   {differs: "twice", ours: 400},
		"HELP not UTF-8":                   {differs: "help", ours: 200},
		"protobuf HELP not UTF-8":          {differs: "help", ours: 200},
		"protobuf family twice":            {differs: "merged", ours: 200},
		"protobuf without a name":          {differs: "nameless", ours: 400},
		"protobuf gauge histogram":         {differs: "gaugehisto", ours: 400},
		"UTF-8 name":                       {differs: "names", ours: 200},
		"UTF-8 label name":                 {differs: "names", ours: 200},
		"protobuf UTF-8 name":              {differs: "names", ours: 200},
		"protobuf name that is none":       {differs: "names", ours: 200},
		"protobuf label name that is none": {differs: "names", ours: 200},
		"protobuf empty family":            {differs: "empty push", ours: 200},
		"name of the Pushgateway's own":    {},
	}
	for _, a := range accidents {
		c := gatewayCase{name: "accident: " + a.name, requests: []gatewayRequest{{typ: a.contentType, body: a.body}}, status: a.status}
		if c.status == 0 {
			c.status = http.StatusBadRequest
		}
		c.differs, c.ours = differ[a.name].differs, differ[a.name].ours
		cases = append(cases, c)
	}
	return cases
}

// startGateway starts a promferry gateway, which the helpers for a Pushgateway know as one.
func startGateway(t *testing.T, flags ...string) *real.Gateway {
	t.Helper()
	s, err := real.Serve(t.Context(), "", real.Command{Path: promferry(t), Args: append([]string{"gateway", "--state.dir=" + t.TempDir()}, flags...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	return &real.Gateway{Server: s}
}

// TestGatewayContract has the same conversations with promferry gateway and with a real
// Pushgateway. Each difference is intended; where there is none in the table, there is none.
func TestGatewayContract(t *testing.T) {
	t.Parallel()
	theirs, ours := startPushgateway(t, "--web.enable-admin-api"), startGateway(t, "--web.enable-admin-api")
	used := map[string]bool{"base64": true} // TestGatewayContractBase64 shows it.
	for _, test := range gatewayCases(t) {
		t.Run(test.name, func(t *testing.T) {
			their, our := converse(t, theirs, test.requests), converse(t, ours, test.requests)
			if their.status != test.status {
				t.Errorf("the Pushgateway's status is %d, want %d: %s", their.status, test.status, their.answer)
			}
			if our.pageErr != nil {
				t.Errorf("our page: %v", our.pageErr)
			}
			if test.differs == "" {
				if our.status != their.status || our.allow != their.allow || our.groups != their.groups {
					t.Errorf("we answer %d (Allow %q) %s\nand have\n%s\nthe Pushgateway %d (Allow %q) %s\nand has\n%s",
						our.status, our.allow, our.answer, our.groups, their.status, their.allow, their.answer, their.groups)
				}
				return
			}
			used[test.differs] = true
			if gatewayDifferences[test.differs] == "" {
				t.Errorf("no such difference: %s", test.differs)
			}
			if our.status != test.ours {
				t.Errorf("our status is %d, want %d: %s", our.status, test.ours, our.answer)
			}
			if our.status == their.status && our.allow == their.allow && our.groups == their.groups && (their.pageErr == nil) == (our.pageErr == nil) {
				t.Errorf("there is no difference %q: status %d,\n%s", test.differs, our.status, our.groups)
			}
		})
	}
	for name := range gatewayDifferences {
		if !used[name] {
			t.Errorf("no conversation shows the difference %q", name)
		}
	}
}

// TestGatewayContractBase64 puts a job in bad base64, after which a Pushgateway 1.5.1 answers no
// push whose job is in base64.
func TestGatewayContractBase64(t *testing.T) {
	t.Parallel()
	impatient := &http.Client{Timeout: 2 * time.Second}
	put := func(g *real.Gateway) error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, g.URL+"/metrics/job@base64/YWJj", strings.NewReader("a 1\n"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := impatient.Do(req)
		if err == nil {
			resp.Body.Close()
			wantStatus(t, resp.StatusCode, http.StatusOK)
		}
		return err
	}
	theirs, ours := startPushgateway(t), startGateway(t)
	for _, g := range []*real.Gateway{theirs, ours} {
		if err := put(g); err != nil {
			t.Fatal(err)
		}
		status, _ := send(t, http.MethodPut, g.URL+"/metrics/job@base64/a$b", "", []byte("a 1\n"))
		wantStatus(t, status, http.StatusBadRequest)
	}
	if err := put(ours); err != nil {
		t.Errorf("we: %v", err)
	}
	if err := put(theirs); err == nil {
		t.Error("the Pushgateway answers")
	}
}

// outcome is how a conversation ended.
type outcome struct {
	status        int
	allow, answer string
	groups        string // with their families and numbers of series
	pageErr       error  // of the page with all groups: what Prometheus would not read
}

func converse(t *testing.T, g *real.Gateway, requests []gatewayRequest) outcome {
	t.Helper()
	if status, answer := send(t, http.MethodPut, g.URL+"/api/v1/admin/wipe", "", nil); status != http.StatusAccepted {
		t.Fatalf("wipe: status %d: %s", status, answer)
	}
	waitGroups(t, g, 0)
	var o outcome
	for _, r := range requests {
		method, path := r.method, r.path
		if method == "" {
			method = http.MethodPut
		}
		if path == "" {
			path = contractGroup
		}
		req, err := http.NewRequestWithContext(t.Context(), method, g.URL+path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		if r.chunked {
			req.ContentLength = -1
		}
		for name, value := range map[string]string{"Content-Type": r.typ, "Content-Encoding": r.encoding} {
			if value != "" {
				req.Header.Set(name, value)
			}
		}
		resp, err := noRedirects.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		resp.Body.Close()
		o.status, o.allow, o.answer = resp.StatusCode, resp.Header.Get("Allow"), string(answer)
	}
	if last := requests[len(requests)-1]; o.status == http.StatusAccepted && last.method == http.MethodDelete && len(requests) > 1 && (last.path == "" || last.path == requests[0].path) ||
		last.path == "/api/v1/admin/wipe" && o.status == http.StatusAccepted {
		waitGroups(t, g, 0) // A Pushgateway deletes in the background.
	}
	groups, err := g.Groups(t.Context())
	var lines []string
	if err != nil {
		lines = []string{err.Error()}
	}
	for _, group := range groups {
		line := fmt.Sprintf("%v ok=%v:", group.Labels, group.LastPushSuccessful)
		for _, name := range slices.Sorted(maps.Keys(group.Families)) {
			line += fmt.Sprintf(" %s %s", name, group.Families[name].Type)
			for _, m := range group.Families[name].Metrics {
				line += fmt.Sprintf(" %v", m.Labels)
				if !strings.HasPrefix(name, "push_") { // Times differ.
					line += " " + m.Value + m.Count
				}
			}
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	o.groups = strings.Join(lines, "\n")
	page, err := g.Get(t.Context(), "/metrics")
	if err == nil {
		_, err = readAsPrometheus(page)
	}
	o.pageErr = err
	return o
}
