package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/promferry/promferry/pushgw"
)

// record is a group on disk: all of one that does not expire; of one that does, that there is
// such a group, and since when it is down or silent.
type record struct {
	Job    string            `json:"job"`
	Labels map[string]string `json:"labels,omitempty"`
	// Content is nil for what expires.
	Content      *content      `json:"content,omitempty"`
	ExpiresAfter time.Duration `json:"expires_after_ns,omitempty"`
	// Pushed is exact for what does not expire, and for what is silent.
	Pushed time.Time `json:"pushed,omitzero"`
	// Failed, RefusedAt and Refusal are there for what does not expire.
	Failed      time.Time `json:"failed,omitzero"`
	RefusedAt   time.Time `json:"refused_at,omitzero"`
	Refusal     string    `json:"refusal,omitempty"`
	DownSince   time.Time `json:"down_since,omitzero"`
	SilentSince time.Time `json:"silent_since,omitzero"`
}

// mark tells what of a group is on disk from what has to be there. The zero mark is that of a
// group that is not. What does not expire is written with each push all the same.
type mark struct {
	there, durable, silent bool
	// unsure tells that a write failed since: that may be on disk all the same, as when only
	// the sync at its end has failed.
	unsure        bool
	expiresAfter  time.Duration
	down, refused int64 // in Unix nanoseconds
}

func (s *state) mark(now time.Time) mark {
	if s.content == nil && !s.awaited {
		return mark{} // Nothing that was taken: it is in memory only.
	}
	m := mark{there: true, durable: s.durable, silent: s.silent(now), expiresAfter: s.expiresAfter}
	if !s.downSince.IsZero() {
		m.down = s.downSince.UnixNano()
	}
	if s.durable && !s.refusedAt.IsZero() {
		m.refused = s.refusedAt.UnixNano()
	}
	return m
}

// record returns what is to be on disk of a group.
func (s *state) record(now time.Time) change {
	if !s.mark(now).there {
		return change{number: s.group.number}
	}
	r := record{
		Job: s.group.key.Job, Labels: s.group.key.Labels, ExpiresAfter: s.expiresAfter, Pushed: s.pushed, DownSince: s.downSince,
	}
	if s.durable {
		r.Content, r.Failed, r.RefusedAt, r.Refusal = s.content, s.failed, s.refusedAt, s.refusal
	}
	if s.silent(now) {
		r.SilentSince = s.silentFrom
	}
	b, err := json.Marshal(r)
	if err != nil { // There is nothing in it that JSON has not.
		panic(err)
	}
	return change{s.group.number, b}
}

// keep writes to disk what of a group is to outlive the process, where that has changed. The
// lock of the group is held. The error is a *Refusal.
func (s *Store) keep(next *state) error {
	if s.disk == nil {
		return nil
	}
	g := next.group
	now := time.Now()
	m := next.mark(now)
	if !next.durable && m == g.kept {
		return nil
	}
	err := s.write([]*group{g}, next.record(now))
	if err == nil {
		g.kept = m
		return nil
	}
	if next.durable || g.kept.durable {
		return &Refusal{Status: http.StatusServiceUnavailable, Reason: reasonDisk, Text: fmt.Sprintf("the push could not be kept: %v; it is as if it had not been: push it again", err)}
	}
	// What expires is told by its next push, and the sweep tries again: a full disk is no
	// reason to lose it.
	return nil
}

// write writes changes of groups, whose locks are held. The error is the disk's.
func (s *Store) write(held []*group, changes ...change) error {
	if len(changes) == 0 {
		return nil
	}
	err := s.disk.write(changes...)
	if err == nil {
		s.faults.Succeeded(context.Background(), "Groups written to disk again")
		return nil
	}
	s.faults.Failed(context.Background(), "Groups not written to disk", err)
	for _, g := range held {
		g.kept.unsure = true
	}
	return err
}

// graceAfterStart is for how long a group that is silent is kept at least after a start, so that
// somebody is told of it whose Prometheus was away with the gateway.
const graceAfterStart = time.Hour

// load makes the groups that are on disk.
func (s *Store) load(logger *slog.Logger) error {
	type loaded struct {
		number uint64
		record
	}
	var all []loaded
	lost, changed, err := s.disk.each(func(number uint64, b []byte, err error) {
		r := loaded{number: number}
		err = cmp.Or(err, json.Unmarshal(b, &r.record)) // Of what is damaged it may still tell whose it is.
		if err == nil && r.Content != nil {
			r.Content, err = r.Content.restored()
		}
		if err == nil && r.Job == "" {
			err = fmt.Errorf("it has no job")
		}
		if err != nil {
			logger.Error("A group on disk is damaged, and left out", "job", r.Job, "labels", r.Labels, "err", err)
			return
		}
		all = append(all, r)
	})
	if err != nil {
		return err
	}
	if changed {
		logger.Error("The file is damaged: groups are lost, or are what they were before", "file", s.config.File, "lost", lost)
	}
	s.started = time.Now() // Before, nobody could push.
	for _, r := range all {
		s.made = max(s.made, r.number)
		g := newGroup(pushgw.GroupingKey{Job: r.Job, Labels: r.Labels}, r.number)
		st := s.restored(g, r.record)
		g.kept = st.mark(s.started)
		s.set(g, st)
		s.groups[g.path] = g
		if st.content != nil && st.content.size() > s.config.MaxGroupBytes {
			logger.Warn("A group on disk is larger than --limit.group-bytes allows: it is kept, and nothing can be added to it",
				"group", g.key.String(), "bytes", st.content.size(), "limit", s.config.MaxGroupBytes)
		}
	}
	if kept := s.memory.Load(); kept > int64(s.config.MaxBytes) {
		logger.Warn("Groups on disk take more memory than --limit.total-bytes allows: they are kept, and pushes that need more are refused",
			"bytes", kept, "limit", s.config.MaxBytes)
	}
	return nil
}

