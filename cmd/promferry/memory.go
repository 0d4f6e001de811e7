package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// heapRoom is how much may be allocated between two garbage collections where little is
	// alive: with Go's own minimum, 4 MiB at GOGC=100, a busy proxy with few clients collects a
	// hundred times a second, and needs a fifth more CPU time (bench).
	heapRoom = 8 << 20
	// The bounds of GOGC. With the lower one at 100, a busy proxy with 9,000 clients needs a tenth more CPU
	// time (bench). The upper one keeps the heap from growing to many times its size when
	// thousands of clients connect at once.
	minPercent, maxPercent = 200, 400
	// memoryEvery is how often memory that is free is given back to the system. The collections
	// that go with it take some 40 ms of CPU time with 10,000 clients.
	memoryEvery = 10 * time.Second
)

// keepMemory keeps the proxy's memory small while it waits, and collections rare while it works,
// until ctx ends.
func keepMemory(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	free := time.NewTicker(memoryEvery)
	defer free.Stop()
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	percent := 0
	for {
		metrics.Read(live)
		if want := gcPercent(live[0].Value.Uint64()); want < percent*9/10 || want > percent*11/10 {
			percent = want
			debug.SetGCPercent(percent)
		}
		select {
		case <-tick.C:
		case <-free.C:
			runtime.GC() // What pools hold, only the second one frees.
			debug.FreeOSMemory()
		case <-ctx.Done():
			return nil
		}
	}
}

// gcPercent leaves room for heapRoom, as far as the bounds allow.
func gcPercent(live uint64) int {
	return min(maxPercent, max(minPercent, heapRoom*100/int(max(live, 1<<20)))) //nolint:gosec // It is less than all memory.
}
