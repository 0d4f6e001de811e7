//go:build bench

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// runsInRound is how often a round runs each of what it compares.
const runsInRound = 40

// The scripts do by hand what promferry run does: they tell a Pushgateway how a command
// ended. Their arguments are the group's URL and the command.
const (
	scriptEnd = `#!/bin/sh
url=$1
shift
start=$(date +%s)
"$@"
status=$?
end=$(date +%s)
success=0
[ $status -ne 0 ] || success=1
curl -sSf --data-binary @- "$url" <<END
# TYPE script_last_start_timestamp_seconds gauge
script_last_start_timestamp_seconds $start
# TYPE script_last_completion_timestamp_seconds gauge
script_last_completion_timestamp_seconds $end
# TYPE script_last_duration_seconds gauge
script_last_duration_seconds $((end - start))
# TYPE script_last_exit_code gauge
script_last_exit_code $status
# TYPE script_last_success gauge
script_last_success $success
# TYPE script_running gauge
script_running 0
END
exit $status
`
	scriptStart = `curl -sSf --data-binary @- "$url" <<END
# TYPE script_last_start_timestamp_seconds gauge
script_last_start_timestamp_seconds $start
# TYPE script_running gauge
script_running 1
END
`
	commandLine = `"$@"` + "\n"
)

