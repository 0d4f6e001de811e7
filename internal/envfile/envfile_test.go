package envfile_test

import (
	"maps"
	"testing"

	"github.com/promferry/promferry/internal/envfile"
)

// TestParse has what systemd.exec(5) says of EnvironmentFile=. How systemd itself reads such
// files is compared in the end-to-end tests.
func TestParse(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       map[string]string
	}{
		{"nothing", "", map[string]string{}},
		{"values", "A=1\nB=2\n", map[string]string{"A": "1", "B": "2"}},
		{"no line end", "A=1", map[string]string{"A": "1"}},
		{"comments", "# A=1\n ; B=2\nC=3\n", map[string]string{"C": "3"}},
		{"blanks around", "  A =  1 2  \n\n", map[string]string{"A": "1 2"}},
		{"empty", "A=\nB=\"\"\n", map[string]string{"A": "", "B": ""}},
		{"the last counts", "A=1\nA=2\n", map[string]string{"A": "2"}},
		{"no assignment", "export\nA=1\n", map[string]string{"A": "1"}},
		{"no name of a variable", "export A=1\n1B=1\n=1\nC=1\n", map[string]string{"C": "1"}},
		{"double quotes", `A="1 # 2"`, map[string]string{"A": "1 # 2"}},
		{"single quotes", `A='1 " 2'`, map[string]string{"A": `1 " 2`}},
		{"quotes over lines", "A=\"1\n2\"\nB=3\n", map[string]string{"A": "1\n2", "B": "3"}},
		{"quotes within a word", `A=a"b"`, map[string]string{"A": `a"b"`}},
		{"escapes", `A=a\"b\\c`, map[string]string{"A": `a"b\c`}},
		{"escapes in double quotes", `A="a\"b\\c\$d\e"`, map[string]string{"A": `a"b\c$d\e`}},
		{"no escapes in single quotes", `A='a\b'`, map[string]string{"A": `a\b`}},
		{"continued", "A=1\\\n2\nB=\"1\\\n2\"\n", map[string]string{"A": "12", "B": "12"}},
		{"a hash in a value", "A=1 # 2\n", map[string]string{"A": "1 # 2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := envfile.Parse(test.text); !maps.Equal(got, test.want) {
				t.Errorf("%q: got %q, want %q", test.text, got, test.want)
			}
		})
	}
}
