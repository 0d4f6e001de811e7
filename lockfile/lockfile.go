// Package lockfile keeps a second process of a kind from running: one process per lock
// file, its PID inside.
package lockfile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/gofrs/flock"

	"github.com/promferry/promferry/internal/statedir"
)

// Lock is a lock that this process holds on a file.
type Lock struct {
	file  *os.File
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

// Acquire locks the file at path as AcquireIn does. The directory has to exist.
func Acquire(path string) (*Lock, error) {
	dir, err := statedir.OpenExisting(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	defer func() { _ = dir.Close() }()
	return AcquireIn(dir, filepath.Base(path))
}

// AcquireIn locks the file called name in a directory, creating it when there is none, and
// writes this process's PID into it. It does not wait: when another process holds the lock,
// or left one that it guarded running, the error is a *HeldError. The kernel lifts the lock
// when its holder ends in whatever way, so a file left behind by a killed process does not
// stand in the way. The holder's PID is for people to read; the lock does not depend on it.
// A symbolic link, and whatever else is not a regular file with one name, is refused.
func AcquireIn(dir *statedir.Dir, name string) (*Lock, error) {
	f, err := dir.OpenRW(name)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	l, err := acquire(f, dir.Path(name))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func acquire(f *os.File, path string) (*Lock, error) {
	// By path the file could be another one by now than the one that was checked.
	l := &Lock{file: f, flock: flock.New(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flock.SetFlag(os.O_RDWR))}
	locked, err := l.flock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	holder, guarded := read(f)
	if !locked {
		return nil, &HeldError{Path: path, PID: holder}
	}
	if guarded != 0 {
		err = &HeldError{Path: path, PID: guarded}
	} else if err = l.write(fmt.Sprintf("%d\n", os.Getpid())); err != nil {
		err = fmt.Errorf("lock %s: write the PID: %w", path, err)
	}
	if err != nil {
		return nil, errors.Join(err, l.flock.Unlock())
	}
	return l, nil
}

// Guard has the lock outlive its holder, should that be killed, as long as the process with
// this PID runs.
func (l *Lock) Guard(pid int) error {
	return l.write(fmt.Sprintf("%d\n%d %s\n", os.Getpid(), pid, startOf(pid)))
}

// Release gives the lock up. The file stays, empty: were it removed, a process that had
// opened it and a process that creates it anew could both hold a lock.
func (l *Lock) Release() error {
	return errors.Join(l.file.Truncate(0), l.flock.Unlock(), l.file.Close())
}

func (l *Lock) write(content string) error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err := l.file.WriteAt([]byte(content), 0)
	return err
}

// read returns the holder's PID, and that of the guarded process if it runs.
func read(f *os.File) (holder, guarded int) {
	b := make([]byte, 200)
	n, _ := f.ReadAt(b, 0)
	lines := strings.Split(string(b[:n]), "\n")
	holder, _ = strconv.Atoi(strings.TrimSpace(lines[0]))
	if len(lines) > 1 {
		var pid int
		var start string
		if _, err := fmt.Sscan(lines[1], &pid, &start); err == nil && start == startOf(pid) && mayGuard(f, pid) {
			guarded = pid
		}
	}
	return holder, guarded
}

// mayGuard reports whether a process may hold the lock after its holder. Another user who owns
// the file could write any PID into it, such as that of a process that never ends.
func mayGuard(f *os.File, pid int) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	owner := uid(info)
	if owner == 0 || owner == os.Geteuid() {
		return true
	}
	process, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil && uid(process) == owner
}

func uid(info os.FileInfo) int {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return int(stat.Uid)
}

// startOf returns when the process started, in the kernel's words: together with the PID
// that names a process for good. It is empty when there is none.
func startOf(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name, in parentheses, may have blanks and parentheses of its own. Field 22 of
	// proc_pid_stat(5) is the 20th after it; field 3 is the state, Z for one that has ended.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" {
		return ""
	}
	return string(fields[19])
}
