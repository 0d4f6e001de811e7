package labelmatch

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/alertmanager/pkg/labels"
)

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

// TestParseBounds has matchers that would take much memory or time, or that almost do.
func TestParseBounds(t *testing.T) {
	const size = "the maximum is 2000; use fewer repetitions"
	match := func(expression string) string { return `{job=~"` + strings.ReplaceAll(expression, `\`, `\\`) + `"}` }
	for _, c := range []struct{ name, matchers, fault string }{
		{"long value", `{job="` + strings.Repeat("x", MaxBytes-8) + `"}`, ""},
		{"too long", `{job="` + strings.Repeat("x", MaxBytes-7) + `"}`, "4097 bytes, the maximum is 4096"},
		{"host name", match(`[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63}){0,2}`), ""},
		{"hundred hosts", match(strings.Repeat(`host-\d+-0001.test|`, 100)), ""},
		{"letters", match(`(?i)größe-\pL+`), ""},
		{"repeated classes", match(`(\pL{500}|\pN{400})`), size},
		{"nested repetitions", match(`((a{10}){10}){10}`), size},
		{"many repetitions", match(`(ab){1000}`), size},
		{"open repetition", match(`(ab){1000,}`), size},
		{"not", `{job!~"(ab){1000}"}`, size},
		{"no quotes", `job=~(ab){1000}x`, size},
		{"operator twice", `job=~~(ab){1000}x`, size},
		{"together", `{` + strings.Repeat(`job=~"a{300}",`, 5) + `}`, size},
		{"ranges that fold", match("(?i)[" + strings.Repeat("B-\U0001e900", 200) + "]"), size},
		{"ranges in hexadecimal", match("(?i)[" + strings.Repeat(`B-\x{1e900}`, 100) + "]"), size},
		{"classes in a class", match(`[` + strings.Repeat(`\pL\PL`, 200) + `]`), size},
		{"text that is not UTF-8", "{job=~\"\xff\"}", "UTF-8"},
	} {
		_, err := Parse(c.matchers)
		if c.fault == "" && err != nil || c.fault != "" && (err == nil || !strings.Contains(err.Error(), c.fault)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.fault)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", c.name, len(err.Error()))
		}
	}
	m, err := Parse(`{job="a",instance=~"b{10}",x!~"c{20}"}`)
	if err != nil || m.RegexpSize() < 30 || m.RegexpSize() > 100 {
		t.Errorf("size %d, %v, want some more than the 30 characters that the expressions repeat", m.RegexpSize(), err)
	}
}

// TestParseAllocates shows that a text which is refused is not compiled: 60 KB of these matchers
// took 4 GiB.
func TestParseAllocates(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _ = Parse(`{job=~"(\\pL{500}|\\pN{400})"}`)
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 200_000 {
		t.Errorf("%d bytes for a text that is refused", got)
	}
}

// FuzzParse compares with Alertmanager's own parser.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{foo = "bar", dings != "bums", }`, `foo=bar,dings!=bums`, `{quote="She said: \"Hi, ladies! That's gender-neutral…\""}`, `statuscode=~"5.."`,
		`a=~~b`, `a=~"=~"`, `a=b=~c`, `a!~"x,y",b=","`, `a="\\",b="c"`, `a=\",b=c`, `a=b\,c=d`, `{a="b"}}`, `a="b" ,, c=d`, "a=\xff,b=~\xff", "a=~'\n'", "{}", "{ }", "{,}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := Parse(s)
		want, theirs := labels.ParseMatchers(strings.TrimSpace(s))
		if err == nil && (theirs != nil || fmt.Sprint(got.matchers) != fmt.Sprint(labels.Matchers(want))) {
			t.Errorf("%q is %s, want %v, %v", s, got, want, theirs)
		}
	})
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
