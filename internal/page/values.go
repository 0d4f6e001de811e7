package page

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// The limits of what is shown of one value, in characters.
const (
	maxShort    = 80   // in the page's text
	maxSentence = 400  // in the text, of an error
	maxFull     = 1000 // where the pointer rests on a value that was cut
)

// Text is a value of somebody else's.
type Text struct {
	Short string
	// Full is "" when Short is all.
	Full string
}

// Short makes the text of a value.
func Short(s string) Text { return limited(s, maxShort) }

// Sentence makes the text of an error, or of another value that is a sentence.
func Sentence(s string) Text { return limited(s, maxSentence) }

// limited makes the text of a value, at most n characters.
func limited(s string, n int) Text {
	if isPlain(s) && len(s) <= n {
		return Text{Short: s}
	}
	t := Text{Short: cut(s, n)}
	if full := cut(s, maxFull); full != t.Short {
		t.Full = full
	}
	return t
}

// isPlain tells that s is printable ASCII.
func isPlain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// cut returns at most n characters of s and an ellipsis when there are more. Characters that
// cannot be seen or that turn the direction of others are spelled out: a job that ends in
// U+202E must not turn what follows around.
func cut(s string, n int) string {
	var b strings.Builder
	count := 0
	for _, r := range s {
		if count == n {
			b.WriteString("…")
			break
		}
		count++
		switch {
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// Moment is a time as seen from another.
type Moment struct {
	// Machine and Absolute are the time in UTC, for programs and for people; Machine is ""
	// when there is no time.
	Machine, Absolute string
	// Ago is how long ago that was, Age the same as a span of time.
	Ago, Age string
}

// MomentOf makes a moment of t.
func MomentOf(t, now time.Time) Moment {
	if t.IsZero() {
		return Moment{}
	}
	utc := t.UTC()
	return Moment{Machine: utc.Format(time.RFC3339), Absolute: utc.Format("2006-01-02 15:04:05 UTC"), Ago: ago(now.Sub(t)), Age: age(now.Sub(t))}
}

// ago says how long ago something was. What lies ahead, for clocks differ, is now.
func ago(d time.Duration) string {
	if d < time.Second {
		return "now"
	}
	return age(d) + " ago"
}

// Size says how large something is, in bytes.
func Size(bytes int) string {
	if bytes < 1<<10 {
		return strconv.Itoa(bytes) + " B"
	}
	size, unit := float64(bytes)/(1<<10), "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if size < 1000 {
			break
		}
		size, unit = size/(1<<10), next
	}
	if size < 9.95 {
		return fmt.Sprintf("%.1f %s", size, unit)
	}
	return fmt.Sprintf("%.0f %s", size, unit)
}

// age says a span of time with the unit that a glance needs.
func age(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d d", d/(24*time.Hour))
}

// Count writes how many of something there are; plural is for all numbers but one.
func Count(n int, singular, plural string) string {
	if n == 1 {
		return "1 " + singular
	}
	return strconv.Itoa(n) + " " + plural
}

// Labels writes labels as name=value, sorted, as much as could be shown.
func Labels(m map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if b.Len() > 0 {
			b.WriteString(" ")
		}
		b.WriteString(name + "=" + m[name])
		if b.Len() > maxFull*utf8.UTFMax {
			break
		}
	}
	return b.String()
}
