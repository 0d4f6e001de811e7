package expiry

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// status is what an operator wants to know first of one Pushgateway.
type status struct {
	mu     sync.Mutex
	since  time.Time // when the sweep that runs began, zero when none does
	swept  time.Time // when the last one succeeded
	groups map[string]int
	fault  error // of the last one
}

func (s *status) began() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = time.Now()
}

func (s *status) ended(groups map[string]int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since, s.fault = time.Time{}, err
	if err == nil {
		s.swept, s.groups = time.Now(), groups
	}
}

func (s *status) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sentence := "not swept yet"
	if !s.swept.IsZero() {
		sentence = fmt.Sprintf("%d groups live, %d silent, last sweep %s", s.groups[stateLive], s.groups[stateSilent], s.swept.Format(time.TimeOnly))
	}
	if s.fault != nil {
		sentence += fmt.Sprintf(", fault: %v", s.fault)
	}
	return sentence
}

// stuckAfter is by how much a sweep may overrun its timeouts, before it counts as stuck
// rather than as late.
const stuckAfter = 10 * time.Second

func (s *sweeper) stuck() bool {
	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	most := s.cfg.ListTimeout + 2*s.cfg.PushTimeout + actFor + stuckAfter
	return !s.status.since.IsZero() && time.Since(s.status.since) > most
}

// Status returns a sentence for an operator. It is safe for concurrent use.
func (e *Expirer) Status() string {
	var parts []string
	for _, s := range e.sweepers {
		parts = append(parts, fmt.Sprintf("%s: %v", s.gateway, &s.status))
	}
	return "Sweeping " + strings.Join(parts, "; ")
}
