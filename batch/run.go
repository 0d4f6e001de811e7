// Package batch pushes how batch jobs ended: commands that it runs, and systemd units that
// tell it. What cannot be pushed now waits in an outbox.
package batch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/lockfile"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

// MetricsFileVariable is the environment variable that tells a command where it may write
// metrics of its own.
const MetricsFileVariable = "PROMFERRY_METRICS_FILE"

// StatusSkipped is what a run returns that another one keeps from beginning: EX_TEMPFAIL
// of sysexits.h.
const StatusSkipped = 75

// maxMetricsFile is up to which size a file of metrics is read, in bytes.
const maxMetricsFile = 64 << 20

// Job is what the runs of a batch job have in common.
type Job struct {
	// Key names the group of the job's metrics.
	Key pushgw.GroupingKey
	// Courier brings them. PushTimeout bounds all of what it does after a run.
	Courier     *Courier
	PushTimeout time.Duration
	// Jobs counts runs, and keeps two from overlapping. Nil: neither.
	Jobs *Jobs
	// Textfile is the directory in which a file for the textfile collector of a
	// node_exporter is written as well; empty means none.
	Textfile string
	// Warn is told of what is wrong, a sentence each time. A run goes on all the same.
	Warn func(error)
}

// Run is a command that is run once.
type Run struct {
	Job
	// Args are the command and its arguments, Env its environment.
	Args, Env             []string
	Stdin, Stdout, Stderr *os.File
	// Signals are passed on to the command. Once that has ended, the first that would end a
	// process ends the pushing: what could not be pushed waits.
	Signals <-chan os.Signal
	// Timeout is how long the command may run; 0 means without end. KillAfter is how long
	// it has to end then before it is killed.
	Timeout, KillAfter time.Duration
	// NoOverlap skips the run when another one of the same group is going on.
	NoOverlap bool
	// StartPush adds, when the command has been started, that it runs.
	StartPush bool
}

// Run runs the command, pushes how it ended, and returns the status to exit with.
func (r *Run) Run(ctx context.Context) int {
	if r.NoOverlap && r.Jobs != nil {
		lock, err := r.Jobs.Lock(r.Key)
		if held, ok := errors.AsType[*lockfile.HeldError](err); ok {
			r.skipped(ctx, held)
			return StatusSkipped
		}
		if err != nil {
			r.Warn(err)
		}
		if lock == nil {
			r.Warn(errors.New("without a lock, nothing keeps a second run from overlapping with this one"))
		}
		return r.run(ctx, lock)
	}
	return r.run(ctx, nil)
}

// skipped counts and pushes that the run did not begin.
func (r *Run) skipped(ctx context.Context, held *lockfile.HeldError) {
	if held.PID == 0 {
		r.Warn(errors.New("skipped: another run is going on"))
	} else {
		r.Warn(fmt.Errorf("skipped: another run is going on, PID %d", held.PID))
	}
	none := new(beginning)
	r.deliver(ctx, r.keep(ctx, time.Now(), none, Skipped, skippedSets), none)
}

func (r *Run) run(ctx context.Context, lock *lockfile.Lock) int {
	var file string
	dir, err := os.MkdirTemp("", "promferry-")
	if err == nil {
		defer func() { _ = os.RemoveAll(dir) }()
		file, err = filepath.Abs(filepath.Join(dir, "metrics.prom")) // TMPDIR may be relative.
	}
	if err != nil {
		r.Warn(fmt.Errorf("%w; the command gets no file for metrics of its own", err))
	}

	var begin beginning
	startCtx, stopStart := context.WithCancel(ctx)
	defer stopStart()
	p := &process{
		args: r.Args, env: withVariable(r.Env, MetricsFileVariable, file), timeout: r.Timeout, killAfter: r.KillAfter,
		stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, signals: r.Signals,
		onStart: func(pid int, at time.Time) {
			if lock != nil {
				if err := lock.Guard(pid); err != nil {
					r.Warn(err)
				}
			}
			if r.StartPush {
				r.startPush(startCtx, at, &begin)
			}
		},
	}
	result, err := p.run()
	if err != nil {
		r.Warn(fmt.Errorf("%s: %w", r.Args[0], err))
	}

	ctx, stop := r.untilSignal(ctx)
	defer stop()
	defer context.AfterFunc(ctx, stopStart)()
	own := r.ownMetrics(ctx, file)
	parcel := r.keep(ctx, result.End, &begin, result.Outcome, func(counts map[Outcome]uint64) []familySet {
		return []familySet{own, completed(result, counts)}
	})
	if lock != nil {
		_ = lock.Release() // The next run need not wait for our pushes: the outbox keeps their order.
	}
	r.deliver(ctx, parcel, &begin)
	return result.Status
}

