package gateway

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
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

// content is what a group holds, and what is kept of it on disk. It is never changed.
type content struct {
	// Own is the text of the families that Prometheus makes of a scrape itself. Text is that
	// of the others. Both are in order of the families' names.
	Own  plainText  `json:"own,omitempty"`
	Text packedText `json:"text"`
	// Series is how many series it has in all.
	Series int `json:"series"`
	// Quoted are the names of the families that have names in quotes, in order.
	Quoted []string `json:"quoted,omitempty"`
	// Native are families that have native histograms, as delimited protobuf messages.
	Native map[string][]byte `json:"native,omitempty"`
	// Down tells that up is 0.
	Down bool `json:"down,omitempty"`
	// ExpiresAfter is for how long after its last put the group is good. Zero means that it
	// does not say that.
	ExpiresAfter time.Duration `json:"expires_after_ns,omitempty"`

	// clashing are the families that may not stand beside every other one.
	clashing []heading
}

// plainText is a text that is written to disk as it is.
type plainText []byte

// MarshalText implements [encoding.TextMarshaler].
func (t plainText) MarshalText() ([]byte, error) { return t, nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (t *plainText) UnmarshalText(b []byte) error {
	*t = bytes.Clone(b)
	return nil
}

// heading is the name and the type of a family.
type heading struct {
	name string
	typ  dto.MetricType
}

// mayClash tells whether a family has series of other names, or a name that a series of another
// family may have.
func (h heading) mayClash() bool {
	return h.typ == dto.MetricType_SUMMARY || h.typ == dto.MetricType_HISTOGRAM || hasAnySuffix(h.name)
}

// maxExpiry is the longest time that a group can ask for, 30 years, in seconds.
const maxExpiry = 1e9

// build makes a content of rendered families, which it copies. Most is the maximum of its size. An
// error is a *Refusal.
func build(families []family, most int) (*content, error) {
	return (*content)(nil).with(families, most)
}

// with returns a content of families, which it copies, and those of c that they do not replace. Of
// the text of c only a piece is in memory at a time. Most is the maximum of its size. Errors that
// are due to the families are *Refusal.
func (c *content) with(families []family, most int) (*content, error) {
	var replaced map[string]bool
	if c == nil {
		c = &content{}
	} else {
		replaced = make(map[string]bool, len(families))
		for _, f := range families {
			replaced[f.name] = true
		}
	}
	// Families without text have only replaced others.
	families = slices.DeleteFunc(slices.Clone(families), func(f family) bool { return len(f.text) == 0 })
	slices.SortFunc(families, func(a, b family) int { return strings.Compare(a.name, b.name) })
	b := &builder{most: most, text: newPacker()}
	for _, f := range families {
		if h := (heading{f.name, f.typ}); h.mayClash() {
			b.content.clashing = append(b.content.clashing, h)
		}
	}
	for _, h := range c.clashing {
		if !replaced[h.name] {
			b.content.clashing = append(b.content.clashing, h)
		}
	}
	err := collision(b.content.clashing)
	if err == nil {
		err = b.addAll(c, families, replaced)
	}
	if err != nil {
		b.text.release()
		return nil, err
	}
	return b.finish(), nil
}

// builder makes a content.
type builder struct {
	content content
	text    *packer
	size    int // of what is in it
	most    int
}

// addAll adds families, which are in order, and those of old that they do not replace.
func (b *builder) addAll(old *content, families []family, replaced map[string]bool) error {
	own := func(f family) bool { return slices.Contains(prometheusOwn, f.name) }
	oldOwn, err := old.split(old.Own)
	if err != nil {
		return err
	}
	oldOwn = slices.DeleteFunc(oldOwn, func(f family) bool { return replaced[f.name] })
	for _, f := range families {
		if own(f) {
			oldOwn = append(oldOwn, f)
		}
	}
	slices.SortFunc(oldOwn, func(a, b family) int { return strings.Compare(a.name, b.name) })
	for _, f := range oldOwn {
		if err := b.add(f, true); err != nil {
			return err
		}
	}
	families = slices.DeleteFunc(families, own)
	r := readPacked(&old.Text, 0)
	defer r.release()
	for {
		name, err := r.name()
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return err
		}
		for len(families) > 0 && (end || families[0].name < string(name)) {
			if err := b.add(families[0], false); err != nil {
				return err
			}
			families = families[1:]
		}
		if end {
			return nil
		}
		if replaced[string(name)] {
			_, err = r.header(nil)
			err = cmp.Or(err, r.series(nil))
		} else {
			err = b.copy(old, string(name), &r)
		}
		if err != nil {
			return err
		}
	}
}

// add adds a family to those that Prometheus makes itself, or to the others.
func (b *builder) add(f family, own bool) error {
	if err := b.grow(len(f.text)); err != nil {
		return err
	}
	if own {
		b.content.Own = append(b.content.Own, f.text...)
	} else {
		b.text.write(f.text)
	}
	b.content.Series += f.series()
	switch f.name {
	case upName:
		b.content.Down = f.number() == 0
	case expiresAfterName:
		if n := f.number(); n > 0 { // Not NaN.
			b.content.ExpiresAfter = time.Duration(min(n, maxExpiry) * float64(time.Second))
		}
	}
	return b.note(f.name, f.quoted, f.native)
}

