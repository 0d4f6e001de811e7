//go:build e2e

package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/promferry/promferry/e2e/real"
)

const (
	protobufType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	// hostileLimit is the agent's --scrape.max-bytes: a node_exporter fits in well.
	hostileLimit = 1 << 20
	// hostileMemory bounds the agent's peak: it holds at most an exposition of a MiB of
	// each of some thirty targets at a time, read and encoded.
	hostileMemory = 300 << 20
)

// A hostile target, and what one has a right to expect of it.
type hostile struct {
	name    string
	handler http.HandlerFunc
	// reason is that of the failed scrapes; empty for a target that is up nevertheless.
	reason string
	// families are those that arrive of it.
	families []string
	// left is the reason for which something is left out, if it is.
	left string
	// labels are those of the series of the first family that do not come from the
	// grouping key; nil means none is looked at.
	labels map[string]string
}

var hostiles = []hostile{
	// Too much, too slow, too little.
	{name: "endless-body", handler: endless("a 1\n"), reason: "too_large"},
	{name: "endless-line", handler: endless("aaaaaaaa"), reason: "too_large"},
	{name: "endless-headers", handler: raw("HTTP/1.1 200 OK\r\n", strings.Repeat("X-Again: and again\r\n", 1<<20)), reason: "connect"},
	{name: "slow-drip", handler: drip, reason: "timeout"},
	{name: "silent", handler: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, reason: "timeout"},
	{name: "at-the-limit", handler: expose(textType, padded(hostileLimit)), families: []string{"a"}},
	{name: "over-the-limit", handler: expose(textType, padded(hostileLimit+1)), reason: "too_large"},
	{name: "gzip-bomb", handler: gzipped(bomb), reason: "too_large"},
	{name: "length-cut", handler: raw("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\na 1\n"), reason: "cut_short"},
	{name: "chunks-cut", handler: raw("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n4\r\na 1\n\r\n"), reason: "cut_short"},
	{name: "gzip-cut", handler: gzipped(func() []byte { return zip("a 1\n")[:15] }), reason: "cut_short"},
	{name: "line-cut", handler: raw("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\na 1\nb"), reason: "not_metrics"},
	{name: "empty", handler: expose(textType, ""), reason: "empty"},
	{name: "comments", handler: expose(textType, "# HELP a Nothing.\n# TYPE a gauge\n"), reason: "empty"},
	{name: "no-http", handler: raw("SSH-2.0-OpenSSH_9.2\r\n"), reason: "connect"},

	// Something else.
	{name: "error-page", handler: expose(textType, "<html><body>502 Bad Gateway</body></html>\n"), reason: "not_metrics"},
	{name: "html", handler: expose("text/html; charset=utf-8", "<html><body>Log in</body></html>\n"), reason: "not_metrics"},
	{name: "json", handler: expose("application/json", `{"a":1}`), reason: "not_metrics"},
	{name: "unavailable", handler: func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "a 1", http.StatusServiceUnavailable) }, reason: "status"},
	{name: "no-content", handler: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, reason: "status"},
	{name: "redirect", handler: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/at-the-limit", http.StatusFound) }, reason: "status"},
	{name: "not-gzip", handler: encoded("gzip", "# This is plain.\na 1\n"), reason: "not_metrics"},
	{name: "zstd", handler: encoded("zstd", "a 1\n"), reason: "not_metrics"},
	{name: "huge-length", handler: expose(protobufType, string(binary.AppendUvarint(nil, 1<<62))+"a"), reason: "not_metrics"},
	{name: "protobuf-cut", handler: expose(protobufType, delimited(untyped("a"))[:5]), reason: "not_metrics"},
	{name: "not-utf8-text", handler: expose(textType, "a{l=\"\xff\"} 1\nb 1\n"), reason: "not_metrics"},

	// Metrics that a Pushgateway would refuse, or break on.
	{name: "timestamps", handler: expose(textType, "a 1 1700000000000\nb 1\n"), families: []string{"a", "b"}},
	{name: "duplicates", handler: expose(textType, "a 1\na 2\nb 1\n"), families: []string{"a", "b"}, left: "duplicate"},
	{name: "nameless", handler: expose(protobufType, delimited(untyped(""), untyped("b"))), families: []string{"b"}, left: "name"},
	{name: "not-utf8", handler: expose(protobufType, delimited(untyped("a", "l", "\xff"), untyped("b"))), families: []string{"b"}, left: "label"},
	{
		name:     "own-families",
		handler:  expose(textType, "up 5\nscrape_duration_seconds 1e9\nscrape_foo 1\npromferry_expires_after_seconds 1e9\npromferry_info 1\nb 1\n"),
		families: []string{"b"}, left: "reserved",
	},
	{
		name: "own-labels", handler: expose(textType, `a{job="evil",instance="db-1",exported_job="x"} 1`+"\n"), families: []string{"a"},
		labels: map[string]string{"exported_exported_job": "evil", "exported_job": "x", "exported_instance": "db-1"},
	},
}

