//go:build e2e

package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"

	"github.com/klauspost/compress/snappy"
	dto "github.com/prometheus/client_model/go"
)

// oracleFinds are pushes that once differed, each to an empty group or after one before, and some
// made-up ones that a fuzzer is to begin with.
func oracleFinds() [][]oraclePush {
	text := func(body string) oraclePush { return oraclePush{method: http.MethodPut, key: "/j", body: body} }
	packed := func(families ...*dto.MetricFamily) oraclePush {
		return oraclePush{method: http.MethodPost, key: "/j", typ: protobufType, body: delimited(families...)}
	}
	summary := func(name string, quantiles ...float64) *dto.MetricFamily {
		s := &dto.Summary{}
		for _, q := range quantiles {
			s.Quantile = append(s.Quantile, &dto.Quantile{Quantile: new(q)})
		}
		return &dto.MetricFamily{Name: &name, Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{{Summary: s}}}
	}
	spoilt := gzipText("a 1\n")
	finds := [][]oraclePush{
		{{method: http.MethodPut, key: "%40base64/YWJj/l%40base64/L3Zhci90bXA", body: "a 1\n"}},
		{{method: http.MethodPut, key: "/a%2Fb/l/1#", body: "a 1\n"}},
		{{method: http.MethodPut, key: "/j/l%2Fm/1", body: "a 1\n"}},
		{text("# TYPE h histogram\nh_bucket{le=\"1\"} -1\n")},
		{text("# TYPE h histogram\nh_bucket{le=\"1\"} 3.5\nh_sum 1\nh_count NaN\n")},
		{text("# TYPE s summary\ns{quantile=\"NaN\"} 1\ns{quantile=\"NaN\"} 1\ns_count -1\n")},
		{text("# TYPE g gaugehistogram\n")},
		{text("a 1\n"), packed(&dto.MetricFamily{Name: new("a"), Type: dto.MetricType_UNTYPED.Enum()})},
		{packed(&dto.MetricFamily{Name: new("a"), Type: dto.MetricType_GAUGE_HISTOGRAM.Enum()})},
		{packed(&dto.MetricFamily{Name: new("a"), Type: dto.MetricType(-1).Enum(), Metric: untyped("a").Metric})},
		{packed(&dto.MetricFamily{Name: new("x"), Type: dto.MetricType_HISTOGRAM.Enum()}, untyped("x_sum"))},
		{packed(untyped("a", "job", "\xff"))},
		{packed(untyped("a", "job", "1", "job", "2"))},
		{packed(untyped("a", "l", "", "l", "1"))},
		{packed(summary("s", 0, math.Copysign(0, -1)))},
		{packed(summary("s", math.NaN(), math.Float64frombits(0x7ff8000000000002)))},
		{packed(summary("push_failure_time_seconds"))},
		{{method: http.MethodPut, key: "/j", typ: protobufType, body: "\n"}},
		{{method: http.MethodPut, key: "/j", encoding: "gzip", body: spoilt + spoilt[:12] + "spoilt"}},
	}
	for n := range uint64(100) {
		finds = append(finds, newMaker(oracleSeed, n).input())
	}
	return finds
}

func gzipText(text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write([]byte(text))
	_ = z.Close()
	return b.String()
}

// A maker makes up pushes. Most are almost valid.
type maker struct{ *rand.Rand }

func newMaker(seed, n uint64) maker { return maker{rand.New(rand.NewPCG(seed, n))} }

// rarely is true once in n times.
func (m maker) rarely(n int) bool { return m.IntN(n) == 0 }

func pick[T any](m maker, list ...T) T { return list[m.IntN(len(list))] }

// input makes up a conversation of one push or two.
func (m maker) input() []oraclePush {
	first := m.push(m.key())
	if m.rarely(2) {
		return []oraclePush{first}
	}
	return []oraclePush{first, m.push(first.key)}
}

