package real

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stopBudget is how long Stop waits between SIGTERM and SIGKILL: longer than any
// of the programs takes to end by itself (the agent at most 20 s).
const stopBudget = 30 * time.Second

// Command says what to start.
type Command struct {
	// Path is the program, Args what follows it.
	Path string
	Args []string
	// Env is all of its environment but PATH, HOME and TMPDIR, which it has from this
	// process. Nothing else of this process's environment reaches it.
	Env []string
	// Dir is its working directory; empty means this process's.
	Dir string
	// Stdin is what it reads; nil means nothing.
	Stdin io.Reader
	// Log receives what it writes as it comes, next to Output; nil means nowhere.
	// It is not used after the process has ended.
	Log io.Writer
}

// A Process is a program that has been started. It leads a process group of its own,
// so that a Ctrl-C at the terminal does not reach it, and it is killed when this
// process dies.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of cmd.Wait; read after done

	mu             sync.Mutex // guards the buffers and Command.Log
	stdout, stderr bytes.Buffer
}

// Start starts command. The caller ends it with Stop or Kill.
func Start(command Command) (*Process, error) {
	p := &Process{done: make(chan struct{})}
	//nolint:noctx // ended by Stop, which asks before it kills
	p.cmd = exec.Command(command.program(), command.Args...)
	p.cmd.Env = command.Env
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			p.cmd.Env = append(p.cmd.Env, name+"="+value)
		}
	}
	p.cmd.Dir = command.Dir
	p.cmd.Stdin = command.Stdin
	p.cmd.Stdout = &output{p, &p.stdout, command.Log}
	p.cmd.Stderr = &output{p, &p.stderr, command.Log}
	p.cmd.SysProcAttr = attributes()
	p.cmd.WaitDelay = time.Second // for a child that keeps stdout open

	// The kernel kills the child when the thread that started it ends, which a Go
	// runtime may do with a thread at any time. So the goroutine that waits for the
	// child keeps that thread. It ends with the child, which Stop and Kill wait for.
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// PID returns the process ID, which is also that of its process group.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Stdout returns what the process has written to its standard output so far.
func (p *Process) Stdout() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdout.String()
}

// Stderr returns what the process has written to its standard error so far: for all
// programs of this field, the log.
func (p *Process) Stderr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stderr.String()
}

// Done returns a channel that is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// State tells how the process ended, and what CPU time and memory it took. It waits
// for the end.
func (p *Process) State() *os.ProcessState {
	<-p.done
	return p.cmd.ProcessState
}

// Signal sends sig to the process.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Wait waits for the process to end by itself, or for ctx, and returns its exit
// status: 128+n when signal n ended it.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return 0, fmt.Errorf("%s has not ended: %w\n%s", p.cmd.Path, context.Cause(ctx), p.Stderr())
	}
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// Stop asks the process to end with SIGTERM, waits, and kills its group if it takes
// longer than 30 s. It returns an error if the process failed. One that handles no
// signal and so dies of this one (node_exporter) did not: where the difference
// matters, Wait tells. A process that has ended before keeps its status.
func (p *Process) Stop() error {
	_ = p.Signal(syscall.SIGTERM) // fails when it has ended
	select {
	case <-p.done:
	case <-time.After(stopBudget):
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM\n%s", p.cmd.Path, stopBudget, p.Stderr())
	}
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGTERM {
		return nil
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w\n%s", p.cmd.Path, p.err, p.Stderr())
	}
	return nil
}

// Kill ends the process and its children with SIGKILL, and waits. A process that has
// ended is left alone.
func (p *Process) Kill() {
	select {
	case <-p.done:
		return // its ID may belong to another by now
	default:
	}
	_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
	<-p.done
}

// WaitLog waits until the process has written a line to its standard error that re
// matches, and returns the submatches of the first one. It fails when ctx or the
// process ends first.
func (p *Process) WaitLog(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	return p.waitFor(ctx, re, p.Stderr)
}

// WaitStdout is WaitLog for the standard output.
func (p *Process) WaitStdout(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	return p.waitFor(ctx, re, p.Stdout)
}

func (p *Process) waitFor(ctx context.Context, re *regexp.Regexp, read func() string) ([]string, error) {
	var match []string
	err := Until(ctx, func(context.Context) error {
		ended := false
		select {
		case <-p.done: // before read: what it wrote last counts
			ended = true
		default:
		}
		for line := range strings.Lines(read()) {
			if match = re.FindStringSubmatch(strings.TrimSuffix(line, "\n")); match != nil {
				return nil
			}
		}
		if ended {
			return fatal{fmt.Errorf("%s ended: %s\n%s", p.cmd.Path, p.State(), p.Stderr())}
		}
		return fmt.Errorf("%s has not written %q:\n%s", p.cmd.Path, re, p.Stderr())
	})
	return match, err
}

// Until calls check, 20 times a second, until it returns nil. When ctx ends first it
// returns check's last error. A context without a deadline gets one of a minute.
//
// It is for what only the outside of a real program shows.
func Until(ctx context.Context, check func(context.Context) error) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Minute)
		defer cancel()
	}
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if f, ok := errors.AsType[fatal](err); ok {
			return f.error
		}
		if last == nil || ctx.Err() == nil {
			last = err // not the cancellation, which says less
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// fatal ends Until at once.
type fatal struct{ error }

// output keeps what a process writes to one of its streams.
type output struct {
	p   *Process
	buf *bytes.Buffer
	log io.Writer
}

func (o *output) Write(b []byte) (int, error) {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	if o.log != nil {
		_, _ = o.log.Write(b)
	}
	return o.buf.Write(b)
}
