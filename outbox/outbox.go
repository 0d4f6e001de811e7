// Package outbox keeps pushes on disk until their Pushgateway has taken them.
//
// Each push is a file of its own, in a directory that any number of processes may use at
// the same time. Its name holds its place in the order, and which Pushgateway and group it
// is for, so one reading of the directory tells what waits:
//
//	outbox/lock                                     locked for a new number, and for each group
//	outbox/00000000000000000042-add-<gateway>-<group>
//	outbox/rejected/…                               what the Pushgateway refused, and why
package outbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/promferry/promferry/internal/statedir"
)

// Op is what a push does with its group.
type Op string

const (
	// Put replaces the group.
	Put Op = "put"
	// Add replaces the families of the same names in the group.
	Add Op = "add"
	// Delete deletes the group.
	Delete Op = "delete"
)

// Entry is a push that waits.
type Entry struct {
	Op Op
	// Gateway is the URL of the Pushgateway, without anything secret.
	Gateway string
	// Job and Labels are the grouping key.
	Job    string
	Labels map[string]string
	// At is when the push was meant to be done.
	At time.Time
	// ContentType and Body are those of the request, the body gzipped; both are empty for
	// Delete.
	ContentType string
	Body        []byte
}

// Group returns the group that the entry is for.
func (e *Entry) Group() Group {
	gateway := sha256.Sum256([]byte(e.Gateway))
	h := sha256.New()
	part := func(s string) { _, _ = fmt.Fprintf(h, "%d:%s", len(s), s) }
	part(e.Gateway)
	part(e.Job)
	for _, name := range slices.Sorted(maps.Keys(e.Labels)) {
		part(name)
		part(e.Labels[name])
	}
	return Group{gateway: hex.EncodeToString(gateway[:8]), id: hex.EncodeToString(h.Sum(nil)[:16])}
}

// Group is a group on one Pushgateway. It can be compared.
type Group struct{ gateway, id string }

// Outbox is an open outbox. It is safe for concurrent use, also by other processes.
type Outbox struct {
	dir, rejected *statedir.Dir
	// step is called before each step of a write or a delivery. Tests end the process there.
	step func(string)
}

const lockName = "lock"

// Open opens the outbox in a state directory, and makes both where they are missing.
func Open(stateDir string) (*Outbox, error) {
	dir, err := statedir.OpenSub(stateDir, "outbox")
	if err != nil {
		return nil, err
	}
	rejected, err := dir.Sub("rejected")
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return &Outbox{dir: dir, rejected: rejected, step: func(string) {}}, nil
}

// Close closes the outbox.
func (o *Outbox) Close() error { return errors.Join(o.dir.Close(), o.rejected.Close()) }

// Path returns where the outbox is, for people.
func (o *Outbox) Path() string { return strings.TrimSuffix(o.dir.Path(""), "/") }

// Add keeps an entry, behind all that are there already. When it returns nil the entry is
// whole on disk, and survives the end of the process and a loss of power. A Put or Delete
// takes the place of the Puts and Deletes of its group that wait. A returned error means
// that nothing was added, or, where only the last sync failed, that this is uncertain.
func (o *Outbox) Add(ctx context.Context, e *Entry) error {
	header, err := json.Marshal(headerOf(e))
	if err != nil {
		return err
	}
	o.step("write")
	temp, err := o.dir.WriteTemp(header, []byte{'\n'}, e.Body)
	if err != nil {
		return err
	}
	o.step("number")
	group := e.Group()
	number, err := o.place(ctx, temp, name{op: e.Op, group: group})
	if err != nil {
		return errors.Join(err, o.dir.Remove(temp))
	}
	o.step("sync")
	if err := o.dir.Sync(); err != nil {
		return err
	}
	if e.Op == Add {
		return nil
	}
	o.step("supersede")
	all, err := o.names()
	if err != nil {
		return nil //nolint:nilerr // The entry is safe; delivery leaves out what it supersedes.
	}
	for _, n := range all {
		if n.group == group && n.op != Add && n.number < number {
			_ = o.dir.Remove(n.String()) // As above.
		}
	}
	return nil
}

