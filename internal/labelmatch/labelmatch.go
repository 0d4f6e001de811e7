// Package labelmatch matches grouping keys by matchers of labels, in the notation that
// Prometheus and Alertmanager share.
package labelmatch

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"

	"github.com/prometheus/alertmanager/pkg/labels"

	"github.com/promferry/promferry/internal/safeurl"
)

// MaxBytes is the maximum length of the text of matchers, in bytes. A grouping key has as many at
// most in a path of the gateway.
const MaxBytes = 4096

// MaxRegexpSize is the maximum size of all regular expressions of a text together: of each its
// characters, the ends of the ranges in its classes and its operators, where a repetition counts as
// often as it repeats, or its length, whichever is more. \pL, all letters, has some 1,300,
// [a-z0-9-]{1,63} some 500. Size 1 takes up to 200 bytes while it is compiled.
const MaxRegexpSize = 2000

// Matchers select sets of labels: those that each of them matches. The zero value has none,
// and selects everything. They are never changed.
type Matchers struct {
	matchers   labels.Matchers
	regexpSize int
}

var (
	quoted = regexp.MustCompile(`"([^"\\]|\\.)*"`)
	cut    = regexp.MustCompile(`[=~]\s*(,|\}|$)`)
	// operator matches a matcher up to its operator, if that is one for regular expressions.
	operator = regexp.MustCompile(`^(\s*[a-zA-Z_:][a-zA-Z0-9_:]*\s*)(=~|!~)`)
	// slow matches what takes up to 5 ms to parse: a range that may end far behind ASCII, of which
	// each character is looked at with (?i), and a class of Unicode.
	slow = regexp.MustCompile(`-(?:[^\x00-\x7f]|\\[x0-7])|\\[pP]`)
)

// slowSize is the size of what slow matches.
const slowSize = 1000

// Parse reads matchers, as {job="node",instance=~"web-.*"}. Both braces, and quotes where
// nothing has to be quoted, may be left out. Regular expressions match whole values. A label
// that a set does not have is the empty text. {} selects everything; an empty text is an error,
// and so is one that seems to be cut, or to lack a value: it would select more than was meant.
// Nothing is compiled of a text beyond MaxBytes or MaxRegexpSize.
func Parse(s string) (Matchers, error) {
	fault := func(err error) (Matchers, error) {
		return Matchers{}, fmt.Errorf(`%.200q: %w: want one as {job="node",instance=~"web-.*"}`, s, safeurl.CutError(err))
	}
	if len(s) > MaxBytes {
		return fault(fmt.Errorf("the matchers have %d bytes, the maximum is %d; use several shorter ones", len(s), MaxBytes))
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
	var m Matchers
	for _, one := range split(text) {
		if err := m.add(one); err != nil {
			return fault(err)
		}
	}
	return m, nil
}

// split cuts matchers at the commas that are not in quotes, as labels.ParseMatchers does.
func split(text string) []string {
	text = strings.TrimSuffix(strings.TrimPrefix(text, "{"), "}")
	var all []string
	begin, inQuotes, escaped := 0, false, false
	for i, c := range text {
		if c == ',' && !inQuotes {
			all = append(all, text[begin:i])
			begin = i + 1
		}
		if c == '"' && !escaped {
			inQuotes = !inQuotes
		}
		escaped = c == '\\' && !escaped
	}
	if rest := text[begin:]; strings.TrimSpace(rest) != "" {
		all = append(all, rest)
	}
	return all
}

// add adds one matcher.
func (m *Matchers) add(text string) error {
	typ := labels.MatchEqual
	if found := operator.FindStringSubmatch(text); found != nil {
		typ = labels.MatchRegexp
		if found[2] == "!~" {
			typ = labels.MatchNotRegexp
		}
		text = found[1] + "= " + text[len(found[0]):] // So that it is read, and not compiled.
	}
	one, err := labels.ParseMatcher(text)
	if err == nil && typ != labels.MatchEqual {
		if err = m.addSize(one.Value); err == nil {
			one, err = labels.NewMatcher(typ, one.Name, one.Value)
		}
	}
	if err == nil {
		m.matchers = append(m.matchers, one)
	}
	return err
}

// addSize adds the size of a regular expression, or returns why that is not possible.
func (m *Matchers) addSize(expression string) error {
	before := m.regexpSize
	fault := func() error {
		return fmt.Errorf("regular expressions of size %d, the maximum is %d; use fewer repetitions and smaller character classes", m.regexpSize, MaxRegexpSize)
	}
	m.regexpSize += len(expression) + slowSize*len(slow.FindAllStringIndex(expression, -1))
	if m.regexpSize > MaxRegexpSize {
		return fault()
	}
	parsed, err := syntax.Parse("^(?:"+expression+")$", syntax.Perl) // As labels.NewMatcher compiles it.
	if err != nil {
		return err
	}
	if m.regexpSize = max(m.regexpSize, before+size(parsed)); m.regexpSize > MaxRegexpSize {
		return fault()
	}
	return nil
}

// size returns about how large what a regular expression compiles to is.
func size(re *syntax.Regexp) int {
	n := 1 + len(re.Rune)
	for _, sub := range re.Sub {
		n += size(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1)
	}
	return n
}

// RegexpSize returns the size of all regular expressions together, as MaxRegexpSize counts it.
func (m Matchers) RegexpSize() int { return m.regexpSize }

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