// beginning is the push that a command runs, while it is going on. The zero value is one
// that there is not.
type beginning struct {
	// noted is done when what waited before the run is known, and pushed when all is done.
	noted, pushed sync.WaitGroup
	// parcel is the push, nil when there is none. It is there when noted is done.
	parcel *Parcel
}

// untilSignal returns a context that ends with the first signal to end.
func (r *Run) untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case sig := <-r.Signals:
				switch sig {
				case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT:
					cancel()
				}
			case <-ctx.Done():
				return
			}
		}
	})
	return ctx, func() {
		cancel()
		watching.Wait()
	}
}

// startPush adds that the command runs, beside it. What waits for the group is noted first,
// so that nothing of this run's end can get before it.
func (r *Run) startPush(ctx context.Context, at time.Time, begin *beginning) {
	begin.noted.Add(1)
	begin.pushed.Go(func() {
		families := started(at)
		if r.Textfile != "" {
			// At the end other errors come again, but by then the file is ours.
			if err := writeTextfile(ctx, r.Textfile, r.Key, families); errors.Is(err, errNotOurs) {
				r.Warn(fmt.Errorf("textfile: %w", err))
			}
		}
		push, err := r.add(at, families)
		if err != nil {
			r.Warn(err)
			begin.noted.Done()
			return
		}
		parcel := r.Courier.Once(ctx, push)
		begin.parcel = parcel
		begin.noted.Done()
		ctx, cancel := context.WithTimeout(ctx, r.PushTimeout)
		defer cancel()
		_ = parcel.Deliver(ctx, nil) // Of this one nobody has to know; the end is what counts.
	})
}

// writeTextfile writes families to the textfile, if there is to be one.
func (j *Job) writeTextfile(ctx context.Context, families []*dto.MetricFamily) {
	if j.Textfile == "" {
		return
	}
	if err := writeTextfile(ctx, j.Textfile, j.Key, families); err != nil {
		j.Warn(fmt.Errorf("textfile: %w", err))
	}
}

// count counts a run where runs are counted; where they are not the counts are nil. Release
// has to be called.
func (j *Job) count(ctx context.Context, outcome Outcome) (counts map[Outcome]uint64, release func()) {
	if j.Jobs == nil {
		return nil, func() {}
	}
	// Whatever ends the delivery, the run is counted.
	counts, release, err := j.Jobs.Count(context.WithoutCancel(ctx), j.Key, outcome)
	if err != nil {
		j.Warn(fmt.Errorf("count the run: %w", err))
	}
	return counts, release
}

// familySet is families that are pushed together.
type familySet []*dto.MetricFamily

// skippedSets returns what is pushed of a run that did not begin.
func skippedSets(counts map[Outcome]uint64) []familySet { return []familySet{runs(counts)} }

// deliver brings what keep returned. The run's beginning, if there is one, goes before.
func (j *Job) deliver(ctx context.Context, parcel *Parcel, begin *beginning) {
	defer begin.pushed.Wait() // Its own time began before ours.
	if parcel == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, j.PushTimeout)
	defer cancel()
	failed := make(map[string]bool)
	for _, err := range parcel.Deliver(ctx, begin.parcel) {
		j.Warn(err)
		if u, ok := errors.AsType[*UndeliveredError](err); ok {
			failed[u.Gateway] = true
		}
	}
	if !parcel.kept {
		return
	}
	for _, g := range j.Courier.Gateways {
		if failed[g.String()] {
			continue
		}
		for _, err := range j.Courier.DeliverAll(ctx, g).Rejected {
			j.Warn(&UndeliveredError{Gateway: g.String(), Fate: Refused, Outbox: j.Courier.Outbox.Path(), Err: err})
		}
	}
}

