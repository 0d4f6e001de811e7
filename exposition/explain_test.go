package exposition_test

import (
	"testing"

	"github.com/promferry/promferry/exposition"
)

func TestExplain(t *testing.T) {
	for name, test := range map[string]struct {
		text, want string
	}{
		"duplicate":        {"b 1\na{x=\"1\",y=\"2\"} 1\na{y=\"2\",x=\"1\"} 2\n", "line 3: a: a series that comes twice, first in line 2"},
		"reserved":         {"a 1\n# TYPE up gauge\nup 1\n", "line 2: up: a name that promferry, Prometheus or a Pushgateway writes itself"},
		"reserved here":    {"mine 1\n", "line 1: mine: a name that promferry, Prometheus or a Pushgateway writes itself"},
		"label":            {"a{x=\"1\"} 1\na{__x=\"1\"} 1\n", `line 2: a: has a label that a Pushgateway does not take: "__x"`},
		"bucket":           {"# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"1\"} 2\nh_sum 1\nh_count 1\n", "line 3: h: a series that comes twice, first in line 2"},
		"clash":            {"# TYPE s summary\ns_sum 1\ns_count 1\n\n# TYPE s gauge\ns 2\n", "line 5: s: clashes with another family of the same name, or with a series of a summary or histogram"},
		"quoted name":      {"a 1\n{\"b.c\"} 1\n", "line 2: b.c: not a name that a Pushgateway takes: letters, digits, _ and : make one, a digit not at the begin"},
		"several":          {"a 1\na 2\na 3\n", "line 2: a: 2 series, a series that comes twice, first in line 1"},
		"after two HELPs":  {"# HELP a x\n# HELP a y\na 1\na 1\n", "line 4: a: a series that comes twice, first in line 3"},
		"a fault of Read":  {"# HELP a x\n# HELP a y\na 1\nb one\n", `line 4: expected float as value, got "one"`},
		"nothing is wrong": {"a 1\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			families, left, err := exposition.Read(t.Context(), []byte(test.text), "")
			got := ""
			if fault := exposition.FaultOf(err); fault != nil {
				got = fault.Error()
			} else if err != nil {
				t.Fatal(err)
			}
			_, more := exposition.Rules{Grouping: []string{"job"}, Reserved: []string{"mine"}}.Check(families)
			for _, l := range append(left, more...) {
				if fault := exposition.Explain([]byte(test.text), l).Error(); got == "" {
					got = fault
				}
			}
			if got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestTimestamps(t *testing.T) {
	for text, want := range map[string]int{
		"a 1\n":                            0,
		"# a 1 2\na 1\nb{x=\" 1 2\"} 1 \n": 0,
		"a 1\nb 1 1700000000000\n":         2,
		"a{x=\"}\"} 1 0\n":                 1,
	} {
		if line, _ := exposition.Timestamps([]byte(text)); line != want {
			t.Errorf("%q: line %d, want %d", text, line, want)
		}
	}
}
