package batch

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Unit is a systemd unit that has stopped, as its ExecStopPost= sees it. The fields are
// what systemd passes in the environment, see systemd.exec(5).
type Unit struct {
	Job
	// Name is the unit's.
	Name string
	// ServiceResult is $SERVICE_RESULT.
	ServiceResult string
	// ExitCode and ExitStatus are $EXIT_CODE and $EXIT_STATUS, both empty when the main
	// process was never started.
	ExitCode, ExitStatus string
}

// JobOf returns what the job of a unit is called: as the unit, without ".service".
func JobOf(unit string) string { return strings.TrimSuffix(unit, ".service") }

// IsOwnUnit tells whether a unit is one of promferry itself, which record leaves alone:
// it would tell of itself, by way of an agent that has just stopped.
func IsOwnUnit(unit string) bool {
	return strings.HasPrefix(unit, "promferry-") || strings.HasPrefix(unit, "promferry.")
}

// Record pushes how the unit ended.
func (u *Unit) Record(ctx context.Context) {
	if u.ServiceResult == "exec-condition" { // ExecCondition= said that it is not to run.
		u.report(ctx, time.Now(), nil, runs(u.count(ctx, Skipped)))
		return
	}
	r := Result{End: time.Now(), Outcome: Failure, Status: unitStatus(u.ExitCode, u.ExitStatus)}
	switch u.ServiceResult {
	case "success":
		r.Outcome = Success
	case "timeout":
		r.Outcome, r.Status = Timeout, statusTimeout
	}
	shown, err := show(ctx, u.Name)
	if err != nil {
		u.Warn(fmt.Errorf("%w; start, duration, CPU time and memory are left out", err))
	}
	shown.fill(&r, u.ExitCode != "")
	u.report(ctx, r.End, nil, completed(r, u.count(ctx, r.Outcome)))
}

// unitStatus returns the exit status in the way of a shell.
func unitStatus(code, status string) int {
	if code == "exited" {
		if n, err := strconv.Atoi(status); err == nil {
			return n
		}
	}
	if code == "killed" || code == "dumped" {
		if sig := unix.SignalNum("SIG" + status); sig != 0 {
			return statusSignal + int(sig)
		}
		if n, err := strconv.Atoi(status); err == nil { // A real-time signal, in some versions.
			return statusSignal + n
		}
	}
	return statusNotRun
}

// properties are what systemd tells of a unit.
type properties map[string]string

const systemctlTimeout = 5 * time.Second

// show asks systemd about a unit. Versions before 248 do not know --timestamp; they tell
// whole seconds.
func show(ctx context.Context, unit string) (properties, error) {
	ctx, cancel := context.WithTimeout(ctx, systemctlTimeout)
	defer cancel()
	args := []string{
		"show", "--property=ExecMainStartTimestamp,ExecMainStartTimestampMonotonic," +
			"ExecMainExitTimestamp,ExecMainExitTimestampMonotonic,InactiveExitTimestamp,InactiveExitTimestampMonotonic," +
			"CPUUsageNSec,MemoryPeak",
	}
	out, err := systemctl(ctx, append(args, "--timestamp=us+utc", "--", unit))
	if err != nil {
		out, err = systemctl(ctx, append(args, "--", unit))
	}
	if err != nil {
		return nil, fmt.Errorf("systemctl show %s: %w", unit, err)
	}
	p := make(properties)
	for line := range strings.Lines(out) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			p[name] = value
		}
	}
	return p, nil
}

func systemctl(ctx context.Context, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, "systemctl", args...) //nolint:gosec // The unit comes from systemd, behind a --.
	cmd.Env = append(cmd.Environ(), "TZ=UTC", "LC_ALL=C")
	out, err := cmd.Output()
	if ee, ok := errors.AsType[*exec.ExitError](err); ok && len(ee.Stderr) > 0 {
		err = errors.New(strings.Join(strings.Fields(string(ee.Stderr)), " "))
	}
	return string(out), err
}

// fill completes r with what is known. A main process that was not started has no times of
// its own: those of the unit's start stand for them.
func (p properties) fill(r *Result, mainStarted bool) {
	from := "InactiveExitTimestamp"
	if mainStarted && p.monotonic("ExecMainStartTimestamp") > 0 {
		from = "ExecMainStartTimestamp"
	}
	begin := p.monotonic(from)
	end := p.monotonic("ExecMainExitTimestamp")
	if t := p.time("ExecMainExitTimestamp"); from == "ExecMainStartTimestamp" && end >= begin && !t.IsZero() {
		r.End = t
	} else {
		end = monotonicNow()
	}
	if t := p.time(from); begin > 0 && end >= begin && !t.IsZero() {
		r.Start, r.Duration = t, end-begin
	}
	if ns, ok := p.number("CPUUsageNSec"); ok {
		r.CPU = map[string]time.Duration{"total": time.Duration(ns)}
	}
	if bytes, ok := p.number("MemoryPeak"); ok {
		r.MaxRSS = bytes
	}
}

// number returns a property that is one. systemd says that it has none in words, or with
// the largest that there is.
func (p properties) number(name string) (int64, bool) {
	n, err := strconv.ParseInt(p[name], 10, 64)
	return n, err == nil && n >= 0
}

// monotonic returns a time on the clock that nobody sets.
func (p properties) monotonic(name string) time.Duration {
	usec, _ := p.number(name + "Monotonic")
	return time.Duration(usec) * time.Microsecond
}

func monotonicNow() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// time returns a point in time, zero where there is none.
func (p properties) time(name string) time.Time {
	t, err := time.Parse("Mon 2006-01-02 15:04:05 MST", p[name]) // Reads a fraction as well.
	if err != nil {
		return time.Time{}
	}
	return t
}