// TestHostileExporter lets one agent scrape many targets that mean no good next to a good
// one, and looks at the Pushgateway through some cycles.
func TestHostileExporter(t *testing.T) {
	t.Parallel()
	gateway := startPushgateway(t)
	good := startExporter(t)
	mux := http.NewServeMux()
	// One more is good and cut short in turn: a part of it must never be seen.
	mux.Handle("/flapping", flapping())
	for _, h := range hostiles {
		mux.Handle("/"+h.name, h.handler)
	}
	url := serve(t, mux)
	flags := []string{
		"--push.interval=2s", "--scrape.timeout=1s", "--instance=web-1", "--push.url=" + gateway.URL,
		fmt.Sprintf("--scrape.max-bytes=%dKiB", hostileLimit>>10),
		"--push.target=good=" + good.URL + "/metrics", "--push.target=flapping=" + url + "/flapping",
	}
	for _, h := range hostiles {
		flags = append(flags, "--push.target="+h.name+"="+url+"/"+h.name)
	}
	a := startAgent(t, flags...)

	since := a.count(t, "good", gateway)
	seen := make(map[string]bool) // up of the flapping one
	wait(t, "four more cycles of the good target", func(ctx context.Context) error {
		seen[checkAll(ctx, t, gateway)] = true
		scrapes, err := a.sum(ctx, "promferry_forwarder_scrapes_total", "target", "good")
		if err == nil && scrapes < since.scrapes+4 {
			err = fmt.Errorf("%v scrapes", scrapes)
		}
		return err
	})
	since.checkEachPut(t)
	if !seen["0"] || !seen["1"] {
		t.Errorf("of up of the flapping target only %v was seen", seen)
	}

	body, err := a.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	number := func(name string, labels ...string) float64 {
		value, err := sum(body, "promferry_forwarder_"+name, labels...)
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	if failures := number("scrape_failures_total", "target", "good"); failures != 0 {
		t.Errorf("%v scrapes of the good target failed", failures)
	}
	if failures := number("put_failures_total"); failures != 0 {
		t.Errorf("%v puts failed: the Pushgateway had to refuse what the agent should have", failures)
	}
	groups := groupsByJob(t, gateway)
	for _, h := range hostiles {
		if err := h.check(groups[h.name]); err != nil {
			t.Error(err)
		}
		failures := number("scrape_failures_total", "target", h.name)
		if h.reason == "" && failures != 0 || h.reason != "" && (failures == 0 || number("scrape_failures_total", "target", h.name, "reason", h.reason) != failures) {
			t.Errorf("%s: of %v failed scrapes not all have the reason %q", h.name, failures, h.reason)
		}
		left := number("left_out_families", "target", h.name)
		if h.left == "" && left != 0 || h.left != "" && number("left_out_families", "target", h.name, "reason", h.left) == 0 {
			t.Errorf("%s: %v left out, and not for the reason %q", h.name, left, h.left)
		}
	}
	if peak := peakMemory(t, a.PID()); peak > hostileMemory {
		t.Errorf("the agent took %d MiB", peak>>20)
	} else {
		t.Logf("the agent took %d MiB", peak>>20)
	}
	a.stop(t)
}

// check checks the group of a hostile target.
func (h hostile) check(g real.Group) error {
	up := "1"
	if h.reason != "" {
		up = "0"
	}
	errs := []error{checkGroup(g, up, h.families...)}
	if h.labels != nil && len(g.Families[h.families[0]].Metrics) == 1 {
		labels := maps.Clone(g.Families[h.families[0]].Metrics[0].Labels)
		for name := range g.Labels {
			delete(labels, name)
		}
		if !maps.Equal(labels, h.labels) {
			errs = append(errs, fmt.Errorf("%s: %s has the labels %v, want %v", h.name, h.families[0], labels, h.labels))
		}
	}
	if !g.LastPushSuccessful {
		errs = append(errs, fmt.Errorf("%s: the last put was refused", h.name))
	}
	return errors.Join(errs...)
}

// checkAll checks what holds at any time: the Pushgateway shows all its groups, and each
// is whole or down. It returns up of the flapping target, if there is one yet.
func checkAll(ctx context.Context, t *testing.T, gateway *real.Gateway) string {
	t.Helper()
	page, err := gateway.Get(ctx, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	groups, err := gateway.Groups(ctx)
	if err != nil {
		t.Fatal(err)
	}
	up := ""
	for _, g := range groups {
		job := g.Labels["job"]
		switch {
		case value(g, "up") == "0" && len(others(g)) > 0:
			t.Errorf("%s is down, and its group has %v", job, others(g))
		case value(g, "up") != "0" && value(g, "up") != "1":
			t.Errorf("%s: up is %q", job, value(g, "up"))
		case job == "good" && len(others(g)) < 50:
			t.Errorf("the good target is up with %v alone", others(g))
		case job == "flapping":
			if up = value(g, "up"); up == "1" && !slices.Equal(others(g), []string{"a", "z"}) {
				t.Errorf("%s: is up with %v", job, others(g))
			}
		}
		// A group may have come in between.
		if !bytes.Contains(page, fmt.Appendf(nil, `up{instance="web-1",job=%q} `, job)) && time.Since(pushedAt(g)) > 3*time.Second {
			t.Errorf("%s is not among what the Pushgateway exposes", job)
		}
	}
	return up
}

func pushedAt(g real.Group) time.Time {
	seconds, _ := strconv.ParseFloat(value(g, "push_time_seconds"), 64)
	return time.UnixMilli(int64(seconds * 1000))
}

func groupsByJob(t *testing.T, gateway *real.Gateway) map[string]real.Group {
	t.Helper()
	groups, err := gateway.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byJob := make(map[string]real.Group)
	for _, g := range groups {
		byJob[g.Labels["job"]] = g
	}
	return byJob
}

// peakMemory returns the most resident memory that a process has had, in bytes.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if match == nil {
		t.Fatalf("no VmHWM in\n%s", status)
	}
	kib, _ := strconv.ParseInt(string(match[1]), 10, 64)
	return kib << 10
}

