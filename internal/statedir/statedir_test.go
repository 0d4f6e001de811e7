package statedir_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/internal/statedir"
)

func open(t *testing.T, path string) *statedir.Dir {
	t.Helper()
	d, err := statedir.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// TestOwner has a directory of another user's, in which root works: what is made is that
// user's, readable by nobody else.
func TestOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	owner := os.Geteuid()
	if owner == 0 {
		owner = 12345
		if err := os.Chown(path, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	sub, err := statedir.OpenSub(path, "sub")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Close() }()
	if err := sub.WriteFile("file", []byte("content")); err != nil {
		t.Fatal(err)
	}
	lock, err := sub.OpenRW("lock")
	if err != nil {
		t.Fatal(err)
	}
	_ = lock.Close()
	temp, err := sub.WriteTemp([]byte("a"), []byte("b"))
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"": os.ModeDir | 0o700, "file": 0o600, "lock": 0o600, temp: 0o600} {
		info, err := os.Stat(filepath.Join(path, "sub", name))
		if err != nil {
			t.Fatal(err)
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok || int(stat.Uid) != owner || info.Mode() != mode {
			t.Errorf("%q: %v of user %d, want %v of %d", name, info.Mode(), stat.Uid, mode, owner)
		}
	}
	if names, err := sub.Names(); err != nil || !slices.Equal(slices.Sorted(slices.Values(names)), []string{"file", "lock"}) {
		t.Errorf("names: %q, %v", names, err)
	}
}

func TestNothingOutside(t *testing.T) {
	path, outside := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"file": secret, "dir": outside, "dangling": filepath.Join(outside, "new"), "up": ".."} {
		if err := os.Symlink(to, filepath.Join(path, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(path, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(secret, filepath.Join(path, "hard")); err != nil {
		t.Fatal(err)
	}
	d := open(t, path)
	socket, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", filepath.Join(path, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	const link = ": a symbolic link is not followed; remove it"
	for name, why := range map[string]string{
		"file": link, "dangling": link, "pipe": "; remove it", "socket": "; remove it",
		"hard": ": it has 2 names (hard links); put a copy in its place",
	} {
		want := filepath.Join(path, name) + ": not a regular file with one name" + why
		for how, open := range map[string]func(string) (*os.File, error){"read": d.OpenFile, "write": d.OpenRW} {
			if _, err := open(name); !errors.Is(err, statedir.ErrNotRegular) || err.Error() != want {
				t.Errorf("%s %s: %v, want %s", how, name, err, want)
			}
		}
	}
	for _, name := range []string{"dir", "up", "../x"} {
		if f, err := d.OpenFile(name); err == nil {
			t.Errorf("opened %s", f.Name())
		}
		if f, err := d.OpenRW(name); err == nil {
			t.Errorf("opened %s to write", f.Name())
		}
	}
	for _, name := range []string{"dir", "up", "file", "pipe", "socket"} { // A pipe must not block either.
		if _, err := d.Sub(name); err == nil {
			t.Errorf("went into %s", name)
		}
	}
	// A link in the place of a file is replaced, not followed.
	if err := d.WriteFile("file", []byte("new")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "precious" {
		t.Errorf("outside is %q, %v", b, err)
	}
	if files, err := os.ReadDir(outside); err != nil || len(files) != 1 {
		t.Errorf("outside: %v, %v", files, err)
	}
}

// other makes a file another user's, if we are root, who alone can.
func other(t *testing.T, path string) (owner int) {
	t.Helper()
	if os.Geteuid() != 0 {
		return os.Geteuid()
	}
	if err := os.Lchown(path, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	return 12345
}

// TestExisting makes nothing.
func TestExisting(t *testing.T) {
	path := t.TempDir()
	if _, err := statedir.OpenExisting(filepath.Join(path, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	d, err := statedir.OpenExisting(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = d.Close()
	if names, err := os.ReadDir(path); err != nil || len(names) > 0 {
		t.Errorf("there is %v, %v", names, err)
	}
}

// TestSticky has a directory into which any user can put a file that nobody else can remove.
func TestSticky(t *testing.T) {
	path := t.TempDir()
	if err := os.Chmod(path, 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ours", "theirs"} {
		if err := os.WriteFile(filepath.Join(path, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := other(t, filepath.Join(path, "theirs")) != os.Geteuid()
	d := open(t, path)
	for name, refused := range map[string]bool{"ours": false, "theirs": refused, "new": false} {
		f, err := d.OpenRW(name)
		if !refused {
			if err != nil {
				t.Error(err)
			}
			_ = f.Close()
		} else if want := filepath.Join(path, name) + ": belongs to the user with ID 12345, and any user can put files there; remove it"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// TestSubIsGivenOnlyWhenNew has a directory of root's that another user has renamed.
func TestSubIsGivenOnlyWhenNew(t *testing.T) {
	path := t.TempDir()
	for _, name := range []string{"filled/secret", "empty"} {
		if err := os.MkdirAll(filepath.Join(path, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	owner := other(t, path)
	d := open(t, path)
	for name, want := range map[string]int{"filled": os.Geteuid(), "empty": owner, "new": owner} {
		sub, err := d.Sub(name)
		if err != nil {
			t.Fatal(err)
		}
		_ = sub.Close()
		info, err := os.Stat(filepath.Join(path, name))
		if err != nil {
			t.Fatal(err)
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != want {
			t.Errorf("%s is of user %d, want %d", name, stat.Uid, want)
		}
	}
}

// TestPrivate has what stands in the way of a directory that only we can write to.
func TestPrivate(t *testing.T) {
	elsewhere := t.TempDir()
	for name, make := range map[string]func(path string) error{
		"nothing": func(string) error { return nil },
		"ours":    func(path string) error { return os.Mkdir(path, 0o700) },
		"another's": func(path string) error {
			defer other(t, path)
			return os.MkdirAll(filepath.Join(path, "full"), 0o777)
		},
		"open":   func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o770)) },
		"a link": func(path string) error { return os.Symlink(elsewhere, path) },
		"a pipe": func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"a file": func(path string) error { return os.WriteFile(path, nil, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			path := filepath.Join(top, "private")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			other(t, top)
			d, moved, err := open(t, top).Private("private")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = d.Close() }()
			if !d.Trusted() || d.Path("") != path {
				t.Errorf("%s: trusted %v", d.Path(""), d.Trusted())
			}
			if err := d.WriteFile("file", nil); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(filepath.Join(path, "file"))
			if err != nil {
				t.Fatal(err)
			}
			if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != os.Geteuid() {
				t.Errorf("the file is of user %d", stat.Uid)
			}
			kept := name == "nothing" || name == "ours" || name == "another's" && os.Geteuid() != 0
			if kept != (moved == "") {
				t.Errorf("moved %q", moved)
			}
			if _, err := os.Lstat(moved); !kept && err != nil {
				t.Error(err)
			}
			if names, err := os.ReadDir(elsewhere); err != nil || len(names) > 0 {
				t.Errorf("elsewhere is %v, %v", names, err)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	for name, test := range map[string]struct {
		file *string
		left string
		err  string
	}{
		"none: made":    {left: "1\n"},
		"ours":          {file: new("1\n"), left: "1\n"},
		"half written":  {file: new(""), left: ""},
		"newer":         {file: new("2\n"), left: "2\n", err: "the state directory %s has version 2, and this promferry reads up to version 1: install the newer promferry that wrote it, or name another directory"},
		"much newer":    {file: new("17"), left: "17", err: "the state directory %s has version 17, and this promferry reads up to version 1: "},
		"not a version": {file: new("two"), left: "two", err: `%s/version: "two" is not a version: write the number 1 into it`},
		"not one":       {file: new("0"), left: "0", err: `%s/version: "0" is not a version`},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			file := filepath.Join(path, "version")
			if test.file != nil {
				if err := os.WriteFile(file, []byte(*test.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			d, err := statedir.OpenSub(path, "sub")
			if test.err == "" {
				if err != nil {
					t.Fatal(err)
				}
				_ = d.Close()
				if names, err := os.ReadDir(filepath.Join(path, "sub")); err != nil || len(names) > 0 {
					t.Errorf("in the sub-directory: %v, %v", names, err)
				}
			} else if want := strings.Replace(test.err, "%s", path, 1); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v\nwant %s", err, want)
			}
			if _, newer := errors.AsType[*statedir.VersionError](err); newer != strings.Contains(test.err, "this promferry reads") {
				t.Errorf("%T", err)
			}
			if b, err := os.ReadFile(file); err != nil || string(b) != test.left {
				t.Errorf("left %q, %v, want %q", b, err, test.left)
			}
			if names, err := os.ReadDir(path); err != nil || test.err != "" && len(names) != 1 {
				t.Errorf("there is %v, %v", names, err)
			}
		})
	}
}

func TestLock(t *testing.T) {
	path := t.TempDir()
	first, second := open(t, path), open(t, path)
	held, err := first.Lock(t.Context(), "lock", 7)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := second.Lock(ctx, "lock", 7); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "held by another process") {
		t.Errorf("got %v", err)
	}
	other, err := second.Lock(t.Context(), "lock", 8)
	if err != nil {
		t.Fatalf("another place: %v", err)
	}
	_ = other.Close()
	_ = held.Close()
	again, err := second.Lock(t.Context(), "lock", 7)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}
