package statedir_test

import (
	"context"
	"errors"
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
	if f, err := d.OpenRW("hard"); err == nil {
		t.Errorf("opened %s, which has another name, to lock", f.Name())
	}
	for _, name := range []string{"file", "dir", "dangling", "up", "pipe", "../x"} {
		if f, err := d.OpenFile(name); err == nil {
			t.Errorf("opened %s", f.Name())
		}
		if f, err := d.OpenRW(name); err == nil {
			t.Errorf("opened %s to lock", f.Name())
		}
	}
	for _, name := range []string{"dir", "up", "file"} {
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

// TestVersion has what a version file can say.
func TestVersion(t *testing.T) {
	for _, test := range []struct{ name, content, err string }{
		{"none", "", ""},
		{"this one", "1\n", ""},
		{"not written to its end", "\n", ""},
		{"newer", "2\n", "has version 2, and this promferry reads up to version 1: install the newer promferry"},
		{"much newer", "10", "has version 10, and"},
		{"no number", "one\n", `version: "one" is not a version: write the number 1 into it`},
		{"zero", "0\n", `version: "0" is not a version`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := t.TempDir()
			file := filepath.Join(path, "version")
			if test.content != "" {
				if err := os.WriteFile(file, []byte(test.content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, open := range []func() (*statedir.Dir, error){
				func() (*statedir.Dir, error) { return statedir.Open(path) },
				func() (*statedir.Dir, error) { return statedir.OpenSub(path, "sub") },
			} {
				d, err := open()
				if err == nil {
					_ = d.Close()
				}
				if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %v, want %q", err, test.err)
				}
			}
			if b, err := os.ReadFile(file); test.content == "" && (err != nil || string(b) != "1\n") {
				t.Errorf("it holds %q, %v", b, err)
			}
		})
	}
}
