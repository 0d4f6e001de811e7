package gateway

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/flate"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// allocated returns how many bytes f allocates.
func allocated(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// long returns a text with one series of a family, of some length.
func long(name string, bytes int) string {
	return name + `{l="` + strings.Repeat("x", bytes) + "\"} 1\n"
}

// buckets returns a histogram whose labels stand in each of its buckets.
func buckets(n, labelBytes int) *dto.MetricFamily {
	h := &dto.Histogram{SampleCount: new(uint64(1)), SampleSum: new(1.0)}
	for i := range n {
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: new(float64(i)), CumulativeCount: new(uint64(1))})
	}
	m := &dto.Metric{Histogram: h, Label: []*dto.LabelPair{{Name: new("l"), Value: new(strings.Repeat("x", labelBytes))}}}
	return &dto.MetricFamily{Name: new("h"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{m}}
}

// TestGroupBytes goes beyond the limit for the text of a group. What was there stays.
func TestGroupBytes(t *testing.T) {
	g := newTest(t, func(c *Config) { c.MaxGroupBytes = 100_000 })
	protobuf := string(expfmt.FmtProtoDelim)
	const path = "/metrics/job/j"
	put(t, g, path, long("a", 50_000))
	for _, test := range []struct{ name, method, path, typ, body string }{
		{"add", http.MethodPost, path, "", long("b", 50_000)},
		{"add of many families", http.MethodPost, path, "", long("b", 20_000) + long("c", 20_000) + long("d", 20_000)},
		{"put", http.MethodPut, path, "", long("a", 100_000)},
		{"put of many families", http.MethodPut, path, "", long("a", 50_000) + long("b", 50_000)},
		{"HELP", http.MethodPut, path, "", "# HELP a " + strings.Repeat("x", 100_000) + "\na 1\n"},
		{"families of Prometheus's own", http.MethodPost, path, "", long("up", 50_000)},
		{"what is escaped", http.MethodPut, path, "", "a{l=\"" + strings.Repeat(`\n`, 40_000) + "\"} 1\nb{l=\"" + strings.Repeat(`\n`, 40_000) + "\"} 1\n"},
		{"labels of the grouping key", http.MethodPut, "/metrics/job/j/l/" + strings.Repeat("x", 1000), "", strings.Repeat("a 1\n", 100)},
		{"labels in each bucket", http.MethodPut, path, protobuf, delimited(t, buckets(100, 1000))},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := ask(g, test.method, test.path, test.body, "Content-Type", test.typ)
			want(t, w, http.StatusRequestEntityTooLarge, "100000 bytes", "--limit.group-bytes", "PUT")
			want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK, "a{", "!\nb{", "!\nup{", "!\nh_bucket{")
		})
	}
	body := delimited(t, buckets(900, 50_000))
	if n := allocated(func() {
		want(t, ask(g, http.MethodPut, path, body, "Content-Type", protobuf), http.StatusRequestEntityTooLarge)
	}); n > 2<<20 {
		t.Errorf("%d bytes are allocated for a text that is refused", n)
	}
	// What replaces as much as it brings has room.
	want(t, ask(g, http.MethodPost, path, long("a", 90_000)), http.StatusOK)
	want(t, ask(g, http.MethodPost, path, "b 1\n"), http.StatusOK)
	put(t, g, path, "a 1\n")
	want(t, ask(g, http.MethodPut, path, strings.Repeat("n", maxName+1)+" 1\n"), http.StatusUnprocessableEntity, "4097 bytes, the maximum is 4096")
	put(t, g, path, strings.Repeat("n", maxName)+" 1\n")
}

