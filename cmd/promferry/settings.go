package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/alecthomas/units"
	"github.com/kelseyhightower/envconfig"
	"github.com/prometheus/common/model"
)

const envPrefix = "PROMFERRY"

// A setting has a value from its default, its environment variable or its flag, where a
// later one of these wins. It never refuses a text while that is read: faults come out
// together, from check.
type setting[T any] struct {
	value T
	flag  string // the flag's name, without dashes
	help  string
	parse func(string) (T, error)
	// list is set for a setting of several values: the flag can be repeated, the variable
	// has a comma between them.
	list  bool
	merge func(T, T) T
	// formerly is the flag's name in the previous release, which is accepted with a warning, as
	// is the variable that goes with it. "" means that it had the same name.
	formerly string

	from     string // what the user typed: the flag or the variable, "" for the default
	fallback T      // the default, where from is not ""
	errs     []error
}

// anySetting is a setting of whatever type.
type anySetting interface {
	kingpin.Value
	register(cmd *kingpin.CmdClause)
	row() string
	flagName() string
	env() string
	formerEnv() string
	renamed() string
	check() []error
	forgive() []error
}

func (s *setting[T]) flagName() string { return s.flag }

// env returns the name of the variable: the flag's, in the plural for a list.
func (s *setting[T]) env() string { return s.variable(s.flag) }

// formerEnv returns the name of the variable in the previous release, "" if it had the same.
func (s *setting[T]) formerEnv() string {
	if s.formerly == "" {
		return ""
	}
	return s.variable(s.formerly)
}

// renamed returns a warning if the user typed the name of the previous release, or "".
func (s *setting[T]) renamed() string {
	switch {
	case s.formerly == "":
	case s.from == s.formerEnv():
		return fmt.Sprintf("%s is now %s; the next release does not accept the old name", s.from, s.env())
	case s.from == "--"+s.formerly:
		return fmt.Sprintf("%s is now --%s; the next release does not accept the old name", s.from, s.flag)
	}
	return ""
}

func (s *setting[T]) variable(flag string) string {
	name := envPrefix + "_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(flag))
	if s.list {
		name += "S"
	}
	return name
}

// name returns the name of the setting as the user typed it, or the flag.
func (s *setting[T]) name() string {
	if s.from == "" {
		return "--" + s.flag
	}
	return s.from
}

// isSet tells whether the user has set it.
func (s *setting[T]) isSet() bool { return s.from != "" }

// Decode takes the value of the environment variable. An empty one counts as not set, for
// that is how a variable is switched off in an environment file.
func (s *setting[T]) Decode(text string) error { return s.decode(s.env(), text) }

// decode is Decode for a variable of this name.
func (s *setting[T]) decode(variable, text string) error {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	texts := []string{text}
	if s.list {
		texts = strings.Split(text, ",")
	}
	for _, t := range texts {
		if t = strings.TrimSpace(t); t != "" {
			s.add(variable, t)
		}
	}
	return nil
}

// Set takes the value of a flag.
func (s *setting[T]) Set(text string) error {
	s.add("--"+s.flag, text)
	return nil
}

func (s *setting[T]) add(from, text string) {
	value, err := s.parse(text)
	if s.from == "" {
		s.fallback = s.value
	}
	if s.from != from {
		s.from, s.errs = from, nil
		s.value = value
	} else if s.merge != nil {
		s.value = s.merge(s.value, value)
	}
	if err != nil {
		s.errs = append(s.errs, s.fault(err))
	}
}

// fault returns err with the name that the user typed.
func (s *setting[T]) fault(err error) error { return fmt.Errorf("%s: %w", s.name(), err) }

func (s *setting[T]) check() []error { return s.errs }

// forgive makes the default of a value that is wrong and comes from the environment, and
// returns what is wrong with it.
func (s *setting[T]) forgive() []error {
	errs := s.errs
	if len(errs) == 0 || !s.fromEnvironment() {
		return nil
	}
	s.reset()
	return errs
}

// fromEnvironment tells whether the value comes from the variable.
func (s *setting[T]) fromEnvironment() bool {
	return s.from != "" && (s.from == s.env() || s.from == s.formerEnv())
}

// reset makes it the default again.
func (s *setting[T]) reset() { s.value, s.from, s.errs = s.fallback, "", nil }

// String returns the value in force, for --help.
func (s *setting[T]) String() string {
	if len(s.errs) > 0 {
		return "(invalid)"
	}
	return fmt.Sprint(any(s.value))
}

// IsCumulative is for kingpin: the flag of a list can be repeated.
func (s *setting[T]) IsCumulative() bool { return s.list }

