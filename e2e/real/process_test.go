package real

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func start(t *testing.T, script string) *Process {
	t.Helper()
	p, err := Start(Command{Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"A=b"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func TestProcessSeesOnlyItsEnvironment(t *testing.T) {
	t.Setenv("PROMFERRY_INSTANCE", "not for the child")
	p := start(t, "env; echo log >&2")
	if status, err := p.Wait(t.Context()); status != 0 || err != nil {
		t.Fatal(status, err)
	}
	if out := p.Stdout(); strings.Contains(out, "PROMFERRY") || !strings.Contains(out, "A=b\n") || !strings.Contains(out, "PATH=") {
		t.Errorf("environment:\n%s", out)
	}
	if log := p.Stderr(); log != "log\n" {
		t.Errorf("stderr %q", log)
	}
}

func TestStop(t *testing.T) {
	p := start(t, `trap 'exit 0' TERM; echo up >&2; while :; do sleep 0.01; done`)
	if _, err := p.WaitLog(t.Context(), regexp.MustCompile("up")); err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Errorf("second Stop: %v", err)
	}

	p = start(t, "echo why >&2; exit 3")
	if status, err := p.Wait(t.Context()); status != 3 || err != nil {
		t.Error(status, err)
	}
	if err := p.Stop(); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("Stop of a failed process: %v", err)
	}
}

func TestKillTakesTheChildren(t *testing.T) {
	p := start(t, "sleep 1000 & echo pid=$! >&2; wait")
	match, err := p.WaitLog(t.Context(), regexp.MustCompile(`pid=(\d+)`))
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()
	if status, err := p.Wait(t.Context()); status != 128+int(syscall.SIGKILL) || err != nil {
		t.Error(status, err)
	}
	pid, _ := strconv.Atoi(match[1])
	err = Until(t.Context(), func(context.Context) error { // until init has reaped it
		if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(state), ") Z ") {
			return fmt.Errorf("child %d is alive", pid)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestWaitLogOfAnEndedProcess(t *testing.T) {
	p := start(t, "echo no >&2; exit 1")
	_, err := p.WaitLog(t.Context(), regexp.MustCompile("yes"))
	if err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("got %v", err)
	}
}

func TestUntilTellsWhy(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	why := errors.New("not there")
	err := Until(ctx, func(context.Context) error { return why })
	if !errors.Is(err, why) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestFindTakesTheVariableFirst(t *testing.T) {
	t.Setenv("PUSHGATEWAY_BIN", "/bin/sh")
	if path, err := Find("pushgateway"); path != "/bin/sh" || err != nil {
		t.Error(path, err)
	}
	t.Setenv("PUSHGATEWAY_BIN", "/nonexistent")
	if _, err := Find("pushgateway"); err == nil || !strings.Contains(err.Error(), "PUSHGATEWAY_BIN") {
		t.Errorf("got %v", err)
	}
	if _, err := Find("no_such_program"); err == nil || !strings.Contains(err.Error(), "NO_SUCH_PROGRAM_BIN") {
		t.Errorf("got %v", err)
	}
}
