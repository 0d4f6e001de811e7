package pushgw_test

import (
	"encoding/base64"
	"maps"
	"net/url"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/promferry/promferry/pushgw"
)

func TestPath(t *testing.T) {
	for _, tc := range []struct {
		key  pushgw.GroupingKey
		want string
	}{
		{pushgw.GroupingKey{Job: "node"}, "/metrics/job/node"},
		{pushgw.GroupingKey{Job: "node", Labels: map[string]string{"instance": "web-1.example:9100", "env": "prod"}}, "/metrics/job/node/env/prod/instance/web-1.example:9100"},
		{pushgw.GroupingKey{Job: "a b"}, "/metrics/job@base64/YSBi"},
		{pushgw.GroupingKey{Job: "j", Labels: map[string]string{"path": "/var/tmp"}}, "/metrics/job/j/path@base64/L3Zhci90bXA"},
		{pushgw.GroupingKey{Job: "j", Labels: map[string]string{"foo": ""}}, "/metrics/job/j/foo@base64/="},
		{pushgw.GroupingKey{Job: "."}, "/metrics/job@base64/Lg"},
		{pushgw.GroupingKey{Job: ".."}, "/metrics/job@base64/Li4"},
		{pushgw.GroupingKey{Job: "ü"}, "/metrics/job@base64/w7w"},
		{pushgw.GroupingKey{Job: "a%2Fb"}, "/metrics/job@base64/YSUyRmI"},
		{pushgw.GroupingKey{Job: "a+b"}, "/metrics/job@base64/YSti"},
	} {
		if got := tc.key.Path(); got != tc.want {
			t.Errorf("%v: got %s, want %s", tc.key, got, tc.want)
		}
	}
}

func TestValidate(t *testing.T) {
	label := func(name, value string) pushgw.GroupingKey {
		return pushgw.GroupingKey{Job: "j", Labels: map[string]string{name: value}}
	}
	for name, key := range map[string]pushgw.GroupingKey{
		"job is empty": {}, "not UTF-8": {Job: "\xff"},
		"my-label": label("my-label", "x"), "__foo": label("__foo", "x"), "__name__": label("__name__", "x"),
		`""`: label("", "x"), "1a": label("1a", "x"), "le": label("le", "0.9"), "quantile": label("quantile", "x"),
		"job": label("job", "x"), `"\xff\xfe"`: label("l", "\xff\xfe"),
	} {
		err := key.Validate()
		if err == nil {
			t.Errorf("%v: no error", key)
			continue
		}
		if name == "job is empty" {
			name = "empty"
		}
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%v: error %q does not name %s", key, err, name)
		}
	}
	good := pushgw.GroupingKey{Job: "j", Labels: map[string]string{"instance": "", "_a1": "ü/.. \x00"}}
	if err := good.Validate(); err != nil {
		t.Errorf("%v: %v", good, err)
	}
}

// decode reads a path as a Pushgateway does: it splits the URL's path at each slash,
// takes pairs of name and value, and where the name ends in @base64 decodes the value
// with padding or without.
func decode(t *testing.T, p string) (string, map[string]string) {
	t.Helper()
	if path.Clean(p) != p {
		t.Fatalf("a router would redirect %q to %q", p, path.Clean(p))
	}
	rest, ok := strings.CutPrefix(p, "/metrics/")
	if !ok {
		t.Fatalf("path %q", p)
	}
	parts := strings.Split(rest, "/")
	if len(parts)%2 != 0 {
		t.Fatalf("odd number of components in %q", p)
	}
	job, labels := "", make(map[string]string)
	for i := 0; i < len(parts); i += 2 {
		name, value := parts[i], parts[i+1]
		if plain, ok := strings.CutSuffix(name, "@base64"); ok {
			name = plain
			b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(value, "="))
			if err != nil {
				t.Fatal(err)
			}
			value = string(b)
		}
		if name == "job" {
			job = value
		} else {
			labels[name] = value
		}
	}
	return job, labels
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{"", "a", ".", "..", "/", "//", "%2F", "a b", "ü", "=", "@base64", "\x00", "a?b#c", "\\", "-_~"} {
		f.Add("node", s)
		f.Add("x"+s, s)
	}
	base, err := url.Parse("http://127.0.0.1:9091/prefix")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, job, value string) {
		key := pushgw.GroupingKey{Job: job, Labels: map[string]string{"instance": value, "l": job}}
		if key.Validate() != nil {
			if job != "" && utf8.ValidString(job) && utf8.ValidString(value) {
				t.Fatalf("%v: %v", key, key.Validate())
			}
			return
		}
		// Over the wire: as a URL and back.
		u, err := url.ParseRequestURI(base.JoinPath(key.Path()).String())
		if err != nil {
			t.Fatal(err)
		}
		gotJob, gotLabels := decode(t, strings.TrimPrefix(u.EscapedPath(), "/prefix"))
		if gotJob != job || !maps.Equal(gotLabels, key.Labels) {
			t.Fatalf("%v arrives as job %q, labels %v", key, gotJob, gotLabels)
		}
	})
}
