package page

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/promferry/promferry/internal/page"
	"github.com/promferry/promferry/reverse"
)

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
	At      page.Moment
	Took    string
	Failing bool
	Status  int
	Result  page.Text
}

func scrapeOf(s reverse.ScrapeStatus, now time.Time) scrape {
	if s.At.IsZero() {
		return scrape{}
	}
	v := scrape{At: page.MomentOf(s.At, now), Took: took(s.Duration), Failing: failing(s), Status: s.Status, Result: page.Short(s.Result)}
	if s.Result == succeeded {
		v.Result = page.Text{Short: "ok"}
		if v.Failing {
			v.Result = page.Text{Short: "from target"}
		}
	}
	return v
}

// kind names a kind of line for people.
func kind(k string) page.Text {
	switch k {
	case "ptth":
		return page.Text{Short: "PTTH"}
	case "longpoll":
		return page.Text{Short: "long-poll"}
	case "pushprox":
		return page.Text{Short: "PushProx"}
	}
	return page.Short(k)
}

// lines says how many lines there are, and in use.
func lines(n, busy int) string {
	if busy == 0 {
		return page.Count(n, "line", "lines")
	}
	return page.Count(n, "line", "lines") + ", " + strconv.Itoa(busy) + " busy"
}
