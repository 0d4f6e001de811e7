package labelmatch

import "testing"

func TestMatch(t *testing.T) {
	node := map[string]string{"job": "node", "instance": "web-1"}
	for _, c := range []struct {
		matchers string
		want     bool
	}{
		{`{}`, true},
		{`{job="node"}`, true},
		{`job=node`, true},
		{`{job="node",instance=~"web-.*"}`, true},
		{`{instance=~"web"}`, false}, // Whole values.
		{`{job!="node"}`, false},
		{`{instance!~"db-.*"}`, true},
		{`{shard=""}`, true},
		{` {job="node", } `, true},
		{`{job!="=}",instance=~"web-[1-3]|,="}`, true},
		{`{job!="\\"}`, true},
		{`{shard=~".+"}`, false},
		{`{job="node",instance="db-1"}`, false},
	} {
		m, err := Parse(c.matchers)
		if err != nil {
			t.Errorf("Parse(%q): %v", c.matchers, err)
			continue
		}
		if got := m.Match(node); got != c.want {
			t.Errorf("%s matches %v: %v, want %v", c.matchers, node, got, c.want)
		}
	}
}

func TestParseFaults(t *testing.T) {
	for _, s := range []string{"", " ", "job", `{job="a}`, `{job="a"`, `{job="a",`, `job="a"}`, "{", "}", "{job=", "{job=}", "job=", "job=~", "job=a,instance=", `{job= ,instance="a"}`, `{instance=~"("}`, `{1job="a"}`, "{\xff=\"a\"}"} {
		if m, err := Parse(s); err == nil {
			t.Errorf("Parse(%q) is %s, want an error", s, m)
		}
	}
}

func TestString(t *testing.T) {
	m, err := Parse(`job=node, instance=~"web-\"1"`)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(m.String())
	if err != nil || again.String() != m.String() {
		t.Errorf("%s, parsed again, is %s, %v", m, again, err)
	}
	if (Matchers{}).All() != true || m.All() {
		t.Error("All is for those without matchers")
	}
}