// TestNativeBytes counts what of native histograms is not in the text.
func TestNativeBytes(t *testing.T) {
	g := newTest(t, func(c *Config) { c.MaxGroupBytes = 20_000 })
	status := http.StatusOK
	for i := range 10 {
		f := gauge(fmt.Sprint("h", i))
		f.Type = dto.MetricType_HISTOGRAM.Enum()
		f.Metric[0].Gauge = nil
		f.Metric[0].Histogram = &dto.Histogram{
			SampleCount: new(uint64(3000)), SampleSum: new(1.0), Schema: new(int32(3)), ZeroThreshold: new(1e-128),
			PositiveSpan: []*dto.BucketSpan{{Offset: new(int32(0)), Length: new(uint32(3000))}}, PositiveDelta: make([]int64, 3000),
		}
		if status = pushProtobuf(t, g, http.MethodPost, f); status != http.StatusOK {
			break
		}
	}
	if size := g.Status().Groups[0].Bytes; status != http.StatusRequestEntityTooLarge || size < 6000 || size > 20_000 {
		t.Errorf("status %d, %d bytes", status, size)
	}
}

// noise returns a text of some length that hardly can be compressed.
func noise(name string, n int) string {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	random := rand.New(rand.NewPCG(1, uint64(len(name))))
	b := make([]byte, n)
	for i := range b {
		b[i] = digits[random.IntN(len(digits))]
	}
	return name + `{l="` + string(b) + "\"} 1\n"
}

// TestTotalBytes goes beyond the limit for all groups together. Who needs no more memory goes on.
func TestTotalBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBytes = 120_000 })
		put(t, g, "/metrics/job/a", noise("a", 60_000))
		put(t, g, "/metrics/job/b", noise("b", 40_000)+"promferry_expires_after_seconds 60\n")
		put(t, g, "/metrics/job/text", long("a", 500_000)) // Of what is compressed the memory counts.
		const refused = "--limit.total-bytes"
		want(t, ask(g, http.MethodPut, "/metrics/job/c", noise("c", 60_000)), http.StatusTooManyRequests, "may take 120000", refused)
		want(t, ask(g, http.MethodPost, "/metrics/job/a", noise("d", 60_000)), http.StatusTooManyRequests, refused)
		want(t, ask(g, http.MethodPut, "/metrics/job/a", noise("a", 99_000)), http.StatusTooManyRequests, refused)
		want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `promferry_gateway_pushes_total{result="too_many_bytes"} 3`, "promferry_gateway_limit_bytes 120000", "!\nc{")
		put(t, g, "/metrics/job/a", noise("a", 50_000))
		put(t, g, "/metrics/job/a", noise("aa", 50_000))
		// A group that is gone leaves its room.
		<-time.After(time.Minute + 24*time.Hour)
		put(t, g, "/metrics/job/b", "b 1\n")
		put(t, g, "/metrics/job/c", noise("c", 50_000))
		want(t, ask(g, http.MethodDelete, "/metrics/job/a", ""), http.StatusAccepted)
		put(t, g, "/metrics/job/d", noise("d", 60_000))
		for _, job := range []string{"b", "c", "d", "text"} {
			want(t, ask(g, http.MethodDelete, "/metrics/job/"+job, ""), http.StatusAccepted)
		}
		want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "promferry_gateway_groups_bytes 0\n")
	})
}

