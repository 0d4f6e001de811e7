package gateway

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/promferry/promferry/exposition"
)

// The families that have a meaning for the gateway.
const (
	pushTimeName        = "push_time_seconds"
	pushFailureTimeName = "push_failure_time_seconds"
	upName              = "up"
	expiresAfterName    = "promferry_expires_after_seconds"
)

// prometheusOwn are the families that Prometheus makes itself of each scrape of a target.
var prometheusOwn = []string{
	upName, "scrape_body_size_bytes", "scrape_duration_seconds", "scrape_sample_limit", "scrape_samples_post_metric_relabeling",
	"scrape_samples_scraped", "scrape_series_added", "scrape_timeout_seconds",
}

// A family is one of a group, as text.
type family struct {
	name string
	typ  dto.MetricType
	text []byte
	// header is how long the HELP and TYPE lines are with which text begins.
	header int
	// series is how many series Prometheus makes of it.
	series int
	// quoted tells that it has a name that stands in quotes.
	quoted bool
	// native is the family as a delimited protobuf message, where it has native histograms,
	// which text has not.
	native []byte
	// number is what up or promferry_expires_after_seconds say.
	number float64
}

// buffers are used again: what a group holds is copied out of them in its exact size.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// largeBuffer is from which size on, in bytes, a buffer is not kept.
const largeBuffer = 4 << 20

func getBuffer() *bytes.Buffer { return buffers.Get().(*bytes.Buffer) }

func putBuffer(b *bytes.Buffer) {
	if b.Cap() < largeBuffer {
		b.Reset()
		buffers.Put(b)
	}
}

// render writes families that were checked. Their text is in b.
func render(b *bytes.Buffer, families []*dto.MetricFamily) ([]family, error) {
	rendered := make([]family, 0, len(families))
	ends := make([]int, 0, len(families))
	for _, f := range families {
		one := family{name: f.GetName(), typ: f.GetType(), series: exposition.Samples([]*dto.MetricFamily{f}), quoted: isQuoted(f), number: number(f)}
		if len(f.GetMetric()) > 0 {
			if _, err := expfmt.MetricFamilyToText(b, f); err != nil {
				return nil, fmt.Errorf("write family %s: %w", f.GetName(), err)
			}
		}
		if isNative(f) {
			var native bytes.Buffer
			if _, err := protodelim.MarshalTo(&native, f); err != nil {
				return nil, fmt.Errorf("write family %s: %w", f.GetName(), err)
			}
			one.native = native.Bytes()
		}
		rendered, ends = append(rendered, one), append(ends, b.Len())
	}
	begin := 0
	for i, end := range ends { // Now b moves no more.
		rendered[i].text = b.Bytes()[begin:end:end]
		rendered[i].header = headerLength(rendered[i].text)
		begin = end
	}
	return rendered, nil
}

// headerLength returns how long the lines at the begin of text are that begin with #.
func headerLength(text []byte) int {
	n := 0
	for n < len(text) && text[n] == '#' {
		n += bytes.IndexByte(text[n:], '\n') + 1
	}
	return n
}

func isQuoted(f *dto.MetricFamily) bool {
	return !model.LegacyValidation.IsValidMetricName(f.GetName()) || slices.ContainsFunc(f.GetMetric(), func(m *dto.Metric) bool {
		return slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return !model.LegacyValidation.IsValidLabelName(l.GetName()) })
	})
}

func isNative(f *dto.MetricFamily) bool {
	return f.GetType() == dto.MetricType_HISTOGRAM && slices.ContainsFunc(f.GetMetric(), func(m *dto.Metric) bool {
		return m.GetHistogram().Schema != nil || m.GetHistogram().SampleCountFloat != nil
	})
}

// number returns the largest number that a family of gauges has, or without a type; NaN
// where there is none.
func number(f *dto.MetricFamily) float64 {
	largest := math.NaN()
	if name := f.GetName(); name != upName && name != expiresAfterName {
		return largest
	}
	for _, m := range f.GetMetric() {
		value := math.NaN()
		if m.Gauge != nil {
			value = m.GetGauge().GetValue()
		} else if m.Untyped != nil {
			value = m.GetUntyped().GetValue()
		}
		if math.IsNaN(largest) || value > largest {
			largest = value
		}
	}
	return largest
}

// content is what a group holds. It is never changed.
type content struct {
	families []family // sorted, those that Prometheus makes itself before the others
	own      int      // how many of families Prometheus makes itself
	page     []byte   // the text of all but these
	series   int
	down     bool // up is 0
	// expiresAfter is for how long after its last put the group is good. Zero means that it
	// does not say that.
	expiresAfter time.Duration
	quoted       bool // a family of page has names in quotes
	native       bool // a family of page has native histograms
}

// maxExpiry is the longest time that a group can ask for, 30 years, in seconds.
const maxExpiry = 1e9

// newContent copies rendered families into one piece of memory.
func newContent(families []family) *content {
	families = slices.DeleteFunc(slices.Clone(families), func(f family) bool { return len(f.text) == 0 })
	isOwn := func(f family) bool { return slices.Contains(prometheusOwn, f.name) }
	slices.SortFunc(families, func(a, b family) int {
		if x, y := isOwn(a), isOwn(b); x != y {
			if x {
				return -1
			}
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	size := 0
	for _, f := range families {
		size += len(f.text)
	}
	c := &content{families: families}
	all := make([]byte, 0, size)
	begin := 0
	for i, f := range families {
		families[i].name = strings.Clone(f.name) // The rest of what it came in is not kept.
		at := len(all)
		all = append(all, f.text...)
		families[i].text = all[at:len(all):len(all)]
		c.series += f.series
		if isOwn(f) {
			c.own, begin = i+1, len(all)
		} else {
			c.quoted = c.quoted || f.quoted
			c.native = c.native || f.native != nil
		}
		switch {
		case f.name == upName:
			c.down = f.number == 0
		case f.name == expiresAfterName && f.number > 0: // Not NaN.
			c.expiresAfter = time.Duration(min(f.number, maxExpiry) * float64(time.Second))
		}
	}
	c.page = all[begin:]
	return c
}

// with returns families and those of the content that they do not replace.
func (c *content) with(families []family) []family {
	if c == nil {
		return families
	}
	replaced := make(map[string]bool, len(families))
	for _, f := range families {
		replaced[f.name] = true
	}
	merged := slices.Clone(families)
	for _, f := range c.families {
		if !replaced[f.name] {
			merged = append(merged, f)
		}
	}
	return merged
}
