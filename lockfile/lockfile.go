// Package lockfile keeps a second process of a kind from running: one process per lock
// file, its PID inside.
package lockfile

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"github.com/gofrs/flock"
)

// Lock is a lock that this process holds on a file.
type Lock struct {
	flock *flock.Flock
}

// HeldError says that another process holds the lock.
type HeldError struct {
	// Path is the lock file.
	Path string
	// PID is the holder's process ID as the file tells it, or 0 when it tells none.
	PID int
}

func (e *HeldError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("lock %s: held by another process", e.Path)
	}
	return fmt.Sprintf("lock %s: held by the process with PID %d", e.Path, e.PID)
}

// Acquire locks the file at path with flock(2), creating it when there is none, and
// writes this process's PID into it. It does not wait: when another process holds the
// lock, the error is a *HeldError. The kernel lifts the lock when its holder ends in
// whatever way, so a file left behind by a killed process does not stand in the way. The
// PID is for people to read; the lock does not depend on it.
func Acquire(path string) (*Lock, error) {
	f := flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR), flock.SetPermissions(0o644))
	locked, err := f.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if !locked {
		return nil, &HeldError{Path: path, PID: readPID(path)}
	}
	if err := os.WriteFile(path, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil { //nolint:gosec // Everybody may know the PID.
		return nil, fmt.Errorf("write the PID: %w", unlockAfter(f, err))
	}
	return &Lock{flock: f}, nil
}

// Release gives the lock up. The file stays, empty: were it removed, a process that had
// opened it and a process that creates it anew could both hold a lock.
func (l *Lock) Release() error {
	return unlockAfter(l.flock, os.Truncate(l.flock.Path(), 0))
}

// unlockAfter unlocks f and returns err, or what unlocking answered.
func unlockAfter(f *flock.Flock, err error) error {
	if unlockErr := f.Unlock(); err == nil {
		return unlockErr
	}
	return err
}

func readPID(path string) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return 0
	}
	return pid
}
