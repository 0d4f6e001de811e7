// Package pushgw speaks the API of a Pushgateway: grouping keys, put, add, delete and list.
package pushgw

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"
)

// GroupingKey names a group on a Pushgateway.
type GroupingKey struct {
	// Job is the value of the job label. It must not be empty.
	Job string
	// Labels are the other labels, instance among them.
	Labels map[string]string
}

// Validate tells what a Pushgateway would refuse in the key, or accept and break on.
func (k GroupingKey) Validate() error {
	if k.Job == "" {
		return errors.New("the job of a group is empty")
	}
	if !utf8.ValidString(k.Job) {
		return fmt.Errorf("the job %q of a group is not UTF-8", k.Job)
	}
	for _, name := range slices.Sorted(maps.Keys(k.Labels)) {
		if err := ValidateLabel(name, k.Labels[name]); err != nil {
			return err
		}
	}
	return nil
}

// ValidateLabel tells what a Pushgateway would refuse in a label of a grouping key, or
// accept and break on: a value that is not UTF-8 makes it refuse every later push, and
// le stands twice in each bucket of a histogram.
func ValidateLabel(name, value string) error {
	switch {
	case !model.LegacyValidation.IsValidLabelName(name):
		return fmt.Errorf("%q is no label name: letters, digits and _ make one, a digit not at the begin", name)
	case strings.HasPrefix(name, model.ReservedLabelPrefix):
		return fmt.Errorf("the label name %q is reserved: it begins with __", name)
	case name == model.JobLabel:
		return errors.New("the label job is the group's job already")
	case name == model.BucketLabel || name == model.QuantileLabel:
		return fmt.Errorf("the label name %q is reserved for histograms and summaries", name)
	case !utf8.ValidString(value):
		return fmt.Errorf("the value %q of label %s is not UTF-8", value, name)
	}
	return nil
}

// Path returns the path of the group below a Pushgateway's URL, percent-encoding not
// needed: /metrics/job/node/instance/web-1. The labels are in order of their names. A
// value that a path, a proxy or a Pushgateway could take for something else is in base64.
func (k GroupingKey) Path() string {
	var b strings.Builder
	b.WriteString("/metrics")
	writePair(&b, model.JobLabel, k.Job)
	for _, name := range slices.Sorted(maps.Keys(k.Labels)) {
		writePair(&b, name, k.Labels[name])
	}
	return b.String()
}

// LabelNames returns the names of all labels of the key, job among them.
func (k GroupingKey) LabelNames() []string {
	return append(slices.Sorted(maps.Keys(k.Labels)), model.JobLabel)
}

// AllLabels returns a copy of all labels of the key, job among them.
func (k GroupingKey) AllLabels() map[string]string {
	labels := make(map[string]string, len(k.Labels)+1)
	maps.Copy(labels, k.Labels)
	labels[model.JobLabel] = k.Job
	return labels
}

// String returns the key in the notation of PromQL.
func (k GroupingKey) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "{job=%q", k.Job)
	for _, name := range slices.Sorted(maps.Keys(k.Labels)) {
		fmt.Fprintf(&b, ",%s=%q", name, k.Labels[name])
	}
	b.WriteByte('}')
	return b.String()
}

func writePair(b *strings.Builder, name, value string) {
	b.WriteByte('/')
	b.WriteString(name)
	if isPlain(value) {
		b.WriteByte('/')
		b.WriteString(value)
		return
	}
	b.WriteString("@base64/")
	if value == "" {
		b.WriteByte('=') // An empty path segment would be cleaned away.
		return
	}
	b.WriteString(base64.RawURLEncoding.EncodeToString([]byte(value)))
}

// isPlain tells whether value means itself in a path.
func isPlain(value string) bool {
	if value == "" || value == "." || value == ".." {
		return false
	}
	for i := range len(value) {
		c := value[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '_', c == '.', c == ':', c == '-':
		default:
			return false
		}
	}
	return true
}
