package page

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/promferry/promferry/reverse"
)

// The limits of what is shown of one value, in characters.
const (
	maxShort    = 80   // in the page's text
	maxSentence = 400  // in the text, of an error
	maxFull     = 1000 // where the pointer rests on a value that was cut
)

// text is a value of somebody else's.
type text struct {
	Short string
	// Full is "" when Short is all.
	Full string
}

// short makes the text of a value.
func short(s string) text { return limited(s, maxShort) }

// limited makes the text of a value, at most n characters.
func limited(s string, n int) text {
	if isPlain(s) && len(s) <= n {
		return text{Short: s}
	}
	t := text{Short: cut(s, n)}
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

// moment is a time as seen from another.
type moment struct {
	// Machine and Absolute are the time in UTC, for programs and for people; Machine is ""
	// when there is no time.
	Machine, Absolute string
	// Ago is how long ago that was, Age the same as a span of time.
	Ago, Age string
}

func momentOf(t, now time.Time) moment {
	if t.IsZero() {
		return moment{}
	}
	utc := t.UTC()
	return moment{Machine: utc.Format(time.RFC3339), Absolute: utc.Format("2006-01-02 15:04:05 UTC"), Ago: ago(now.Sub(t)), Age: age(now.Sub(t))}
}

// ago says how long ago something was. What lies ahead, for clocks differ, is now.
func ago(d time.Duration) string {
	if d < time.Second {
		return "now"
	}
	return age(d) + " ago"
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

// took says how long a scrape took.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d/time.Millisecond)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// succeeded is the result of a scrape that went well.
const succeeded = "success"

// failing tells that Prometheus got no metrics the last time: it takes 200 only.
func failing(s reverse.ScrapeStatus) bool {
	return !s.At.IsZero() && (s.Result != succeeded || s.Status != http.StatusOK)
}

// scrape is the last one of a target.
type scrape struct {
	At      moment
	Took    string
	Failing bool
	Status  int
	Result  text
}

func scrapeOf(s reverse.ScrapeStatus, now time.Time) scrape {
	if s.At.IsZero() {
		return scrape{}
	}
	v := scrape{At: momentOf(s.At, now), Took: took(s.Duration), Failing: failing(s), Status: s.Status, Result: short(s.Result)}
	if s.Result == succeeded {
		v.Result = text{Short: "ok"}
		if v.Failing {
			v.Result = text{Short: "from target"}
		}
	}
	return v
}

// kind names a kind of line for people.
func kind(k string) text {
	switch k {
	case "ptth":
		return text{Short: "PTTH"}
	case "longpoll":
		return text{Short: "long-poll"}
	case "pushprox":
		return text{Short: "PushProx"}
	}
	return short(k)
}

// count writes how many of something there are; plural is for all numbers but one.
func count(n int, singular, plural string) string {
	if n == 1 {
		return "1 " + singular
	}
	return strconv.Itoa(n) + " " + plural
}

// lines says how many lines there are, and in use.
func lines(n, busy int) string {
	if busy == 0 {
		return count(n, "line", "lines")
	}
	return count(n, "line", "lines") + ", " + strconv.Itoa(busy) + " busy"
}

// labels writes labels as name=value, sorted, as much as could be shown.
func labels(m map[string]string) text {
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
	return short(b.String())
}
