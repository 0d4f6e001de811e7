package gateway

import (
	"bufio"
	"bytes"
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/promferry/promferry/internal/safeurl"
)

// page puts families of several groups together so that each stands there once, of one type. It
// reads the texts of the groups side by side, so that of each one a piece is in memory.
type page struct {
	scheme model.EscapingScheme
	now    time.Time
	states []*state
	// sources are what the page is made of, the oldest group first.
	sources []*source
	// clashes has which families must not stand there, and why.
	clashes map[place]string
	// left says what was left out, at most maxLeft of it; leftOut counts all.
	left    []string
	leftOut int
}

// maxLeft is of how many families a page says that they are left out.
const maxLeft = 100

// source is a text of families in order of their names, or one family of such a text that gets
// another name on the page.
type source struct {
	textReader

	number  int // tells the older of two
	labels  []byte
	content *content
	// escaped is the name that the only family of the source gets; "": it has all others.
	escaped string
}

// place is a family in a source.
type place struct {
	source *source
	name   string
}

func newPage(scheme model.EscapingScheme) *page {
	return &page{scheme: scheme, now: time.Now()}
}

// add adds all families of a content, those that Prometheus makes itself before the others.
func (p *page) add(c *content, labels []byte) {
	p.addText(c, labels, func(at int) textReader { return readPlain(c.Own, at) })
	p.addText(c, labels, func(at int) textReader { return readPacked(&c.Text, at) })
}

func (p *page) addText(c *content, labels []byte, reader func(at int) textReader) {
	s := &source{textReader: reader(0), number: len(p.sources), labels: labels, content: c}
	p.sources = append(p.sources, s)
	if !p.escapes(c) {
		return
	}
	r := reader(0)
	defer r.release()
	for {
		at := r.at
		name, err := r.name()
		if err != nil {
			return // The source has the same error.
		}
		if name := string(name); c.isQuoted(name) {
			p.sources = append(p.sources, &source{
				textReader: reader(at), number: len(p.sources), labels: labels, content: c, escaped: model.EscapeName(name, p.scheme),
			})
		}
		if _, err := r.header(nil); err != nil {
			return
		}
		if err := r.series(nil); err != nil {
			return
		}
	}
}

// escapes tells whether the page has other names than a content.
func (p *page) escapes(c *content) bool { return len(c.Quoted) > 0 && p.scheme != model.NoEscaping }

// state adds all of a group; of a silent one that it is down.
func (p *page) state(s *state) {
	p.states = append(p.states, s)
	if c := s.content; c != nil && !s.silent(p.now) {
		p.add(c, s.group.labels)
	}
}

// made are the families that have series of the gateway's own making in a group.
var made = []struct {
	name, help string
	value      func(s *state, now time.Time) (float64, bool)
}{
	{pushFailureTimeName, "When a push to this group was last refused, in Unix time.", func(s *state, _ time.Time) (float64, bool) {
		return unixTime(s.failed), s.hasTimes()
	}},
	{pushTimeName, "When a push to this group last succeeded, in Unix time.", func(s *state, _ time.Time) (float64, bool) {
		return unixTime(s.pushed), s.hasTimes()
	}},
	{upName, "Whether the target of this group could be scraped.", func(s *state, now time.Time) (float64, bool) {
		return 0, s.silent(now) || s.content == nil && !s.downSince.IsZero()
	}},
}

func (s *state) hasTimes() bool { return !s.awaited || !s.pushed.IsZero() }

// appendHeader and appendGauge append parts of a family of the gateway's own making.
func appendHeader(b []byte, name, help string) []byte {
	return fmt.Appendf(b, "# HELP %s %s\n# TYPE %s gauge\n", name, help, name)
}

func appendGauge(b []byte, name string, labels []byte, value float64) []byte {
	b = append(append(append(b, name...), labels...), ' ')
	return append(strconv.AppendFloat(b, value, 'g', -1, 64), '\n')
}