func (s *setting[T]) register(cmd *kingpin.CmdClause) {
	if s.formerly != "" {
		if !s.isSet() {
			_ = s.decode(s.formerEnv(), os.Getenv(s.formerEnv()))
		}
		cmd.Flag(s.formerly, "Now --"+s.flag+".").Hidden().SetValue(former[T]{s})
	}
	help := s.help + " (" + s.env() + ")"
	if s.list {
		help = s.help + " Can be repeated. (" + s.env() + ", with a comma between two.)"
	}
	value := s.String()
	if value == "" {
		value = `""`
	}
	cmd.Flag(s.flag, help).PlaceHolder(value).SetValue(s)
}

// former is a setting's flag of the previous release.
type former[T any] struct{ *setting[T] }

func (f former[T]) Set(text string) error {
	f.add("--"+f.formerly, text)
	return nil
}

// row returns the setting's row in the configuration page.
func (s *setting[T]) row() string {
	flag, value := "`--"+s.flag+"`", ""
	if s.list {
		flag += " (repeatable)"
	}
	if v := s.String(); v != "" {
		value = "`" + v + "`"
	}
	return fmt.Sprintf("| %s | `%s` | %s | %s |\n", flag, s.env(), value, s.help)
}

// The kinds of settings.

func text(flag, value, help string) *setting[string] {
	return &setting[string]{flag: flag, value: value, help: help, parse: func(s string) (string, error) { return s, nil }}
}

// duration is a time above zero. Where the default is zero, which then has a meaning of its
// own, zero can be set as well.
func duration(flag string, value time.Duration, help string) *setting[model.Duration] {
	return &setting[model.Duration]{flag: flag, value: model.Duration(value), help: help, parse: func(s string) (model.Duration, error) {
		if d, err := model.ParseDuration(s); err == nil && (d > 0 || value == 0) {
			return d, nil
		}
		return 0, fmt.Errorf("%q: want a time above zero with its unit, as in 500ms, 15s or 1m30s", s)
	}}
}

func size(flag string, value units.Base2Bytes, help string) *setting[units.Base2Bytes] {
	return &setting[units.Base2Bytes]{flag: flag, value: value, help: help, parse: func(s string) (units.Base2Bytes, error) {
		if b, err := units.ParseBase2Bytes(s); err == nil && b > 0 && !strings.HasPrefix(s, "+") {
			return b, nil
		}
		return 0, fmt.Errorf("%q: want a size above zero with its unit, as in 512KiB or 64MiB", s)
	}}
}

// oneOf is a setting that takes some words only.
func oneOf[T ~string](flag string, value T, help string, words ...T) *setting[T] {
	return &setting[T]{flag: flag, value: value, help: help, parse: func(s string) (T, error) {
		if slices.Contains(words, T(s)) {
			return T(s), nil
		}
		return value, fmt.Errorf("%q: want one of %v", s, words)
	}}
}

// pattern is a regular expression that matches from the begin to the end.
type pattern struct{ *regexp.Regexp }

func (p pattern) String() string {
	if p.Regexp == nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimPrefix(p.Regexp.String(), "^(?:"), ")$")
}

func regex(flag, help string) *setting[pattern] {
	return &setting[pattern]{flag: flag, help: help, parse: func(s string) (pattern, error) {
		if _, err := regexp.Compile(s); err != nil {
			return pattern{}, fmt.Errorf("%q: no regular expression: %w", s, err)
		}
		return pattern{regexp.MustCompile("^(?:" + s + ")$")}, nil
	}}
}

// list is a value of several parts that prints as it is typed in a variable.
type list[T fmt.Stringer] []T

func (l list[T]) String() string {
	parts := make([]string, len(l))
	for i, part := range l {
		parts[i] = part.String()
	}
	return strings.Join(parts, ",")
}

func listOf[T fmt.Stringer](flag, help string, value list[T], parse func(string) (T, error)) *setting[list[T]] {
	return &setting[list[T]]{
		flag: flag, help: help, value: value, list: true,
		parse: func(s string) (list[T], error) {
			part, err := parse(s)
			if err != nil {
				return nil, err
			}
			return list[T]{part}, nil
		},
		merge: func(a, b list[T]) list[T] { return append(slices.Clone(a), b...) },
	}
}

// readEnvironment reads the variables of specs, pointers to structs of settings.
func readEnvironment(specs []any) {
	for _, spec := range specs {
		if err := envconfig.Process(envPrefix, spec); err != nil {
			panic(err) // A mistake in spec: settings keep their faults to themselves.
		}
	}
}

// unknownVariables returns an error for each variable of ours that is not known, for the
// command that it is no setting of.
func unknownVariables(known map[string]bool, command string) []error {
	var errs []error
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(name, envPrefix+"_") && !known[name] {
			errs = append(errs, fmt.Errorf("%s: no such variable; promferry %s --help lists all", name, command))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errs
}

// faults makes one error of all that is wrong with the settings, or nil.
func faults(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return usageError{errs[0]}
	}
	lines := []string{fmt.Sprintf("%d settings are wrong:", len(errs))}
	for _, err := range errs {
		lines = append(lines, "  "+err.Error())
	}
	return usageError{errors.New(strings.Join(lines, "\n"))}
}
