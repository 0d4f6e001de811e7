package gateway

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/internal/faultlog"
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
	// File is where groups are kept that do not expire, and which groups there are. Empty
	// means that all is gone with the process.
	File string
	// ExpireDefault is for how long after its last put a group is good that does not say that
	// itself. Zero means for ever.
	ExpireDefault time.Duration
	// ForgetAfter is how long a group is kept that is silent, or that only refused pushes were
	// made to. Zero means not at all.
	ForgetAfter time.Duration
	// MaxGroups and MaxSeries are how many groups there are at most, and series in each. Zero
	// means none.
	MaxGroups, MaxSeries int
	// MaxGroupBytes is how long the text of a group is at most, and MaxBytes how much memory all
	// groups together take at most for what they hold, compressed, in bytes. Zero means none.
	// What is on disk already is kept all the same.
	MaxGroupBytes, MaxBytes int
}

// A Store keeps groups. It is safe for concurrent use: pushes to different groups wait for each
// other only while a group is looked up or made, and while they are written to disk, which is
// done for several at once.
type Store struct {
	config  StoreConfig
	disk    *disk // nil: groups are in memory only
	started time.Time
	faults  faultlog.Log

	mu     sync.RWMutex
	groups map[string]*group // by path
	made   uint64            // the highest number of a group

	// several is held by who holds the locks of several groups.
	several sync.Mutex

	// memory is how much memory all contents take, in bytes.
	memory atomic.Int64
	// merging has room for as many large groups as are added to at a time. Who waits for it
	// holds the lock of a group; who has it waits for no group.
	merging chan struct{}
}

// maxMerges is how many large groups are added to at a time, each of which takes memory for what
// the group becomes, and for what of it is written to disk.
const maxMerges = 2

// NewStore returns a Store with the groups that its file holds.
func NewStore(config StoreConfig, logger *slog.Logger, r prometheus.Registerer) (*Store, error) {
	s := &Store{config: config, started: time.Now(), faults: faultlog.Log{Logger: logger}, groups: make(map[string]*group), merging: make(chan struct{}, maxMerges)}
	if config.File == "" {
		return s, nil
	}
	var err error
	if s.disk, err = openDisk(config.File, r); err != nil {
		return nil, err
	}
	if err := s.load(logger); err != nil {
		return nil, errors.Join(err, s.disk.close())
	}
	return s, nil
}

// Close closes the file. Nothing is to be done with the Store afterwards.
func (s *Store) Close() error {
	if s.disk == nil {
		return nil
	}
	return s.disk.close()
}

// group is what was pushed under one grouping key.
type group struct {
	key    pushgw.GroupingKey
	path   string // below /metrics or /groups
	labels []byte // as in a text: {instance="",job="x"}
	number uint64 // tells the older of two groups, and is its key on disk

	mu      sync.Mutex // held by who changes the group
	removed bool       // from Store.groups
	kept    mark       // what is on disk
	now     atomic.Pointer[state]
}

// state is what a group is at a time. It is never changed.
type state struct {
	group   *group
	content *content // nil: no push ever succeeded, or awaited
	// awaited tells that the gateway has restarted since the last push to a group that
	// expires: its content is gone.
	awaited bool
	// durable tells that the content is on disk.
	durable bool
	// expiresAfter is for how long the last push is good. Zero means for ever.
	expiresAfter time.Duration
	// pushed and failed are when a push last succeeded, and last was refused for what was in
	// it. Zero means never, and for pushed when awaited that nobody knows.
	pushed, failed time.Time
	// refusedAt is when a push was last refused for whatever was wrong with it, refusal why.
	refusedAt time.Time
	refusal   string
	// downSince is since when each put says up 0. Zero means that the last one does not.
	downSince time.Time
	// silentFrom is from when on the group is silent unless it is pushed to, forgotFrom from
	// when on it is gone. Zero means never.
	silentFrom, forgotFrom time.Time
}

func (s *state) silent(now time.Time) bool {
	return !s.silentFrom.IsZero() && !now.Before(s.silentFrom)
}

func (s *state) gone(now time.Time) bool { return !s.forgotFrom.IsZero() && !now.Before(s.forgotFrom) }

