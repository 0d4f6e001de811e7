package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
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
	// quoted tells that it has a name that stands in quotes.
	quoted bool
	// native is the family as a delimited protobuf message, where it has native histograms,
	// which text has not.
	native []byte
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
		if len(f.GetMetric()) > 0 { // Others have no text. An add removes with them what there was.
			if _, err := expfmt.MetricFamilyToText(b, f); err != nil {
				return nil, fmt.Errorf("write family %.200s: %w", f.GetName(), err)
			}
		}
		one := family{name: f.GetName(), typ: f.GetType(), quoted: isQuoted(f)}
		if isNative(f) {
			var native bytes.Buffer
			if _, err := protodelim.MarshalTo(&native, f); err != nil {
				return nil, fmt.Errorf("write family %.200s: %w", f.GetName(), err)
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

// series returns how many series a family has in a text.
func (f family) series() int { return bytes.Count(f.text[f.header:], []byte{'\n'}) }

// number returns the largest number that a family of gauges has, or without a type; NaN
// where there is none.
func (f family) number() float64 {
	largest := math.NaN()
	if f.typ != dto.MetricType_GAUGE && f.typ != dto.MetricType_UNTYPED {
		return largest
	}
	for line := range bytes.Lines(f.text[f.header:]) {
		line = bytes.TrimSuffix(line, []byte{'\n'})
		value, err := strconv.ParseFloat(string(line[bytes.LastIndexByte(line, ' ')+1:]), 64)
		if err == nil && !math.IsNaN(value) && (math.IsNaN(largest) || value > largest) {
			largest = value
		}
	}
	return largest
}

// split cuts a text that was rendered into its families.
func (c *content) split(text []byte) ([]family, error) {
	var families []family
	if len(text) > 0 && text[len(text)-1] != '\n' {
		return nil, errors.New("the text of a group does not end with a line")
	}
	for len(text) > 0 {
		f := family{header: headerLength(text)}
		end := f.header
		for end < len(text) && text[end] != '#' {
			end += bytes.IndexByte(text[end:], '\n') + 1
		}
		f.text, text = text[:end:end], text[end:]
		var err error
		if f.name, f.typ, err = parseHeader(f.text[:f.header]); err != nil {
			return nil, err
		}
		f.quoted = slices.Contains(c.Quoted, f.name)
		f.native = c.Native[f.name]
		families = append(families, f)
	}
	return families, nil
}

// parseHeader returns the name and the type of a family, of which its last header line tells.
func parseHeader(header []byte) (string, dto.MetricType, error) {
	line := bytes.TrimSuffix(header, []byte{'\n'})
	line = line[bytes.LastIndexByte(line, '\n')+1:]
	rest, ok := bytes.CutPrefix(line, []byte("# TYPE "))
	end := bytes.LastIndexByte(rest, ' ')
	if !ok || end < 0 {
		return "", 0, fmt.Errorf("%.200q is no header of a family", header)
	}
	name := string(rest[:end])
	if quoted, ok := strings.CutPrefix(name, `"`); ok {
		name = unescapeValue.Replace(strings.TrimSuffix(quoted, `"`))
	}
	typ, ok := dto.MetricType_value[strings.ToUpper(string(rest[end+1:]))]
	if !ok {
		return "", 0, fmt.Errorf("%.200q has no type that there is", header)
	}
	return name, dto.MetricType(typ), nil
}

// content is what a group holds, and what is kept of it on disk. It is never changed.
type content struct {
	// Own is the text of the families that Prometheus makes of a scrape itself. Text is that
	// of the others.
	Own  string     `json:"own,omitempty"`
	Text packedText `json:"text"`
	// Series is how many series it has in all.
	Series int `json:"series"`
	// Quoted are the names of the families that have names in quotes.
	Quoted []string `json:"quoted,omitempty"`
	// Native are families that have native histograms, as delimited protobuf messages.
	Native map[string][]byte `json:"native,omitempty"`
	// Down tells that up is 0.
	Down bool `json:"down,omitempty"`
	// ExpiresAfter is for how long after its last put the group is good. Zero means that it
	// does not say that.
	ExpiresAfter time.Duration `json:"expires_after_ns,omitempty"`
}

// maxExpiry is the longest time that a group can ask for, 30 years, in seconds.
const maxExpiry = 1e9

// newContent makes a content of rendered families, which it copies.
func newContent(families []family) *content {
	families = slices.DeleteFunc(slices.Clone(families), func(f family) bool { return len(f.text) == 0 })
	slices.SortFunc(families, func(a, b family) int { return strings.Compare(a.name, b.name) })
	c := &content{}
	var own []byte
	p := newPacker()
	for _, f := range families {
		if slices.Contains(prometheusOwn, f.name) {
			own = append(own, f.text...)
		} else {
			p.write(f.text)
		}
		c.Series += f.series()
		if f.quoted {
			c.Quoted = append(c.Quoted, f.name)
		}
		if f.native != nil {
			if c.Native == nil {
				c.Native = make(map[string][]byte)
			}
			c.Native[f.name] = f.native
		}
		switch f.name {
		case upName:
			c.Down = f.number() == 0
		case expiresAfterName:
			if n := f.number(); n > 0 { // Not NaN.
				c.ExpiresAfter = time.Duration(min(n, maxExpiry) * float64(time.Second))
			}
		}
	}
	c.Own, c.Text = string(own), p.packed()
	return c
}

// families returns the families, those that Prometheus makes itself before the others.
func (c *content) families() ([]family, error) {
	own, err := c.split([]byte(c.Own))
	if err != nil {
		return nil, err
	}
	others, err := c.others()
	return append(own, others...), err
}

// others returns the families that Prometheus does not make itself.
func (c *content) others() ([]family, error) {
	text, err := c.Text.unpack()
	if err != nil {
		return nil, err
	}
	return c.split(text)
}

// size returns the length of the text, in bytes.
func (c *content) size() int { return len(c.Own) + c.Text.Size }

// with returns families and those of the content that they do not replace.
func (c *content) with(families []family) ([]family, error) {
	if c == nil {
		return families, nil
	}
	replaced := make(map[string]bool, len(families))
	for _, f := range families {
		replaced[f.name] = true
	}
	old, err := c.families()
	if err != nil {
		return nil, err
	}
	return append(slices.Clone(families), slices.DeleteFunc(old, func(f family) bool { return replaced[f.name] })...), nil
}
