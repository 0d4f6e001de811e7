// Package statedir opens directories for what must survive a process. Root may work in one
// that belongs to another user: what root makes there is that user's, and nothing that the
// user puts there, such as a link or a named pipe, leads root to a file elsewhere or stops it.
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
	path string // as it was given, for people
	root *os.Root
	// owner and mode are those of the directory when it was opened.
	owner int
	mode  fs.FileMode
	// uid and gid own what is made here, or are -1: whoever makes it.
	uid, gid int
}

// Open opens the state directory at path. When there is none it is made, and those above
// it. One that a newer version of promferry wrote is refused with a *VersionError.
func Open(path string) (*Dir, error) {
	d, err := openAt(path, true)
	if err != nil {
		return nil, err
	}
	if err := d.CheckVersion(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.writeVersion()
	return d, nil
}

// OpenExisting opens the directory at path, which may be any, and changes nothing. When
// there is none the error is fs.ErrNotExist.
func OpenExisting(path string) (*Dir, error) { return openAt(path, false) }

func openAt(path string, create bool) (*Dir, error) {
	if create {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	d, gid, err := newDir(path, root)
	if err == nil && os.Geteuid() == 0 && d.owner != 0 {
		d.uid, d.gid = d.owner, gid
	}
	return d, err
}

// newDir returns the directory at path, which is open as root, and its group.
func newDir(path string, root *os.Root) (d *Dir, gid int, err error) {
	d = &Dir{path: path, root: root, uid: -1, gid: -1}
	info, err := root.Stat(".")
	if err != nil {
		return nil, 0, errors.Join(d.named(err), root.Close())
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, 0, errors.Join(fmt.Errorf("%s: %w", path, errors.ErrUnsupported), root.Close())
	}
	d.owner, d.mode = int(stat.Uid), info.Mode()
	return d, int(stat.Gid), nil
}

// OpenSub opens the directory called name in the state directory at path, and makes both
// where they are missing. The error is that of Open.
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
	sub, err := d.openDir(name)
	if err != nil {
		return nil, err
	}
	sub.uid, sub.gid = d.uid, d.gid
	if err := sub.own(); err != nil {
		return nil, errors.Join(err, sub.Close())
	}
	return sub, nil
}

// openDir opens the directory called name in d.
func (d *Dir) openDir(name string) (*Dir, error) {
	info, err := d.root.Lstat(name)
	if err != nil {
		return nil, d.named(err)
	}
	if !info.IsDir() { // OpenRoot would follow a link, and wait for the other end of a named pipe.
		return nil, fmt.Errorf("%s: %w; remove it", d.Path(name), errNotDirectory)
	}
	root, err := d.root.OpenRoot(name)
	if err != nil {
		return nil, d.named(err)
	}
	sub, _, err := newDir(d.Path(name), root)
	return sub, err
}

var errNotDirectory = errors.New("not a directory")

// own gives a directory that root has just made to the owner of what is in it. Root's own
// directory with something in it, which that user may have moved here, stays root's.
func (d *Dir) own() error {
	if d.uid < 0 || d.owner != 0 {
		return nil
	}
	f, err := d.root.Open(".")
	if err != nil {
		return d.named(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Readdirnames(1); !errors.Is(err, io.EOF) {
		return nil
	}
	if err := f.Chown(d.uid, d.gid); err != nil {
		return err
	}
	d.owner = d.uid
	return nil
}

// Trusted reports whether nobody but this process's user, and root, can put files into the
// directory.
func (d *Dir) Trusted() bool { return d.owner == os.Geteuid() && d.mode&0o022 == 0 }

// Private opens the directory called name in d, and makes it when there is none. It is
// Trusted, whoever owns d. What stands in its place and is not gets another name: moved is
// its path then, else it is empty.
func (d *Dir) Private(name string) (private *Dir, moved string, err error) {
	for {
		if err := d.root.Mkdir(name, 0o700); err != nil && !os.IsExist(err) {
			return nil, moved, d.named(err)
		}
		private, err = d.openDir(name)
		if err == nil && private.Trusted() {
			return private, moved, nil
		}
		if err == nil {
			err = fmt.Errorf("%s: belongs to another user", private.path)
			_ = private.Close()
		} else if !errors.Is(err, errNotDirectory) { // It may be a good one, with locks that are held.
			return nil, moved, err
		}
		if moved != "" { // Whoever owns d is at work there.
			return nil, moved, err
		}
		away := name + "." + rand.Text()
		if err := d.Rename(name, away); err != nil {
			return nil, "", err
		}
		moved = d.Path(away)
	}
}

// Close closes the directory.
func (d *Dir) Close() error { return d.root.Close() }

// Path returns where the file called name is, for people.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

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

// OpenRW opens a file to be read and written in place, and makes it when there is none. What
// is not a regular file with one name is refused with ErrNotRegular.
func (d *Dir) OpenRW(name string) (*os.File, error) {
	if f, err := d.open(name, os.O_RDWR); err == nil || !os.IsNotExist(err) {
		return f, err
	}
	f, err := d.create(name)
	if os.IsExist(err) { // Another process was faster.
		return d.open(name, os.O_RDWR)
	}
	return f, err
}

// Lock takes a lock on a place in the lock file called name, from 0 on, which it waits for
// until ctx ends. Closing the file lifts it, as the end of the process does. It is an open
// file description lock, see fcntl(2), so it also keeps out another part of this process.
func (d *Dir) Lock(ctx context.Context, name string, place int64) (*os.File, error) {
	f, err := d.OpenRW(name)
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

// OpenFile opens a file to be read. What is not a regular file with one name is refused with
// ErrNotRegular.
func (d *Dir) OpenFile(name string) (*os.File, error) { return d.open(name, os.O_RDONLY) }

func (d *Dir) open(name string, flags int) (*os.File, error) {
	if err := d.noLink(name); err != nil {
		return nil, err
	}
	// Nothing that is in the way, a named pipe for example, may stop us.
	f, err := d.root.OpenFile(name, flags|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.ENXIO) { // ENXIO: a socket.
		return nil, fmt.Errorf("%s: %w; remove it", d.Path(name), ErrNotRegular)
	}
	if err != nil {
		return nil, d.named(err)
	}
	if err := d.regular(f, name); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// regular refuses an open file that is not a regular file with one name. What also has a
// name elsewhere may be a file of another user's, or root's.
func (d *Dir) regular(f *os.File, name string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w; remove it", d.Path(name), ErrNotRegular)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if ok && stat.Nlink > 1 {
		return fmt.Errorf("%s: %w: it has %d names (hard links); put a copy in its place", d.Path(name), ErrNotRegular, stat.Nlink)
	}
	// In a directory as /tmp any user can put a file that others cannot remove.
	if owner := int(stat.Uid); ok && d.mode&fs.ModeSticky != 0 && owner != os.Geteuid() && owner != d.owner {
		return fmt.Errorf("%s: belongs to the user with ID %d, and any user can put files there; remove it", d.Path(name), owner)
	}
	return nil
}

// ErrNotRegular is the error for what stands in the place of a file.
var ErrNotRegular = errors.New("not a regular file with one name")

// Has reports whether there is a file called name.
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
		return fmt.Errorf("%s: %w: a symbolic link is not followed; remove it", d.Path(name), ErrNotRegular)
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

// named puts the directory's path before the name of a file in it.
func (d *Dir) named(err error) error {
	if pe, ok := err.(*fs.PathError); ok { //nolint:errorlint // Exactly what os returned.
		return &fs.PathError{Op: pe.Op, Path: d.Path(pe.Path), Err: pe.Err}
	}
	if le, ok := err.(*os.LinkError); ok { //nolint:errorlint // As above.
		return &fs.PathError{Op: le.Op, Path: d.Path(le.New), Err: le.Err}
	}
	return err
}
