//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/exposition"
)

// oracleFor is how long TestGatewayOracle makes up pushes, and oracleSeed what they are made
// from, unless ORACLE_FOR and ORACLE_SEED say otherwise.
const (
	oracleFor  = 20 * time.Second
	oracleSeed = 1
)

// TestGatewayOracle sends made-up pushes, of which most are almost valid, to promferry gateway
// and to a real Pushgateway: the same bytes have the same verdict, and leave the same series,
// but for the differences that docs/gateway.md has. A real Prometheus then reads our pages.
func TestGatewayOracle(t *testing.T) {
	t.Parallel()
	duration, seed := oracleFor, uint64(oracleSeed)
	var err error
	if s := os.Getenv("ORACLE_FOR"); s != "" {
		if duration, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	if s := os.Getenv("ORACLE_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	o := newOracle(t)
	end := time.Now().Add(duration)
	n := uint64(0)
	for ; time.Now().Before(end) && o.faults < 20; n++ {
		o.compare(t, fmt.Sprintf("seed %d, input %d", seed, n), newMaker(seed, n).input())
	}
	t.Logf("seed %d: %d inputs in %v; pushes that both took %d, that both refused %d, by difference %v",
		seed, n, duration, o.taken, o.refused, o.differed)
	if o.taken < 100 || o.refused < 100 {
		t.Error("that is too little to show anything")
	}
	o.checkWithPrometheus(t)
}

// FuzzGatewayOracle does the same with pushes that differed before, and with what the fuzzer
// makes of them.
func FuzzGatewayOracle(f *testing.F) {
	o := newOracle(f)
	for _, in := range oracleFinds() {
		if !in[0].sendable() {
			f.Fatalf("it would not be compared: %q", in[0])
		}
		second := oraclePush{}
		if len(in) > 1 {
			second = in[1]
		}
		f.Add(in[0].method == http.MethodPost, in[0].key, in[0].typ, in[0].encoding, []byte(in[0].body), second.method, []byte(second.body))
	}
	f.Fuzz(func(t *testing.T, post bool, key, typ, encoding string, body []byte, method string, again []byte) {
		first := oraclePush{method: http.MethodPut, key: key, typ: typ, encoding: encoding, body: string(body)}
		if post {
			first.method = http.MethodPost
		}
		in := []oraclePush{first}
		switch method {
		case "":
		case http.MethodPut, http.MethodPost:
			second := first
			second.method, second.body = method, string(again)
			in = append(in, second)
		default:
			return // The fuzzer's own: no such request is compared.
		}
		if !first.sendable() {
			return // As above.
		}
		o.compare(t, fmt.Sprintf("%q", in), in)
	})
}

// An oraclePush is sent to both gateways.
type oraclePush struct {
	method   string
	key      string // what stands after /metrics/job, escaped
	typ      string
	encoding string
	body     string
}

var (
	sendableKey    = regexp.MustCompile(`^(@base64|%40base64)?/[\x21-\x7e]{0,1000}$`)
	sendableHeader = regexp.MustCompile(`^[\t\x20-\x7e]*$`)
)

// sendable tells whether an HTTP client can send it, and whether it is for a group.
func (p oraclePush) sendable() bool {
	path, _, _ := strings.Cut(p.key, "?")
	_, err := url.PathUnescape(path) // net/http refuses others.
	return err == nil && sendableKey.MatchString(p.key) && sendableHeader.MatchString(p.typ) && sendableHeader.MatchString(p.encoding) && len(p.body) <= 64<<10
}

// An oracle has both gateways.
type oracle struct {
	ours, theirs           *real.Gateway
	client                 *http.Client
	taken, refused, faults int
	differed               map[string]int
	pages                  map[string]bool // of ours, for Prometheus
}

func newOracle(tb testing.TB) *oracle {
	tb.Helper()
	path, err := real.Promferry(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	ours, err := real.Serve(tb.Context(), "", real.Command{Path: path, Args: []string{"gateway", "--state.dir=" + tb.TempDir(), "--web.enable-admin-api"}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ours.Kill() })
	theirs, err := real.Pushgateway(tb.Context(), "", "--web.enable-admin-api")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { theirs.Kill() })
	return &oracle{
		ours: &real.Gateway{Server: ours}, theirs: theirs, client: &http.Client{
			Timeout: 10 * time.Second, CheckRedirect: noRedirects.CheckRedirect,
			Transport: &http.Transport{DisableCompression: true},
		},
		differed: make(map[string]int), pages: make(map[string]bool),
	}
}

// oracleAnchor is a group that is always there. A push to it is answered when those before it,
// and deletions, are done.
var oracleAnchor = oraclePush{method: http.MethodPut, key: "/anchor", body: "anchor 1\n"}

const anchorLine = `anchor{instance="",job="anchor"} 1`

// slow is how long we take for no push that is as small as these.
const slow = 2 * time.Second

// compare has a conversation with both, and finds what differs.
func (o *oracle) compare(t *testing.T, name string, pushes []oraclePush) {
	t.Helper()
	fault := func(format string, args ...any) {
		t.Helper()
		o.faults++
		t.Errorf("%s: "+format+"\n%s", slices.Concat([]any{name}, args, []any{describe(pushes)})...)
	}
	for _, g := range []*real.Gateway{o.ours, o.theirs} {
		if status, answer, err := o.send(t.Context(), g, oraclePush{method: http.MethodPut}, "/api/v1/admin/wipe"); err != nil || status != http.StatusAccepted {
			t.Fatalf("%s: wipe: status %d: %s, %v", name, status, answer, err)
		}
		if status, answer, err := o.push(t.Context(), g, oracleAnchor); err != nil || status != http.StatusOK {
			t.Fatalf("%s: anchor: status %d: %s, %v", name, status, answer, err)
		}
	}
	var differs []string // of all pushes so far: POST keeps what was there
	apart := false       // the Pushgateway was not sent all pushes
	before := anchorLine
	for _, p := range pushes {
		i := intended(p)
		differs = append(differs, i.differs...)
		for _, name := range slices.Compact(slices.Sorted(slices.Values(i.differs))) {
			o.differed[name]++
		}
		start := time.Now()
		ourStatus, ourAnswer, err := o.push(t.Context(), o.ours, p)
		if err != nil {
			fault("we: %v", err)
			return
		}
		if took := time.Since(start); took > slow {
			fault("we took %v", took)
		}
		our, err := o.ourLines(t, slices.Contains(differs, "names"))
		if err != nil {
			fault("our page: %v", err)
			return
		}
		if i.refused {
			apart = true
			if ourStatus != http.StatusBadRequest {
				fault("we answer %d %s, and the documentation (%v) that it is refused", ourStatus, ourAnswer, i.differs)
			}
		}
		after := withoutTimes(our)
		if ourStatus != http.StatusOK && after != before {
			fault("it was refused, and we had\n%s\nand have\n%s", before, after)
		}
		before = after
		if i.refused {
			continue
		}
		theirStatus, theirAnswer, err := o.push(t.Context(), o.theirs, i.theirs)
		if err != nil {
			t.Fatalf("%s: the Pushgateway: %v\n%s", name, err, describe(pushes))
		}
		page, err := o.get(t.Context(), o.theirs, "/metrics", "")
		if err != nil {
			fault("the Pushgateway's page: %v", err)
			return
		}
		if i.unknown {
			return
		}
		if ourStatus == http.StatusOK {
			o.taken++
		} else {
			o.refused++
		}
		if ourStatus != theirStatus {
			fault("differs in %v: we answer %d %s, the Pushgateway %d %s", i.differs, ourStatus, ourAnswer, theirStatus, theirAnswer)
			return
		}
		their := linesOf(page)
		if slices.Contains(differs, "names") || slices.Contains(differs, "fractions") {
			a, b := after, withoutTimes(their)
			if strings.Count(a, "\n") != strings.Count(b, "\n") {
				fault("differs in %v: we have\n%s\nthe Pushgateway\n%s", differs, a, b)
			}
			continue
		}
		a, b := strings.Join(our, "\n"), strings.Join(their, "\n")
		if apart {
			a, b = after, withoutTimes(their)
		}
		if a != b {
			fault("differs in %v: we answer %d and have\n%s\nthe Pushgateway has\n%s", differs, ourStatus, a, b)
		}
	}
	key, _, _ := strings.Cut(pushes[0].key, "?")
	for _, accept := range []string{"", exposition.Accept} {
		status, body, err := o.send(t.Context(), o.ours, oraclePush{method: http.MethodGet, typ: accept}, "/groups/job"+key+"/metrics")
		if err != nil {
			fault("our target: %v", err)
		}
		if status != http.StatusOK {
			continue
		}
		// What holds nothing is text for everybody.
		if accept == "" || strings.HasPrefix(body, "# No push to the group ever succeeded") {
			if _, err = readAsPrometheus([]byte(body)); len(o.pages) < 300 {
				o.pages[body] = true
			}
		} else {
			_, err = readDelimited([]byte(body))
		}
		if err != nil {
			fault("our target: %v\n%s", err, body)
		}
	}
}

func describe(pushes []oraclePush) string {
	var b strings.Builder
	for _, p := range pushes {
		fmt.Fprintf(&b, "%s /metrics/job%s, type %q, encoding %q, body %q\n", p.method, p.key, p.typ, p.encoding, p.body)
		if i := intended(p); i.theirs != p {
			fmt.Fprintf(&b, "  in its place: /metrics/job%s, body %q\n", i.theirs.key, i.theirs.body)
		}
	}
	return b.String()
}

// ourLines returns the samples on our page, which must be good for an old Prometheus, and
// with UTF-8 names for one that knows them.
func (o *oracle) ourLines(t *testing.T, names bool) ([]string, error) {
	t.Helper()
	page, err := o.get(t.Context(), o.ours, "/metrics", "text/plain;version=0.0.4;escaping=allow-utf-8")
	if err != nil {
		return nil, err
	}
	old := page
	if names {
		parser := expfmt.NewTextParser(model.UTF8Validation)
		if _, err := parser.TextToMetricFamilies(bytes.NewReader(page)); err != nil || !utf8.Valid(page) {
			return nil, fmt.Errorf("in UTF-8: %w\n%s", err, page)
		}
		if old, err = o.get(t.Context(), o.ours, "/metrics", ""); err != nil {
			return nil, err
		}
	}
	if _, err := readAsPrometheus(old); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, old)
	}
	lines := linesOf(page)
	if !slices.Contains(lines, anchorLine) {
		return nil, errors.New("the anchor is lost")
	}
	for i := range lines[1:] {
		a, b := lines[i], lines[i+1]
		if a[:strings.LastIndexByte(a, ' ')] == b[:strings.LastIndexByte(b, ' ')] {
			return nil, fmt.Errorf("series twice:\n%s\n%s", a, b)
		}
	}
	return lines, nil
}

