package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kingpin/v2"
)

// TestSettingsKept checks that the flags and variables of the previous version, which
// testdata/previous/settings.txt lists, are still accepted.
func TestSettingsKept(t *testing.T) {
	previous, err := os.ReadFile(filepath.Join("testdata", "previous", "settings.txt"))
	if err != nil {
		t.Fatal(err)
	}
	app := kingpin.New("promferry", "")
	_, known := newCommands(app)
	for line := range strings.Lines(string(previous)) {
		command, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		flag, variable, _ := strings.Cut(rest, "\t")
		if c := app.GetCommand(command); c == nil || c.GetFlag(flag) == nil {
			t.Errorf("promferry %s --%s: no such flag: name it as formerly in the setting that it is now", command, flag)
		}
		if variable != "" && !known[variable] {
			t.Errorf("%s: no such variable: name its flag as formerly in the setting that it is now", variable)
		}
	}
}

// TestRenamedSetting checks that a setting goes by its former name, and warns of it.
func TestRenamedSetting(t *testing.T) {
	for _, test := range []struct{ name, variable, arg, value, warning string }{
		{"not set", "", "", "default", ""},
		{"flag", "", "--new.name=a", "a", ""},
		{"former flag", "", "--old.name=a", "a", "--old.name is now --new.name; the next release does not accept the old name"},
		{"variable", "PROMFERRY_NEW_NAME", "", "b", ""},
		{"former variable", "PROMFERRY_OLD_NAME", "", "b", "PROMFERRY_OLD_NAME is now PROMFERRY_NEW_NAME; the next release does not accept the old name"},
		{"the flag wins", "PROMFERRY_OLD_NAME", "--new.name=a", "a", ""},
		{"the former flag wins", "PROMFERRY_NEW_NAME", "--old.name=a", "a", "--old.name is now --new.name; the next release does not accept the old name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.variable != "" {
				t.Setenv(test.variable, "b")
			}
			spec := &struct {
				NewName *setting[string] `split_words:"true"`
			}{text("new.name", "default", "A setting.")}
			spec.NewName.formerly = "old.name"
			app := kingpin.New("x", "")
			readEnvironment([]any{spec})
			spec.NewName.register(app.Command("agent", ""))
			args := []string{"agent"}
			if test.arg != "" {
				args = append(args, test.arg)
			}
			if _, err := app.Parse(args); err != nil {
				t.Fatal(err)
			}
			if s := spec.NewName; s.value != test.value || s.renamed() != test.warning {
				t.Errorf("%q with the warning %q, want %q with %q", s.value, s.renamed(), test.value, test.warning)
			}
		})
	}
}