// known tells whether there is a group: one that was just made, and not pushed to yet, is none.
func (s *state) known(now time.Time) bool {
	return !s.gone(now) && (s.content != nil || s.awaited || !s.failed.IsZero())
}

// in returns in which of States the group is.
func (s *state) in(now time.Time) string {
	switch {
	case s.content == nil && !s.awaited:
		return StateRefused
	case s.silent(now):
		return StateSilent
	case !s.downSince.IsZero():
		return StateDown
	case s.awaited:
		return StateAwaited
	}
	return StateLive
}

// A pushed is a push that was understood.
type pushed struct {
	key      pushgw.GroupingKey
	add      bool
	families []family      // of an add
	buffer   *bytes.Buffer // that their texts are in; nil for a put
	content  *content      // of a put, ready
	err      error
	done     func() // called when it is released
}

// prepare makes a push ready to be applied: what takes time and does not depend on what the
// group holds. It takes families over. The push must be released.
func (s *Store) prepare(key pushgw.GroupingKey, families []*dto.MetricFamily, add bool) *pushed {
	p := &pushed{key: key, add: add, buffer: getBuffer(), done: func() {}}
	if families, p.err = check(families, key); p.err != nil {
		return p
	}
	if p.families, p.err = render(p.buffer, families); p.err != nil || add {
		return p
	}
	p.content, p.err = build(p.families, s.config.MaxGroupBytes)
	putBuffer(p.buffer)
	p.families, p.buffer = nil, nil
	return p
}

func (p *pushed) release() {
	if p.buffer != nil {
		putBuffer(p.buffer)
	}
	p.done()
}

// Push replaces the families of a group, or with add those of the same names, and makes the
// group where there is none. It takes families over. Errors are *Refusal; the group then keeps
// what it had. What does not expire is on disk when Push returns.
func (s *Store) Push(key pushgw.GroupingKey, families []*dto.MetricFamily, add bool) error {
	p := s.prepare(key, families, add)
	defer p.release()
	return s.apply(p)
}

// apply does what was prepared.
func (s *Store) apply(p *pushed) error {
	for {
		g, err := s.groupOf(p.key, p.err == nil)
		if err != nil {
			return cmp.Or(p.err, err)
		}
		g.mu.Lock()
		if g.removed { // In the time between.
			g.mu.Unlock()
			continue
		}
		err = s.applyTo(g, p)
		g.mu.Unlock()
		return err
	}
}

// applyTo changes a group, whose lock is held.
func (s *Store) applyTo(g *group, p *pushed) error {
	if old := g.now.Load().content; p.add && old != nil && old.size()+p.buffer.Len() > smallBody {
		s.merging <- struct{}{}
		defer func() { <-s.merging }()
	}
	next, err := (*state)(nil), p.err
	if err == nil {
		next, err = s.replace(g, p)
	}
	if err != nil {
		s.fail(g, asRefusal(err))
		return err
	}
	if err := s.keep(next); err != nil {
		s.memory.Add(-s.growth(g, next))
		return err // That was not for what is in the push.
	}
	g.now.Store(next)
	return nil
}

// growth returns how much more memory a group takes with its next state.
func (s *Store) growth(g *group, next *state) int64 {
	return int64(next.content.memory() - g.now.Load().content.memory())
}

// set makes next what a group is. Its lock is held.
func (s *Store) set(g *group, next *state) {
	s.memory.Add(s.growth(g, next))
	g.now.Store(next)
}