var pushTimes = regexp.MustCompile(`^(push_(?:failure_)?time_seconds\{.*\}) [1-9].*$`)

// linesOf returns the samples of all groups on a page, sorted. Times are 1 or 0.
func linesOf(page []byte) []string {
	var lines []string
	for line := range strings.Lines(string(page)) {
		if !strings.HasPrefix(line, "#") && strings.Contains(line, `job="`) {
			lines = append(lines, pushTimes.ReplaceAllString(strings.TrimSuffix(line, "\n"), "$1 1"))
		}
	}
	slices.Sort(lines)
	return lines
}

func withoutTimes(lines []string) string {
	var kept []string
	for _, line := range lines {
		if !strings.HasPrefix(line, "push_time_seconds{") && !strings.HasPrefix(line, "push_failure_time_seconds{") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n")
}

func (o *oracle) push(ctx context.Context, g *real.Gateway, p oraclePush) (status int, answer string, err error) {
	return o.send(ctx, g, p, "/metrics/job"+p.key)
}

func (o *oracle) get(ctx context.Context, g *real.Gateway, path, accept string) ([]byte, error) {
	status, answer, err := o.send(ctx, g, oraclePush{method: http.MethodGet, typ: accept}, path)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d: %s", status, answer)
	}
	return []byte(answer), err
}