func (m maker) push(key string) oraclePush {
	p := oraclePush{method: pick(m, http.MethodPut, http.MethodPost), key: key}
	var body []byte
	if m.rarely(3) {
		p.typ = protobufType
		body = m.protobuf()
	} else {
		p.typ = pick(m, "", "", textType, "application/x-www-form-urlencoded", "application/openmetrics-text; version=1.0.0")
		body = []byte(m.text())
	}
	if m.rarely(10) {
		body = m.mutate(body)
	}
	if m.rarely(20) {
		p.typ = pick(m, protobufType, strings.ToUpper(protobufType), `application/vnd.google.protobuf; encoding="delimited"; proto=io.prometheus.client.MetricFamily; x=y`,
			"application/vnd.google.protobuf", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=text", "a/b; c", ";", textType)
	}
	if m.rarely(6) {
		p.encoding, body = m.pack(body)
	}
	p.body = string(body)
	return p
}

func (m maker) pack(body []byte) (encoding string, packed []byte) {
	var b bytes.Buffer
	switch m.IntN(8) {
	case 0, 1, 2, 3:
		encoding = pick(m, "gzip", "gzip", "gzip", "gzip", "GZIP", "Gzip", "x-gzip", "gzip, gzip")
		z := gzip.NewWriter(&b)
		_, _ = z.Write(body)
		_ = z.Close()
		if m.rarely(8) { // Two of them are one.
			z.Reset(&b)
			_, _ = z.Write(body)
			_ = z.Close()
		}
	case 4, 5:
		encoding = pick(m, "snappy", "snappy", "Snappy")
		z := snappy.NewBufferedWriter(&b)
		_, _ = z.Write(body)
		_ = z.Close()
	default:
		encoding = pick(m, "identity", "zstd", "deflate", "gzip", "snappy")
		b.Write(body)
	}
	packed = b.Bytes()
	if m.rarely(4) && len(packed) > 0 {
		packed = m.mutate(packed)
	}
	return encoding, packed
}

// mutate spoils bytes.
func (m maker) mutate(b []byte) []byte {
	b = bytes.Clone(b)
	for range 1 + m.IntN(3) {
		if len(b) == 0 {
			return b
		}
		at := m.IntN(len(b))
		switch m.IntN(5) {
		case 0:
			b = b[:at]
		case 1:
			b[at] = byte(m.IntN(256))
		case 2:
			b = append(b[:at:at], b[min(at+1+m.IntN(5), len(b)):]...)
		case 3:
			b = append(b[:at:at], append([]byte(pick(m, "\x00", "\xff", "\r", "\n", "\"", "\\", "{", "}", ",", " ", "\t", "#", "=", "0", "_", ":", "é")), b[at:]...)...)
		default:
			b = append(b[:at:at], append(bytes.Clone(b[at:min(at+m.IntN(20), len(b))]), b[at:]...)...)
		}
	}
	return b
}

func (m maker) key() string {
	if m.rarely(2) {
		return "/j"
	}
	key := pick(m, "/", "/", "/", "/", "@base64/", "%40base64/")
	if key == "/" {
		key += m.keyValue()
	} else {
		key += m.keyBase64()
	}
	for range m.IntN(4) {
		name := pick(m, "instance", "instance", "l", "l", "m", "job", "le", "quantile", "labels", "__x", "my-label", "%6C", "_", "1a", "l%2Fm", "a%3Ab", "%C3%A9", "", "@base64")
		if m.rarely(4) {
			key += "/" + name + pick(m, "@base64/", "@base64/", "%40base64/") + m.keyBase64()
		} else {
			key += "/" + name + "/" + m.keyValue()
		}
	}
	if m.rarely(15) {
		key += pick(m, "/", "?", "?x=/y", "/x", "//", "/.", "/..", "#", ";x", "=")
	}
	return key
}

func (m maker) keyValue() string {
	if m.rarely(2) {
		return pick(m, "1", "2", "web-1")
	}
	return pick(m, "a%20b", "a+b", "%2Fvar%2Ftmp", "a%2Fb", "%2F", ".", "..", "...", "%2E", "%2e%2E", "", "%00", "%22", "%5C", "%0A", "%0D", "%7F", "%ff", "%C3%BC", "%E2%80%A8", "0.5", "+Inf",
		"=", "%25", "%252F", "%3F", "%23", "a:b", "a@base64", "~", "!$&'()*+,;=", "%F0%9F%98%80", "%ED%A0%80", "%EF%BF%BD", "%EF%BB%BF", "%2F#", "{%2F}", "%2F\"", "\\%2F", "^", "|", "<>", "`")
}

func (m maker) keyBase64() string {
	return pick(m, "YWJj", "YWJj", "L3Zhci90bXA", "L3Zhci90bXA=", "=", "==", "_w", "Lg", "Li4", "AA", "Cg", "YWJj%0A", "%0A", "YQ==", "YQ", "YR", "Y", "a$b", "+++-", "w7w", "", "YWJj=YWJj", "LzA")
}

var (
	oracleNames  = []string{"a", "a", "a", "b", "b_total", "x", "x", "x", "x_count", "x_sum", "x_bucket", "x_bucket_count", "x_count_sum", "h", "s", "up", "labels", "a:b", "A1", "_", "__name__", "le"}
	oracleRare   = []string{"push_time_seconds", "push_failure_time_seconds", "push_time_seconds_count", "go_goroutines", "a.b", "é", "a-b", "1a", "", "a b", "a\nb", "a\x00b", "\xff", "x.y_count", "x.y", "{", "a\"b", "#a", ":", "job", "\u2028", "scrape_duration_seconds"}
	oracleLabels = []string{"l", "l", "m", "n", "instance", "job", "le", "quantile", "_"}
	oracleValues = []string{"1", "2", "3", "x y", "é", "0.5", "+Inf"}
	oracleTypes  = []string{"counter", "gauge", "untyped", "histogram", "summary"}
	oracleFloats = []string{"0", "1", "1", "2", "3.5", "-1", "1e3", "NaN", "+Inf", "-Inf"}
)

func (m maker) name() string {
	if m.rarely(40) {
		return pick(m, oracleRare...)
	}
	return pick(m, oracleNames...)
}

func (m maker) labelName() string {
	if m.rarely(40) {
		return pick(m, "__name__", "__x", "a:b", "a.b", "é", "", "1a", "a-b", "a b", "\xff", "a\x00b", "L", "__", "__é", "é:", "a\nb", "a\"b", "=", "push_time_seconds")
	}
	return pick(m, oracleLabels...)
}

func (m maker) value() string {
	if m.rarely(8) {
		return pick(m, "", "", "", "", "\\", "\"", "\n", "a\\nb", "\t", "\r", "\x00", "\x7f", "\xff", "\xed\xa0\x80", "\u2028", "\ufeff", "{}", ",", "=", "#", " ", "  x  ", strings.Repeat("v", 3000))
	}
	return pick(m, oracleValues...)
}

func (m maker) number() string {
	if m.rarely(25) {
		return pick(m, "nan", "NAN", "inf", "Inf", "+inf", "-inf", "infinity", "Infinity", "+nan", "-NaN", "0x1p4", "0X1P-2", "0x1", "1_000", "1e", "1e400", "-1e400", "1e-400", "1e308", "4.9e-324", "-0", "+1", "01", "1.", ".5", ".", "--1",
			"1,5", "1d", "0b1", "0o7", "١", "18446744073709551616", "9007199254740993", "123456789012345678901234567890", "true", "", "1\x00", "-1", "0.1", "1e21", "1e20", "123456789", "0.000001", "1e-7")
	}
	return pick(m, oracleFloats...)
}

func (m maker) blank() string {
	if m.rarely(60) {
		return pick(m, "", "  ", "\t", " \t ", "\r", "\u00a0", "\v")
	}
	return " "
}

func (m maker) maybe(n int, s ...string) string {
	if m.rarely(n) {
		return pick(m, s...)
	}
	return ""
}

// text makes up a text.
func (m maker) text() string {
	var lines []string
	for range m.IntN(5) {
		lines = append(lines, m.familyLines()...)
	}
	if m.rarely(8) && len(lines) > 1 {
		m.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
	}
	if m.rarely(12) && len(lines) > 0 {
		lines = append(lines, pick(m, lines...))
	}
	if m.rarely(8) {
		at := m.IntN(len(lines) + 1)
		lines = append(lines[:at:at], append([]string{m.oddLine()}, lines[at:]...)...)
	}
	newline := "\n"
	if m.rarely(30) {
		newline = pick(m, "\r\n", "\n\n", "\n \n", "\r", "\n\r")
	}
	text := strings.Join(lines, newline)
	if !m.rarely(30) {
		text += newline
	}
	return m.maybe(60, "\ufeff", "\n", " ", "\x00", "#") + text
}

func (m maker) oddLine() string {
	return pick(m, "", " ", "\t", "#", "# ", "##", "# a comment", "#HELP", "# HELP", "# TYPE", "# HELP a", "# TYPE a", "# TYPE a ", "# HELP a ", "# EOF", "# UNIT a seconds", "#\tTYPE\ta\tgauge", "#TYPE a gauge", "# TYPE a gauge x",
		"# TYPE a GAUGE", "# TYPE a unknown", "# TYPE a info", "# TYPE a stateset", "# TYPE a gaugehistogram", "# TYPE 1a gauge", "# HELP 1a x", "# HELP a \\", "# HELP a \\x", "# HELP a \xff", "# HELP a \x00", "# HELP \"a\" x",
		"# TYPE \"a.b\" gauge", "<html>", "a", "a{", "a{}", "a{} 1", "a{,} 1", "a{l=\"1\",} 1", "a{l=\"1\",,} 1", "a{l=1} 1", "a{l='1'} 1", "a{l=\"1\"m=\"2\"} 1", "a{\"l\"=\"1\"} 1", "{\"a\"} 1", "{\"a.b\",l=\"1\"} 1", "{l=\"1\"} 1",
		"{} 1", "{__name__=\"a\"} 1", "{\"a\",\"b\"} 1", "a{\"b\"} 1", "a {l=\"1\"} 1", "a{ l = \"1\" , m = \"2\" } 1", "a 1 # {x=\"y\"} 1", "a 1 1", "a 1 -1", "a 1 1 1", "a 1 1.5", "a 1 0", "a 1 x", " a 1", "\ta\t1", "a\v1", "a 1 ", "a 1\t",
		"a{l=\"\\x\"} 1", "a{l=\"\\\"} 1", "a{l=\"\n\"} 1", "1a 1", ":a 1", "a-b 1", "é 1", "a.b 1", "x{le=\"1\"} 1", "x_bucket 1", "x{quantile=\"x\"} 1", "# TYPE x histogram", "# TYPE x summary", "# TYPE x_count counter",
		"a{l=\"1\",l=\"1\"} 1", "a{l=\"1\"}1", "a{l=\"1\"} 1}", "a\"b\" 1", "a{\"\"=\"1\"} 1", "{\"\"} 1", "{\"a\nb\"} 1", "{\"a\\nb\"} 1", "{\"a\", } 1", "{,\"a\"} 1", "a{\"b:c\"=\"1\"} 1", "a{b:c=\"1\"} 1", "a{\"b.c\"=\"\"} 1")
}

// familyLines makes up the lines of a family.
func (m maker) familyLines() []string {
	name, typ := m.name(), pick(m, oracleTypes...)
	var lines []string
	help := "# HELP " + name + pick(m, " H.", " H.", " H.", "", " ", "  x  ", " a\\nb\\\\c", " é", " \"q\"", " H"+m.maybe(10, "\xff", "\x00", "\\", "\\x"))
	header := "# TYPE " + name + " " + typ
	if m.rarely(3) {
		lines = append(lines, help)
	}
	if !m.rarely(4) {
		lines = append(lines, header)
	}
	if m.rarely(25) {
		lines = append(lines, help)
	}
	for range m.IntN(3) {
		switch typ {
		case "histogram":
			labels := m.labels()
			for range m.IntN(4) {
				lines = append(lines, m.sample(name+"_bucket", m.with(labels, "le", m.number())))
			}
			if !m.rarely(4) {
				lines = append(lines, m.sample(name+"_bucket", m.with(labels, "le", "+Inf")))
			}
			lines = append(lines, m.sumAndCount(name, labels)...)
			if m.rarely(20) {
				lines = append(lines, m.sample(name, labels))
			}
		case "summary":
			labels := m.labels()
			for range m.IntN(3) {
				lines = append(lines, m.sample(name, m.with(labels, "quantile", m.number())))
			}
			lines = append(lines, m.sumAndCount(name, labels)...)
			if m.rarely(20) {
				lines = append(lines, m.sample(name+pick(m, "_bucket", ""), labels))
			}
		default:
			lines = append(lines, m.sample(name, m.labels()))
		}
	}
	if m.rarely(20) {
		lines = append(lines, header)
	}
	return lines
}

func (m maker) sumAndCount(name string, labels []string) []string {
	var lines []string
	if !m.rarely(6) {
		lines = append(lines, m.sample(name+"_sum", labels))
	}
	if !m.rarely(6) {
		lines = append(lines, m.sample(name+"_count", labels))
	}
	if m.rarely(20) {
		lines = append(lines, m.sample(name+pick(m, "_sum", "_count", "_created", "_total"), m.with(labels, pick(m, "le", "quantile"), "1")))
	}
	return lines
}

// labels makes up labels, names and values in turn.
func (m maker) labels() []string {
	var labels []string
	for range m.IntN(3) {
		name := m.labelName()
		if !slices.Contains(labels, name) || m.rarely(20) {
			labels = append(labels, name, m.value())
		}
	}
	return labels
}

// with adds a label somewhere.
func (m maker) with(labels []string, name, value string) []string {
	at := 2 * m.IntN(len(labels)/2+1)
	return append(labels[:at:at], append([]string{name, value}, labels[at:]...)...)
}

func (m maker) sample(name string, labels []string) string {
	var b strings.Builder
	b.WriteString(name)
	if len(labels) > 0 || m.rarely(10) {
		b.WriteString(m.maybe(30, " ", "\t") + "{")
		for i := 0; i < len(labels); i += 2 {
			if i > 0 {
				b.WriteString("," + m.maybe(10, " ", "\t"))
			}
			value := labels[i+1]
			if !m.rarely(20) {
				value = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(value)
			}
			label := labels[i]
			if m.rarely(60) {
				label = `"` + label + `"`
			}
			fmt.Fprintf(&b, `%s%s=%s"%s"%s`, label, m.maybe(40, " "), m.maybe(40, " "), value, m.maybe(40, " ", "\t"))
		}
		b.WriteString(m.maybe(30, ",", ",", ", ", ",,") + "}")
	}
	return b.String() + m.blank() + m.number() + m.maybe(100, " 1", " 0", " 1700000000000", " -5", " x", " 1.5") + m.maybe(80, " ", "\t", "\r", " # {a=\"b\"} 1", " #")
}

func (m maker) float() float64 {
	if m.rarely(8) {
		return pick(m, math.NaN(), math.Float64frombits(0x7ff0000000000002), math.Inf(1), math.Inf(-1), math.Copysign(0, -1), math.MaxFloat64, math.SmallestNonzeroFloat64, 1e21, 0.1)
	}
	return float64(m.IntN(4))
}

// protobuf makes up delimited messages.
func (m maker) protobuf() []byte {
	var families []*dto.MetricFamily
	for range m.IntN(4) {
		family := &dto.MetricFamily{Name: new(m.name()), Type: pick(m, dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED, dto.MetricType_HISTOGRAM, dto.MetricType_SUMMARY).Enum()}
		switch m.IntN(30) {
		case 0:
			family.Name = nil
		case 1:
			family.Type = nil
		case 2:
			family.Type = dto.MetricType(pick(m, 5, 6, 17, -1)).Enum()
		case 3, 4, 5, 6:
			family.Help = new(pick(m, "", "H.", "a\nb\\c", "\xff", "\x00", "\r", "é"))
		case 7:
			family.Unit = new("seconds")
		}
		for range m.IntN(4) {
			family.Metric = append(family.Metric, m.metric(family.GetType()))
		}
		families = append(families, family)
	}
	return []byte(delimited(families...))
}

func (m maker) metric(typ dto.MetricType) *dto.Metric {
	metric := &dto.Metric{}
	labels := m.labels()
	for i := 0; i < len(labels); i += 2 {
		pair := &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]}
		switch m.IntN(80) {
		case 0:
			pair.Name = nil
		case 1:
			pair.Value = nil
		}
		metric.Label = append(metric.Label, pair)
	}
	if m.rarely(30) {
		typ = pick(m, dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED, dto.MetricType_HISTOGRAM, dto.MetricType_SUMMARY)
	}
	if m.rarely(30) {
		metric.Gauge = &dto.Gauge{Value: new(m.float())}
	}
	value := new(m.float())
	if m.rarely(20) {
		value = nil
	}
	switch typ {
	case dto.MetricType_COUNTER:
		metric.Counter = &dto.Counter{Value: value}
		if m.rarely(8) {
			metric.Counter.Exemplar = &dto.Exemplar{Label: []*dto.LabelPair{{Name: new("e"), Value: new(m.value())}}, Value: value}
		}
	case dto.MetricType_GAUGE:
		metric.Gauge = &dto.Gauge{Value: value}
	case dto.MetricType_UNTYPED:
		metric.Untyped = &dto.Untyped{Value: value}
	case dto.MetricType_SUMMARY:
		s := &dto.Summary{SampleCount: new(m.Uint64N(4)), SampleSum: value}
		for range m.IntN(3) {
			s.Quantile = append(s.Quantile, &dto.Quantile{Quantile: new(m.float()), Value: new(m.float())})
		}
		if m.rarely(10) {
			s.Quantile = append(s.Quantile, &dto.Quantile{})
		}
		metric.Summary = s
	default:
		metric.Histogram = m.histogram(value)
	}
	if m.rarely(60) {
		metric.TimestampMs = new(int64(m.IntN(3)))
	}
	return metric
}

