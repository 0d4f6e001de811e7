package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// heapRoom is how much may be allocated between two garbage collections where little is
	// alive: with Go's own minimum, 4 MiB, a busy proxy with few clients collects a hundred times
	// a second, and needs a fifth more CPU time (bench).
	heapRoom = 8 << 20
	// memoryEvery is how often memory that is free is given back to the system. The collection
	// that goes with it takes some 20 ms of CPU time with 10,000 clients.
	memoryEvery = 10 * time.Second
)

// keepMemory keeps the proxy's memory small while it waits, and collections rare while it works,
// until ctx ends.
func keepMemory(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	debug.SetGCPercent(gcPercent(0))
	for {
		select {
		case <-tick.C:
			debug.FreeOSMemory()
			metrics.Read(live)
			debug.SetGCPercent(gcPercent(live[0].Value.Uint64()))
		case <-ctx.Done():
			return nil
		}
	}
}

// gcPercent leaves room for half of what is alive, at least for heapRoom.
func gcPercent(live uint64) int {
	return max(50, heapRoom*100/int(max(live, 1<<20))) //nolint:gosec // It is less than all memory.
}