// TestRestartWithLess starts again with limits that what is on disk exceeds: it stays, and the log
// has it.
func TestRestartWithLess(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/a", noise("a", 60_000))
	put(t, g, "/metrics/job/b", noise("b", 30_000))
	var log bytes.Buffer
	g = restart(t, g, func(c *Config) {
		c.MaxGroupBytes, c.MaxBytes, c.Logger = 50_000, 10_000, slog.New(slog.NewTextHandler(&log, nil))
	})
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\na{", "\nb{")
	for _, part := range []string{"larger than --limit.group-bytes", `group="{job=\"a\"}"`, "more memory than --limit.total-bytes"} {
		if strings.Count(log.String(), part) != 1 {
			t.Errorf("not once in the log: %q\n%s", part, log.String())
		}
	}
	want(t, ask(g, http.MethodPost, "/metrics/job/a", "c 1\n"), http.StatusRequestEntityTooLarge, "--limit.group-bytes")
	want(t, ask(g, http.MethodPut, "/metrics/job/c", noise("c", 1000)), http.StatusTooManyRequests, "--limit.total-bytes")
	put(t, g, "/metrics/job/a", noise("a", 20_000))
	g = restart(t, g, nil)
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "\na{", "\nb{")
}

// poolsForget tells that what is allocated cannot be measured.
var poolsForget bool

// TestMemoryOfPages makes pages and adds to groups whose texts are long, in memory that does not
// grow with them.
func TestMemoryOfPages(t *testing.T) {
	const groups, size, most = 5, 4 << 20, 2 << 20
	g := newTest(t, func(c *Config) { c.MaxBodyBytes = 2 * size })
	for i := range groups {
		put(t, g, fmt.Sprintf("/metrics/job/j/instance/%d", i), long("a", size)+"# HELP b "+strings.Repeat("x", size/8)+"\nb 1\n")
	}
	for _, test := range []struct{ name, path, encoding string }{
		{"page", "/metrics", ""},
		{"page, gzipped", "/metrics", "gzip"},
		{"target", "/groups/job/j/instance/1/metrics", ""},
		{"target, gzipped", "/groups/job/j/instance/1/metrics", "gzip"},
	} {
		w := &countingWriter{header: make(http.Header)}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://hub:9091"+test.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept-Encoding", test.encoding)
		w.measure()
		before := w.heap
		g.ServeHTTP(w, r)
		if n := w.heap - before; n > most {
			t.Errorf("%s of %d bytes: %d bytes of memory", test.name, w.n, n)
		}
		if w.n < size/1000 || test.encoding == "" && w.n < size {
			t.Errorf("%s: only %d bytes", test.name, w.n)
		}
	}
	// What is merged is compressed again.
	if n := allocated(func() {
		want(t, ask(g, http.MethodPost, "/metrics/job/j/instance/1", "c 1\n"), http.StatusOK)
	}); n > most && !poolsForget {
		t.Errorf("to add a series, %d bytes are allocated", n)
	}
	want(t, ask(g, http.MethodGet, "/groups/job/j/instance/1/metrics", ""), http.StatusOK, `a{instance="1",job="j",l="xx`, "\nb{", "\nc{")
}

// countingWriter is a http.ResponseWriter that keeps nothing, and looks how much memory is in use
// now and then.
type countingWriter struct {
	header    http.Header
	n, writes int
	heap      int // the most that was in use
}

func (w *countingWriter) Header() http.Header { return w.header }
func (w *countingWriter) WriteHeader(int)     {}

func (w *countingWriter) Write(b []byte) (int, error) {
	if w.writes++; w.writes%200 == 1 {
		w.measure()
	}
	w.n += len(b)
	return len(b), nil
}

func (w *countingWriter) measure() {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	w.heap = max(w.heap, int(m.HeapAlloc))
}

// TestLargeAdds has large groups added to while others are: not more than some at a time, and what
// waits has a turn of large bodies. Small groups go on.
func TestLargeAdds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBodyBytes = 4 * smallBody })
		put(t, g, "/metrics/job/large", long("a", smallBody))
		for range maxMerges {
			g.store.merging <- struct{}{}
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			want(t, ask(g, http.MethodPost, "/metrics/job/large", long("b", smallBody)), http.StatusOK)
		}()
		synctest.Wait()
		select {
		case <-done:
			t.Fatal("it did not wait")
		default:
		}
		if len(g.large) != 1 {
			t.Error("a large push waits without a turn of its own")
		}
		put(t, g, "/metrics/job/large2", long("a", smallBody)) // Is not merged with anything.
		put(t, g, "/metrics/job/small", "a 1\n")
		want(t, ask(g, http.MethodPost, "/metrics/job/small", "b 1\n"), http.StatusOK)
		<-g.store.merging
		<-done
		if len(g.large) != 0 || len(g.store.merging) != maxMerges-1 {
			t.Error("a turn was not given back")
		}
	})
}

