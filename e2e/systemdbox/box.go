//go:build e2e

// Package systemdbox boots a real systemd for a test: as PID 1 of namespaces of
// its own, over a copy-on-write view of this machine's root. It takes root and
// what every Debian has (systemd, util-linux, bash), under a second, and leaves
// nothing on the host.
package systemdbox

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

//go:embed box.sh
var script []byte

// A box's cgroups are named by cgroupPrefix, the PID of this process, a dot and the
// number of boxes before it.
const cgroupPrefix = "promferry-box."

var boxes atomic.Int32

// bootTimeout bounds a boot. Seen: 0.5 s.
const bootTimeout = 30 * time.Second

// A Box is a running systemd with a network of its own. Its methods may be called concurrently.
type Box struct {
	pid    int
	client *http.Client
}

// Boot starts a box and waits until its basic.target stands. The box ends with
// the test, or, at the latest, with the process.
func Boot(t *testing.T) *Box {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("systemdbox: needs root, for namespaces and mounts")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "box.sh")
	if err := os.WriteFile(program, script, 0o700); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	cgroups, err := makeCgroups()
	t.Cleanup(func() { removeCgroups(t, cgroups) })
	if err != nil {
		t.Fatal(err)
	}
	args := []string{program, root}
	for _, c := range cgroups {
		args = append(args, c.dir+"="+c.options)
	}

	cmd := exec.Command("bash", args...) //nolint:noctx // ends in the cleanup below
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET,
		Setsid:    true, // a Ctrl-C is for the test, not for systemd
		Pdeathsig: syscall.SIGKILL,
	}
	started := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		// Pdeathsig follows the thread that started the child, not the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed
		}
	}()
	if err := <-started; err != nil {
		t.Fatal("systemdbox: ", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and with PID 1 all others of the namespace
		<-ended
	})

	box := &Box{pid: cmd.Process.Pid}
	box.client = &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{DialContext: box.dial, DisableKeepAlives: true},
	}
	box.waitBooted(t, ended, &output)
	return box
}

// waitBooted waits for box.target. ended is closed, and output not written to any
// more, when the box has ended.
func (b *Box) waitBooted(t *testing.T, ended <-chan struct{}, output *bytes.Buffer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	err := real.Until(ctx, func(context.Context) error {
		select {
		case <-ended:
			cancel() // it will not come
		default:
		}
		out, err := b.Run(t, "systemctl", "is-active", "box.target")
		if err != nil {
			return fmt.Errorf("box.target: %s: %w", strings.TrimSpace(out), err)
		}
		return nil
	})
	select {
	case <-ended:
		t.Fatalf("systemdbox: ended while it booted: %s", output)
	default:
	}
	if err != nil {
		t.Fatal("systemdbox: ", err)
	}
}

// Run runs a command inside and returns what it printed on both streams, and an
// error when its status is not 0.
func (b *Box) Run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(b.pid), "--all", "--",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_COLORS=0",
	}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return string(out), err
}

// MustRun is Run for a command that has to succeed.
func (b *Box) MustRun(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.Run(t, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Show returns a property of a unit.
func (b *Box) Show(t *testing.T, unit, property string) string {
	t.Helper()
	return strings.TrimSpace(b.MustRun(t, "systemctl", "show", "--value", "--property", property, unit))
}

// Path returns where the host finds a file of the box. No part of name may be an
// absolute symbolic link: it would lead to the host's.
func (b *Box) Path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(b.pid), "root", name)
}

// WriteFile writes a file in the box and makes the directories above it.
func (b *Box) WriteFile(t *testing.T, name string, content []byte, perm fs.FileMode) {
	t.Helper()
	path := b.Path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, perm); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// CopyFile copies a file of the host into the box.
func (b *Box) CopyFile(t *testing.T, name, source string, perm fs.FileMode) {
	t.Helper()
	content, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	b.WriteFile(t, name, content, perm)
}

// Client returns a client within the box's network, for URLs with an IP address.
func (b *Box) Client() *http.Client { return b.client }

// dial connects within the box's network namespace, in which the socket stays
// wherever it is used from. addr has to be an IP address: then the dialer
// makes the socket here and not in a goroutine, which would be on another thread.
func (b *Box) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	runtime.LockOSThread()
	host, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer host.Close()
	inside, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", b.pid))
	if err != nil {
		return nil, err
	}
	defer inside.Close()
	if err := unix.Setns(int(inside.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err // and the thread, still locked, ends with its goroutine
	}
	runtime.UnlockOSThread()
	return conn, err
}

// A cgroup is the box's own in one hierarchy.
type cgroup struct {
	dir     string
	options string // mount options of its hierarchy; "" for cgroup2
}

// makeCgroups makes one cgroup in each hierarchy that is mounted below
// /sys/fs/cgroup: one on a host with cgroup2 alone, about ten on one with v1 or
// both. cpuset is left out: nobody may enter one before it is configured, and
// systemd does not use it in v1.
func makeCgroups() ([]cgroup, error) {
	const mount = "/sys/fs/cgroup"
	table, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var roots []cgroup
	for line := range strings.Lines(string(table)) {
		fields := strings.SplitN(line, ":", 3) // number:controllers:path
		switch controllers := fields[1]; {
		case strings.Contains(controllers, "cpuset"):
		case controllers == "":
			roots = append(roots, cgroup{dir: mount + "/unified"})
		case strings.HasPrefix(controllers, "name="):
			roots = append(roots, cgroup{dir: filepath.Join(mount, controllers[len("name="):]), options: "none," + controllers})
		default:
			roots = append(roots, cgroup{dir: filepath.Join(mount, controllers), options: controllers})
		}
	}
	if _, err := os.Stat(mount + "/cgroup.procs"); err == nil {
		roots = []cgroup{{dir: mount}}
	}
	name := fmt.Sprintf("%s%d.%d", cgroupPrefix, os.Getpid(), boxes.Add(1)-1)
	var made []cgroup
	for _, c := range roots {
		if _, err := os.Stat(c.dir + "/cgroup.procs"); errors.Is(err, fs.ErrNotExist) {
			continue // known to the kernel, not mounted
		}
		removeStale(c.dir)
		c.dir = filepath.Join(c.dir, name)
		if err := os.Mkdir(c.dir, 0o755); err != nil {
			return made, err
		}
		made = append(made, c)
	}
	if len(made) == 0 {
		return nil, errors.New("systemdbox: no cgroup hierarchy below " + mount)
	}
	return made, nil
}

func removeCgroups(t *testing.T, cgroups []cgroup) {
	t.Helper()
	for _, c := range cgroups {
		// A cgroup stays busy for a moment after the death of its last process.
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		if err := real.Until(ctx, func(context.Context) error { return removeCgroup(c.dir) }); err != nil {
			t.Error("systemdbox: ", err)
		}
		cancel()
	}
}

// removeStale removes what a test process left that was killed.
func removeStale(root string) {
	left, _ := filepath.Glob(filepath.Join(root, cgroupPrefix+"*"))
	for _, dir := range left {
		number, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix), ".")
		pid, err := strconv.Atoi(number)
		if err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			_ = removeCgroup(dir)
		}
	}
}

func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	slices.Reverse(dirs) // children first
	for _, d := range dirs {
		err = errors.Join(err, syscall.Rmdir(d))
	}
	return err
}