// unixTime returns a time in seconds since 1970, 0 for none.
func unixTime(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

func (p *page) leave(name string, labels []byte, why string) {
	p.leftOut++
	if len(p.left) < maxLeft {
		p.left = append(p.left, fmt.Sprintf("# Left out: the family %.200q of %s: %s.\n", name, labels, safeurl.Cut(why)))
	}
}

// write writes the page, once.
func (p *page) write(w io.Writer) error {
	defer func() {
		for _, s := range p.sources {
			s.release()
		}
	}()
	p.findClashes()
	b := bufio.NewWriterSize(w, 64<<10)
	q := queue{rows: make(map[string]*row)}
	for _, m := range made {
		if slices.ContainsFunc(p.states, func(s *state) bool { _, ok := m.value(s, p.now); return ok }) {
			q.row([]byte(m.name))
		}
	}
	for _, s := range p.sources {
		p.advance(&q, s)
	}
	for len(q.sorted) > 0 {
		r := q.next()
		if err := p.family(b, r); err != nil {
			return err
		}
		for _, s := range r.sources {
			p.advance(&q, s)
		}
		q.free = append(q.free, r)
	}
	for _, line := range p.left {
		_, _ = b.WriteString(line)
	}
	if p.leftOut > len(p.left) {
		_, _ = fmt.Fprintf(b, "# Left out: %d more.\n", p.leftOut-len(p.left))
	}
	return b.Flush()
}

// row is a family of a page: which sources are at it.
type row struct {
	name    string
	sources []*source
}

// queue has the families that sources are at, in order of their names.
type queue struct {
	rows   map[string]*row
	last   *row // that was asked for: groups are alike
	sorted []*row
	free   []*row
}

func (q *queue) Len() int           { return len(q.sorted) }
func (q *queue) Less(i, j int) bool { return q.sorted[i].name < q.sorted[j].name }
func (q *queue) Swap(i, j int)      { q.sorted[i], q.sorted[j] = q.sorted[j], q.sorted[i] }
func (q *queue) Push(r any)         { q.sorted = append(q.sorted, r.(*row)) }

func (q *queue) Pop() any {
	last := len(q.sorted) - 1
	r := q.sorted[last]
	q.sorted = q.sorted[:last]
	return r
}

// row returns the row of a family, and makes it where there is none.
func (q *queue) row(name []byte) *row {
	if q.last != nil && q.last.name == string(name) {
		return q.last
	}
	r := q.rows[string(name)]
	if r == nil {
		r = &row{}
		if n := len(q.free); n > 0 {
			r, q.free = q.free[n-1], q.free[:n-1]
		}
		r.name, r.sources = string(name), r.sources[:0]
		q.rows[r.name] = r
		heap.Push(q, r)
	}
	q.last = r
	return r
}

// next takes the first row out of the queue.
func (q *queue) next() *row {
	r := heap.Pop(q).(*row)
	delete(q.rows, r.name)
	q.last = nil
	slices.SortFunc(r.sources, func(a, b *source) int { return cmp.Compare(a.number, b.number) })
	return r
}

// advance puts a source into the row of the family that it is at.
func (p *page) advance(q *queue, s *source) {
	name, err := p.nameOf(s)
	switch {
	case errors.Is(err, io.EOF):
		s.release()
	case err != nil: // It was checked when it was read from disk.
		p.leave("all", s.labels, err.Error())
		s.release()
	default:
		r := q.row(name)
		r.sources = append(r.sources, s)
	}
}

// nameOf returns the name on the page of the family that a source is at. The error of a source
// without more families is io.EOF.
func (p *page) nameOf(s *source) ([]byte, error) {
	if s.escaped != "" {
		if s.content == nil { // It was on the page.
			return nil, io.EOF
		}
		return []byte(s.escaped), nil
	}
	for {
		name, err := s.name()
		if err != nil || !p.escapes(s.content) || !s.content.isQuoted(string(name)) {
			return name, err
		}
		if _, err = s.header(nil); err == nil { // That family is a source of its own.
			err = s.series(nil)
		}
		if err != nil {
			return nil, err
		}
	}
}

// family writes a family. An error is that of w.
func (p *page) family(w io.Writer, r *row) error {
	typ := noType
	for _, s := range r.sources {
		if err := p.part(w, s, r.name, &typ); err != nil {
			return err
		}
	}
	var b []byte
	for _, m := range made {
		if m.name != r.name {
			continue
		}
		for _, s := range p.states {
			value, ok := m.value(s, p.now)
			switch {
			case !ok:
				continue
			case typ == noType:
				typ, b = dto.MetricType_GAUGE, appendHeader(b, m.name, m.help)
			case typ != dto.MetricType_GAUGE && typ != dto.MetricType_UNTYPED && typ != dto.MetricType_COUNTER:
				p.leave(m.name, s.group.labels, "it is a "+typeName(typ)+" in a group before")
				continue
			}
			b = appendGauge(b, m.name, s.group.labels, value)
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	return nil
}

// noType is of a family of which nothing is on the page.
const noType dto.MetricType = -1

// part writes what of a family is in a source, or leaves it out where it clashes with what came
// before. Typ is the type of the family, noType before the first part. An error is that of w.
func (p *page) part(w io.Writer, s *source, name string, typ *dto.MetricType) error {
	why := p.clashes[place{s, name}]
	to := &faultWriter{w: w}
	fault := error(nil)
	if s.escaped != "" {
		fault = s.escape(p.scheme)
	}
	if fault == nil {
		why, fault = s.write(to, why, typ)
	}
	if to.err != nil {
		return to.err
	}
	if fault != nil {
		why = fault.Error()
		if e, ok := errors.AsType[*nameError](fault); ok {
			name = e.name
		}
		s.release()
		s.textReader = textReader{} // At its end.
	}
	if why != "" {
		p.leave(name, s.labels, why)
	}
	return nil
}

// write writes the family at which the source is, or nothing if there is a reason why not. It
// returns the reason.
func (s *source) write(w io.Writer, why string, typ *dto.MetricType) (string, error) {
	to := w
	if why != "" || *typ != noType {
		to = nil
	}
	its, err := s.header(to)
	if err != nil {
		return "", err
	}
	to = w
	switch {
	case why != "":
		to = nil
	case *typ == noType:
		*typ = its
	case *typ != its:
		why = fmt.Sprintf("it is a %s, and a %s in a group before", typeName(its), typeName(*typ))
		to = nil
	}
	return why, s.series(to)
}

// nameError is why a family has no other name.
type nameError struct {
	name string // of the family
	error
}

// faultWriter keeps the error of a writer, to tell it from those of what is written.
type faultWriter struct {
	w   io.Writer
	err error
}

func (f *faultWriter) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	f.err = err
	return n, err
}

// escape makes the family of a source ready to be read under its other name. It can be called once.
func (s *source) escape(scheme model.EscapingScheme) error {
	var text bytes.Buffer
	f, err := s.content.next(&s.textReader, &text)
	s.release()
	s.content = nil
	if err != nil {
		return err
	}
	escaped, err := escape(f, scheme)
	if err != nil {
		return &nameError{f.name, err}
	}
	s.textReader = readPlain(escaped.text, 0)
	return nil
}

// findClashes finds the families that have the name of a series of another one, a summary or a
// histogram, or are such a one. That of the older group stands on the page.
func (p *page) findClashes() {
	involved := p.involved()
	if len(involved) == 0 {
		return
	}
	p.clashes = make(map[place]string)
	types := make(map[string]dto.MetricType)
	for _, s := range p.sources {
		again := *s // Nothing of it is read yet.
		for {
			b, err := p.nameOf(&again)
			if err != nil {
				break // The source has the same error.
			}
			name := string(b)
			if again.escaped != "" && !involved[name] {
				break
			}
			if again.escaped != "" && again.escape(p.scheme) != nil {
				break
			}
			typ, err := again.header(nil)
			if err == nil {
				err = again.series(nil)
			}
			if err != nil {
				break
			}
			if _, known := types[name]; involved[name] && !known {
				if why := clash(heading{name, typ}, types); why != "" {
					p.clashes[place{s, name}] = why
				} else {
					types[name] = typ
				}
			}
		}
		again.release()
	}
}

// involved returns the names of families that may clash: mostly none.
func (p *page) involved() map[string]bool {
	bases, suffixed := make(map[string]bool), make(map[string]bool)
	note := func(name string, base bool) {
		if base {
			bases[name] = true
		}
		if hasAnySuffix(name) {
			suffixed[name] = true
		}
	}
	var last *content
	for _, s := range p.sources {
		if s.content == last {
			continue
		}
		last = s.content
		for _, h := range s.content.clashing {
			isBase := h.typ == dto.MetricType_SUMMARY || h.typ == dto.MetricType_HISTOGRAM
			if p.escapes(s.content) {
				h.name = model.EscapeName(h.name, p.scheme)
			}
			note(h.name, isBase)
		}
		if p.escapes(s.content) {
			for _, name := range s.content.Quoted {
				note(model.EscapeName(name, p.scheme), false)
			}
		}
	}
	involved := make(map[string]bool)
	for name := range suffixed {
		for _, suffix := range suffixes {
			if base, ok := strings.CutSuffix(name, suffix); ok && bases[base] {
				involved[name], involved[base] = true, true
			}
		}
	}
	return involved
}

// clash returns why a family cannot stand beside those of other names, or nothing.
func clash(f heading, types map[string]dto.MetricType) string {
	if base := collidesWith(f.name, types); base != "" {
		return fmt.Sprintf("the %s %.200q of a group before has series of this name", typeName(types[base]), base)
	}
	if f.typ == dto.MetricType_SUMMARY || f.typ == dto.MetricType_HISTOGRAM {
		for _, suffix := range suffixes {
			if _, ok := types[f.name+suffix]; ok && hasSuffix(f.typ, suffix) {
				return fmt.Sprintf("a group before has a family %.200q", f.name+suffix)
			}
		}
	}
	return ""
}

// parsed returns a family as it was before it was rendered.
func (f family) parsed() (*dto.MetricFamily, error) {
	if f.native != nil {
		parsed := &dto.MetricFamily{}
		err := protodelim.UnmarshalFrom(bytes.NewReader(f.native), parsed)
		return parsed, err
	}
	return f.fromText()
}

// fromText returns a family as its text tells it, without native histograms.
func (f family) fromText() (*dto.MetricFamily, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(f.text))
	if err != nil {
		return nil, fmt.Errorf("read family %.200q: %w", f.name, err)
	}
	if families[f.name] == nil {
		return nil, fmt.Errorf("read family %.200q: it is not there", f.name)
	}
	return families[f.name], nil
}

// escaped returns a family with names that stand without quotes, or why it has none.
func (f family) escaped(scheme model.EscapingScheme) (*dto.MetricFamily, error) {
	parsed, err := f.parsed()
	if err != nil || !f.quoted {
		return parsed, err
	}
	escaped := model.EscapeMetricFamily(parsed, scheme)
	if name := escaped.GetName(); name == pushTimeName || name == pushFailureTimeName {
		return nil, fmt.Errorf("without quotes it would be called %.200s, which is the gateway's own", name)
	}
	for _, m := range escaped.GetMetric() {
		seen := make(map[string]bool, len(m.GetLabel()))
		for _, l := range m.GetLabel() {
			// Either would make Prometheus refuse all of the page.
			if name := l.GetName(); seen[name] || !validLabel(name) {
				return nil, fmt.Errorf("without quotes a label would be called %.200s, which is another's name or reserved", name)
			}
			seen[l.GetName()] = true
		}
	}
	return escaped, nil
}

// escape is escaped, rendered.
func escape(f family, scheme model.EscapingScheme) (family, error) {
	escaped, err := f.escaped(scheme)
	if err != nil {
		return family{}, err
	}
	var b bytes.Buffer
	rendered, err := render(&b, []*dto.MetricFamily{escaped})
	if err != nil {
		return family{}, err
	}
	return rendered[0], nil
}
