package batch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The exit statuses that a shell, env(1) and timeout(1) use too.
const (
	statusTimeout       = 124
	statusNotRun        = 125
	statusNotExecutable = 126
	statusNotFound      = 127
	statusSignal        = 128 // and the signal's number
)

// process is a command that is to be run as if it were run without us: with our own
// standard streams, terminal, environment and signals.
type process struct {
	args                  []string
	env                   []string
	timeout, killAfter    time.Duration
	stdin, stdout, stderr *os.File
	signals               <-chan os.Signal
	// onStart is called when the command has been started.
	onStart func(pid int, at time.Time)
}

// run runs the command. The error tells why it could not be run, or what we did to it.
func (p *process) run() (Result, error) {
	terminal := controllingTerminal()
	if terminal != nil {
		defer func() { _ = terminal.Close() }()
	}
	if p.timeout > 0 {
		// So that children whose parent has ended are still found at the timeout.
		_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
	begin := time.Now()
	cmd, err := p.start()
	if err != nil {
		end := time.Now()
		return Result{
			Start: begin, End: end, Duration: end.Sub(begin), Status: startStatus(err), Outcome: Failure,
			CPU: map[string]time.Duration{"user": 0, "system": 0},
		}, err
	}
	if p.onStart != nil {
		p.onStart(cmd.Process.Pid, begin)
	}
	g := &group{command: cmd.Process, terminal: terminal}
	timedOut := p.wait(cmd, g)
	end := time.Now()
	r := Result{Start: begin, End: end, Duration: end.Sub(begin), Outcome: Success, Status: exitStatus(cmd.ProcessState)}
	r.CPU = map[string]time.Duration{"user": cmd.ProcessState.UserTime(), "system": cmd.ProcessState.SystemTime()}
	if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		r.MaxRSS = int64(usage.Maxrss) << 10 //nolint:unconvert // Not an int64 everywhere. In KiB, see getrusage(2).
	}
	switch {
	case timedOut:
		r.Status, r.Outcome = statusTimeout, Timeout
		return r, fmt.Errorf("ended after its time of %v", p.timeout)
	case r.Status != 0:
		r.Outcome = Failure
	}
	return r, nil
}

// start starts the command as execvp(3) would.
func (p *process) start() (*exec.Cmd, error) {
	path, err := lookPath(p.args[0])
	if err != nil {
		return nil, err
	}
	cmd := p.command(path, p.args)
	err = cmd.Start()
	if errors.Is(err, syscall.ENOEXEC) {
		// A script without a first line that names its interpreter.
		cmd = p.command("/bin/sh", append([]string{"sh", path}, p.args[1:]...))
		err = cmd.Start()
	}
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	if errors.Is(err, syscall.ENOENT) { // The file itself was found.
		err = fmt.Errorf("what its first line names to run it: %w", err)
	}
	return cmd, err
}

func (p *process) command(path string, args []string) *exec.Cmd {
	return &exec.Cmd{
		Path: path, Args: args, Env: p.env,
		Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, // Files: given to it as they are.
	}
}

var errNotExecutable = errors.New("not executable")

// lookPath finds a command as execvp(3) does: also in the working directory when PATH
// says so, and telling what is not there from what may not be executed.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil || errors.Is(err, exec.ErrDot) {
		return path, nil
	}
	if strings.Contains(name, "/") {
		if _, statErr := os.Stat(name); statErr == nil || errors.Is(statErr, syscall.EACCES) {
			return "", errNotExecutable
		}
		return "", syscall.ENOENT
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) { //nolint:forbidigo // As exec.LookPath does.
		if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.Mode().IsRegular() {
			return "", errNotExecutable
		}
	}
	return "", exec.ErrNotFound
}

// startStatus returns the exit status for a command that could not be started.
func startStatus(err error) int {
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR):
		return statusNotFound
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return statusNotRun // No fault of the command.
	default:
		return statusNotExecutable
	}
}

func exitStatus(state *os.ProcessState) int {
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return statusSignal + int(ws.Signal())
	}
	return state.ExitCode()
}

