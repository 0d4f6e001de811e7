package forwarder

import (
	"fmt"
	"sync"
	"time"
)

// status is what an operator wants to know first.
type status struct {
	targets, gateways int

	mu      sync.Mutex
	put     time.Time
	fault   error
	faultAt time.Time
}

func (s *status) succeeded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put = time.Now()
}

func (s *status) failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.faultAt = err, time.Now()
}

func (s *status) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sentence := fmt.Sprintf("Forwarding %s to %s; ", count(s.targets, "target"), count(s.gateways, "Pushgateway"))
	if s.put.IsZero() {
		sentence += "no put yet"
	} else {
		sentence += "last put " + s.put.Format(time.TimeOnly)
	}
	if s.fault == nil {
		return sentence + "; no fault"
	}
	return sentence + fmt.Sprintf("; last fault %s: %v", s.faultAt.Format(time.TimeOnly), s.fault)
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// stopwatch tells for how long something has been running.
type stopwatch struct {
	mu    sync.Mutex
	since time.Time
}

func (s *stopwatch) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = time.Now()
}

func (s *stopwatch) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = time.Time{}
}

// elapsed returns the time since start, or 0 when nothing runs.
func (s *stopwatch) elapsed() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.since.IsZero() {
		return 0
	}
	return time.Since(s.since)
}
