package target_test

import (
	"strings"
	"testing"

	"github.com/promferry/promferry/target"
)

func TestParse(t *testing.T) {
	got, err := target.Parse(" node = http://127.0.0.1:9100/metrics?collect[]=cpu&a=b ")
	if err != nil {
		t.Fatal(err)
	}
	if got.Job != "node" || got.URL.String() != "http://127.0.0.1:9100/metrics?collect[]=cpu&a=b" {
		t.Errorf("got %q, %q", got.Job, got.URL)
	}
	if got.String() != "node=http://127.0.0.1:9100/metrics?..." {
		t.Errorf("shown as %q", got)
	}
}

func TestParseRefuses(t *testing.T) {
	for s, want := range map[string]string{
		"":                               "want job=URL",
		"http://127.0.0.1:9100/metrics":  "want job=URL",
		"http://127.0.0.1:9100/?a=b":     "want job=URL",
		"=http://127.0.0.1:9100/metrics": "job before = is empty",
		"\xff=http://h/":                 "not UTF-8",
		"node=127.0.0.1:9100/metrics":    "not a URL",
		"node=localhost:9100/metrics":    "begins with http://",
		"node=ftp://h/metrics":           "begins with http://",
		"node=http:///metrics":           "names no host",
		"node=http://h:port/metrics":     "not a URL",
		"node=http://h:65536/":           "port 65536",
		"node=http://me:canary@h/":       "http_config",
		"node=http://me:can ary@h/":      "not a URL",
		"node=":                          "begins with http://",
	} {
		_, err := target.Parse(s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want an error with %q", s, err, want)
			continue
		}
		if strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "can ary") {
			t.Errorf("%q: error shows the password: %v", s, err)
		}
	}
}
