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
	// Systemctl is the path of systemctl: absolute, for the PATH is the unit's.
	Systemctl string
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
	none := new(beginning)
	if u.ServiceResult == "exec-condition" { // ExecCondition= said that it is not to run.
		u.deliver(ctx, u.keep(ctx, time.Now(), none, Skipped, skippedSets), none)
		return
	}
	r := Result{End: time.Now(), Outcome: Failure, Status: unitStatus(u.ExitCode, u.ExitStatus)}
	switch u.ServiceResult {
	case "success":
		r.Outcome = Success
	case "timeout":
		r.Outcome, r.Status = Timeout, statusTimeout
	}
	shown, err := u.show(ctx)
	if err != nil {
		u.Warn(fmt.Errorf("%w; start, duration, CPU time and memory are left out", err))
	}
	if stop := shown.timespan("TimeoutStopUSec"); stop > 0 {
		// After that systemd would call the unit failed, for what is our fault.
		u.PushTimeout = min(u.PushTimeout, stop/2)
	}
	shown.fill(&r, u.ExitCode != "")
	u.deliver(ctx, u.keep(ctx, r.End, none, r.Outcome, func(counts map[Outcome]uint64) []familySet {
		return []familySet{completed(r, counts)}
	}), none)
}

// unitStatus returns the exit status in the way of a shell.
func unitStatus(code, status string) int {
	if code == "exited" {
		if n, err := strconv.Atoi(status); err == nil {
			return n
		}
	}
	if code == "killed" || code == "dumped" {
		if sig := signalNumber(status); sig != 0 {
			return statusSignal + sig
		}
	}
	return statusNotRun
}

// The first and the last real-time signal for programs, as glibc has them: systemd names
// the others by their distance from one of these.
const sigRTMin, sigRTMax = 34, 64

// signalNumber returns the number of a signal as systemd names it, without SIG, or 0.
func signalNumber(name string) int {
	base, rest := 0, ""
	if after, ok := strings.CutPrefix(name, "RTMIN"); ok {
		base, rest = sigRTMin, after
	} else if after, ok := strings.CutPrefix(name, "RTMAX"); ok {
		base, rest = sigRTMax, after
	} else {
		return int(unix.SignalNum("SIG" + name))
	}
	n, err := strconv.Atoi(rest) // +3, -1, or nothing
	if err != nil && rest != "" {
		return 0
	}
	return base + n
}

// properties are what systemd tells of a unit.
type properties map[string]string

const systemctlTimeout = 5 * time.Second

// show asks systemd about the unit. Versions before 248 do not know --timestamp; they tell
// whole seconds.
func (u *Unit) show(ctx context.Context) (properties, error) {
	ctx, cancel := context.WithTimeout(ctx, systemctlTimeout)
	defer cancel()
	args := []string{
		"show", "--property=ExecMainStartTimestamp,ExecMainStartTimestampMonotonic," +
			"ExecMainExitTimestamp,ExecMainExitTimestampMonotonic,InactiveExitTimestamp,InactiveExitTimestampMonotonic," +
			"CPUUsageNSec,MemoryPeak,TimeoutStopUSec",
	}
	out, err := u.systemctl(ctx, append(args, "--timestamp=us+utc", "--", u.Name))
	if err != nil {
		out, err = u.systemctl(ctx, append(args, "--", u.Name))
	}
	if err != nil {
		return nil, fmt.Errorf("systemctl show %s: %w", u.Name, err)
	}
	p := make(properties)
	for line := range strings.Lines(out) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			p[name] = value
		}
	}
	return p, nil
}

func (u *Unit) systemctl(ctx context.Context, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, u.Systemctl, args...) //nolint:gosec // The unit comes from systemd, behind a --.
	// Nothing of the unit's environment, LD_PRELOAD for example.
	cmd.Env = []string{"PATH=/usr/bin:/bin", "TZ=UTC", "LC_ALL=C"}
	out, err := cmd.Output()
	if ee, ok := errors.AsType[*exec.ExitError](err); ok && len(ee.Stderr) > 0 {
		err = errors.New(strings.Join(strings.Fields(string(ee.Stderr)), " "))
	}
	return string(out), err
}

// fill completes r with what is known. The run began when the unit was started or its main
// process was, whichever came first: the main process of a unit with several ExecStart= is
// that of the last one.
func (p properties) fill(r *Result, mainStarted bool) {
	from := "InactiveExitTimestamp"
	main := p.monotonic("ExecMainStartTimestamp")
	if unit := p.monotonic(from); mainStarted && main > 0 && (main < unit || unit == 0) {
		from = "ExecMainStartTimestamp"
	}
	begin, end := p.monotonic(from), monotonicNow()
	if exit := p.monotonic("ExecMainExitTimestamp"); mainStarted && exit >= begin {
		if t := p.time("ExecMainExitTimestamp"); !t.IsZero() {
			r.End, end = t, exit
		}
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

// units are those in which systemd writes a timespan, see systemd.time(7).
var units = map[string]time.Duration{
	"us": time.Microsecond, "ms": time.Millisecond, "s": time.Second, "min": time.Minute, "h": time.Hour,
	"d": 24 * time.Hour, "w": 7 * 24 * time.Hour,
}

// timespan returns a property such as 1min 30s, or 0 for one without end or of more than
// weeks.
func (p properties) timespan(name string) time.Duration {
	var sum time.Duration
	for field := range strings.FieldsSeq(p[name]) {
		number := strings.TrimRight(field, "abcdefghijklmnopqrstuvwxyz")
		unit, ok := units[field[len(number):]]
		n, err := strconv.ParseFloat(number, 64)
		if !ok || err != nil {
			return 0
		}
		sum += time.Duration(n * float64(unit))
	}
	return sum
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
