package forwarder

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/promferry/promferry/internal/statedir"
	"github.com/promferry/promferry/pushgw"
)

const (
	// ledgerFile is the ledger's name in the state directory.
	ledgerFile = "groups.json"
	// brokenLedgerFile is where one that cannot be read is kept for people to look at.
	brokenLedgerFile = "groups.json.broken"
)

// Ledger remembers, in a file in the state directory, which groups an agent has put to
// which Pushgateways, so that those that are no longer configured can be deleted. A group
// is in it from before its first put until it has been deleted: a process that is killed
// leaves none behind that nobody knows of. It is written when something changes, which is
// not at each put.
//
// It belongs to one agent on one host. That of another, as in a copy of a disk or an image,
// is never acted on: the copy would delete what the original puts. It is safe for
// concurrent use. A nil Ledger remembers nothing.
type Ledger struct {
	path  string // of the state directory
	owner string
	// step is called before and after each write. Tests end the process there.
	step func(string)

	mu     sync.Mutex
	dir    *statedir.Dir // nil: it is not open, and nothing is noted
	groups map[string]groups
	// unsaved tells that the file is not what groups are.
	unsaved bool
}

// groups are grouping keys by their notation.
type groups map[string]pushgw.GroupingKey

// ledgerContents is what the file says.
type ledgerContents struct {
	// Owner is a hash of the machine ID and the agent's lock.
	Owner    string          `json:"owner"`
	Gateways []ledgerGateway `json:"gateways"`
}

type ledgerGateway struct {
	// URL is the Pushgateway's, without anything secret.
	URL    string        `json:"url"`
	Groups []ledgerGroup `json:"groups"`
}

type ledgerGroup struct {
	Job    string            `json:"job"`
	Labels map[string]string `json:"labels"`
}

// machineID is what machine-id(5) says that one is.
var machineID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// errNotOwner says that a ledger is another agent's.
var errNotOwner = errors.New("another host's or another agent's")

// NewLedger returns the ledger in stateDir of the agent with this lock file on the host with
// this machine ID, see machine-id(5). Nothing is read before the forwarder runs. A host
// without a machine ID, as many containers are, can have none: nobody could tell whether
// the state directory is its own or a copy. Where the hosts' is made known in the container,
// it has one.
func NewLedger(stateDir, lockFile, machine string) (*Ledger, error) {
	machine = strings.TrimSpace(machine)
	if !machineID.MatchString(machine) {
		return nil, errors.New("no machine ID: want 32 hexadecimal digits")
	}
	// Of two agents that share a state directory, each with a lock of its own, neither acts on
	// what the other noted; the last one to start has the file. A state directory may be moved,
	// lock and all.
	if lock, err := filepath.Rel(stateDir, lockFile); err == nil {
		lockFile = lock
	}
	// Only a hash, as machine-id(5) wants it: the ID itself is confidential.
	mac := hmac.New(sha256.New, []byte("promferry: owner of groups"))
	_, _ = io.WriteString(mac, machine+"\x00"+lockFile)
	return &Ledger{path: stateDir, owner: hex.EncodeToString(mac.Sum(nil)), step: func(string) {}, groups: make(map[string]groups)}, nil
}

// Path returns where the ledger is, for people.
func (l *Ledger) Path() string { return filepath.Join(l.path, ledgerFile) }

// open reads the ledger. Whatever the error, which is for a person to see, it can be used
// after that; errNotOwner says that it begins anew, and other errors what became of it.
func (l *Ledger) open() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	dir, err := statedir.Open(l.path)
	if err != nil {
		return fmt.Errorf("%w; groups are not noted", err)
	}
	read, err := l.read(dir.OpenFile)
	switch {
	case err == nil:
		l.groups = read
	case errors.Is(err, errNotOwner):
		l.unsaved = true
	case dir.Has(ledgerFile):
		if renameErr := dir.Rename(ledgerFile, brokenLedgerFile); renameErr != nil {
			_ = dir.Close()
			return fmt.Errorf("%w; groups are not noted: move the file away (%w)", err, renameErr)
		}
		l.unsaved = true
		err = fmt.Errorf("%w; the file is now %s: delete the groups that it names and that are no longer wanted", err, dir.Path(brokenLedgerFile))
	}
	l.dir = dir
	return errors.Join(err, l.save())
}