// batchRun measures what promferry run costs a command that takes no time, beside the
// command alone and beside a script with curl.
func batchRun(ctx context.Context, promferry string) error {
	dir, remove, err := diskDir()
	if err != nil {
		return err
	}
	defer remove()
	command, err := exec.LookPath("true")
	if err != nil {
		return err
	}
	one, two := filepath.Join(dir, "one.sh"), filepath.Join(dir, "two.sh")
	if err := os.WriteFile(one, []byte(scriptEnd), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(two, []byte(strings.Replace(scriptEnd, commandLine, scriptStart+commandLine, 1)), 0o600); err != nil {
		return err
	}
	gateway, err := real.Pushgateway(ctx, "")
	if err != nil {
		return err
	}
	defer gateway.Kill()
	group := gateway.URL + "/metrics/job/bench/instance/"
	run := []string{promferry, "run", "--push.url=" + gateway.URL, "--state.dir=" + filepath.Join(dir, "state"), "--job=bench"}
	compared := []struct {
		name string
		args []string
		// beside is the index of what the ratios are to, 0 for none.
		beside int
	}{
		{"true", []string{command}, 0},
		{"sh, curl at the start and at the end", []string{"sh", two, group + "two", command}, 0},
		{"promferry run", append(run, "--instance=start", "--", command), 1},
		{"sh, curl at the end", []string{"sh", one, group + "one", command}, 0},
		{"promferry run --no-start-push", append(run, "--instance=end", "--no-start-push", "--", command), 3},
	}
	costs := make([][]cost, len(compared))
	if err := onMeasuredCore(ctx, func() error {
		for range rounds {
			for i, c := range compared {
				m, err := costOf(ctx, c.args)
				if err != nil {
					return err
				}
				costs[i] = append(costs[i], m)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := counted(ctx, gateway, "start", "end"); err != nil {
		return err
	}

	fmt.Printf("What it costs to tell a Pushgateway how `true` ended; %d rounds of %d runs:\n", rounds, runsInRound)
	t := table()
	_, _ = fmt.Fprintln(t, "\twall ms\tCPU ms\tpeak MiB\tratio of wall\tof CPU\t")
	for i, c := range compared {
		wall := func(c cost) float64 { return c.wall }
		cpu := func(c cost) float64 { return c.cpu }
		peak := func(c cost) float64 { return c.peak }
		_, _ = fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.1f\t", c.name, 1000*medianOf(costs[i], wall), 1000*medianOf(costs[i], cpu), mib(medianOf(costs[i], peak)))
		if c.beside != 0 {
			_, _ = fmt.Fprintf(t, "%.2f\t%.2f\t", ratioOf(costs[i], costs[c.beside], wall), ratioOf(costs[i], costs[c.beside], cpu))
		} else {
			_, _ = fmt.Fprint(t, "\t\t")
		}
		_, _ = fmt.Fprintln(t)
	}
	return endTable(t)
}

// counted checks that a Pushgateway got all that the runs were to push.
func counted(ctx context.Context, gateway *real.Gateway, instances ...string) error {
	page, err := gateway.Get(ctx, "/metrics")
	if err != nil {
		return err
	}
	// Those of costOf, and of peakOf within.
	for _, instance := range instances {
		want := fmt.Sprintf(`batch_job_runs_total{instance="%s",job="bench",outcome="success"} %d`, instance, rounds*(runsInRound+1))
		if !bytes.Contains(page, []byte(want+"\n")) {
			return fmt.Errorf("the Pushgateway does not expose %s", want)
		}
	}
	return nil
}

// cost is what a run takes: seconds, seconds and bytes.
type cost struct{ wall, cpu, peak float64 }

// costOf runs a command as often as a round does, and returns the medians, with the peak
// of one more run.
func costOf(ctx context.Context, args []string) (cost, error) {
	var wall, cpu []float64
	for range runsInRound {
		cmd := clean(ctx, args)
		begin := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			return cost{}, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		wall = append(wall, time.Since(begin).Seconds())
		cpu = append(cpu, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
	}
	peak, err := peakOf(ctx, args)
	return cost{wall: median(wall), cpu: median(cpu), peak: peak}, err
}

// clean returns a command that has nothing of this process's environment but what it needs.
func clean(ctx context.Context, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	return cmd
}

// peakOf runs a command, and returns the peak of the resident memory of its largest
// process, in bytes. A child of ours would be charged for ours: Go starts it with vfork(2),
// and the kernel counts what a process had before execve(2) as its own. So a shell, which
// forks, starts it, and leaves it to us to wait for. It begins when that shell is gone, which
// would otherwise wait for one that ends soon.
func peakOf(ctx context.Context, args []string) (float64, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 0, err
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }()
	held, release, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer func() { _ = release.Close() }()
	shell := clean(ctx, append([]string{"sh", "-c", `{ read _ <&3; exec "$@" 3<&-; } >/dev/null 2>&1 & echo $!`, "sh"}, args...))
	shell.ExtraFiles = []*os.File{held} // Number 3.
	shell.Stderr = os.Stderr            // Output would wait for the end of any other.
	out, err := shell.Output()
	_ = held.Close()
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return 0, err
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return 0, err
	}
	_ = release.Close()
	state, err := p.Wait()
	if err != nil {
		return 0, err
	}
	usage, ok := state.SysUsage().(*syscall.Rusage)
	if !ok || !state.Success() {
		return 0, fmt.Errorf("%s: %v", strings.Join(args, " "), state)
	}
	return float64(usage.Maxrss) * 1024, nil
}

// onMeasuredCore calls f on the core for what is measured, where everything that f starts
// runs as well.
func onMeasuredCore(ctx context.Context, f func() error) error {
	if err := pin(ctx, os.Getpid(), measuredCore); err != nil {
		return err
	}
	return errors.Join(f(), pin(ctx, os.Getpid(), serverCore))
}

// diskVariable names a directory on another disk than the checkout's, to measure that.
const diskVariable = "BENCH_DIR"

// diskDir makes a directory on the disk of the checkout, where what is to survive a loss
// of power has to be waited for, and returns how to remove it.
func diskDir() (string, func(), error) {
	root := os.Getenv(diskVariable)
	if root == "" {
		checkout, err := real.Root()
		if err != nil {
			return "", nil, err
		}
		root = filepath.Join(checkout, ".tools")
	}
	dir, err := os.MkdirTemp(root, "bench-")
	if err != nil {
		return "", nil, err
	}
	remove := func() { _ = os.RemoveAll(dir) }
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		remove()
		return "", nil, err
	}
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		remove()
		return "", nil, fmt.Errorf("%s is in memory: nothing there is synced", root)
	}
	return dir, remove, nil
}

// table returns a table on stdout, whose cells end with tabs.
func table() *tabwriter.Writer {
	return tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
}

func endTable(t *tabwriter.Writer) error {
	_, _ = io.WriteString(t, "\n")
	return t.Flush()
}

// medianOf returns the median of what value returns for each of all.
func medianOf[T any](all []T, value func(T) float64) float64 {
	values := make([]float64, 0, len(all))
	for _, v := range all {
		values = append(values, value(v))
	}
	return median(values)
}

// ratioOf returns the median of the ratios of each round.
func ratioOf[T any](ours, theirs []T, value func(T) float64) float64 {
	ratios := make([]float64, 0, len(ours))
	for i := range ours {
		ratios = append(ratios, value(ours[i])/value(theirs[i]))
	}
	return median(ratios)
}