// restored returns what a group is at the start of the gateway. Nobody is silent that was not
// before its time has passed anew.
func (s *Store) restored(g *group, r record) *state {
	st := &state{
		group: g, content: r.Content, awaited: r.Content == nil, durable: r.Content != nil, expiresAfter: r.ExpiresAfter, pushed: r.Pushed,
		failed: r.Failed, refusedAt: r.RefusedAt, refusal: r.Refusal, downSince: r.DownSince,
	}
	if st.durable { // It did not expire when it was pushed, and said no time itself.
		st.expiresAfter = s.config.ExpireDefault
	}
	if st.expiresAfter == 0 {
		return st
	}
	if r.SilentSince.IsZero() {
		st.silentFrom = s.started.Add(st.expiresAfter)
		if st.awaited {
			st.pushed = time.Time{} // There may have been more since that was written.
		}
	} else {
		// Counted from the start, for the clock may be set after it, and may have gone back before.
		st.silentFrom = s.started.Add(min(0, r.SilentSince.Sub(s.started)))
	}
	st.forgotFrom = st.silentFrom.Add(s.config.ForgetAfter)
	if grace := s.started.Add(min(graceAfterStart, s.config.ForgetAfter)); st.forgotFrom.Before(grace) {
		st.forgotFrom = grace
	}
	return st
}

// Delete removes the group of a key. One that there is not is no error.
func (s *Store) Delete(key pushgw.GroupingKey) error {
	s.mu.RLock()
	g := s.groups[groupPath(key)]
	s.mu.RUnlock()
	if g == nil {
		return nil
	}
	_, err := s.remove([]*group{g}, func(*state) bool { return true })
	return err
}

// DeleteAll removes all groups whose keys are wanted, and returns these. With an error, a
// *Refusal, none of them is removed.
func (s *Store) DeleteAll(wanted func(pushgw.GroupingKey) bool) ([]pushgw.GroupingKey, error) {
	var chosen []*group
	for _, st := range s.states(time.Now()) {
		if wanted(st.group.key) {
			chosen = append(chosen, st.group)
		}
	}
	removed, err := s.remove(chosen, func(*state) bool { return true })
	keys := make([]pushgw.GroupingKey, 0, len(removed))
	for _, g := range removed {
		keys = append(keys, g.key)
	}
	return keys, err
}

// hold locks those of the groups that are there and as wanted. They are locked until release. It
// waits for who else holds one, as a rule a pusher that waits for the disk; or, with try, leaves
// that one out.
func (s *Store) hold(groups []*group, try bool, wanted func(*group) bool) (held []*group, release func()) {
	several := len(groups) > 1
	if several {
		s.several.Lock()
	}
	for _, g := range groups {
		if !try {
			g.mu.Lock()
		} else if !g.mu.TryLock() {
			continue
		}
		if g.removed || !wanted(g) {
			g.mu.Unlock()
			continue
		}
		held = append(held, g)
	}
	return held, func() {
		for _, g := range held {
			g.mu.Unlock()
		}
		if several {
			s.several.Unlock()
		}
	}
}

// remove takes groups out of memory, and off the disk, that are as wanted. It returns which.
func (s *Store) remove(groups []*group, wanted func(*state) bool) ([]*group, error) {
	held, release := s.hold(groups, false, func(g *group) bool { return wanted(g.now.Load()) })
	defer release()
	var changes []change
	for _, g := range held {
		if g.kept.there || g.kept.unsure {
			changes = append(changes, change{number: g.number})
		}
	}
	if err := s.write(held, changes...); err != nil {
		return nil, &Refusal{Status: http.StatusServiceUnavailable, Reason: reasonDisk, Text: fmt.Sprintf("nothing is deleted: %v", err)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range held {
		g.removed = true
		s.memory.Add(-int64(g.now.Load().content.memory()))
		delete(s.groups, g.path)
	}
	return held, nil
}

// sweep removes what is gone, and writes to disk what has changed by time alone.
func (s *Store) sweep() {
	s.mu.RLock()
	all := slices.Collect(maps.Values(s.groups))
	s.mu.RUnlock()
	now := time.Now()
	gone := func(st *state) bool { return !st.known(now) }
	var these []*group // Only they are locked, and only for them is waited.
	for _, g := range all {
		if gone(g.now.Load()) {
			these = append(these, g)
		}
	}
	// An error is told, and the next sweep tries again.
	_, _ = s.remove(these, gone)
	if s.disk != nil {
		s.rewrite(all, now)
	}
}

// rewrite writes those of the groups of which something else has to be on disk than is. Those that
// somebody changes just now have time until the next sweep.
func (s *Store) rewrite(groups []*group, now time.Time) {
	held, release := s.hold(groups, true, func(g *group) bool {
		st := g.now.Load()
		return st.known(now) && st.mark(now) != g.kept
	})
	defer release()
	var changes []change
	for _, g := range held {
		changes = append(changes, g.now.Load().record(now))
	}
	if s.write(held, changes...) != nil {
		return // It is told, and the next sweep tries again.
	}
	for _, g := range held {
		g.kept = g.now.Load().mark(now)
	}
}
