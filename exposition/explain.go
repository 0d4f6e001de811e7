package exposition

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Fault is something in a text that a Pushgateway would refuse.
type Fault struct {
	// Line is the number of the line, from 1 on, or 0 where it is not known.
	Line int
	// Text says what it is.
	Text string
	// First is the number of the line of a series that comes again in Line, or 0.
	First int
}

func (f *Fault) Error() string {
	text := f.Text
	if f.First != 0 {
		text += fmt.Sprintf(", first in line %d", f.First)
	}
	if f.Line == 0 {
		return text
	}
	return fmt.Sprintf("line %d: %s", f.Line, text)
}

// FaultOf returns the fault that err, of Read, tells of a text, or nil.
func FaultOf(err error) *Fault {
	if pe, ok := errors.AsType[expfmt.ParseError](err); ok {
		return &Fault{Line: pe.Line, Text: pe.Msg}
	}
	return nil
}

// Explain tells why something of a text was left out, and where that stands. It reads the
// text once more, so it is for a person, not for each scrape.
func Explain(text []byte, l LeftOut) *Fault {
	what := fmt.Sprintf("%.200s: %s", l.Family, phrases[l.Reason])
	if l.Series > 1 {
		what = fmt.Sprintf("%.200s: %d series, %s", l.Family, l.Series, phrases[l.Reason])
	}
	seen := make(map[string]int)
	number, types := 0, 0
	quoted := []byte(strconv.Quote(l.Family))
	for line := range bytes.Lines(text) {
		number++
		if l.Reason == ReasonName && bytes.Contains(line, quoted) {
			return &Fault{Line: number, Text: what}
		}
		name := sampleName(line)
		if keyword, of, _ := header(line); keyword != "" && of == l.Family {
			if keyword == "TYPE" {
				types++
			}
			if l.Series == 0 || l.Reason == ReasonClash && types == 2 {
				return &Fault{Line: number, Text: what}
			}
		}
		if !isSeriesOf(name, l.Family) || l.Reason == ReasonClash && l.Series > 0 {
			continue
		}
		switch l.Reason {
		case ReasonDuplicate:
			m := sample(line)
			if m == nil {
				continue
			}
			sortLabels(m.Label)
			key := sampleName(line) + seriesKey(m)
			if first := seen[key]; first != 0 {
				return &Fault{Line: number, Text: what, First: first}
			}
			seen[key] = number
		case ReasonLabel:
			if name := badLabel(sampleName(line), sample(line)); name != "" {
				return &Fault{Line: number, Text: fmt.Sprintf("%s: %.200q", what, name)}
			}
		default:
			return &Fault{Line: number, Text: what}
		}
	}
	return &Fault{Text: what}
}

// Timestamps returns the number of the first line of a text whose sample has a timestamp,
// which a Pushgateway refuses, and the name of that family; 0 when none has.
func Timestamps(text []byte) (line int, family string) {
	for content := range bytes.Lines(text) {
		line++
		name := sampleName(content)
		if name == "" {
			continue
		}
		if m := sample(content); m != nil && m.TimestampMs != nil {
			return line, name
		}
	}
	return 0, ""
}

var phrases = map[Reason]string{
	ReasonReserved:  "a name that promferry, Prometheus or a Pushgateway writes itself",
	ReasonName:      "not a name that a Pushgateway takes: letters, digits, _ and : make one, a digit not at the begin",
	ReasonType:      "a type that a Pushgateway does not take, or a sample that is not of the family's type",
	ReasonClash:     "clashes with another family of the same name, or with a series of a summary or histogram",
	ReasonDuplicate: "a series that comes twice",
	ReasonLabel:     "has a label that a Pushgateway does not take",
}

// sample reads one line by itself, nil where that cannot be done.
func sample(line []byte) *dto.Metric {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.MultiReader(bytes.NewReader(bytes.TrimRight(line, "\r\n")), strings.NewReader("\n")))
	if err != nil {
		return nil
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			return m
		}
	}
	return nil
}

// badLabel returns the first label of a sample that can be the reason why its series was
// left out. Le stands in the samples of a histogram's buckets, and quantile in those of a
// summary that have no suffix.
func badLabel(name string, m *dto.Metric) string {
	for _, l := range m.GetLabel() {
		label := l.GetName()
		if !model.LegacyValidation.IsValidLabelName(label) || strings.HasPrefix(label, model.ReservedLabelPrefix) ||
			label == model.BucketLabel && !strings.HasSuffix(name, "_bucket") ||
			label == model.QuantileLabel && (strings.HasSuffix(name, "_sum") || strings.HasSuffix(name, "_count")) {
			return label
		}
	}
	return ""
}