// endless answers with a text again and again.
func endless(again string) http.HandlerFunc {
	block := []byte(strings.Repeat(again, 4096))
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", textType)
		for {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
}

// drip answers with a good line ten times a second.
func drip(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", textType)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		_, _ = fmt.Fprintf(w, "a{i=\"%d\"} 1\n", i)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// raw answers with bytes of its own, in place of HTTP.
func raw(parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		for _, part := range parts {
			if _, err := io.WriteString(conn, part); err != nil {
				return
			}
		}
	}
}

// flapping answers with a whole exposition, and with the begin of it, in turn.
func flapping() http.HandlerFunc {
	whole, cut := expose(textType, "a 1\nz 1\n"), raw("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 8\r\n\r\na 1\n")
	n := make(chan int, 1)
	n <- 0
	return func(w http.ResponseWriter, r *http.Request) {
		i := <-n
		n <- i + 1
		if i%2 == 0 {
			whole(w, r)
		} else {
			cut(w, r)
		}
	}
}

// encoded answers with a body that has this Content-Encoding, it says.
func encoded(encoding, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", encoding)
		expose(textType, body)(w, r)
	}
}

// gzipped answers with what is gzipped already.
func gzipped(body func() []byte) http.HandlerFunc {
	b := string(body())
	return encoded("gzip", b)
}

func zip(text string) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = io.WriteString(w, text)
	_ = w.Close()
	return b.Bytes()
}

// bomb returns some 100 KiB that are 100 MiB unzipped.
func bomb() []byte {
	return zip(strings.Repeat("# And then there was nothing but comments, line after line.\n", 100<<20/60))
}

// padded returns a text of n bytes with one sample.
func padded(n int) string {
	const sample = "a 1\n"
	return sample + "#" + strings.Repeat(" ", n-len(sample)-2) + "\n"
}

// untyped returns a family with one series, of the type that a text without types has:
// the Pushgateway would refuse two.
func untyped(name string, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Untyped: &dto.Untyped{Value: proto.Float64(1)}}
	for pair := range slices.Chunk(labels, 2) {
		m.Label = append(m.Label, &dto.LabelPair{Name: &pair[0], Value: &pair[1]})
	}
	return &dto.MetricFamily{Name: &name, Type: dto.MetricType_UNTYPED.Enum(), Metric: []*dto.Metric{m}}
}

// delimited returns families in protobuf.
func delimited(families ...*dto.MetricFamily) string {
	var b bytes.Buffer
	for _, family := range families {
		if _, err := protodelim.MarshalTo(&b, family); err != nil {
			panic(err)
		}
	}
	return b.String()
}