// place gives the file called temp its number and its name.
func (o *Outbox) place(ctx context.Context, temp string, n name) (uint64, error) {
	lock, err := o.lockNumbers(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { _ = lock.Close() }()
	if n.number, err = o.next(lock, n); err != nil {
		return 0, err
	}
	o.step("rename")
	return n.number, o.dir.Rename(temp, n.String())
}

// next returns the number of the next entry, which is to be called n but for that. The lock file has the last one, and under
// which boot of the system it was written: after another boot nobody knows whether what
// the file says had reached the disk.
func (o *Outbox) next(lock *os.File, n name) (uint64, error) {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	bootID := cmp.Or(strings.TrimSpace(string(boot)), "unknown")
	content := make([]byte, 100)
	size, err := lock.ReadAt(content, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	var last uint64
	if fields := strings.Fields(string(content[:size])); len(fields) == 2 && fields[0] == bootID && bootID != "unknown" {
		last, err = strconv.ParseUint(fields[1], 10, 64)
	} else {
		err = errors.ErrUnsupported
	}
	if err != nil || o.dir.Has(name{number: last + 1, op: n.op, group: n.group}.String()) { // The latter where it was tampered with.
		if last, err = o.last(); err != nil {
			return 0, err
		}
	}
	if _, err := lock.WriteAt(fmt.Appendf(nil, "%s %020d\n", bootID, last+1), 0); err != nil {
		return 0, err
	}
	return last + 1, nil
}

// numberPatience is how long the lock for numbers is waited for. It is held for as long as
// a directory takes to be read; a process that was stopped in there must stop nobody else.
const numberPatience = 2 * time.Second

func (o *Outbox) lockNumbers(ctx context.Context) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, numberPatience)
	defer cancel()
	return o.dir.Lock(ctx, lockName, 0)
}

// last returns the highest number that is in use: also among the rejected, which a new entry
// of the same name would replace, should it be rejected too.
func (o *Outbox) last() (uint64, error) {
	waiting, err := o.names()
	if err != nil {
		return 0, err
	}
	rejected, err := namesIn(o.rejected)
	if err != nil {
		return 0, err
	}
	var last uint64
	for _, n := range append(waiting, rejected...) {
		last = max(last, n.number)
	}
	return last, nil
}

// lockGroup takes the lock of a group, so that one process at a time delivers it. Place 0
// is that for numbers.
func (o *Outbox) lockGroup(ctx context.Context, g Group, patience time.Duration) (*os.File, error) {
	waitCtx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	id, err := hex.DecodeString(g.id)
	if err != nil {
		return nil, err
	}
	lock, err := o.dir.Lock(waitCtx, lockName, 1+int64(binary.BigEndian.Uint64(id)>>2))
	if waitCtx.Err() != nil && err != nil {
		return nil, ErrBusy
	}
	return lock, err
}

// Waiting is the entries of a group that wait.
type Waiting struct {
	Group Group
	names []name
}

// Waiting returns what waits for a Pushgateway, by group, the one with the oldest entry
// first.
func (o *Outbox) Waiting(ctx context.Context, gateway string) ([]Waiting, error) {
	all, err := o.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	want := (&Entry{Gateway: gateway}).Group().gateway
	index := make(map[Group]int)
	var groups []Waiting
	for _, n := range all {
		if n.group.gateway != want {
			continue
		}
		i, ok := index[n.group]
		if !ok {
			i = len(groups)
			index[n.group] = i
			groups = append(groups, Waiting{Group: n.group})
		}
		groups[i].names = append(groups[i].names, n)
	}
	return groups, nil
}

// WaitingFor returns what waits for one group.
func (o *Outbox) WaitingFor(ctx context.Context, g Group) (Waiting, error) {
	all, err := o.snapshot(ctx)
	return Waiting{Group: g, names: slices.DeleteFunc(all, func(n name) bool { return n.group != g })}, err
}

// snapshot returns all that waits at one time, in order. Without the lock an entry could be
// missing that is older than another one of its group.
func (o *Outbox) snapshot(ctx context.Context) ([]name, error) {
	lock, err := o.lockNumbers(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }()
	return o.names()
}

