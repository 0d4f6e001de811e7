// Package statedir opens directories for what must survive a process. Root may work in one
// that belongs to another user: what it makes there is that user's, and no symbolic link
// leads it out.
package statedir

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tempPrefix begins the names of files that are still being written.
const tempPrefix = ".new-"

// Dir is an open directory. It is safe for concurrent use.
type Dir struct {
	root *os.Root
	// uid and gid own what is made here, or are -1: whoever makes it.
	uid, gid int
}

// Open opens the directory at path. When there is none it is made, and those above it.
func Open(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	d := &Dir{root: root, uid: -1, gid: -1}
	if os.Geteuid() != 0 {
		return d, nil
	}
	info, err := root.Stat(".")
	if err != nil {
		_ = root.Close()
		return nil, err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
		d.uid, d.gid = int(owner.Uid), int(owner.Gid)
	}
	return d, nil
}

// OpenSub opens the directory called name in the one at path, and makes both where they are
// missing.
func OpenSub(path, name string) (*Dir, error) {
	d, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.Close() }()
	return d.Sub(name)
}

// Sub opens the directory called name in d, and makes it when there is none.
func (d *Dir) Sub(name string) (*Dir, error) {
	switch err := d.root.Mkdir(name, 0o700); {
	case err == nil:
		if err := d.Sync(); err != nil {
			return nil, err
		}
	case !os.IsExist(err):
		return nil, d.named(err)
	}
	if err := d.noLink(name); err != nil {
		return nil, err
	}
	root, err := d.root.OpenRoot(name)
	if err != nil {
		return nil, d.named(err)
	}
	sub := &Dir{root: root, uid: d.uid, gid: d.gid}
	if err := sub.own(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return sub, nil
}

// own gives the directory to the owner of what is in it.
func (d *Dir) own() error {
	if d.uid < 0 {
		return nil
	}
	f, err := d.root.Open(".")
	if err != nil {
		return d.named(err)
	}
	defer func() { _ = f.Close() }()
	return f.Chown(d.uid, d.gid)
}

// Close closes the directory.
func (d *Dir) Close() error { return d.root.Close() }

// Path returns where the file called name is, for people.
func (d *Dir) Path(name string) string { return filepath.Join(d.root.Name(), name) }

// Names returns the names of all files, without those that are being written, in no
// order. It reads no more than the directory itself.
func (d *Dir) Names() ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, d.named(err)
	}
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, d.named(err)
	}
	kept := names[:0]
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			kept = append(kept, name)
		}
	}
	return kept, nil
}

// Temporary returns the files that are being written, or were left by a process that was
// killed.
func (d *Dir) Temporary() ([]fs.FileInfo, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, d.named(err)
	}
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, d.named(err)
	}
	var infos []fs.FileInfo
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			continue
		}
		if info, err := d.root.Lstat(name); err == nil {
			infos = append(infos, info)
		}
	}
	return infos, nil
}

// OpenLock opens a file to be locked, which it makes when there is none.
func (d *Dir) OpenLock(name string) (*os.File, error) {
	if f, err := d.open(name, os.O_RDWR); err == nil || !os.IsNotExist(err) {
		return f, err
	}
	f, err := d.create(name)
	if os.IsExist(err) { // Somebody else was faster.
		return d.open(name, os.O_RDWR)
	}
	return f, err
}

// Lock takes a lock on a place in the lock file called name, from 0 on, which it waits for
// until ctx ends. Closing the file lifts it, as the end of the process does. It is an open
// file description lock, see fcntl(2), so it also keeps out another part of this process.
func (d *Dir) Lock(ctx context.Context, name string, place int64) (*os.File, error) {
	f, err := d.OpenLock(name)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: place, Len: 1})
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", d.Path(name), err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: held by another process: %w", d.Path(name), ctx.Err())
		}
	}
}

// OpenFile opens a file to be read. What is no regular file is refused.
func (d *Dir) OpenFile(name string) (*os.File, error) { return d.open(name, os.O_RDONLY) }

func (d *Dir) open(name string, flags int) (*os.File, error) {
	if err := d.noLink(name); err != nil {
		return nil, err
	}
	// Nothing that is in the way, a pipe for example, may stop us.
	f, err := d.root.OpenFile(name, flags|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, d.named(err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w", d.Path(name), ErrNotRegular)
	}
	// What also has a name elsewhere is not ours to write to.
	if err == nil && flags != os.O_RDONLY {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink > 1 {
			err = fmt.Errorf("%s: %w: it has another name", d.Path(name), ErrNotRegular)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// ErrNotRegular says that something else stands in the place of a file.
var ErrNotRegular = errors.New("no regular file")

// Has tells whether there is a file called name.
func (d *Dir) Has(name string) bool {
	_, err := d.root.Lstat(name)
	return err == nil
}

// noLink refuses a symbolic link. One that is made after this was asked leads nowhere
// else: os.Root keeps within the directory.
func (d *Dir) noLink(name string) error {
	info, err := d.root.Lstat(name)
	if err != nil {
		return d.named(err)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%s: %w: a symbolic link is not followed", d.Path(name), ErrNotRegular)
	}
	return nil
}

func (d *Dir) create(name string) (*os.File, error) {
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, d.named(err)
	}
	if d.uid >= 0 {
		if err := f.Chown(d.uid, d.gid); err != nil {
			_ = f.Close()
			_ = d.root.Remove(name)
			return nil, err
		}
	}
	return f, nil
}

// WriteTemp writes a new file, synced, under a name that Names does not tell. The caller
// gives it its place by Rename, or removes it.
func (d *Dir) WriteTemp(parts ...[]byte) (name string, err error) {
	name = tempPrefix + rand.Text()
	f, err := d.create(name)
	if err != nil {
		return "", err
	}
	for _, part := range parts {
		if err == nil {
			_, err = f.Write(part)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		_ = d.root.Remove(name)
		return "", err
	}
	return name, nil
}

// WriteFile writes a file so that, whatever happens, it is there as it was or as it is to
// be. When it has returned without an error, the file survives a loss of power.
func (d *Dir) WriteFile(name string, b []byte) error {
	temp, err := d.WriteTemp(b)
	if err != nil {
		return err
	}
	if err := d.Rename(temp, name); err != nil {
		_ = d.root.Remove(temp)
		return err
	}
	return d.Sync()
}

// Rename gives a file another name.
func (d *Dir) Rename(from, to string) error { return d.named(d.root.Rename(from, to)) }

// Remove removes a file. That there is none is no error.
func (d *Dir) Remove(name string) error {
	if err := d.root.Remove(name); err != nil && !os.IsNotExist(err) {
		return d.named(err)
	}
	return nil
}

// Sync makes the names in the directory survive a loss of power.
func (d *Dir) Sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return d.named(err)
	}
	defer func() { _ = f.Close() }()
	return f.Sync()
}

// named puts the directory's own name before that of a file in it.
func (d *Dir) named(err error) error {
	if pe, ok := err.(*fs.PathError); ok { //nolint:errorlint // Exactly what os returned.
		return &fs.PathError{Op: pe.Op, Path: d.Path(pe.Path), Err: pe.Err}
	}
	if le, ok := err.(*os.LinkError); ok { //nolint:errorlint // As above.
		return &fs.PathError{Op: le.Op, Path: d.Path(le.New), Err: le.Err}
	}
	return err
}
