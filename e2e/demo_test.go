//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// TestDemo runs what `make demo` runs, and ends it as Ctrl-C does.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	demo, tmp := startDemo(ctx, t)
	children := childrenOf(t, demo.PID())
	if len(children) != 3 {
		t.Errorf("the demo runs processes %v, want three", children)
	}

	if err := demo.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if status, err := demo.Wait(ctx); status != 0 || err != nil {
		t.Errorf("exit status %d, %v\n%s", status, err, demo.Stderr())
	}
	out := demo.Stdout()
	for _, want := range []string{
		`(?m)^node_exporter +http://\S+/metrics `,
		`(?m)^promferry agent +http://\S+/metrics `,
		`(?m)^Pushgateway +http://`,
		`(?m)^node_load1\{instance="[^"]+",job="node"\} [0-9.]+$`,
		`(?m)^up\{instance="[^"]+",job="node"\} 1$`,
		`(?s)After the agent's stop.*\nup\{instance="[^"]+",job="node"\} 0\n$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the output has no %s", want)
		}
	}
	if after := out[strings.LastIndex(out, "After"):]; strings.Contains(after, "node_load1") {
		t.Errorf("node_load1 has outlived the agent")
	}
	if t.Failed() {
		t.Log(out)
	}
	for _, pid := range children {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is left: %v", pid, err)
		}
	}
	if left, err := os.ReadDir(tmp); len(left) != 0 || err != nil {
		t.Errorf("left in the temporary directory: %v, %v", left, err)
	}
}

// TestDemoKilled shows that nothing outlives even a demo (and so a test) that is
// killed before it can clean up.
func TestDemoKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	demo, _ := startDemo(ctx, t)
	children := childrenOf(t, demo.PID())

	if err := demo.Signal(syscall.SIGKILL); err != nil { // the demo alone, not its group
		t.Fatal(err)
	}
	for _, pid := range children {
		err := real.Until(ctx, func(context.Context) error {
			if state, _ := stat(pid); state == "" || state == "Z" {
				return nil
			}
			return fmt.Errorf("process %d of %v is left", pid, children)
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// startDemo returns a demo that runs and has shown its lines, and the empty directory
// that it has for its temporary files.
func startDemo(ctx context.Context, t *testing.T) (demo *real.Process, tmp string) {
	t.Helper()
	root, err := real.Root()
	if err != nil {
		t.Fatal(err)
	}
	promferry, err := real.Promferry(ctx)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "demo")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", bin, "./e2e/demo")
	build.Dir = root
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}

	tmp = t.TempDir()
	t.Setenv("TMPDIR", tmp)
	command := real.Command{Path: bin, Args: []string{"-promferry", promferry}, Dir: root}
	for _, name := range []string{"NODE_EXPORTER_BIN", "PUSHGATEWAY_BIN"} {
		if value := os.Getenv(name); value != "" {
			command.Env = append(command.Env, name+"="+value)
		}
	}
	demo, err = real.Start(command)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(demo.Kill)
	if _, err := demo.WaitStdout(ctx, regexp.MustCompile("^Ctrl-C")); err != nil {
		t.Fatal(err)
	}
	return demo, tmp
}

// childrenOf returns the processes whose parent is process parent.
func childrenOf(t *testing.T, parent int) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var children []int
	for _, entry := range entries {
		var pid int
		if _, err := fmt.Sscan(entry.Name(), &pid); err != nil {
			continue
		}
		if _, ppid := stat(pid); ppid == parent {
			children = append(children, pid)
		}
	}
	return children
}

// stat returns the state and the parent of a process: "" and 0 if there is none.
func stat(pid int) (state string, parent int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, fields, _ := strings.Cut(string(b), ") ") // after the name, in brackets
	_, _ = fmt.Sscan(fields, &state, &parent)
	return state, parent
}
