// Package backoff says how long to wait before another try.
package backoff

import (
	"math/rand/v2"
	"time"
)

// Delay returns a random duration from zero up to base doubled attempt times, at most
// limit: "full jitter", which spreads clients that failed together better than any
// fixed share of the wait (AWS Architecture Blog, "Exponential Backoff And Jitter").
// The first try that failed is attempt 0. Base and limit must be above zero.
func Delay(attempt int, base, limit time.Duration) time.Duration {
	top := limit
	if attempt < 32 && base<<attempt > 0 {
		top = min(limit, base<<attempt)
	}
	return rand.N(top + 1) //nolint:gosec // Spreads load; nothing depends on it being secret.
}
