package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/pushgw"
)

// A Refusal says why a push was not taken.
type Refusal struct {
	// Status is the HTTP status that tells it.
	Status int
	// Reason is one of a closed set, for a metric.
	Reason string
	// Text says what is wrong.
	Text string
}

func (r *Refusal) Error() string { return r.Text }

// StoreConfig says how a Store keeps groups.
type StoreConfig struct {
	// ExpireDefault is for how long after its last put a group is good that does not say that
	// itself. Zero means for ever.
	ExpireDefault time.Duration
	// ForgetAfter is how long a group is kept that is silent.
	ForgetAfter time.Duration
	// MaxGroups and MaxSeries are how many groups there are at most, and series in each.
	MaxGroups, MaxSeries int
}

// A Store keeps groups in memory. It is safe for concurrent use: pushes to different groups
// wait for each other only while a group is looked up or made.
type Store struct {
	config StoreConfig

	mu     sync.RWMutex
	groups map[string]*group // by path
	made   uint64            // how many groups were ever made
}

// NewStore returns a Store without groups.
func NewStore(config StoreConfig) *Store {
	return &Store{config: config, groups: make(map[string]*group)}
}

// group is what was pushed under one grouping key.
type group struct {
	key    pushgw.GroupingKey
	path   string // below /metrics or /groups
	labels []byte // as in a text: {instance="",job="x"}
	number uint64 // tells the older of two groups

	mu      sync.Mutex // held by who changes the group
	removed bool       // from Store.groups
	now     atomic.Pointer[state]
}

// state is what a group is at a time. It is never changed.
type state struct {
	group   *group
	content *content // nil: no push ever succeeded
	// pushed and failed are when a push last succeeded, and last was refused for what was in
	// it. Zero means never.
	pushed, failed time.Time
	// downSince is since when each put says up 0. Zero means that the last one does not.
	downSince time.Time
	// silentFrom is from when on the group is silent unless it is pushed to, forgotFrom from
	// when on it is gone. Zero means never.
	silentFrom, forgotFrom time.Time

	zip    sync.Once
	zipped []byte // the page of the group, gzipped
}

func (s *state) silent(now time.Time) bool {
	return !s.silentFrom.IsZero() && !now.Before(s.silentFrom)
}

func (s *state) gone(now time.Time) bool { return !s.forgotFrom.IsZero() && !now.Before(s.forgotFrom) }

// Push replaces the families of a group, or with add those of the same names, and makes the
// group where there is none. It takes families over. Errors are *Refusal; the group then keeps
// what it had.
func (s *Store) Push(key pushgw.GroupingKey, families []*dto.MetricFamily, add bool) error {
	b := getBuffer()
	defer putBuffer(b)
	families, err := check(families, key)
	var rendered []family
	if err == nil {
		rendered, err = render(b, families)
	}
	for {
		g, groupErr := s.groupOf(key)
		if groupErr != nil {
			return cmp.Or(err, groupErr)
		}
		g.mu.Lock()
		if g.removed { // In the time between.
			g.mu.Unlock()
			continue
		}
		if err == nil {
			err = s.replace(g, rendered, add)
		}
		if err != nil {
			s.fail(g)
		}
		g.mu.Unlock()
		return err
	}
}

// replace changes what a group holds. Its lock is held.
func (s *Store) replace(g *group, families []family, add bool) error {
	now := time.Now()
	old := g.before(now)
	if add {
		families = old.content.with(families)
	}
	if err := collision(families); err != nil {
		return err
	}
	c := newContent(families)
	if c.series > s.config.MaxSeries {
		return tooManySeries(c.series, s.config.MaxSeries)
	}
	next := &state{group: g, content: c, pushed: now, failed: old.failed}
	if c.down {
		next.downSince = old.downSince
		if next.downSince.IsZero() {
			next.downSince = now
		}
	}
	if expiry := cmp.Or(c.expiresAfter, s.config.ExpireDefault); expiry > 0 {
		next.silentFrom = now.Add(expiry)
		next.forgotFrom = next.silentFrom.Add(s.config.ForgetAfter)
	}
	g.now.Store(next)
	return nil
}

// before returns what the group is before it is changed. One that is gone begins anew.
func (g *group) before(now time.Time) *state {
	if st := g.now.Load(); !st.gone(now) {
		return st
	}
	return &state{group: g}
}

func tooManySeries(n, most int) error {
	return &Refusal{
		Status: http.StatusUnprocessableEntity, Reason: reasonSeries,
		Text: fmt.Sprintf("the group would have %d series, and may have %d (--limit.group-series)", n, most),
	}
}

