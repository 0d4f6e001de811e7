package batch

import (
	"time"

	dto "github.com/prometheus/client_model/go"
)

// Result is how a run went.
type Result struct {
	// Start and End are when the command was started, and when it had ended. Start is zero
	// where it is not known.
	Start, End time.Time
	// Duration is the time between the two, by a clock that nobody sets.
	Duration time.Duration
	// Status is the exit status.
	Status int
	// Outcome is none of Skipped.
	Outcome Outcome
	// CPU is the time on a processor by mode: user and system, or total where no more is
	// known.
	CPU map[string]time.Duration
	// MaxRSS is the peak of its memory in bytes, 0 where it is not known.
	MaxRSS int64
}

// An Outcome is how a run ended.
type Outcome string

// All that can become of a run.
const (
	Success Outcome = "success"
	Failure Outcome = "failure"
	Timeout Outcome = "timeout"
	// Skipped runs did not begin.
	Skipped Outcome = "skipped"
)

// outcomes are all, in the order in which they are exposed.
var outcomes = []Outcome{Success, Failure, Timeout, Skipped}

// The families that are pushed for a run. Gauges, all but runsTotal: a Pushgateway holds
// the last run's.
const (
	lastStart      = "batch_job_last_start_timestamp_seconds"
	lastCompletion = "batch_job_last_completion_timestamp_seconds"
	lastSuccessAt  = "batch_job_last_success_timestamp_seconds"
	lastDuration   = "batch_job_last_duration_seconds"
	lastExitCode   = "batch_job_last_exit_code"
	lastSuccess    = "batch_job_last_success"
	lastCPU        = "batch_job_last_cpu_seconds"
	lastMaxRSS     = "batch_job_last_max_rss_bytes"
	isRunning      = "batch_job_running"
	runsTotal      = "batch_job_runs_total"
)

// ownFamilies are the names that a command's own metrics must not have.
var ownFamilies = []string{
	lastStart, lastCompletion, lastSuccessAt, lastDuration, lastExitCode, lastSuccess, lastCPU, lastMaxRSS, isRunning, runsTotal,
}

// OwnLabels are the labels that series of these families have, so that a group cannot.
var OwnLabels = []string{"mode", "outcome"}

// started returns what is pushed when a command has been started.
func started(at time.Time) []*dto.MetricFamily {
	return []*dto.MetricFamily{
		gauge(lastStart, helpStart, seconds(at)),
		gauge(isRunning, helpRunning, 1),
	}
}

const (
	helpStart   = "When the last run was started, in Unix time."
	helpRunning = "Whether a run is going on."
)

// completed returns what is pushed when a run has ended. A run that failed has no last
// success: that of an earlier one stays.
func completed(r Result, counts map[Outcome]uint64) []*dto.MetricFamily {
	var families []*dto.MetricFamily
	if !r.Start.IsZero() {
		families = append(families,
			gauge(lastStart, helpStart, seconds(r.Start)),
			gauge(lastDuration, "How long the last run took.", r.Duration.Seconds()))
	}
	families = append(families,
		gauge(lastCompletion, "When the last run ended, in Unix time, whether it succeeded or not.", seconds(r.End)),
		gauge(lastExitCode, "Exit status of the last run: the command's, 128 and the signal's number, 124 for a timeout, 126 or 127 when it could not be started.", float64(r.Status)))
	success := 0.0
	if r.Outcome == Success {
		success = 1
		families = append(families, gauge(lastSuccessAt, "When the last run that succeeded ended, in Unix time.", seconds(r.End)))
	}
	families = append(families, gauge(lastSuccess, "Whether the last run succeeded.", success))
	if len(r.CPU) > 0 {
		cpu := family(lastCPU, "Time that the last run took of the processors.", dto.MetricType_GAUGE)
		for _, mode := range []string{"user", "system", "total"} {
			if t, ok := r.CPU[mode]; ok {
				m := &dto.Metric{Gauge: &dto.Gauge{Value: new(t.Seconds())}}
				m.Label = []*dto.LabelPair{{Name: new("mode"), Value: &mode}}
				cpu.Metric = append(cpu.Metric, m)
			}
		}
		families = append(families, cpu)
	}
	if r.MaxRSS > 0 {
		families = append(families, gauge(lastMaxRSS, "Peak of the resident memory of the last run's largest process, where promferry itself, some 15 MiB, counts as one; for a systemd unit that of all of it.", float64(r.MaxRSS)))
	}
	families = append(families, gauge(isRunning, helpRunning, 0))
	return append(families, runs(counts)...)
}

// runs returns the counter of runs, or nothing where none are counted.
func runs(counts map[Outcome]uint64) []*dto.MetricFamily {
	if counts == nil {
		return nil
	}
	total := family(runsTotal, "Runs by how they ended; skipped ones did not begin.", dto.MetricType_COUNTER)
	for _, outcome := range outcomes {
		m := &dto.Metric{Counter: &dto.Counter{Value: new(float64(counts[outcome]))}}
		m.Label = []*dto.LabelPair{{Name: new("outcome"), Value: new(string(outcome))}}
		total.Metric = append(total.Metric, m)
	}
	return []*dto.MetricFamily{total}
}

func gauge(name, help string, value float64) *dto.MetricFamily {
	f := family(name, help, dto.MetricType_GAUGE)
	f.Metric = []*dto.Metric{{Gauge: &dto.Gauge{Value: &value}}}
	return f
}

func family(name, help string, typ dto.MetricType) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Help: &help, Type: &typ}
}

// seconds returns t in Unix time, to the microsecond.
func seconds(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }
