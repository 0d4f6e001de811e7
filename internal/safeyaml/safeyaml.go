// Package safeyaml writes errors about YAML files that may hold secrets, so that they can
// stand in a log line or an error. A password in the wrong place makes the file wrong, and
// YAML libraries quote what they do not understand.
package safeyaml

import (
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v2"
)

// The messages of yaml.v2 that can be shown: their other words are its own.
var (
	safeSyntax = regexp.MustCompile(`^yaml: ((line \d+: )?([\w ,<>%-]|'[^\w]')+)$`)
	syntaxLine = regexp.MustCompile(`^yaml: (line \d+): `)
	formFault  = regexp.MustCompile(`(?s)^(line \d+): (field|key|cannot unmarshal) .*?(not found in type \S+|already set in \S+.*|into \S+)$`)
)

// wrongForm is said of what yaml.v2 cannot put into a Go value.
const wrongForm = "not of the form that is wanted"

// Syntax returns what can be shown of an error about a file that is not YAML: the line.
func Syntax(err error) error {
	if m := safeSyntax.FindStringSubmatch(err.Error()); m != nil {
		return errors.New("not YAML: " + m[1])
	}
	if m := syntaxLine.FindStringSubmatch(err.Error()); m != nil {
		return errors.New("not YAML: " + m[1])
	}
	return errors.New("not YAML")
}

// Form returns what can be shown of one of the Errors of a *yaml.TypeError. Want says what is
// wanted, given the end of the message: "not found in type T", "already set in type T" or
// "into T", where T is a Go type; "" for what it does not know. A nil want knows nothing.
func Form(fault string, want func(end string) string) string {
	m := formFault.FindStringSubmatch(fault)
	if m == nil {
		return wrongForm
	}
	wanted := ""
	if want != nil {
		wanted = want(m[3])
	}
	switch {
	case wanted != "":
	case strings.HasPrefix(m[3], "already set"):
		wanted = "a field stands there twice"
	case strings.HasPrefix(m[3], "not found"):
		wanted = "unknown field"
	case m[3] == "into string":
		wanted = "want one text"
	case m[3] == "into bool":
		wanted = "want true or false"
	default:
		wanted = wrongForm
	}
	return m[1] + ": " + wanted
}

// hidden stands where something of the file stood.
const hidden = "(hidden)"

var quoted = regexp.MustCompile("`[^`]*`|\"[^\"]*\"|'[^']*'")

// Error returns what can be shown of err, which another package made of a file with this
// content. Nothing of the file's values is, be it a file's name or a word that is not quoted.
func Error(err error, content []byte) error {
	if err == nil {
		return nil
	}
	// A *yaml.TypeError, which not every package passes on as one.
	if _, faults, ok := strings.Cut(err.Error(), "yaml: unmarshal errors:\n  "); ok {
		var shown []string
		for fault := range strings.SplitSeq(faults, "\n  ") {
			shown = append(shown, Form(fault, nil))
		}
		return errors.New(strings.Join(shown, "; "))
	}
	if strings.HasPrefix(err.Error(), "yaml: ") {
		return Syntax(err)
	}
	var values texts
	if yaml.Unmarshal(content, &values) != nil {
		return errors.New(wrongForm)
	}
	words := make(map[string]bool)
	for _, value := range values {
		for word := range strings.FieldsFuncSeq(value, isSeparator) {
			words[word] = true
		}
	}
	shown := strings.Fields(quoted.ReplaceAllString(err.Error(), hidden))
	for i, s := range shown {
		for word := range strings.FieldsFuncSeq(s, isSeparator) {
			if words[word] {
				shown[i] = hidden + s[len(strings.TrimRight(s, ":,;")):]
			}
		}
	}
	return errors.New(strings.Join(shown, " "))
}

func isSeparator(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }

// texts are the values in a YAML file, as they stand there. Names of fields are no values.
type texts []string

// UnmarshalYAML reads a value of any form.
func (t *texts) UnmarshalYAML(unmarshal func(any) error) error {
	var text string
	if unmarshal(&text) == nil {
		*t = texts{text}
		return nil
	}
	var list []texts
	if unmarshal(&list) == nil {
		*t = slices.Concat(list...)
		return nil
	}
	var fields map[string]texts
	err := unmarshal(&fields)
	*t = slices.Concat(slices.Collect(maps.Values(fields))...)
	return err
}
