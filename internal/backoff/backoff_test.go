package backoff_test

import (
	"testing"
	"time"

	"github.com/promferry/promferry/internal/backoff"
)

// TestDelay checks that each attempt's delays stay below their bound and fill the range
// below it: a delay that is fixed, or that never falls in the lower half, is not full
// jitter.
func TestDelay(t *testing.T) {
	const base, limit = 100 * time.Millisecond, time.Second
	for attempt, top := range map[int]time.Duration{
		0: 100 * time.Millisecond, 1: 200 * time.Millisecond, 2: 400 * time.Millisecond,
		3: 800 * time.Millisecond, 4: limit, 40: limit, 1000: limit,
	} {
		var low, high int
		for range 1000 {
			d := backoff.Delay(attempt, base, limit)
			if d < 0 || d > top {
				t.Fatalf("attempt %d: delay %v, want 0 to %v", attempt, d, top)
			}
			if d < top/2 {
				low++
			} else {
				high++
			}
		}
		if low < 300 || high < 300 {
			t.Errorf("attempt %d: %d delays in the lower half of %v, %d in the upper, want them spread evenly", attempt, low, top, high)
		}
	}
}