// wait waits for the command to end, forwards signals to it, and ends it when its time is
// up.
func (p *process) wait(cmd *exec.Cmd, g *group) (timedOut bool) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // What there is to know is in cmd.ProcessState.
	}()
	var timeout, kill <-chan time.Time
	if p.timeout > 0 {
		timeout = time.After(p.timeout)
	}
	for {
		select {
		case sig := <-p.signals:
			if s, ok := sig.(syscall.Signal); ok && !g.hasFromTerminal(s) {
				_ = cmd.Process.Signal(s) // Should it just have ended, nobody is there to hear.
			}
		case <-timeout:
			timedOut = true
			g.signal(syscall.SIGTERM)
			g.signal(syscall.SIGCONT) // A stopped process hears nothing.
			kill = time.After(p.killAfter)
		case <-kill:
			g.signal(syscall.SIGKILL)
			kill = nil
		case <-ended:
			for len(p.signals) > 0 {
				<-p.signals // Meant for the command, as it was there.
			}
			if timedOut {
				g.end(kill)
			}
			return timedOut
		}
	}
}

// controllingTerminal opens the terminal that this process belongs to, or returns nil.
func controllingTerminal() *os.File {
	f, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	return f
}

// group is the processes of a command. It stays in our process group: whoever signals that
// one, as a terminal, a shell or a CI runner does, reaches all of it, and others than ours may
// be in it, as in a pipeline of a shell. So what is to be ended is what descends from us in
// it.
type group struct {
	command  *os.Process
	terminal *os.File
}

// hasFromTerminal tells whether the group has a signal already, from its terminal, which
// sends these to all that is in the foreground.
func (g *group) hasFromTerminal(sig syscall.Signal) bool {
	switch sig {
	case syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH:
		if g.terminal == nil {
			return false
		}
		foreground, err := unix.IoctlGetInt(int(g.terminal.Fd()), unix.TIOCGPGRP)
		return err == nil && foreground == syscall.Getpgrp()
	case syscall.SIGPIPE:
		return true // Ours.
	default:
		return false
	}
}

func (g *group) signal(sig syscall.Signal) {
	for _, pid := range g.members() {
		if pid != g.command.Pid {
			_ = syscall.Kill(pid, sig)
		}
	}
	_ = g.command.Signal(sig) // Does nothing once it has been waited for.
}

// killed is how long end waits for processes that were killed to be gone.
const killed = time.Second

// end waits, after the command itself has ended, for what is left of its group, kills that
// when kill says so, and returns when nothing is left.
func (g *group) end(kill <-chan time.Time) {
	if kill == nil { // They were killed before.
		kill = time.After(0)
	}
	var giveUp <-chan time.Time
	for len(g.members()) > 0 {
		select {
		case <-time.After(10 * time.Millisecond):
			if giveUp != nil {
				g.signal(syscall.SIGKILL) // Those that were made in the meantime.
			}
		case <-kill:
			g.signal(syscall.SIGKILL)
			giveUp = time.After(killed)
		case <-giveUp:
			return
		}
	}
}

// members returns the living processes of the group.
func (g *group) members() []int {
	all := processes()
	var pids []int
	ours := syscall.Getpgrp()
	parents := []int{os.Getpid()}
	for len(parents) > 0 {
		var children []int
		for pid, p := range all {
			if slices.Contains(parents, p.parent) {
				children = append(children, pid)
				if p.group == ours {
					pids = append(pids, pid)
				}
			}
		}
		parents = children
	}
	return pids
}

type procStat struct{ parent, group int }

// processes returns the processes that run, as proc_pid_stat(5) shows them.
func processes() map[int]procStat {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer func() { _ = dir.Close() }()
	names, _ := dir.Readdirnames(-1)
	all := make(map[int]procStat)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue // It has ended.
		}
		var state string
		var p procStat
		_, err = fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &p.parent, &p.group)
		if err == nil && state != "Z" && state != "X" {
			all[pid] = p
		}
	}
	return all
}