// close closes the ledger: nothing is noted after that.
func (l *Ledger) close() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dir != nil {
		_ = l.dir.Close()
		l.dir = nil
	}
}

// peek reads the ledger and changes nothing, not even where it is broken. It must not be
// open.
func (l *Ledger) peek() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	dir, err := statedir.OpenExisting(l.path)
	if err == nil {
		defer func() { _ = dir.Close() }()
		if err := dir.CheckVersion(); err != nil {
			return err
		}
		l.groups, err = l.read(dir.OpenFile)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: run it as root, or as the agent's user, to see what would be deleted", err)
	}
	return err
}

// read reads the file. That there is none is no error.
func (l *Ledger) read(open func(name string) (*os.File, error)) (map[string]groups, error) {
	f, err := open(ledgerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return make(map[string]groups), nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var c ledgerContents
	if err := json.NewDecoder(f).Decode(&c); err != nil {
		return nil, fmt.Errorf("read %s: %w", l.Path(), err)
	}
	if c.Owner != l.owner {
		return nil, fmt.Errorf("%s: %w", l.Path(), errNotOwner)
	}
	read := make(map[string]groups)
	for _, g := range c.Gateways {
		if u, err := url.Parse(g.URL); err != nil || u.Host == "" {
			return nil, fmt.Errorf("read %s: a Pushgateway's URL is none", l.Path())
		}
		read[g.URL] = make(groups)
		for _, group := range g.Groups {
			key := pushgw.GroupingKey{Job: group.Job, Labels: group.Labels}
			if err := key.Validate(); err != nil {
				return nil, fmt.Errorf("read %s: %w", l.Path(), err)
			}
			read[g.URL][key.String()] = key
		}
	}
	return read, nil
}

// own notes groups that are to be put to a Pushgateway, and returns those that were not
// noted before. When it returns no error they are known after a loss of power, too.
func (l *Ledger) own(gateway string, keys []pushgw.GroupingKey) (added []pushgw.GroupingKey, err error) {
	if l == nil {
		return nil, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.groups[gateway] == nil {
		l.groups[gateway] = make(groups)
	}
	for _, key := range keys {
		if _, ok := l.groups[gateway][key.String()]; !ok {
			l.groups[gateway][key.String()] = key
			l.unsaved = true
			added = append(added, key)
		}
	}
	return added, l.save()
}

// forget takes groups off that have been deleted.
func (l *Ledger) forget(gateway string, keys ...pushgw.GroupingKey) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range keys {
		if _, ok := l.groups[gateway][key.String()]; ok {
			delete(l.groups[gateway], key.String())
			l.unsaved = true
		}
	}
	return l.save()
}

// save writes the file, if it is not what is known. The caller holds mu.
func (l *Ledger) save() error {
	if l.dir == nil || !l.unsaved {
		return nil
	}
	c := ledgerContents{Owner: l.owner, Gateways: []ledgerGateway{}}
	for _, gateway := range slices.Sorted(maps.Keys(l.groups)) {
		g := ledgerGateway{URL: gateway}
		for _, name := range slices.Sorted(maps.Keys(l.groups[gateway])) {
			key := l.groups[gateway][name]
			g.Groups = append(g.Groups, ledgerGroup{Job: key.Job, Labels: key.Labels})
		}
		if len(g.Groups) > 0 {
			c.Gateways = append(c.Gateways, g)
		}
	}
	b, err := json.MarshalIndent(c, "", "\t")
	if err != nil {
		return err
	}
	l.step("write")
	if err := l.dir.WriteFile(ledgerFile, append(b, '\n')); err != nil {
		return err
	}
	l.step("written")
	l.unsaved = false
	return nil
}

// abandoned returns, by Pushgateway, the groups of the ledger that are none of keys on one
// of gateways, in the order of their names.
func (l *Ledger) abandoned(gateways []Gateway, keys []pushgw.GroupingKey) map[string][]pushgw.GroupingKey {
	if l == nil {
		return nil
	}
	configured := make(map[string]bool)
	for _, g := range gateways {
		for _, key := range keys {
			configured[g.String()+" "+key.String()] = true
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	left := make(map[string][]pushgw.GroupingKey)
	for gateway, owned := range l.groups {
		for _, name := range slices.Sorted(maps.Keys(owned)) {
			if !configured[gateway+" "+name] {
				left[gateway] = append(left[gateway], owned[name])
			}
		}
	}
	return left
}
