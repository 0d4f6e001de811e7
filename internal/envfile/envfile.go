// Package envfile reads files of environment variables as systemd's EnvironmentFile= does.
package envfile

import (
	"regexp"
	"strings"
)

const (
	newline = "\r\n" // Either one ends a line.
	blank   = " \t" + newline
)

var validName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// Parse returns the variables of a text, by the rules of EnvironmentFile= in systemd.exec(5):
// NAME=value, one a line; comments begin with # or ;; values may have quotes, and a backslash
// takes the special meaning off what follows it, or joins the next line. Of two variables of
// one name the last counts. Lines that are none are left out, as systemd does with them.
func Parse(text string) map[string]string {
	vars := make(map[string]string)
	for {
		text = strings.TrimLeft(text, blank)
		if text == "" {
			return vars
		}
		if text[0] == '#' || text[0] == ';' {
			text = afterComment(text)
			continue
		}
		// What a line begins with belongs to the name, be it a =.
		end := 1 + strings.IndexAny(text[1:], "="+newline)
		if end == 0 {
			return vars
		}
		name := strings.TrimRight(text[:end], blank)
		text = text[end:]
		if text[0] != '=' {
			continue
		}
		var value string
		if value, text = readValue(text[1:]); validName.MatchString(name) {
			vars[name] = value
		}
	}
}

// afterComment returns what follows a comment. A backslash at its end joins the next line.
func afterComment(text string) string {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case '\r', '\n':
			return text[i:]
		}
	}
	return ""
}

// readValue reads a value, which ends with the line, and returns what follows it.
func readValue(text string) (value, rest string) {
	var b strings.Builder
	// Quotes count where a word begins only. Blanks in front of words are dropped, and those
	// behind the last one.
	begin, kept := true, 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case isIn(newline, c):
			return b.String()[:kept], text[i:]
		case begin && (c == '\'' || c == '"'):
			i = readQuoted(&b, text, i)
			kept = b.Len()
		case c == '\\':
			begin = false
			if i++; i < len(text) && !isIn(newline, text[i]) {
				b.WriteByte(text[i])
			}
			kept = b.Len()
		case !isIn(blank, c):
			begin = false
			b.WriteByte(c)
			kept = b.Len()
		case !begin:
			b.WriteByte(c)
		}
	}
	return b.String()[:kept], ""
}

// readQuoted reads what is between the quote at i and the next one like it, which may be lines
// away, and returns where that is. As in a shell, a backslash means something between double
// quotes only, and only before a few characters.
func readQuoted(b *strings.Builder, text string, i int) (end int) {
	quote := text[i]
	for i++; i < len(text) && text[i] != quote; i++ {
		if text[i] != '\\' || quote == '\'' {
			b.WriteByte(text[i])
			continue
		}
		switch i++; {
		case i == len(text):
		case isIn("\"\\`$", text[i]):
			b.WriteByte(text[i])
		case text[i] != '\n':
			b.WriteByte('\\')
			b.WriteByte(text[i])
		}
	}
	return i
}

func isIn(set string, c byte) bool { return strings.IndexByte(set, c) >= 0 }