// fail notes that a push was refused. The lock of the group is held.
func (s *Store) fail(g *group) {
	now := time.Now()
	old := g.before(now)
	next := &state{
		group: g, content: old.content, pushed: old.pushed, failed: now, downSince: old.downSince,
		silentFrom: old.silentFrom, forgotFrom: old.forgotFrom,
	}
	if next.content == nil {
		next.forgotFrom = now.Add(s.config.ForgetAfter)
	}
	g.now.Store(next)
}

// groupOf returns the group of a key, and makes it where there is none.
func (s *Store) groupOf(key pushgw.GroupingKey) (*group, error) {
	path := groupPath(key)
	s.mu.RLock()
	g := s.groups[path]
	s.mu.RUnlock()
	if g != nil {
		return g, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.groups[path]; g != nil {
		return g, nil
	}
	if len(s.groups) >= s.config.MaxGroups {
		return nil, &Refusal{
			Status: http.StatusTooManyRequests, Reason: reasonGroups,
			Text: fmt.Sprintf("there are %d groups, and no more may be made (--limit.groups): delete some", len(s.groups)),
		}
	}
	s.made++
	g = &group{key: key, path: path, labels: labelText(key), number: s.made}
	g.now.Store(&state{group: g})
	s.groups[path] = g
	return g, nil
}

// Delete removes a group. One that there is not is no error.
func (s *Store) Delete(key pushgw.GroupingKey) {
	path := groupPath(key)
	s.mu.Lock()
	g := s.groups[path]
	delete(s.groups, path)
	s.mu.Unlock()
	if g != nil {
		g.remove()
	}
}

// Wipe removes all groups.
func (s *Store) Wipe() {
	s.mu.Lock()
	groups := s.groups
	s.groups = make(map[string]*group)
	s.mu.Unlock()
	for _, g := range groups {
		g.remove()
	}
}

// remove marks a group that is in the map no more.
func (g *group) remove() {
	g.mu.Lock()
	g.removed = true
	g.mu.Unlock()
}

// sweepEvery is how often groups that are gone are taken out of memory.
const sweepEvery = time.Minute

// Run takes groups out of memory that are gone, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.sweep()
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Store) sweep() {
	now := time.Now()
	s.mu.RLock()
	all := slices.Collect(maps.Values(s.groups))
	s.mu.RUnlock()
	for _, g := range all {
		// Its lock first, so that no push comes in between. Nobody who holds the lock of the
		// store waits for that of a group.
		g.mu.Lock()
		if !g.removed && g.now.Load().gone(now) {
			g.removed = true
			s.mu.Lock()
			if s.groups[g.path] == g { // Not one that was made after this was deleted.
				delete(s.groups, g.path)
			}
			s.mu.Unlock()
		}
		g.mu.Unlock()
	}
}

// states returns what each group is now, the oldest group first, without those that are gone.
func (s *Store) states(now time.Time) []*state {
	s.mu.RLock()
	all := make([]*state, 0, len(s.groups))
	for _, g := range s.groups {
		if st := g.now.Load(); st.known(now) {
			all = append(all, st)
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(all, func(a, b *state) int { return cmp.Compare(a.group.number, b.group.number) })
	return all
}

// known tells whether there is a group: one that was just made, and not pushed to yet, is none.
func (s *state) known(now time.Time) bool {
	return !s.gone(now) && (s.content != nil || !s.failed.IsZero())
}

// state returns what a group is, or nil where there is none.
func (s *Store) state(key pushgw.GroupingKey, now time.Time) *state {
	s.mu.RLock()
	g := s.groups[groupPath(key)]
	s.mu.RUnlock()
	if g == nil {
		return nil
	}
	if st := g.now.Load(); st.known(now) {
		return st
	}
	return nil
}

// labelText returns the labels of a group as a text has them, with an empty instance where
// they have none.
func labelText(key pushgw.GroupingKey) []byte {
	labels := labelsOf(key)
	if _, ok := labels[model.InstanceLabel]; !ok {
		labels[model.InstanceLabel] = ""
	}
	b := []byte{'{'}
	for i, name := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(b, name...), `="`...)
		b = append(append(b, escapeValue.Replace(labels[name])...), '"')
	}
	return append(b, '}')
}

var escapeValue = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// asRefusal returns err as what a client is told.
func asRefusal(err error) *Refusal {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r
	}
	return &Refusal{Status: http.StatusBadRequest, Reason: reasonBody, Text: err.Error()}
}
