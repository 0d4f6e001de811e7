// Package safeurl writes URLs so that they can stand in a log line, an error, a metric
// or a page: user-info and the query, which may hold passwords and tokens, are hidden.
package safeurl

import (
	"net/url"
	"strings"
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