// replace returns what a group is after a push, and counts the memory that this takes. The lock of
// the group is held.
func (s *Store) replace(g *group, p *pushed) (*state, error) {
	now := time.Now()
	old := g.before(now)
	c := p.content
	if p.add {
		var err error
		if c, err = old.content.with(p.families, s.config.MaxGroupBytes); err != nil {
			return nil, err
		}
	}
	if c.Series > s.config.MaxSeries {
		return nil, tooManySeries(c.Series, s.config.MaxSeries)
	}
	next := &state{group: g, content: c, pushed: now, failed: old.failed, expiresAfter: cmp.Or(c.ExpiresAfter, s.config.ExpireDefault)}
	if c.Down {
		next.downSince = old.downSince
		if next.downSince.IsZero() {
			next.downSince = now
		}
	}
	if next.expiresAfter > 0 {
		next.silentFrom = now.Add(next.expiresAfter)
		next.forgotFrom = next.silentFrom.Add(s.config.ForgetAfter)
	}
	next.durable = next.expiresAfter == 0
	growth := s.growth(g, next)
	if kept := s.memory.Add(growth); growth > 0 && kept > int64(s.config.MaxBytes) {
		s.memory.Add(-growth)
		return nil, &Refusal{
			Status: http.StatusTooManyRequests, Reason: reasonTotal,
			Text: fmt.Sprintf("all groups together would take %d bytes of memory, and may take %d (--limit.total-bytes): delete some", kept, s.config.MaxBytes),
		}
	}
	return next, nil
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

// fail notes that a push was refused for what is in it. The lock of the group is held.
func (s *Store) fail(g *group, why *Refusal) {
	now := time.Now()
	next := *g.before(now)
	next.failed = now
	next.refuse(now, why)
	if next.content == nil && !next.awaited {
		next.forgotFrom = now.Add(s.config.ForgetAfter)
	}
	s.set(g, &next)
}

func (s *state) refuse(now time.Time, why *Refusal) { s.refusedAt, s.refusal = now, why.Text }

// Refused notes at the group of a key, where there is one, that a push was refused before
// anybody knew what is in it. So does a Pushgateway: push_failure_time_seconds does not tell it.
func (s *Store) Refused(key pushgw.GroupingKey, why *Refusal) {
	s.mu.RLock()
	g := s.groups[groupPath(key)]
	s.mu.RUnlock()
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if st := g.now.Load(); st.known(now) {
		next := *st
		next.refuse(now, why)
		g.now.Store(&next)
	}
}

// groupOf returns the group of a key, and makes it where there is none. With room, one that holds
// nothing makes room for it.
func (s *Store) groupOf(key pushgw.GroupingKey, room bool) (*group, error) {
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
	if len(s.groups) >= s.config.MaxGroups && (!room || !s.dropRefused()) {
		return nil, &Refusal{
			Status: http.StatusTooManyRequests, Reason: reasonGroups,
			Text: fmt.Sprintf("there are %d groups, and no more may be made (--limit.groups): delete some", len(s.groups)),
		}
	}
	s.made++
	g = newGroup(key, s.made)
	s.groups[path] = g
	return g, nil
}

// dropRefused removes a group that no push to ever succeeded, and tells whether there was one:
// pushes that are refused must not leave no room for others. The lock of the store is held.
func (s *Store) dropRefused() bool {
	for path, g := range s.groups {
		// Who removes groups has their locks first, so that this must not wait for one.
		if st := g.now.Load(); st.content != nil || st.awaited || st.failed.IsZero() || !g.mu.TryLock() {
			continue
		}
		st := g.now.Load()
		if st.content == nil && !g.kept.there {
			g.removed = true
			delete(s.groups, path)
		}
		g.mu.Unlock()
		if g.removed {
			return true
		}
	}
	return false
}

func newGroup(key pushgw.GroupingKey, number uint64) *group {
	g := &group{key: key, path: groupPath(key), labels: labelText(key), number: number}
	g.now.Store(&state{group: g})
	return g
}

// sweepEvery is how often groups that are gone are taken out of memory, and what has changed
// by time alone is written to disk.
const sweepEvery = time.Second

// Run takes groups out of memory that are gone, and keeps on disk since when groups are silent
// and why pushes to them were refused, until ctx ends, and then once more.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.sweep()
		case <-ctx.Done():
			s.sweep()
			return nil
		}
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
	labels := key.AllLabels()
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

var (
	escapeValue   = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	unescapeValue = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n")
)

// maxRefusal is the maximum length of the text of a refusal, in bytes. A text can quote what was
// pushed.
const maxRefusal = 1000

// asRefusal returns err as what a client is told, with a text that is not too long to be answered,
// logged and kept.
func asRefusal(err error) *Refusal {
	r := Refusal{Status: http.StatusBadRequest, Reason: reasonBody, Text: err.Error()}
	if refusal, ok := errors.AsType[*Refusal](err); ok {
		r = *refusal
	}
	if len(r.Text) > maxRefusal {
		r.Text = strings.ToValidUTF8(r.Text[:maxRefusal], "") + "..."
	}
	return &r
}
