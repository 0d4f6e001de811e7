// Package labelmatch matches grouping keys by matchers of labels, in the notation that
// Prometheus and Alertmanager share.
package labelmatch

import (
	"errors"
	"fmt"

	"github.com/prometheus/alertmanager/pkg/labels"
)

// Matchers select sets of labels: those that each of them matches. The zero value has none,
// and selects everything. They are never changed.
type Matchers struct{ matchers labels.Matchers }

// Parse reads matchers, as {job="node",instance=~"web-.*"}. Braces, and quotes where nothing
// has to be quoted, may be left out. Regular expressions match whole values. A label that a
// set does not have is the empty text. {} selects everything; an empty text is an error.
func Parse(s string) (Matchers, error) {
	if s == "" {
		return Matchers{}, errors.New(`no matchers: want one as {job="node",instance=~"web-.*"}`)
	}
	parsed, err := labels.ParseMatchers(s)
	if err != nil {
		return Matchers{}, fmt.Errorf(`%q: %w: want one as {job="node",instance=~"web-.*"}`, s, err)
	}
	return Matchers{parsed}, nil
}

// All tells whether there is no matcher, so that everything is selected.
func (m Matchers) All() bool { return len(m.matchers) == 0 }

// Match tells whether a set of labels is selected.
func (m Matchers) Match(set map[string]string) bool {
	for _, one := range m.matchers {
		if !one.Matches(set[one.Name]) {
			return false
		}
	}
	return true
}

// String returns the matchers in Prometheus's notation.
func (m Matchers) String() string { return m.matchers.String() }
