//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// nobody is another user than root.
const nobody = 65534

// runOnce runs a command that ends by itself, and returns its exit status and what it wrote to
// stderr.
func runOnce(t *testing.T, args ...string) (status int, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, err := real.Start(real.Command{Path: promferry(t), Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	status, err = p.Wait(ctx)
	if err != nil {
		t.Fatalf("%v: %s", err, p.Stderr())
	}
	return status, p.Stderr()
}

// dirOf makes a directory of another user's.
func dirOf(t *testing.T, owner int, path string) {
	t.Helper()
	if err := errors.Join(os.Mkdir(path, 0o700), os.Chown(path, owner, owner)); err != nil {
		t.Fatal(err)
	}
}

// TestStateOfAnotherUser has root's daemons on a state directory of another user, who put
// something else in the place of a file. No file outside may change.
func TestStateOfAnotherUser(t *testing.T) {
	t.Parallel()
	daemons := map[string][]string{
		"agent":   {"--push.url=http://127.0.0.1:1", "--web.listen-address=127.0.0.1:0"},
		"proxy":   {"--web.listen-address=127.0.0.1:0"},
		"gateway": {"--web.listen-address=127.0.0.1:0"},
	}
	plants := map[string]func(victim, file string) error{
		"symbolic link": os.Symlink,
		"dangling link": func(victim, file string) error { return os.Symlink(victim+".new", file) },
		"hard link":     os.Link,
		"named pipe":    func(_, file string) error { return syscall.Mkfifo(file, 0o666) },
		"directory":     func(_, file string) error { return os.Mkdir(file, 0o755) },
	}
	for _, file := range []struct{ daemon, name string }{
		{"agent", "agent.pid"}, {"proxy", "proxy.pid"}, {"proxy", "clients.json"}, {"gateway", "gateway.pid"}, {"gateway", "groups.db"},
	} {
		for plant, make := range plants {
			t.Run(file.name+" is a "+plant, func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "state")
				dirOf(t, nobody, dir)
				victim := filepath.Join(t.TempDir(), "victim")
				if err := errors.Join(os.WriteFile(victim, []byte("must survive"), 0o600), make(victim, filepath.Join(dir, file.name))); err != nil {
					t.Fatal(err)
				}
				status, stderr := runOnce(t, append([]string{file.daemon, "--state.dir=" + dir}, daemons[file.daemon]...)...)
				if status != 1 || !strings.Contains(stderr, filepath.Join(dir, file.name)+": not a regular file with one name") {
					t.Errorf("status %d: %s", status, stderr)
				}
				if b, err := os.ReadFile(victim); err != nil || string(b) != "must survive" {
					t.Errorf("the file outside is %q, %v", b, err)
				}
				if _, err := os.Lstat(victim + ".new"); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("a file outside was made: %v", err)
				}
			})
		}
	}
}

// startOfInit returns when process 1 started, as a lock file has it.
func startOfInit(t *testing.T) string {
	t.Helper()
	stat, err := os.ReadFile("/proc/1/stat")
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])[19])
}

// TestForgedLock has root's jobs and daemons on a state directory of a user who wants them not
// to run.
func TestForgedLock(t *testing.T) {
	t.Parallel()
	forged := fmt.Sprintf("1\n1 %s\n", startOfInit(t))
	job := func(dir string) (status int, stderr string) {
		return runOnce(t, "run", "--job=backup", "--no-overlap", "--push.url=http://127.0.0.1:1", "--push.timeout=1s", "--state.dir="+dir, "--", "true")
	}
	// What a first run makes tells the name of the lock.
	first := filepath.Join(t.TempDir(), "state")
	dirOf(t, nobody, first)
	if status, stderr := job(first); status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	locks, err := filepath.Glob(filepath.Join(first, "jobs", "locks", "backup-*.lock"))
	if err != nil || len(locks) != 1 {
		t.Fatalf("locks: %q, %v", locks, err)
	}
	info, err := os.Stat(filepath.Dir(locks[0]))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 || info.Mode().Perm() != 0o700 {
		t.Errorf("%s belongs to %d, mode %v", filepath.Dir(locks[0]), uid, info.Mode())
	}

	for _, place := range []string{"jobs", "jobs/locks"} {
		t.Run("job, forged in "+place, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			dirOf(t, nobody, dir)
			dirOf(t, nobody, filepath.Join(dir, "jobs"))
			if place != "jobs" {
				dirOf(t, nobody, filepath.Join(dir, place))
			}
			path := filepath.Join(dir, place, filepath.Base(locks[0]))
			f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteString(forged); err != nil {
				t.Fatal(err)
			}
			// And held.
			if err := errors.Join(f.Chown(nobody, nobody), unix.Flock(int(f.Fd()), unix.LOCK_EX)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if status, stderr := job(dir); status != 0 || strings.Contains(stderr, "skipped") {
					t.Errorf("status %d: %s", status, stderr)
				}
			}
		})
	}
	t.Run("daemon", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		dirOf(t, nobody, dir)
		path := filepath.Join(dir, "gateway.pid")
		if err := errors.Join(os.WriteFile(path, []byte(forged), 0o600), os.Chown(path, nobody, nobody)); err != nil {
			t.Fatal(err)
		}
		startGatewayAt(t, dir)
	})
}

// TestForgedTextfile has root write a textfile where another user put a link to a file that only
// root can read.
func TestForgedTextfile(t *testing.T) {
	t.Parallel()
	dir, state := filepath.Join(t.TempDir(), "textfile"), t.TempDir()
	dirOf(t, nobody, dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	job := func() string {
		t.Helper()
		status, stderr := runOnce(t, "run", "--job=backup", "--textfile="+dir, "--state.dir="+state, "--", "true")
		if status != 0 {
			t.Fatalf("status %d: %s", status, stderr)
		}
		return stderr
	}
	job()
	files, err := filepath.Glob(filepath.Join(dir, "*.prom"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files: %q, %v", files, err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("# TYPE canary gauge\ncanary 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func() error{
		"hard link":     func() error { return os.Link(secret, files[0]) },
		"symbolic link": func() error { return os.Symlink(secret, files[0]) },
		"foreign file": func() error {
			return errors.Join(os.WriteFile(files[0], []byte("canary 1\n"), 0o644), os.Chown(files[0], nobody, nobody))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := errors.Join(os.Remove(files[0]), plant()); err != nil {
				t.Fatal(err)
			}
			if stderr := job(); !strings.Contains(stderr, "not a file that this user wrote") {
				t.Errorf("it warns: %s", stderr)
			}
			b, err := os.ReadFile(files[0])
			if err != nil || strings.Contains(string(b), "canary") || !strings.Contains(string(b), "batch_job_last_success") {
				t.Errorf("the textfile: %s, %v", b, err)
			}
			if b, err := os.ReadFile(secret); err != nil || string(b) != "# TYPE canary gauge\ncanary 1\n" {
				t.Errorf("the secret: %s, %v", b, err)
			}
		})
	}
}
