package forwarder

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// faults logs the failures of one thing that is done again and again: the first of a run
// of them, then at most one a minute, and the first success after them.
type faults struct {
	logger *slog.Logger

	mu          sync.Mutex
	consecutive int
	logged      time.Time
}

const logFaultsEvery = time.Minute

func (f *faults) failed(ctx context.Context, message string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.consecutive++
	if f.consecutive > 1 && time.Since(f.logged) < logFaultsEvery {
		return
	}
	f.logged = time.Now()
	f.logger.LogAttrs(ctx, slog.LevelWarn, message, slog.Int("consecutive", f.consecutive), slog.Any("err", err)) //nolint:sloglint // The callers' are constants.
}

func (f *faults) succeeded(ctx context.Context, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.consecutive > 0 {
		f.logger.LogAttrs(ctx, slog.LevelInfo, message, slog.Int("failures", f.consecutive)) //nolint:sloglint // As above.
	}
	f.consecutive = 0
}
