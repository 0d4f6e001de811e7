package gateway

import (
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/pushgw"
)

// maxLabels is how many labels a series may have, with those of its grouping key. The parser of
// texts, which reads pushes, and what was pushed when it is listed or escaped, takes time that
// grows with the square of their number: 12 s for 10,000.
const maxLabels = 200

// maxName is the maximum length of the name of a family, in bytes. A page with all groups has one
// name of each group in memory.
const maxName = 4096

// check makes families ready to be rendered: it sets the labels of the key in each series, and
// sorts. It refuses, with what was wrong, all that a Pushgateway refuses within one push, and
// that by which it, or who scrapes it, breaks. It takes families over.
func check(families []*dto.MetricFamily, key pushgw.GroupingKey) ([]*dto.MetricFamily, error) {
	byName := make(map[string]*dto.MetricFamily, len(families))
	var kept []*dto.MetricFamily
	for _, family := range families {
		name := family.GetName()
		first := byName[name]
		switch {
		case name == pushTimeName || name == pushFailureTimeName: // The gateway's own to write.
		case !model.UTF8Validation.IsValidMetricName(name) || hasControl(name):
			return nil, inconsistent("family %.200q: that is no name; a name is UTF-8 without control characters, and not empty", name)
		case len(name) > maxName:
			return nil, &Refusal{
				Status: http.StatusUnprocessableEntity, Reason: reasonSize,
				Text: fmt.Sprintf("family %.200q: the name has %d bytes, the maximum is %d", name, len(name), maxName),
			}
		case first != nil && first.GetType() != family.GetType():
			return nil, inconsistent("family %.200q: it comes twice, as %s and as %s", name, typeName(first.GetType()), typeName(family.GetType()))
		case first != nil:
			first.Metric = append(first.Metric, family.GetMetric()...)
		default:
			if family.Help != nil && !utf8.ValidString(family.GetHelp()) {
				family.Help = new(strings.ToValidUTF8(family.GetHelp(), "\uFFFD"))
			}
			byName[name] = family
			kept = append(kept, family)
		}
	}
	grouping := make([]*dto.LabelPair, 0, len(key.Labels)+2)
	for name, value := range key.AllLabels() {
		grouping = append(grouping, &dto.LabelPair{Name: new(name), Value: new(value)})
	}
	for _, family := range kept {
		if err := checkFamily(family, grouping); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(kept, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return kept, nil
}

func checkFamily(family *dto.MetricFamily, grouping []*dto.LabelPair) error {
	reserved := ""
	switch family.GetType() {
	case dto.MetricType_SUMMARY:
		reserved = model.QuantileLabel
	case dto.MetricType_HISTOGRAM:
		reserved = model.BucketLabel
	case dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED:
	default:
		return inconsistent("family %.200q: Prometheus reads no %s", family.GetName(), typeName(family.GetType()))
	}
	seen := make(map[string]struct{}, len(family.GetMetric()))
	var key []byte
	for _, m := range family.GetMetric() {
		if n := len(m.GetLabel()) + len(grouping); n > maxLabels {
			return tooManyLabels(n)
		}
		fault := setLabels(m, grouping, reserved)
		if fault == "" {
			fault = checkValue(m, family.GetType())
		}
		if fault == "" && len(family.GetMetric()) > 1 {
			key = key[:0]
			for _, l := range m.GetLabel() {
				key = append(key, l.GetName()...)
				key = append(key, 0xff) // In no UTF-8 text.
				key = append(key, l.GetValue()...)
				key = append(key, 0xff)
			}
			if _, ok := seen[string(key)]; ok {
				fault = "it was collected before with the same name and label values; labels of the grouping key replace those of a series"
			}
			seen[string(key)] = struct{}{}
		}
		if fault != "" {
			return inconsistent("family %.200q, series %s: %s", family.GetName(), seriesName(m.GetLabel()), fault)
		}
	}
	return nil
}

// checkValue returns what is wrong with the value of a series, or nothing.
func checkValue(m *dto.Metric, typ dto.MetricType) string {
	if m.TimestampMs != nil {
		return "pushed metrics must not have timestamps"
	}
	var ok bool
	switch typ {
	case dto.MetricType_COUNTER:
		ok = m.Counter != nil
	case dto.MetricType_GAUGE:
		ok = m.Gauge != nil
	case dto.MetricType_UNTYPED:
		ok = m.Untyped != nil
	case dto.MetricType_SUMMARY:
		ok = m.Summary != nil
		if q, twice := twice(m.GetSummary().GetQuantile(), (*dto.Quantile).GetQuantile); twice {
			return fmt.Sprintf("the quantile %v comes twice", q)
		}
	case dto.MetricType_HISTOGRAM:
		ok = m.Histogram != nil
		if bound, twice := twice(m.GetHistogram().GetBucket(), (*dto.Bucket).GetUpperBound); twice {
			return fmt.Sprintf("the bucket up to %v comes twice", bound)
		}
	default: // checkFamily has refused it.
	}
	if !ok {
		return "it is not a " + typeName(typ)
	}
	return ""
}

// twice returns the number that two of list have in common. Unlike in Go NaN is one number in a
// text.
func twice[T any](list []T, number func(T) float64) (float64, bool) {
	seen := make(map[float64]bool, len(list))
	hasNaN := false
	for _, one := range list {
		n := number(one)
		if seen[n] || hasNaN && math.IsNaN(n) {
			return n, true
		}
		seen[n] = true
		hasNaN = hasNaN || math.IsNaN(n)
	}
	return 0, false
}

// setLabels gives a series the labels of the grouping key, and an empty instance where it has
// none, so that Prometheus does not add that of the gateway. It returns what is wrong with the
// labels, or nothing.
func setLabels(m *dto.Metric, grouping []*dto.LabelPair, reserved string) string {
	labels := make([]*dto.LabelPair, 0, len(m.GetLabel())+len(grouping)+1)
	labels = append(labels, grouping...)
	isSet := func(name string) bool {
		return slices.ContainsFunc(grouping, func(l *dto.LabelPair) bool { return l.GetName() == name })
	}
	var replaced []string
	for _, l := range m.GetLabel() {
		switch {
		case slices.Contains(replaced, l.GetName()):
			return fmt.Sprintf("the label %.200q comes twice", l.GetName())
		case isSet(l.GetName()): // That of the key replaces it.
			replaced = append(replaced, l.GetName())
		case !validLabel(l.GetName()):
			return fmt.Sprintf("%.200q is no name of a label", l.GetName())
		case !utf8.ValidString(l.GetValue()):
			return fmt.Sprintf("the value of the label %.200q is not UTF-8", l.GetName())
		case l.GetValue() != "":
			labels = append(labels, l)
		}
	}
	slices.SortFunc(labels, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	hasInstance := false
	for i, l := range labels {
		switch {
		case i > 0 && labels[i-1].GetName() == l.GetName():
			return fmt.Sprintf("the label %.200q comes twice", l.GetName())
		case l.GetName() == reserved:
			return fmt.Sprintf("it must not have an explicit %q label, neither of its own nor in the grouping key", reserved)
		case l.GetName() == model.InstanceLabel:
			hasInstance = true
		}
	}
	if !hasInstance {
		i, _ := slices.BinarySearchFunc(labels, model.InstanceLabel, func(l *dto.LabelPair, name string) int { return strings.Compare(l.GetName(), name) })
		labels = slices.Insert(labels, i, &dto.LabelPair{Name: new(model.InstanceLabel), Value: new("")})
	}
	m.Label = labels
	return ""
}

// validLabel tells whether a series may have a label of this name. One with a colon would be
// written without quotes, which Prometheus does not read.
func validLabel(name string) bool {
	return model.UTF8Validation.IsValidLabelName(name) && !strings.HasPrefix(name, model.ReservedLabelPrefix) &&
		!strings.Contains(name, ":") && !hasControl(name)
}

// hasControl tells whether a name has ASCII control characters. With a zero in one, Prometheus
// would read nothing of a page.
func hasControl(name string) bool {
	for i := range len(name) {
		if name[i] < ' ' || name[i] == 0x7f {
			return true
		}
	}
	return false
}

// collision tells which of families has the name of a series of another one, a summary or a
// histogram: in a text nobody can tell which of them a sample belongs to. The error is a *Refusal.
func collision(families []heading) error {
	byName := make(map[string]dto.MetricType)
	for _, f := range families {
		if f.typ == dto.MetricType_SUMMARY || f.typ == dto.MetricType_HISTOGRAM {
			byName[f.name] = f.typ
		}
	}
	for _, f := range families {
		if base := collidesWith(f.name, byName); base != "" {
			return inconsistent("family %.200q: the %s %.200q has series of this name", f.name, typeName(byName[base]), base)
		}
	}
	return nil
}

// collidesWith returns the summary or histogram that has series of this name, or nothing.
func collidesWith(name string, byName map[string]dto.MetricType) string {
	for _, suffix := range suffixes {
		if base, ok := strings.CutSuffix(name, suffix); ok {
			typ, known := byName[base]
			if known && hasSuffix(typ, suffix) {
				return base
			}
		}
	}
	return ""
}

var suffixes = []string{"_count", "_sum", "_bucket"}

func hasAnySuffix(name string) bool {
	return slices.ContainsFunc(suffixes, func(suffix string) bool { return strings.HasSuffix(name, suffix) })
}

// hasSuffix tells whether series of a type have a suffix.
func hasSuffix(typ dto.MetricType, suffix string) bool {
	return typ == dto.MetricType_HISTOGRAM || typ == dto.MetricType_SUMMARY && suffix != "_bucket"
}

func inconsistent(format string, args ...any) error {
	return &Refusal{
		Status: http.StatusBadRequest, Reason: reasonInconsistent,
		Text: "pushed metrics are invalid or inconsistent: " + fmt.Sprintf(format, args...),
	}
}

func tooManyLabels(n int) error {
	return &Refusal{
		Status: http.StatusUnprocessableEntity, Reason: reasonSize,
		Text: fmt.Sprintf("a series has %d labels, those of the grouping key among them, and may have %d", n, maxLabels),
	}
}

// textSize returns how long the text of families in a group is at least, in bytes: without
// values, and without what has to be escaped.
func textSize(families []*dto.MetricFamily, key pushgw.GroupingKey) int {
	const perLine, perLabel = len("{} 0\n"), len(`=""`)
	grouping := perLine
	for name, value := range key.AllLabels() {
		grouping += len(name) + len(value) + perLabel
	}
	size := 0
	for _, f := range families {
		size += len(f.GetHelp()) + len(f.GetName())
		for _, m := range f.GetMetric() {
			line := grouping + len(f.GetName())
			for _, l := range m.GetLabel() {
				if _, ok := key.Labels[l.GetName()]; !ok && l.GetName() != model.JobLabel && l.GetValue() != "" {
					line += len(l.GetName()) + len(l.GetValue()) + perLabel
				}
			}
			size += line * max(1, len(m.GetSummary().GetQuantile()), len(m.GetHistogram().GetBucket()))
		}
	}
	return size
}

func tooLargeGroup(most int) error {
	return &Refusal{
		Status: http.StatusRequestEntityTooLarge, Reason: reasonSize,
		Text: fmt.Sprintf("the group would have more than %d bytes of text, with the labels of the grouping key in each series (--limit.group-bytes): push less, or make a smaller group with PUT", most),
	}
}

func typeName(t dto.MetricType) string { return strings.ToLower(t.String()) }

// seriesName returns labels in the notation of PromQL, cut where they are very long.
func seriesName(labels []*dto.LabelPair) string {
	var b strings.Builder
	b.WriteByte('{')
	for i, l := range labels {
		if i > 0 {
			b.WriteByte(',')
		}
		if b.Len() > 500 {
			b.WriteString("...")
			break
		}
		fmt.Fprintf(&b, "%.200s=%.200q", l.GetName(), l.GetValue())
	}
	b.WriteByte('}')
	return b.String()
}
