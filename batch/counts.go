package batch

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/promferry/promferry/internal/statedir"
	"github.com/promferry/promferry/lockfile"
	"github.com/promferry/promferry/pushgw"
)

// Jobs keeps, in a state directory, what has to survive a run: how many there were of each
// group, and a lock for each. It is safe for concurrent use, also by other processes.
type Jobs struct{ dir *statedir.Dir }

// OpenJobs opens them, and makes the directory when there is none.
func OpenJobs(stateDir string) (*Jobs, error) {
	dir, err := statedir.OpenSub(stateDir, "jobs")
	if err != nil {
		return nil, err
	}
	return &Jobs{dir: dir}, nil
}

// Close closes them.
func (j *Jobs) Close() error { return j.dir.Close() }

// countFile is what a file of counts holds.
type countFile struct {
	Job    string             `json:"job"`
	Labels map[string]string  `json:"labels,omitempty"`
	Runs   map[Outcome]uint64 `json:"runs"`
}

// countPatience is how long Count waits for another process, which keeps the lock for as
// long as some small files take to be written.
const countPatience = 5 * time.Second

// Count counts a run, and returns how many there were by outcome. No other process counts
// for the group until release is called, so that counts can be pushed in their order. A file that cannot
// be read as one is begun anew, with an error beside the counts.
func (j *Jobs) Count(ctx context.Context, key pushgw.GroupingKey, outcome Outcome) (counts map[Outcome]uint64, release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, countPatience)
	defer cancel()
	sum := sha256.Sum256([]byte(key.Path()))
	lock, err := j.dir.Lock(ctx, "lock", int64(binary.BigEndian.Uint64(sum[:])>>2)) // One for each group.
	if err != nil {
		return nil, func() {}, err
	}
	counts, err = j.count(key, outcome)
	return counts, func() { _ = lock.Close() }, err
}

func (j *Jobs) count(key pushgw.GroupingKey, outcome Outcome) (map[Outcome]uint64, error) {
	name := fileName(key) + ".json"
	file, damage := j.read(name)
	if file.Runs == nil {
		file.Runs = make(map[Outcome]uint64)
	}
	file.Job, file.Labels = key.Job, key.Labels
	file.Runs[outcome]++
	b, err := json.Marshal(file)
	if err != nil {
		return nil, err
	}
	if err := j.dir.WriteFile(name, append(b, '\n')); err != nil {
		return nil, err
	}
	return file.Runs, damage
}

func (j *Jobs) read(name string) (countFile, error) {
	var file countFile
	f, err := j.dir.OpenFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, err
	}
	defer func() { _ = f.Close() }()
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&file); err != nil {
		return countFile{}, fmt.Errorf("%s: damaged, runs are counted from 0 on: %w", j.dir.Path(name), err)
	}
	return file, nil
}

// locksDir has root's locks in a directory that another user owns.
const locksDir = "locks"

// Lock takes the lock of a group's runs. It does not wait: see lockfile.AcquireIn. Root's
// locks are in a directory that only root can write to: whoever owns the state directory
// could hold them, or forge the PID of a run in them, and so stop root's jobs. The error may
// come beside a lock.
func (j *Jobs) Lock(key pushgw.GroupingKey) (*lockfile.Lock, error) {
	dir := j.dir
	var moved error
	if os.Geteuid() == 0 && !dir.Trusted() {
		private, away, err := dir.Private(locksDir)
		if away != "" {
			moved = fmt.Errorf("%s belonged to another user, is now %s, and can be removed; a run whose lock is there does not count as going on", dir.Path(locksDir), away)
		}
		if err != nil {
			return nil, errors.Join(moved, err)
		}
		defer func() { _ = private.Close() }()
		dir = private
	}
	lock, err := lockfile.AcquireIn(dir, fileName(key)+".lock")
	return lock, errors.Join(moved, err)
}

// maxShownName is up to how many bytes of a job's name stand in the name of its files.
const maxShownName = 64

// fileName returns a name for the files of a group: readable, and its own.
func fileName(key pushgw.GroupingKey) string {
	sum := sha256.Sum256([]byte(key.Path()))
	return shown(key.Job) + "-" + hex.EncodeToString(sum[:8])
}

// shown returns what of a job's name can stand in the name of a file.
func shown(job string) string {
	s := strings.Map(func(c rune) rune {
		if c < 0x80 && (c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z') {
			return c
		}
		return '_'
	}, job)
	return s[:min(len(s), maxShownName)]
}
