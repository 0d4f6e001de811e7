package exposition

import (
	"cmp"
	"math"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// A Reason says why something of an exposition was left out.
type Reason string

// The reasons for which Rules.Check leaves something out.
const (
	// ReasonReserved: the family's name is one that this program writes itself.
	ReasonReserved Reason = "reserved"
	// ReasonName: the family has no name, or one that a Pushgateway does not take.
	ReasonName Reason = "name"
	// ReasonType: a series has no value of its family's type, or the type is unknown. A
	// gauge histogram counts as unknown: of one that it took, a Pushgateway 1.5.1 exposes a
	// line without a value, which costs the rest of its page.
	ReasonType Reason = "type"
	// ReasonClash: another family of the exposition has the same name and another type; or
	// one of a summary's or histogram's series and a family have one name.
	ReasonClash Reason = "clash"
	// ReasonDuplicate: the series, or a bucket or quantile of it, came before.
	ReasonDuplicate Reason = "duplicate"
	// ReasonLabel: the series has a label that a Pushgateway refuses, or breaks on.
	ReasonLabel Reason = "label"
)

// Reasons are all reasons, for a metric that has one series for each.
var Reasons = []Reason{ReasonReserved, ReasonName, ReasonType, ReasonClash, ReasonDuplicate, ReasonLabel}

// LeftOut tells of something that Rules.Check left out.
type LeftOut struct {
	// Family is the family's name as the exposition has it.
	Family string
	// Reason is why.
	Reason Reason
	// Series is how many series of the family it was, or 0 for the whole family.
	Series int
}

// Rules say what may stand in a put. They are safe for concurrent use.
type Rules struct {
	// Grouping has the names of the grouping labels. A series' own label of such a name
	// is kept under that name with "exported_" before it, as Prometheus does with
	// honor_labels: false.
	Grouping []string
	// Reserved are names of further families that only this program writes.
	Reserved []string
	// Keep and Drop match names of families; nil keeps all, and drops none. What they
	// filter is not told as left out.
	Keep, Drop *regexp.Regexp
}

// reserved matches the families that are Prometheus's, a Pushgateway's or ours to write in
// a group. The daemons' own metrics are not among them, so that a daemon can be a target as
// well.
var reserved = regexp.MustCompile(`^(up|push_time_seconds|push_failure_time_seconds|scrape_.*|promferry_.*)$`)

var daemonsOwn = regexp.MustCompile(`^promferry_(agent|build|client|expiry|forwarder|gateway|outbox|proxy)_`)

// Check returns the families that can be put, and tells what had to be left out because
// a Pushgateway would refuse it, with everything else in the same put, or would accept
// it and break. Timestamps and labels without a value go silently. It takes families
// over: they must not be used again.
func (r Rules) Check(families []*dto.MetricFamily) ([]*dto.MetricFamily, []LeftOut) {
	var left leftOut
	var kept []*dto.MetricFamily
	byName := make(map[string]*dto.MetricFamily, len(families))
	for _, family := range families {
		name := family.GetName()
		if r.Keep != nil && !r.Keep.MatchString(name) || r.Drop != nil && r.Drop.MatchString(name) {
			continue
		}
		first := byName[name]
		switch {
		case !model.LegacyValidation.IsValidMetricName(name):
			left.family(name, ReasonName)
		case reserved.MatchString(name) && !daemonsOwn.MatchString(name), slices.Contains(r.Reserved, name):
			left.family(name, ReasonReserved)
		case first != nil && first.GetType() != family.GetType():
			left.family(name, ReasonClash)
		case first != nil:
			first.Metric = append(first.Metric, family.GetMetric()...)
		default:
			if family.Help != nil && !utf8.ValidString(family.GetHelp()) {
				// One byte of it would make all of a Pushgateway's page unreadable.
				family.Help = new(strings.ToValidUTF8(family.GetHelp(), "\uFFFD"))
			}
			byName[name] = family
			kept = append(kept, family)
		}
	}
	kept = slices.DeleteFunc(kept, func(family *dto.MetricFamily) bool {
		r.checkSeries(family, &left)
		if len(family.GetMetric()) == 0 {
			delete(byName, family.GetName())
			return true
		}
		return false
	})
	clashing := make(map[string]bool)
	for _, family := range kept {
		if base := clashesWith(family.GetName(), byName); base != "" {
			clashing[family.GetName()], clashing[base] = true, true
		}
	}
	kept = slices.DeleteFunc(kept, func(family *dto.MetricFamily) bool {
		if clashing[family.GetName()] {
			left.family(family.GetName(), ReasonClash)
		}
		return clashing[family.GetName()]
	})
	return kept, left.all
}

// clashesWith returns the summary or histogram of the exposition that calls one of its
// series by this name, or nothing. In a text nobody can tell which of the two families a
// sample belongs to.
func clashesWith(name string, byName map[string]*dto.MetricFamily) string {
	for _, suffix := range []string{"_count", "_sum", "_bucket"} {
		base, ok := strings.CutSuffix(name, suffix)
		if !ok || byName[base] == nil {
			continue
		}
		switch byName[base].GetType() {
		case dto.MetricType_SUMMARY:
			if suffix != "_bucket" {
				return base
			}
		case dto.MetricType_HISTOGRAM:
			return base
		}
	}
	return ""
}

// checkSeries takes the series out of family that cannot be put.
func (r Rules) checkSeries(family *dto.MetricFamily, left *leftOut) {
	seen := make(map[string]struct{}, len(family.GetMetric()))
	family.Metric = slices.DeleteFunc(family.GetMetric(), func(m *dto.Metric) bool {
		reason := r.checkOne(m, family.GetType())
		if reason == "" {
			// After checkOne, for two series may have become the same.
			key := seriesKey(m)
			if _, ok := seen[key]; ok {
				reason = ReasonDuplicate
			}
			seen[key] = struct{}{}
		}
		if reason != "" {
			left.series(family.GetName(), reason)
		}
		return reason != ""
	})
}

// checkOne makes m ready to be put, or returns why it cannot be.
func (r Rules) checkOne(m *dto.Metric, typ dto.MetricType) Reason {
	m.TimestampMs = nil
	forbidden := ""
	switch typ {
	case dto.MetricType_COUNTER:
		if m.Counter == nil {
			return ReasonType
		}
	case dto.MetricType_GAUGE:
		if m.Gauge == nil {
			return ReasonType
		}
	case dto.MetricType_UNTYPED:
		if m.Untyped == nil {
			return ReasonType
		}
	case dto.MetricType_SUMMARY:
		if m.Summary == nil {
			return ReasonType
		}
		forbidden = model.QuantileLabel
		quantiles := m.GetSummary().GetQuantile()
		if repeats(len(quantiles), func(i int) float64 { return quantiles[i].GetQuantile() }) {
			return ReasonDuplicate
		}
	case dto.MetricType_HISTOGRAM:
		if m.Histogram == nil {
			return ReasonType
		}
		forbidden = model.BucketLabel
		buckets := m.GetHistogram().GetBucket()
		if repeats(len(buckets), func(i int) float64 { return buckets[i].GetUpperBound() }) {
			return ReasonDuplicate
		}
	default:
		return ReasonType
	}
	return r.checkLabels(m, forbidden)
}

// checkLabels drops labels without a value, renames those that the grouping key has, and
// sorts. It returns ReasonLabel when m cannot be put.
func (r Rules) checkLabels(m *dto.Metric, forbidden string) Reason {
	m.Label = slices.DeleteFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetValue() == "" })
	sortLabels(m.Label)
	var conflicts []*dto.LabelPair
	for i, l := range m.Label {
		name := l.GetName()
		if !model.LegacyValidation.IsValidLabelName(name) || strings.HasPrefix(name, model.ReservedLabelPrefix) ||
			name == forbidden || !utf8.ValidString(l.GetValue()) || i > 0 && m.Label[i-1].GetName() == name {
			return ReasonLabel
		}
		if slices.Contains(r.Grouping, name) {
			conflicts = append(conflicts, l)
		}
	}
	// The shortest first, as Prometheus does: which of job and exported_job becomes
	// exported_exported_job does not depend on their order.
	slices.SortStableFunc(conflicts, func(a, b *dto.LabelPair) int { return cmp.Compare(len(a.GetName()), len(b.GetName())) })
	for _, l := range conflicts {
		name := l.GetName()
		for labelNamed(m.Label, name) || slices.Contains(r.Grouping, name) {
			name = model.ExportedLabelPrefix + name
		}
		l.Name = &name
	}
	if conflicts != nil {
		sortLabels(m.Label)
	}
	return ""
}

