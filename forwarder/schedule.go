package forwarder

import (
	"errors"
	"hash/fnv"
	"time"

	"github.com/go-co-op/gocron/v2"
)

// Schedule says when the cycles of a target begin. Its zero value is no schedule.
type Schedule struct {
	cron     string
	shortest time.Duration
	longest  time.Duration
}

// Every returns the schedule of a cycle each interval, which must be above zero.
func Every(interval time.Duration) Schedule {
	return Schedule{shortest: interval, longest: interval}
}

// Cron returns the schedule of a cron expression of five fields, or of a descriptor such
// as @hourly. A time zone may stand before it, as in CRON_TZ=Europe/Paris 0 3 * * *;
// without one it means the host's local time.
func Cron(expression string) (Schedule, error) {
	cron := gocron.NewDefaultCron(false)
	now := time.Now()
	if err := cron.IsValid(expression, time.Local, now); err != nil {
		if errors.Is(err, gocron.ErrCronJobInvalid) {
			return Schedule{}, errors.New("this time never comes")
		}
		if joined, ok := err.(interface{ Unwrap() []error }); ok { // gocron's own error, and the parser's on a line of its own
			err = joined.Unwrap()[len(joined.Unwrap())-1]
		}
		return Schedule{}, err
	}
	s := Schedule{cron: expression}
	s.shortest, s.longest = gaps(cron.Next, now)
	return s, nil
}

const (
	// exactFires is up to how many fires gaps looks at each of them.
	exactFires = 20_000
	// horizon is how far ahead gaps looks: a year, a leap day, and a change of the clock.
	horizon = 367 * 24 * time.Hour
)

// gaps returns the shortest and longest time between two fires that next tells. After
// exactFires it goes on in steps of an hour, by which the longest may come out too long.
func gaps(next func(time.Time) time.Time, from time.Time) (shortest, longest time.Duration) {
	last := next(from)
	shortest = horizon
	fires := 0
	for ; fires < exactFires && last.Before(from.Add(horizon)); fires++ {
		fire := next(last)
		if fire.IsZero() {
			break
		}
		shortest, longest = min(shortest, fire.Sub(last)), max(longest, fire.Sub(last))
		last = fire
	}
	for ; fires == exactFires && last.Before(from.Add(horizon)); last = last.Add(time.Hour) {
		if wait := next(last).Sub(last); wait > longest {
			longest = wait + time.Hour
		}
	}
	if longest == 0 { // It comes once, or within the horizon just once.
		longest = horizon
	}
	return shortest, longest
}

// Shortest returns the shortest time between the begins of two cycles.
func (s Schedule) Shortest() time.Duration { return s.shortest }

// ExpiresAfter returns for how long a put is good: for an interval twice that and the
// push timeout, so that one put may fail; for a cron expression the longest time between
// two fires and the push timeout, twice over.
func (s Schedule) ExpiresAfter(pushTimeout time.Duration) time.Duration {
	if s.cron != "" {
		return 2 * (s.longest + pushTimeout)
	}
	return 2*s.longest + pushTimeout
}

// job returns what gocron runs. An interval's cycles keep a place in it that name, the
// host and target, decides: many hosts do not begin at once, and a restart changes nothing.
func (s Schedule) job(name string, now time.Time) (gocron.JobDefinition, []gocron.JobOption) {
	if s.cron != "" {
		return gocron.CronJob(s.cron, false), nil
	}
	start := gocron.WithStartDateTime(now.Add(s.untilPhase(name, now)))
	return gocron.DurationJob(s.shortest), []gocron.JobOption{gocron.WithStartAt(start)}
}

// untilPhase returns the time from now to the next begin, above zero and at most the
// interval.
func (s Schedule) untilPhase(name string, now time.Time) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	phase := time.Duration(h.Sum64() % uint64(s.shortest)) //nolint:gosec // Above zero.
	since := time.Duration(now.UnixNano()) % s.shortest
	wait := (phase - since + s.shortest) % s.shortest
	if wait == 0 {
		return s.shortest
	}
	return wait
}
