//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// TestDemo runs what `make demo` runs, does what it says, and ends it as Ctrl-C does.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	demo, tmp := startDemo(ctx, t)
	children := childrenOf(t, demo.PID())
	if len(children) != 3 {
		t.Errorf("the demo runs processes %v, want three", children)
	}
	listed := said(t, demo, `(?m)^  curl (http://\S+/sd) `)
	if body, err := real.Get(ctx, listed); err != nil || !bytes.Contains(body, []byte(`"job":"node"`)) {
		t.Errorf("%s: %v: %s", listed, err, body)
	}
	target := said(t, demo, `(?m)^  curl (http://\S+/groups/\S+) `)
	if body, err := real.Get(ctx, target); err != nil || !bytes.Contains(body, []byte("\nnode_load1{")) {
		t.Errorf("%s: %v: %s", target, err, body)
	}
	exporter, err := strconv.Atoi(said(t, demo, `(?m)^  kill ([0-9]+) `))
	if err != nil || !slices.Contains(children, exporter) {
		t.Fatalf("process %d, %v, is none of the demo's", exporter, err)
	}
	if err := syscall.Kill(exporter, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	const down = `up\{instance="[^"]+",job="node"\} 0\n\S+ answers\n  503 [^\n]+ is down since [^\n]+\n`
	if _, err := demo.WaitStdout(ctx, regexp.MustCompile(`^  503 `)); err != nil {
		t.Fatal(err)
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
		`(?m)^promferry agent +http://\S+/ `,
		`(?m)^promferry gateway +http://\S+/ `,
		`(?m)^node_load1\{instance="[^"]+",job="node"\} [0-9.]+$`,
		`(?m)^up\{instance="[^"]+",job="node"\} 1$`,
		`node_exporter is dead\. .*\n` + down,
		`The agent has stopped\. .*\n` + down + `$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the output has no %s", want)
		}
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
	command.Env = []string{"PUSHGATEWAY_BIN=/dev/null"} // It needs none.
	if value := os.Getenv("NODE_EXPORTER_BIN"); value != "" {
		command.Env = append(command.Env, "NODE_EXPORTER_BIN="+value)
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

// said returns what the demo has printed, as the group of a regular expression.
func said(t *testing.T, demo *real.Process, re string) string {
	t.Helper()
	match := regexp.MustCompile(re).FindStringSubmatch(demo.Stdout())
	if match == nil {
		t.Fatalf("the output has no %s:\n%s", re, demo.Stdout())
	}
	return match[1]
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