// copy adds the family of another content at which a reader of its text is.
func (b *builder) copy(from *content, name string, r *textReader) error {
	if _, err := r.header(b); err != nil {
		return err
	}
	if err := r.series(seriesCounter{b}); err != nil {
		return err
	}
	if name == expiresAfterName {
		b.content.ExpiresAfter = from.ExpiresAfter
	}
	return b.note(name, from.isQuoted(name), from.Native[name])
}

// note notes what is known of a family beside its text.
func (b *builder) note(name string, quoted bool, native []byte) error {
	if quoted {
		b.content.Quoted = append(b.content.Quoted, name)
	}
	if native == nil {
		return nil
	}
	if b.content.Native == nil {
		b.content.Native = make(map[string][]byte)
	}
	b.content.Native[name] = native
	return b.grow(len(native))
}

// grow notes that there are n bytes more, or returns that this is too much.
func (b *builder) grow(n int) error {
	if b.size += n; b.size > b.most {
		return tooLargeGroup(b.most)
	}
	return nil
}

// Write adds a part of a text to the others.
func (b *builder) Write(text []byte) (int, error) {
	if err := b.grow(len(text)); err != nil {
		return 0, err
	}
	b.text.write(text)
	return len(text), nil
}

// seriesCounter adds parts of a text, and counts the series in them.
type seriesCounter struct{ *builder }

func (c seriesCounter) Write(text []byte) (int, error) {
	c.content.Series += bytes.Count(text, []byte{'\n'})
	return c.builder.Write(text)
}

func (b *builder) finish() *content {
	b.content.Own, b.content.Text = bytes.Clone(b.content.Own), b.text.packed()
	slices.Sort(b.content.Quoted)
	c := b.content // Without the builder behind it.
	return &c
}

func (c *content) isQuoted(name string) bool {
	_, ok := slices.BinarySearch(c.Quoted, name)
	return ok
}

// size returns the length of the text, and of what it lacks of native histograms, in bytes.
func (c *content) size() int {
	n := len(c.Own) + c.Text.Size
	for _, native := range c.Native {
		n += len(native)
	}
	return n
}

// memory returns how much memory the content takes, in bytes. Nil takes none.
func (c *content) memory() int {
	if c == nil {
		return 0
	}
	n := len(c.Own) + len(c.Text.Stream)
	for name, native := range c.Native {
		n += len(name) + len(native)
	}
	for _, name := range c.Quoted {
		n += len(name)
	}
	for _, h := range c.clashing {
		n += len(h.name)
	}
	return n
}

// restored returns the content as it is kept, after it was read from disk. An error means that it
// is damaged.
func (c *content) restored() (*content, error) {
	text, err := c.Text.unpack()
	if err != nil {
		return nil, err
	}
	slices.Sort(c.Quoted)
	own, err := c.split(c.Own)
	if err != nil {
		return nil, err
	}
	others, err := c.split(text)
	if err != nil {
		return nil, err
	}
	families := append(own, others...)
	inOrder := slices.IsSortedFunc(others, func(a, b family) int { return strings.Compare(a.name, b.name) })
	if !inOrder || !c.Text.inPieces() { // As earlier versions wrote it.
		return build(families, math.MaxInt)
	}
	for _, f := range families {
		if h := (heading{f.name, f.typ}); h.mayClash() {
			c.clashing = append(c.clashing, h)
		}
	}
	return c, nil
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
		name, ok := nameIn(f.text)
		if !ok {
			return nil, errNoHeader
		}
		header := bytes.TrimSuffix(f.text[:f.header], []byte{'\n'})
		var err error
		if f.typ, err = typeIn(header[bytes.LastIndexByte(header, '\n')+1:]); err != nil {
			return nil, err
		}
		f.name = string(name)
		f.quoted, f.native = c.isQuoted(f.name), c.Native[f.name]
		families = append(families, f)
	}
	return families, nil
}

// families calls each with every family of a text of the content, of which one is in memory at a
// time. It is valid until each returns.
func (c *content) families(r textReader, each func(family) error) error {
	defer func() { r.release() }()
	var text bytes.Buffer
	for {
		f, err := c.next(&r, &text)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = each(f)
		}
		if err != nil {
			return err
		}
	}
}

// next returns the family at which a reader of a text of the content is, in b. At the end of the
// text the error is io.EOF.
func (c *content) next(r *textReader, b *bytes.Buffer) (family, error) {
	b.Reset()
	name, err := r.name()
	if err != nil {
		return family{}, err
	}
	f := family{name: string(name)}
	f.quoted, f.native = c.isQuoted(f.name), c.Native[f.name]
	if f.typ, err = r.header(b); err != nil {
		return family{}, err
	}
	f.header = b.Len()
	err = r.series(b)
	f.text = b.Bytes()
	return f, err
}