// RejectedError says that a push would be refused again, however often it is tried.
type RejectedError struct{ Err error }

func (e *RejectedError) Error() string { return e.Err.Error() }
func (e *RejectedError) Unwrap() error { return e.Err }

// Delivery tells what Deliver did.
type Delivery struct {
	// Delivered is the number of entries that were delivered.
	Delivered int
	// Rejected are the errors of those that were set aside.
	Rejected []error
}

// ErrBusy says that another process is delivering the group.
var ErrBusy = errors.New("another process is delivering this group")

// Deliver has send deliver the entries of a group, in their order, and removes each that
// was. One for which send returns a *RejectedError is set aside with the reason, and the
// next one follows; any other error ends the delivery, and is returned. A Put or Delete
// makes what is older than it needless. Two processes never deliver the same group at the
// same time: the second waits as long as patience allows, and returns ErrBusy.
func (o *Outbox) Deliver(ctx context.Context, w Waiting, patience time.Duration, send func(context.Context, *Entry) error) (Delivery, error) {
	var d Delivery
	lock, err := o.lockGroup(ctx, w.Group, patience)
	if err != nil {
		return d, err
	}
	defer func() { _ = lock.Close() }()
	left := slices.Clone(w.names)
	for len(left) > 0 {
		i := max(0, lastReplacing(left))
		n := left[i]
		entry, err := o.read(o.dir, n)
		if errors.Is(err, fs.ErrNotExist) { // Another process delivered or superseded it.
			left = slices.Delete(left, i, i+1)
			continue
		}
		if err == nil {
			o.step("send")
			err = send(ctx, entry)
			o.step("sent")
		}
		switch _, rejected := errors.AsType[*RejectedError](err); {
		case rejected:
			d.Rejected = append(d.Rejected, err)
			if err := o.setAside(n, err); err != nil {
				return d, err
			}
			left = slices.Delete(left, i, i+1)
		case err != nil:
			return d, err
		default:
			d.Delivered++
			if err := o.remove(left[:i+1]); err != nil {
				return d, err
			}
			left = left[i+1:]
		}
	}
	return d, nil
}

// lastReplacing returns the index of the last of names that replaces or deletes its whole
// group, or -1.
func lastReplacing(names []name) int {
	for i, n := range slices.Backward(names) {
		if n.op != Add {
			return i
		}
	}
	return -1
}

// remove removes what the last of names, which was delivered, made needless, and then that
// one: should this be interrupted, it will be delivered again, and nothing older after it.
func (o *Outbox) remove(names []name) error {
	for i, n := range names {
		if i == len(names)-1 && i > 0 {
			if err := o.dir.Sync(); err != nil {
				return err
			}
		}
		o.step("remove")
		if err := o.dir.Remove(n.String()); err != nil {
			return err
		}
	}
	return nil
}

const reasonSuffix = ".reason"

// setAside moves an entry to the rejected ones.
func (o *Outbox) setAside(n name, reason error) error {
	o.step("reason")
	if err := o.rejected.WriteFile(n.String()+reasonSuffix, []byte(reason.Error()+"\n")); err != nil {
		return err
	}
	o.step("set aside")
	switch err := o.dir.Rename(n.String(), "rejected/"+n.String()); {
	case errors.Is(err, fs.ErrNotExist): // A newer put has taken its place in the meantime.
		return o.rejected.Remove(n.String() + reasonSuffix)
	case err != nil:
		return err
	}
	o.step("sync rejected")
	return errors.Join(o.rejected.Sync(), o.dir.Sync())
}

// tempAge is after which time a file that is being written counts as left behind.
const tempAge = time.Hour