func (m maker) histogram(sum *float64) *dto.Histogram {
	h := &dto.Histogram{SampleCount: new(m.Uint64N(4)), SampleSum: sum}
	for range m.IntN(4) {
		b := &dto.Bucket{UpperBound: new(m.float()), CumulativeCount: new(m.Uint64N(4))}
		if m.rarely(20) {
			b.Exemplar = &dto.Exemplar{Label: []*dto.LabelPair{{Name: new("e"), Value: new(m.value())}}, Value: new(m.float())}
		}
		h.Bucket = append(h.Bucket, b)
	}
	switch m.IntN(20) {
	case 0:
		h.Bucket = append(h.Bucket, &dto.Bucket{})
	case 1:
		h.SampleCount = nil
	case 2, 3: // A native one, whose parts need not fit.
		h.Schema, h.ZeroThreshold, h.ZeroCount = new(int32(m.IntN(12)-2)), new(m.float()), new(m.Uint64N(3))
		h.PositiveSpan = []*dto.BucketSpan{{Offset: new(int32(m.IntN(5) - 2)), Length: new(uint32(m.IntN(3)))}}
		h.PositiveDelta = []int64{1, int64(m.IntN(5) - 3)}
		if m.rarely(3) {
			h.NegativeSpan, h.NegativeDelta = h.PositiveSpan, h.PositiveDelta
		}
	}
	return h
}
