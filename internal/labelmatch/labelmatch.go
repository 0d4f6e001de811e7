// Package labelmatch matches grouping keys by matchers of labels, in the notation that
// Prometheus and Alertmanager share.
package labelmatch

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/prometheus/alertmanager/pkg/labels"
)

// Matchers select sets of labels: those that each of them matches. The zero value has none,
// and selects everything. They are never changed.
type Matchers struct{ matchers labels.Matchers }

var (
	quoted = regexp.MustCompile(`"([^"\\]|\\.)*"`)
	cut    = regexp.MustCompile(`[=~]\s*(,|\}|$)`)
)

// Parse reads matchers, as {job="node",instance=~"web-.*"}. Both braces, and quotes where
// nothing has to be quoted, may be left out. Regular expressions match whole values. A label
// that a set does not have is the empty text. {} selects everything; an empty text is an error,
// and so is one that seems to be cut, or to lack a value: it would select more than was meant.
func Parse(s string) (Matchers, error) {
	fault := func(err error) (Matchers, error) {
		return Matchers{}, fmt.Errorf(`%q: %w: want one as {job="node",instance=~"web-.*"}`, s, err)
	}
	text := strings.TrimSpace(s)
	bare := quoted.ReplaceAllString(text, "x")
	switch {
	case text == "":
		return fault(errors.New("no matchers"))
	case strings.HasPrefix(bare, "{") != strings.HasSuffix(bare, "}"):
		return fault(errors.New("a brace is missing"))
	case cut.MatchString(bare):
		return fault(errors.New(`a value is missing; the empty one is ""`))
	}
	parsed, err := labels.ParseMatchers(text)
	if err != nil {
		return fault(err)
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