// Clean removes what processes that were killed in the middle of Add have left.
func (o *Outbox) Clean() error {
	for _, dir := range []*statedir.Dir{o.dir, o.rejected} {
		temporary, err := dir.Temporary()
		if err != nil {
			return err
		}
		for _, info := range temporary {
			if time.Since(info.ModTime()) > tempAge {
				if err := dir.Remove(info.Name()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Listed is an entry as List shows it.
type Listed struct {
	// Entry has no Body.
	Entry Entry
	// Size is that of the body, gzipped, in bytes.
	Size int
	// Path is the file.
	Path string
	// Rejected is why the entry was set aside, and empty for one that waits.
	Rejected string
}

// List returns all entries, in their order, those that were set aside at the end.
func (o *Outbox) List() ([]Listed, error) {
	waiting, err := o.list(o.dir)
	if err != nil {
		return nil, err
	}
	rejected, err := o.list(o.rejected)
	if err != nil {
		return nil, err
	}
	for i := range rejected {
		reason, err := readAll(o.rejected, rejected[i].name+reasonSuffix)
		rejected[i].listed.Rejected = cmp.Or(strings.TrimSpace(string(reason)), "no reason noted")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	var all []Listed
	for _, l := range append(waiting, rejected...) {
		all = append(all, l.listed)
	}
	return all, nil
}

type namedListed struct {
	name   string
	listed Listed
}

func (o *Outbox) list(dir *statedir.Dir) ([]namedListed, error) {
	all, err := namesIn(dir)
	if err != nil {
		return nil, err
	}
	var listed []namedListed
	for _, n := range all {
		entry, err := o.read(dir, n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		l := Listed{Path: dir.Path(n.String())}
		if err != nil { // Unreadable; what its name tells is left.
			l.Entry, l.Rejected = Entry{Op: n.op}, err.Error()
		} else {
			l.Size = len(entry.Body)
			entry.Body = nil
			l.Entry = *entry
		}
		listed = append(listed, namedListed{name: n.String(), listed: l})
	}
	return listed, nil
}

// Stats are numbers of an outbox.
type Stats struct {
	// Waiting is the number of entries that wait for each of the Pushgateways asked for.
	Waiting map[string]int
	// Other is the number of those that wait for another one.
	Other int
	// Rejected is the number of entries that were set aside.
	Rejected int
	// Oldest is the time of the oldest entry that waits, zero when none does.
	Oldest time.Time
}

// Stats counts what is there. It reads the directory and one file.
func (o *Outbox) Stats(gateways ...string) (Stats, error) {
	s := Stats{Waiting: make(map[string]int)}
	byHash := make(map[string]string)
	for _, gateway := range gateways {
		s.Waiting[gateway] = 0
		byHash[(&Entry{Gateway: gateway}).Group().gateway] = gateway
	}
	all, err := o.names()
	if err != nil {
		return s, err
	}
	for _, n := range all {
		if gateway, ok := byHash[n.group.gateway]; ok {
			s.Waiting[gateway]++
		} else {
			s.Other++
		}
		if s.Oldest.IsZero() {
			if entry, err := o.read(o.dir, n); err == nil {
				s.Oldest = entry.At
			}
		}
	}
	rejected, err := namesIn(o.rejected)
	s.Rejected = len(rejected)
	return s, err
}

// name is what the name of an entry's file tells.
type name struct {
	number uint64
	op     Op
	group  Group
}

func (n name) String() string {
	return fmt.Sprintf("%020d-%s-%s-%s", n.number, n.op, n.group.gateway, n.group.id)
}

func parseName(s string) (name, bool) {
	parts := strings.Split(s, "-")
	if len(parts) != 4 || len(parts[0]) != 20 || len(parts[2]) != 16 || len(parts[3]) != 32 {
		return name{}, false
	}
	number, err := strconv.ParseUint(parts[0], 10, 64)
	if _, hexErr := hex.DecodeString(parts[3]); err != nil || hexErr != nil {
		return name{}, false
	}
	n := name{number: number, op: Op(parts[1]), group: Group{gateway: parts[2], id: parts[3]}}
	return n, slices.Contains([]Op{Put, Add, Delete}, n.op)
}

// names returns all that waits, in order.
func (o *Outbox) names() ([]name, error) { return namesIn(o.dir) }

func namesIn(dir *statedir.Dir) ([]name, error) {
	all, err := dir.Names()
	if err != nil {
		return nil, err
	}
	names := make([]name, 0, len(all))
	for _, s := range all {
		if n, ok := parseName(s); ok {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, func(a, b name) int { return cmp.Compare(a.number, b.number) })
	return names, nil
}