// keep counts the run, keeps what sets returns for the counts, in that order, each set on its
// own so that what is wrong with one costs the others nothing, and writes it to the textfile.
// It returns nil where there is nothing to push.
func (j *Job) keep(ctx context.Context, at time.Time, begin *beginning, outcome Outcome, sets func(counts map[Outcome]uint64) []familySet) *Parcel {
	begin.noted.Wait()
	counts, release := j.count(ctx, outcome)
	defer release()
	var pushes []Push
	var all familySet
	for _, families := range sets(counts) {
		if len(families) == 0 {
			continue
		}
		all = append(all, families...)
		push, err := j.add(at, families)
		if err != nil {
			j.Warn(err)
			continue
		}
		pushes = append(pushes, push)
	}
	// Not with ctx: whatever ends the delivery, they are kept.
	parcel, err := j.Courier.Keep(context.WithoutCancel(ctx), pushes...)
	if err != nil {
		j.Warn(fmt.Errorf("%w; the push is tried once, and what waited before is untouched", err))
	}
	j.writeTextfile(ctx, all)
	if len(pushes) == 0 {
		return nil
	}
	return parcel
}

// add returns the push that adds families to the job's group.
func (j *Job) add(at time.Time, families []*dto.MetricFamily) (Push, error) {
	b, err := exposition.Encode(families, exposition.Text)
	if err != nil {
		return Push{}, err
	}
	return Push{Op: outbox.Add, Key: j.Key, At: at, Body: pushgw.Body{ContentType: exposition.Text.ContentType(), Gzipped: b}}, nil
}

// maxExplained is how many faults are explained: for each the text is read once more.
const maxExplained = 10

// ownMetrics returns what can be pushed of the metrics that the command wrote.
func (r *Run) ownMetrics(ctx context.Context, path string) []*dto.MetricFamily {
	if path == "" {
		return nil
	}
	b, err := readRegular(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	families, left, err := r.checkOwn(ctx, b, err)
	if fault := exposition.FaultOf(err); fault != nil {
		err = fault
	}
	if err != nil {
		r.Warn(fmt.Errorf("metrics of the command's own, left out: %w", err))
		return nil
	}
	for i, l := range left {
		if i == maxExplained {
			r.Warn(fmt.Errorf("metrics of the command's own: %d more families with faults", len(left)-i))
			break
		}
		r.Warn(fmt.Errorf("metrics of the command's own: %w", exposition.Explain(b, l)))
	}
	return families
}

func (r *Run) checkOwn(ctx context.Context, b []byte, err error) ([]*dto.MetricFamily, []exposition.LeftOut, error) {
	if err != nil {
		return nil, nil, err
	}
	// A signal now ends the pushing, but not this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.PushTimeout)
	defer cancel()
	families, left, err := exposition.Read(ctx, withNewline(b), "")
	if errors.Is(err, exposition.ErrEmpty) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	families, more := exposition.Rules{Grouping: r.Key.LabelNames(), Reserved: ownFamilies}.Check(families)
	return families, append(left, more...), nil
}

// withNewline mends what echo -n and printf leave: a text without a newline at its end.
func withNewline(b []byte) []byte {
	if len(b) > 0 && b[len(b)-1] != '\n' {
		return append(slices.Clip(b), '\n')
	}
	return b
}

// readRegular reads a file that another program wrote.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: no regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxMetricsFile+1))
	if err == nil && len(b) > maxMetricsFile {
		err = fmt.Errorf("%s: larger than %d MiB", path, maxMetricsFile>>20)
	}
	return b, err
}

// withVariable returns env with a variable set, or without it where value is empty.
func withVariable(env []string, name, value string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, name+"=") })
	if value != "" {
		env = append(env, name+"="+value)
	}
	return env
}