func sortLabels(labels []*dto.LabelPair) {
	slices.SortFunc(labels, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
}

func labelNamed(labels []*dto.LabelPair, name string) bool {
	return slices.ContainsFunc(labels, func(l *dto.LabelPair) bool { return l.GetName() == name })
}

// seriesKey tells series of a family apart. Their labels must be sorted.
func seriesKey(m *dto.Metric) string {
	var b strings.Builder
	for _, l := range m.GetLabel() {
		b.WriteString(l.GetName())
		b.WriteByte(0xff) // In no UTF-8 text.
		b.WriteString(l.GetValue())
		b.WriteByte(0xff)
	}
	return b.String()
}

// repeats tells whether a number comes twice among the n that at returns.
func repeats(n int, at func(int) float64) bool {
	ascending := true
	for i := 1; i < n && ascending; i++ {
		ascending = at(i-1) < at(i)
	}
	if ascending {
		return false
	}
	seen := make(map[float64]bool, n)
	for i := range n {
		if seen[at(i)] {
			return true
		}
		seen[at(i)] = true
	}
	return false
}

func isInf(f float64) bool { return math.IsInf(f, +1) }

// leftOut collects what was left out, a family's series together.
type leftOut struct {
	all   []LeftOut
	index map[LeftOut]int // by family and reason, of those that count series
}

func (l *leftOut) family(name string, reason Reason) {
	l.all = append(l.all, LeftOut{Family: name, Reason: reason})
}

func (l *leftOut) series(name string, reason Reason) {
	key := LeftOut{Family: name, Reason: reason}
	i, ok := l.index[key]
	if !ok {
		if l.index == nil {
			l.index = make(map[LeftOut]int)
		}
		i = len(l.all)
		l.index[key] = i
		l.all = append(l.all, key)
	}
	l.all[i].Series++
}
