package safeurl_test

import (
	"net/url"
	"strings"
	"testing"

	"github.com/promferry/promferry/internal/safeurl"
)

func TestHidesWhatMayBeSecret(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"http://127.0.0.1:9100/metrics", "http://127.0.0.1:9100/metrics"},
		{"http://h/m?token=canary", "http://h/m?..."},
		{"http://me:canary@h:1/m", "http://...@h:1/m"},
		{"http://me:can/canary@h:1/m", "http://...@h:1/m"},
		{"http://me:can?canary@h:1/m?x=canary", "http://...@h:1/m?..."},
		{"me:canary@h", "...@h"},
		{"not a url", "not a url"},
		{"", ""},
	} {
		if got := safeurl.Text(tc.in); got != tc.want {
			t.Errorf("Text(%q) = %q, want %q", tc.in, got, tc.want)
		}
		u, err := url.Parse(tc.in)
		if err != nil {
			continue
		}
		if got := safeurl.String(u); strings.Contains(got, "canary@") || strings.Contains(got, ":canary") || strings.Contains(got, "=canary") {
			t.Errorf("String(%q) = %q shows a secret", tc.in, got)
		}
	}
}

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"two\nlines\there":                    "two lines here",
		"\x1b[31mred\x1b]0;title\a\x00":       "\uFFFD[31mred\uFFFD]0;title\uFFFD\uFFFD",
		"ünïcode stays":                       "ünïcode stays",
		"got Authorization: Bearer canary ok": "got Authorization ... ok",
		"authorization=canary, x":             "authorization ...",
		"header Basic Y2FuYXJ5":               "header Basic ...",
		"a basic":                             "a basic",
		"\xff":                                "\uFFFD",
	} {
		if got := safeurl.Line(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}
