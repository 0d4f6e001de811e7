package forwarder_test

import (
	"testing"
	"time"

	"github.com/promferry/promferry/forwarder"
)

func TestCronGaps(t *testing.T) {
	const day = 24 * time.Hour
	for expression, want := range map[string][2]time.Duration{ // shortest; longest, from which and up to an hour more
		"CRON_TZ=UTC */5 * * * *":         {5 * time.Minute, 5 * time.Minute},
		"CRON_TZ=UTC 0 3 * * *":           {day, day},
		"CRON_TZ=UTC 0 3 * * 1-5":         {day, 3 * day},
		"CRON_TZ=UTC * 9-17 * * 1-5":      {time.Minute, 2*day + 15*time.Hour + time.Minute},
		"CRON_TZ=UTC 0,7 * * * *":         {7 * time.Minute, 53 * time.Minute},
		"@hourly":                         {time.Hour, time.Hour},
		"@every 10s":                      {10 * time.Second, 10 * time.Second},
		"CRON_TZ=UTC * 9-17 * 1 *":        {time.Minute, 334*day + 15*time.Hour + time.Minute},
		"CRON_TZ=Europe/Paris 30 2 * * *": {0, 0}, // Some day has no 2:30, see below.
		"CRON_TZ=UTC 0 0 29 2 *":          {0, 0},
	} {
		s, err := forwarder.Cron(expression)
		if err != nil {
			t.Errorf("%s: %v", expression, err)
			continue
		}
		longest := s.ExpiresAfter(0) / 2
		if want[0] == 0 {
			if longest < day {
				t.Errorf("%s: longest %v", expression, longest)
			}
			continue
		}
		if s.Shortest() != want[0] || longest < want[1] || longest > want[1]+time.Hour {
			t.Errorf("%s: shortest %v, longest %v, want %v", expression, s.Shortest(), longest, want)
		}
	}
}

func TestCronRefuses(t *testing.T) {
	for _, expression := range []string{"", "soon", "* * * *", "* * * * * *", "60 * * * *", "0 0 30 2 *", "CRON_TZ=Nowhere * * * * *"} {
		if _, err := forwarder.Cron(expression); err == nil {
			t.Errorf("%q: no error", expression)
		}
	}
}

func TestExpiresAfter(t *testing.T) {
	if got := forwarder.Every(15 * time.Second).ExpiresAfter(10 * time.Second); got != 40*time.Second {
		t.Errorf("interval 15s, push timeout 10s: %v, want 2 × 15s + 10s", got)
	}
	s, err := forwarder.Cron("CRON_TZ=UTC 0 3 * * *")
	if err != nil {
		t.Fatal(err)
	}
	if got := s.ExpiresAfter(10 * time.Second); got != 2*(24*time.Hour+10*time.Second) {
		t.Errorf("daily: %v, want 2 × (24h + 10s)", got)
	}
}
