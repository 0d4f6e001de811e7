package gateway

import (
	"time"

	"github.com/promferry/promferry/pushgw"
)

// The states that a group can be in.
const (
	// StateLive: it serves what was pushed.
	StateLive = "live"
	// StateAwaited: the gateway has restarted since its last push, and waits for the next.
	StateAwaited = "awaited"
	// StateDown: the last push says up 0.
	StateDown = "down"
	// StateSilent: there was no push for as long as the last one was good.
	StateSilent = "silent"
	// StateRefused: no push ever succeeded.
	StateRefused = "refused"
)

// States are all states, for a metric that has one series for each.
var States = []string{StateLive, StateAwaited, StateDown, StateSilent, StateRefused}

// Status is what a gateway holds, for its page.
type Status struct {
	// Version is that of promferry. It may be empty.
	Version string
	Now     time.Time
	Groups  []GroupStatus
}

// GroupStatus is what one group is.
type GroupStatus struct {
	Key pushgw.GroupingKey
	// Target is the path of the target that serves it, /groups/…/metrics.
	Target string
	// State is one of States, and Since since when it is in it where it is down or silent.
	State string
	Since time.Time
	// Pushed and Failed are when a push last succeeded, and last was refused. Zero means never.
	Pushed, Failed time.Time
	// Failure says why the push at Failed was refused.
	Failure string
	// Series is how many series it has, Bytes how large its text is.
	Series, Bytes int
	// ExpiresAfter is for how long a push is good. Zero means for ever.
	ExpiresAfter time.Duration
	// OnDisk tells that it is on disk, as what does not expire is.
	OnDisk bool
}

// Status returns what the gateway holds, the oldest group first. Version is for the caller to
// set.
func (g *Gateway) Status() Status {
	now := time.Now()
	status := Status{Now: now}
	for _, s := range g.store.states(now) {
		one := GroupStatus{
			Key: s.group.key, Target: targetPath(s.group), State: s.in(now), Pushed: s.pushed, Failed: s.refusedAt, Failure: s.refusal,
			ExpiresAfter: s.expiresAfter, OnDisk: s.durable && g.store.disk != nil,
		}
		switch one.State {
		case StateSilent:
			one.Since = s.silentFrom
		case StateDown:
			one.Since = s.downSince
		}
		if s.content != nil {
			one.Series, one.Bytes = s.content.Series, s.content.size()
		}
		status.Groups = append(status.Groups, one)
	}
	return status
}