// TestRenderedLarge has a small body whose text is large: it waits for the turns of large ones.
func TestRenderedLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, nil)
		body := delimited(t, buckets(500, 5000))
		push := func() int {
			return ask(g, http.MethodPut, "/metrics/job/j", body, "Content-Type", string(expfmt.FmtProtoDelim)).Code
		}
		for range largeBodies {
			g.large <- struct{}{}
		}
		if len(body) > smallBody/8 || push() != http.StatusTooManyRequests {
			t.Errorf("%d bytes did not wait", len(body))
		}
		<-g.large
		if status := push(); status != http.StatusOK || len(g.large) != largeBodies-1 || len(g.parsing) != 0 || len(g.parsingLarge) != 0 {
			t.Errorf("%d, or a turn was not given back", status)
		}
	})
}

// TestPieces reads texts in which the first piece ends at each byte of a family.
func TestPieces(t *testing.T) {
	const rest = "# HELP m Help.\n# TYPE m gauge\nm{a=\"#\"} 1\nm{a=\"b\"} 2\n# TYPE \"n n\" counter\n{\"n n\"} 1\n# TYPE o untyped\no 1\n"
	for moved := range len(rest) + 1 {
		const head = "# HELP a \n# TYPE a gauge\na 1\n"
		text := "# HELP a " + strings.Repeat("x", pieceSize-len(head)-moved) + "\n# TYPE a gauge\na 1\n" + rest
		want, err := (&content{}).split([]byte(text))
		if err != nil || len(want) != 4 {
			t.Fatal(want, err)
		}
		c, err := build(want, len(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := familiesOf(t, c); !slices.EqualFunc(got, want, func(a, b family) bool {
			return a.name == b.name && a.typ == b.typ && a.header == b.header && bytes.Equal(a.text, b.text)
		}) {
			t.Errorf("with %d bytes in the first piece there are other families: %v", moved, got)
		}
	}
}

// TestEarlierText reads what earlier versions wrote: a text in one stream. Later ones read pieces as
// one stream, as earlier versions do.
func TestEarlierText(t *testing.T) {
	var text bytes.Buffer
	for i := range 2000 {
		fmt.Fprintf(&text, "# HELP n%04d Number %d.\n# TYPE n%04d gauge\nn%04d{instance=\"\",job=\"j\"} %d\n", i, i, i, i, i)
	}
	families, err := (&content{}).split(text.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	now, err := build(families, text.Len())
	if err != nil || len(now.Text.Ends) != (text.Len()-1)/pieceSize {
		t.Fatal(err, len(now.Text.Ends))
	}
	whole, err := io.ReadAll(flate.NewReader(io.MultiReader(bytes.NewReader(now.Text.Stream), strings.NewReader(lastBlock))))
	if err != nil || !bytes.Equal(whole, text.Bytes()) {
		t.Errorf("as one stream the text has %d bytes, %v", len(whole), err)
	}
	var stream bytes.Buffer
	z, err := flate.NewWriter(&stream, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = z.Write(text.Bytes())
	_ = z.Flush()
	earlier := &content{Series: now.Series, Text: packedText{Stream: stream.Bytes(), Sum: now.Text.Sum, Size: now.Text.Size}}
	for name, ends := range map[string][]int{"none": nil, "too few": now.Text.Ends[1:], "not in order": slices.Repeat([]int{5}, len(now.Text.Ends)), "too far": slices.Repeat([]int{1 << 40}, len(now.Text.Ends))} {
		one := *earlier
		one.Text.Ends = ends
		got, err := one.restored()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !equalContent(got, now) {
			t.Errorf("ends of pieces, %s: it is another content", name)
		}
	}
}
