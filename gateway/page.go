package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
)

// page puts families of several groups together so that each stands there once, of one type.
type page struct {
	scheme model.EscapingScheme
	rows   map[string]*row
	types  map[string]dto.MetricType
	// down are the labels of groups of which is known only that they are down.
	down [][]byte
	// left says what was left out, at most maxLeft of it; leftOut counts all.
	left    []string
	leftOut int
}

// maxLeft is of how many families a page says that they are left out.
const maxLeft = 100

// row is a family of a page.
type row struct {
	header []byte
	parts  [][]byte
}

func newPage(scheme model.EscapingScheme) *page {
	return &page{scheme: scheme, rows: make(map[string]*row), types: make(map[string]dto.MetricType)}
}

// add adds a family of a group, or leaves it out where it clashes with what came before.
func (p *page) add(f family, labels []byte) {
	if f.quoted && p.scheme != model.NoEscaping {
		escaped, err := escape(f, p.scheme)
		if err != nil {
			p.leave(f.name, labels, err.Error())
			return
		}
		f = escaped
	}
	r := p.rows[f.name]
	if r == nil {
		if why := p.clash(f); why != "" {
			p.leave(f.name, labels, why)
			return
		}
		r = &row{header: f.text[:f.header]}
		p.rows[f.name], p.types[f.name] = r, f.typ
	} else if p.types[f.name] != f.typ {
		p.leave(f.name, labels, fmt.Sprintf("it is a %s, and a %s in a group before", typeName(f.typ), typeName(p.types[f.name])))
		return
	}
	r.parts = append(r.parts, f.text[f.header:])
}

// clash returns why a family cannot stand beside those of other names, or nothing.
func (p *page) clash(f family) string {
	if base := collidesWith(f.name, p.types); base != "" {
		return fmt.Sprintf("the %s %.200q of a group before has series of this name", typeName(p.types[base]), base)
	}
	if f.typ == dto.MetricType_SUMMARY || f.typ == dto.MetricType_HISTOGRAM {
		for _, suffix := range suffixes {
			if _, ok := p.types[f.name+suffix]; ok && hasSuffix(f.typ, suffix) {
				return fmt.Sprintf("a group before has a family %.200q", f.name+suffix)
			}
		}
	}
	return ""
}

func (p *page) leave(name string, labels []byte, why string) {
	p.leftOut++
	if len(p.left) < maxLeft {
		p.left = append(p.left, fmt.Sprintf("# Left out: the family %.200q of %s: %s.\n", name, labels, why))
	}
}

// gauge adds a series of the gateway's own making to a group.
func (p *page) gauge(name, help string, labels []byte, value float64) {
	line := make([]byte, 0, len(name)+len(labels)+24)
	line = append(append(append(line, name...), labels...), ' ')
	line = append(strconv.AppendFloat(line, value, 'g', -1, 64), '\n')
	r := p.rows[name]
	if r == nil {
		r = &row{header: fmt.Appendf(nil, "# HELP %s %s\n# TYPE %s gauge\n", name, help, name)}
		p.rows[name], p.types[name] = r, dto.MetricType_GAUGE
	}
	switch p.types[name] {
	case dto.MetricType_GAUGE, dto.MetricType_UNTYPED, dto.MetricType_COUNTER:
		r.parts = append(r.parts, line)
	default:
		p.leave(name, labels, "it is a "+typeName(p.types[name])+" in a group before")
	}
}

// times adds when a group was pushed to.
func (p *page) times(s *state) {
	p.gauge(pushTimeName, "When a push to this group last succeeded, in Unix time.", s.group.labels, unixTime(s.pushed))
	p.gauge(pushFailureTimeName, "When a push to this group was last refused, in Unix time.", s.group.labels, unixTime(s.failed))
}

// state adds all of a group; of a silent one that it is down.
func (p *page) state(s *state, now time.Time) {
	switch {
	case s.silent(now):
		p.down = append(p.down, s.group.labels)
	case s.content != nil:
		families, err := s.content.families()
		if err != nil { // It was checked when it was read from disk.
			p.leave("all", s.group.labels, err.Error())
		}
		for _, f := range families {
			p.add(f, s.group.labels)
		}
	case !s.downSince.IsZero():
		p.down = append(p.down, s.group.labels)
	}
	if !s.awaited || !s.pushed.IsZero() {
		p.times(s)
	}
}

const upHelp = "Whether the target of this group could be scraped."

// unixTime returns a time in seconds since 1970, 0 for none.
func unixTime(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

// write writes the page, once.
func (p *page) write(w io.Writer) error {
	for _, labels := range p.down { // Last, so that up is of the type that others gave it.
		p.gauge(upName, upHelp, labels, 0)
	}
	b := bufio.NewWriterSize(w, 64<<10)
	for _, name := range slices.Sorted(maps.Keys(p.rows)) {
		r := p.rows[name]
		if len(r.parts) == 0 {
			continue
		}
		_, _ = b.Write(r.header)
		for _, part := range r.parts {
			_, _ = b.Write(part)
		}
	}
	for _, line := range p.left {
		_, _ = b.WriteString(line)
	}
	if p.leftOut > len(p.left) {
		_, _ = fmt.Fprintf(b, "# Left out: %d more.\n", p.leftOut-len(p.left))
	}
	return b.Flush()
}

// parsed returns a family as it was before it was rendered.
func (f family) parsed() (*dto.MetricFamily, error) {
	if f.native != nil {
		parsed := &dto.MetricFamily{}
		err := protodelim.UnmarshalFrom(bytes.NewReader(f.native), parsed)
		return parsed, err
	}
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
