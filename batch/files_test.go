package batch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/lockfile"
	"github.com/promferry/promferry/pushgw"
)

// give makes what is below path another user's, if we are root, who alone can.
func give(t *testing.T, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	err := filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, 12345, 12345))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// running is what is in the lock file of a run that was killed and left its command running.
func running(t *testing.T, pid int) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Release() }()
	if err := lock.Guard(pid); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestLockInDirectoryOfAnotherUser has the locks of root's runs in a state directory of the
// agent's user, who may want to stop root's jobs. Who runs jobs in a directory of their own
// has the locks there, where also former versions look for them.
func TestLockInDirectoryOfAnotherUser(t *testing.T) {
	key := pushgw.GroupingKey{Job: "backup"}
	root := os.Geteuid() == 0
	for name, test := range map[string]struct {
		// forge puts what that user made into the directory of the locks.
		forge func(t *testing.T, dir string)
		// held, for who owns the directory.
		held bool
		// warn is beside root's lock.
		warn string
	}{
		"nothing": {forge: func(*testing.T, string) {}},
		"a lock of a former version": {forge: func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, fileName(key)+".lock"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		"a PID that is not of a run": {held: true, forge: func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, fileName(key)+".lock"), running(t, 1), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		"a lock that they hold": {held: true, forge: func(t *testing.T, dir string) {
			f, err := os.Create(filepath.Join(dir, fileName(key)+".lock"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
				t.Fatal(err)
			}
		}},
		"a directory in the place of root's": {forge: func(t *testing.T, dir string) {
			if err := os.Mkdir(filepath.Join(dir, locksDir), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, locksDir, fileName(key)+".lock"), running(t, 1), 0o600); err != nil {
				t.Fatal(err)
			}
		}, warn: "/jobs/locks belonged to another user, is now "},
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			dir := filepath.Join(state, "jobs")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			test.forge(t, dir)
			give(t, state)
			jobs, err := OpenJobs(state)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = jobs.Close() }()
			lock, err := jobs.Lock(key)
			if _, held := errors.AsType[*lockfile.HeldError](err); held || lock == nil {
				if root || !test.held {
					t.Errorf("got %v", err)
				}
				return
			}
			if warned := err != nil && strings.Contains(err.Error(), test.warn) && test.warn != ""; warned != (root && test.warn != "") {
				t.Errorf("got %v", err)
			}
			if !root && test.held {
				t.Error("the lock was not held")
			}
			if _, err := jobs.Lock(key); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("held by the process with PID %d", os.Getpid())) {
				t.Errorf("a second lock: %v", err)
			}
			if err := lock.Release(); err != nil {
				t.Error(err)
			}
			again, err := jobs.Lock(key)
			if err != nil {
				t.Fatalf("after the release: %v", err)
			}
			_ = again.Release()
			where := dir
			if root {
				where = filepath.Join(dir, locksDir)
			}
			info, err := os.Stat(filepath.Join(where, fileName(key)+".lock"))
			if err != nil {
				t.Fatal(err)
			}
			if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != os.Geteuid() {
				t.Errorf("the lock file is of user %d", stat.Uid)
			}
		})
	}
}

// TestGuardedByRoot has a run of root's that was killed and left its command running: also
// where another user owns the directory it counts.
func TestGuardedByRoot(t *testing.T) {
	key := pushgw.GroupingKey{Job: "backup"}
	state := t.TempDir()
	give(t, state)
	jobs, err := OpenJobs(state)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = jobs.Close() }()
	lock, err := jobs.Lock(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(state, "jobs", fileName(key)+".lock")
	if os.Geteuid() == 0 {
		path = filepath.Join(state, "jobs", locksDir, fileName(key)+".lock")
	}
	if err := os.WriteFile(path, running(t, os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = jobs.Lock(key)
	if held, ok := errors.AsType[*lockfile.HeldError](err); !ok || held.PID != os.Getpid() {
		t.Errorf("got %v, want it held by PID %d", err, os.Getpid())
	}
}

// TestTextfileOfAnother has in the place of the textfile what whoever owns the directory may
// have put there. Nothing of that is published, and the file is written anew.
func TestTextfileOfAnother(t *testing.T) {
	key := pushgw.GroupingKey{Job: "backup"}
	family := func(name string) []*dto.MetricFamily {
		return []*dto.MetricFamily{{Name: &name, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{{Gauge: &dto.Gauge{Value: new(1.0)}}}}}
	}
	const secret = "secret_token 1\n"
	private := filepath.Join(t.TempDir(), "private")
	for name, test := range map[string]struct {
		place func(path string) error
		kept  bool
	}{
		"ours": {kept: true, place: func(path string) error {
			return errors.Join(os.WriteFile(path, []byte(secret), 0o600), os.Chmod(path, 0o644))
		}},
		"hard link":     {place: func(path string) error { return errors.Join(os.Chmod(private, 0o644), os.Link(private, path)) }},
		"symbolic link": {place: func(path string) error { return os.Symlink(private, path) }},
		"link to a file beside it": {place: func(path string) error {
			return errors.Join(os.WriteFile(path+".private", []byte(secret), 0o600), os.Symlink(filepath.Base(path)+".private", path))
		}},
		"a private file that was renamed": {place: func(path string) error { return os.WriteFile(path, []byte(secret), 0o600) }},
		"another user's": {kept: os.Geteuid() != 0, place: func(path string) error {
			return errors.Join(os.WriteFile(path, []byte(secret), 0o600), os.Chmod(path, 0o644), func() error { give(t, path); return nil }())
		}},
		"named pipe": {place: func(path string) error { return syscall.Mkfifo(path, 0o644) }},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(private, []byte(secret), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "promferry-"+fileName(key)+".prom")
			if err := test.place(path); err != nil {
				t.Fatal(err)
			}
			err := writeTextfile(t.Context(), dir, key, family("a"))
			if want := path + ": not a file that this user wrote; it was written anew, without what was in it"; test.kept && err != nil || !test.kept && (err == nil || err.Error() != want) {
				t.Errorf("got %v", err)
			}
			if err := writeTextfile(t.Context(), dir, key, family("b")); err != nil {
				t.Errorf("the next time: %v", err)
			}
			b, err := os.ReadFile(path)
			if err != nil || strings.Contains(string(b), "secret") != test.kept || !strings.Contains(string(b), `a{job="backup"} 1`) || !strings.Contains(string(b), `b{job="backup"} 1`) {
				t.Errorf("there is %v\n%s", err, b)
			}
			info, err := os.Lstat(path)
			if err != nil || info.Mode() != 0o644 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			if b, err := os.ReadFile(private); err != nil || string(b) != secret {
				t.Errorf("the private file is %q, %v", b, err)
			}
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) > 2 || strings.HasSuffix(entries[0].Name(), ".tmp") {
				t.Errorf("left in the directory: %v, %v", entries, err)
			}
		})
	}
}
