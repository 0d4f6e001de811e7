// Package faultlog logs failures that come again and again without filling the log.
package faultlog

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Log logs the failures of one thing that is done again and again: the first of a run of
// them, then at most one a minute, and the first success after them. It is safe for
// concurrent use.
type Log struct {
	// Logger is where they go.
	Logger *slog.Logger

	mu          sync.Mutex
	consecutive int
	logged      time.Time
}

// Every is how often a failure that goes on is logged.
const Every = time.Minute

// Failed logs err, if it is time to. The message must be a constant.
func (f *Log) Failed(ctx context.Context, message string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.consecutive++
	if f.consecutive > 1 && time.Since(f.logged) < Every {
		return
	}
	f.logged = time.Now()
	f.Logger.LogAttrs(ctx, slog.LevelWarn, message, slog.Int("consecutive", f.consecutive), slog.Any("err", err)) //nolint:sloglint // The callers' are constants.
}

// Succeeded logs that there was a success, if it is the first after failures; it returns
// whether it was.
func (f *Log) Succeeded(ctx context.Context, message string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.consecutive > 0 {
		f.Logger.LogAttrs(ctx, slog.LevelInfo, message, slog.Int("failures", f.consecutive)) //nolint:sloglint // As above.
	}
	after := f.consecutive > 0
	f.consecutive = 0
	return after
}
