package lockfile_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/lockfile"
)

// TestMain is also the other process: with HOLD set it takes that lock, says so, and
// holds it until it is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv("HOLD"); path != "" {
		if _, err := lockfile.Acquire(path); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		select {}
	}
	os.Exit(m.Run())
}

func TestSecondProcessIsRefusedUntilTheFirstIsKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.pid")
	holder := exec.CommandContext(t.Context(), os.Args[0])
	holder.Env = append(os.Environ(), "HOLD="+path)
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	n, err := stdout.Read(line)
	if err != nil || string(line[:n]) != "held\n" {
		t.Fatalf("holder said %q, %v", line[:n], err)
	}

	_, err = lockfile.Acquire(path)
	held, ok := errors.AsType[*lockfile.HeldError](err)
	if !ok {
		t.Fatalf("got %v, want a HeldError", err)
	}
	if held.PID != holder.Process.Pid || held.Path != path {
		t.Errorf("got %+v, want PID %d, path %s", held, holder.Process.Pid, path)
	}
	if want := fmt.Sprint("PID ", holder.Process.Pid); !strings.Contains(err.Error(), want) {
		t.Errorf("error %q does not say %q", err, want)
	}

	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatalf("after kill -9: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != fmt.Sprintf("%d\n", os.Getpid()) {
		t.Errorf("lock file holds %q, %v, want our PID %d", b, err, os.Getpid())
	}
	if err := lock.Release(); err != nil {
		t.Errorf("release: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the file must stay: %v", err)
	}
}

func TestSameProcessIsRefusedToo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.pid")
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockfile.Acquire(path); err == nil {
		t.Error("a second lock in one process was granted")
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	_ = again.Release()
}

func TestErrorNamesThePath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing", "agent.pid")
	if _, err := lockfile.Acquire(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, want an error that names %s", err, path)
	}
}

// TestOtherFiles has in the place of the lock file what another user may have put there.
func TestOtherFiles(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	for name, place := range map[string]func(path string) error{
		"symbolic link": func(path string) error { return os.Symlink(victim, path) },
		"hard link":     func(path string) error { return os.Link(victim, path) },
		"dangling link": func(path string) error { return os.Symlink(victim+".new", path) },
		"named pipe":    func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "agent.pid")
			if err := place(path); err != nil {
				t.Fatal(err)
			}
			_, err := lockfile.Acquire(path)
			if want := "lock: " + path + ": not a regular file with one name"; err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
			if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
				t.Errorf("the victim is %q, %v", b, err)
			}
			if _, err := os.Stat(victim + ".new"); err == nil {
				t.Error("a file was made behind the link")
			}
		})
	}
}

// TestFormerLock has the lock as former versions take it, by flock(2) on the file: it excludes
// ours, and ours excludes it.
func TestFormerLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.pid")
	if err := os.WriteFile(path, []byte("4711\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	former, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = former.Close() }()
	flock := func(how int) error { return unix.Flock(int(former.Fd()), how|unix.LOCK_NB) }
	if err := flock(unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	held, ok := errors.AsType[*lockfile.HeldError](func() error { _, err := lockfile.Acquire(path); return err }())
	if !ok || held.PID != 4711 || held.Path != path {
		t.Errorf("got %+v, want it held by PID 4711", held)
	}
	if err := flock(unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := flock(unix.LOCK_EX); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the former lock beside ours: %v", err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	if err := flock(unix.LOCK_EX); err != nil {
		t.Errorf("the former lock after ours: %v", err)
	}
}

func TestRelativePath(t *testing.T) {
	t.Chdir(t.TempDir())
	lock, err := lockfile.Acquire("agent.pid")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Release() }()
	_, err = lockfile.Acquire("./agent.pid")
	if held, ok := errors.AsType[*lockfile.HeldError](err); !ok || held.PID != os.Getpid() {
		t.Errorf("got %v, want it held by ourselves", err)
	}
}

// TestGuardedProcessHoldsTheLock has a holder that is gone and left a process behind.
func TestGuardedProcessHoldsTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "job.lock")
	child := exec.CommandContext(t.Context(), "sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Guard(child.Process.Pid); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	write := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	acquire := func() error {
		l, err := lockfile.Acquire(path)
		if err == nil {
			_ = l.Release()
		}
		return err
	}
	if err := acquire(); err != nil {
		t.Errorf("released: %v", err)
	}
	write(left) // As a holder leaves it that was killed.
	held, ok := errors.AsType[*lockfile.HeldError](acquire())
	if !ok || held.PID != child.Process.Pid {
		t.Errorf("got %+v, want it held by PID %d", held, child.Process.Pid)
	}
	// The PID alone does not count: another process may have it by now.
	write(fmt.Appendf(nil, "1\n%d 1\n", child.Process.Pid))
	if err := acquire(); err != nil {
		t.Errorf("another process with this PID: %v", err)
	}
	write(left)
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	if err := acquire(); err != nil {
		t.Errorf("the process has ended: %v", err)
	}
}

// TestForgedGuard has a lock file of another user's, with the PID of a process that is not that
// user's: anybody could have written it there.
func TestForgedGuard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.pid")
	lock, err := lockfile.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Guard(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := lockfile.Acquire(path); err == nil {
		t.Fatal("our own guard does not count")
	}
	if os.Chown(path, 65534, 65534) != nil {
		return // Only root can make a file another user's.
	}
	if lock, err = lockfile.Acquire(path); err != nil {
		t.Fatal(err)
	}
	_ = lock.Release()
}
