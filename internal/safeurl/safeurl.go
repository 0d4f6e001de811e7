// Package safeurl writes URLs, and what servers answer, so that they can stand in a log
// line, an error, a metric or a page: user-info and the query, which may hold passwords and
// tokens, are hidden.
package safeurl

import (
	"net/url"
	"regexp"
	"strings"
	"unicode"
)

// hidden stands where something secret may have stood.
const hidden = "..."

// String returns u without its user-info, query and fragment.
func String(u *url.URL) string {
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	if u.Opaque != "" {
		shown.Opaque = hidden
	}
	s := shown.String()
	if u.RawQuery != "" {
		s += "?" + hidden
	}
	return s
}

// Text does for a text that may be no URL at all, as a user typed it, what String does
// for a URL.
func Text(s string) string {
	head, rest, ok := strings.Cut(s, "://")
	if ok {
		head += "://"
	} else {
		head, rest = "", s
	}
	if i := strings.LastIndex(rest, "@"); i >= 0 {
		rest = hidden + rest[i:]
	}
	if before, _, ok := strings.Cut(rest, "?"); ok {
		rest = before + "?" + hidden
	}
	return head + rest
}

// credentials matches what a server may have echoed of a request's headers.
var credentials = regexp.MustCompile(`(?i)\b((?:proxy-)?authorization|cookie|bearer|basic)\b[\s:="']+\S+(?:\s+\S+)?`)

// Line returns what another program wrote as one line that can be shown: without control
// characters, which a terminal would obey, without credentials, and cut by Cut.
func Line(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
	return Cut(credentials.ReplaceAllString(s, "$1 "+hidden))
}
