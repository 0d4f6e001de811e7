package safeyaml_test

import (
	"errors"
	"testing"

	"go.yaml.in/yaml/v2"

	"github.com/promferry/promferry/internal/safeyaml"
)

// plain is a file as those of Prometheus are read: its type has no name that says anything.
type plain struct {
	User     string   `yaml:"user"`
	Password string   `yaml:"password"`
	Files    []string `yaml:"files"`
	On       bool     `yaml:"on"`
}

// TestErrorOfYAML has files that are not what is wanted, with a secret in each place.
func TestErrorOfYAML(t *testing.T) {
	for content, want := range map[string]string{
		"canary":                                "line 1: not of the form that is wanted",
		"canary: x":                             "line 1: unknown field",
		"user: me\ncanary: x\npassword: [x]":    "line 2: unknown field; line 3: want one text",
		"user: me\nuser: canary":                "line 2: a field stands there twice",
		"files: canary":                         "line 1: not of the form that is wanted",
		"on: canary":                            "line 1: want true or false",
		"on: \"canary\\n  line 9: field canary": "not YAML: found unexpected end of stream",
		"password: *canary":                     "not YAML",
		"user: me\n\tpassword: canary":          "not YAML: line 2: found a tab character that violates indentation",
		"user: {canary":                         "not YAML: line 1: did not find expected ',' or '}'",
		"user: !!binary canary!":                "not YAML",
	} {
		err := safeyaml.Error(yaml.UnmarshalStrict([]byte(content), &plain{}), []byte(content))
		if err == nil || err.Error() != want {
			t.Errorf("%q:\ngot  %v\nwant %s", content, err, want)
		}
	}
}

// TestErrorOfValues has errors as packages make them of the values of a file.
func TestErrorOfValues(t *testing.T) {
	content := []byte("user: me\npassword: canary\nfiles: [/run/canary/file, 0017]\ntls: {version: canary2, ca: \"a b\"}\n12: x-canary3\n")
	for in, want := range map[string]string{
		"at most one of user, password & files must be configured": "at most one of user, password & files must be configured",
		"unknown version: canary2":                                 "unknown version: (hidden)",
		"open /etc/run/canary/file: no such file or directory":     "open (hidden): no such (hidden) or directory",
		"port 0017 is wrong":                                       "port (hidden) is wrong",
		`parse "http://me:canary@ host": invalid`:                  "parse (hidden): invalid",
		"parse `a\nb`: invalid":                                    "parse (hidden): invalid",
		"got canary3":                                              "got (hidden)",
		"starts with 'c'":                                          "starts with (hidden)",
	} {
		if got := safeyaml.Error(errors.New(in), content).Error(); got != want {
			t.Errorf("%q:\ngot  %s\nwant %s", in, got, want)
		}
	}
	if err := safeyaml.Error(nil, content); err != nil {
		t.Errorf("no error: got %v", err)
	}
}