// send sends a request with exactly this path.
func (o *oracle) send(ctx context.Context, g *real.Gateway, p oraclePush, path string) (status int, answer string, err error) {
	req, err := http.NewRequestWithContext(ctx, p.method, g.URL, strings.NewReader(p.body))
	if err != nil {
		return 0, "", err
	}
	req.URL.Opaque = path
	header := "Content-Type"
	if p.method == http.MethodGet {
		header = "Accept"
	}
	for name, value := range map[string]string{header: p.typ, "Content-Encoding": p.encoding} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	resp, err := o.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// checkWithPrometheus has a real Prometheus scrape what we exposed.
func (o *oracle) checkWithPrometheus(t *testing.T) {
	t.Helper()
	pages := slices.Sorted(maps.Keys(o.pages))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.FormValue("n"))
		if err != nil || n >= len(pages) {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", textType)
		_, _ = io.WriteString(w, pages[n])
	}))
	defer server.Close()
	targets := "- job_name: page\n  honor_labels: true\n  static_configs:\n"
	for n := range pages {
		targets += fmt.Sprintf("  - targets: [%q]\n    labels: {__param_n: '%d', page: '%d'}\n", strings.TrimPrefix(server.URL, "http://"), n, n)
	}
	p, err := real.Prometheus(t.Context(), t.TempDir(), targets)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	waitQuery(t, p, fmt.Sprintf("count(up{page!=''}) == %d", len(pages)), exactly(float64(len(pages))))
	down, err := p.Query(t.Context(), "up{page!=''} == 0")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range down {
		n, _ := strconv.Atoi(s.Labels["page"])
		t.Errorf("Prometheus does not read\n%s", pages[n])
	}
	t.Logf("Prometheus read %d pages", len(pages)-len(down))
}
