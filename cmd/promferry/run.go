package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/batch"
)

const (
	noOverlapHelp   = "Skip the run when another one of the same group is going on, and return 75."
	noStartPushHelp = "Do not push, at the start, that the command runs."
)

// runCommand is promferry run.
type runCommand struct {
	own         *runSettings
	settings    *jobSettings
	args        []string
	noOverlap   bool
	noStartPush bool
}

type runSettings struct {
	Timeout   *setting[model.Duration] `split_words:"true"`
	KillAfter *setting[model.Duration] `split_words:"true"`
}

func newRunCommand(app *kingpin.Application) *runCommand {
	clause := app.Command("run", "Run a command, return its exit status, and push how it ended: promferry run --job=backup -- backup.sh --full")
	r := &runCommand{
		own: &runSettings{
			Timeout:   duration("timeout", 0, "How long the command may run; then it gets SIGTERM, and the exit status is 124. 0s: without end."),
			KillAfter: duration("kill-after", 10*time.Second, "How long after SIGTERM it gets SIGKILL, and all of its process group."),
		},
		settings: newJobSettings("Value of the job label, which names the job. Required."),
	}
	clause.Flag("no-overlap", noOverlapHelp).BoolVar(&r.noOverlap)
	clause.Flag("no-start-push", noStartPushHelp).BoolVar(&r.noStartPush)
	clause.Arg("command", "The command, with its arguments.").Required().StringsVar(&r.args)
	return r
}

func (*runCommand) name() string { return "run" }

func (r *runCommand) sets() ([]any, []anySetting) {
	return []any{r.own, r.settings, r.settings.push, r.settings.group}, append(r.settings.all(), r.own.Timeout, r.own.KillAfter)
}

func (r *runCommand) run(in *invocation) (int, error) {
	forgiven := append(forgive(r.own.Timeout, r.own.KillAfter), r.settings.forgive()...)
	errs := append(r.own.Timeout.check(), r.own.KillAfter.check()...)
	if err := faults(append(errs, r.settings.check()...)); err != nil {
		return exitNotRun, fmt.Errorf("nothing was run: %w", err)
	}
	warn := warner(in, "run "+r.settings.group.Job.value)
	for _, err := range append(in.unknown, forgiven...) {
		warn(err)
	}
	job, closeJob := r.settings.job(warn)
	defer closeJob()
	if r.noOverlap && job.Jobs == nil {
		warn(errors.New("without a state directory nothing keeps a second run from overlapping with this one"))
	}
	env := os.Environ()
	if _, ok := os.LookupEnv("PATH"); !ok {
		// Where execvp(3) looks then; the command's environment stays without.
		if err := os.Setenv("PATH", "/bin:/usr/bin"); err != nil {
			warn(err)
		}
	}
	signals := make(chan os.Signal, 64)
	for _, sig := range forwarded() {
		signal.Notify(signals, sig) // To the end of the process: to give them back takes time.
	}
	b := &batch.Run{
		Job: job, Args: r.args, Env: env, Stdin: in.stdin, Stdout: in.stdout, Stderr: in.stderr, Signals: signals,
		Timeout: time.Duration(r.own.Timeout.value), KillAfter: time.Duration(r.own.KillAfter.value),
		NoOverlap: r.noOverlap, StartPush: !r.noStartPush,
	}
	return b.Run(context.Background()), nil
}

// forwarded returns the signals that are passed on: all that can be caught, less those that
// tell of our own children, memory and scheduling, and those that stop for job control, which
// a terminal sends to the whole group. SIGHUP and SIGINT are not taken where they were ignored
// when we were started, as by nohup(1), so that they are for the command too; of other signals
// Go's runtime does not tell. SIGPIPE is caught so that a closed stderr does not end us.
func forwarded() []os.Signal {
	var signals []os.Signal
	for number := 1; number <= 64; number++ { // SIGRTMAX
		switch sig := syscall.Signal(number); sig {
		case syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGCHLD, syscall.SIGURG, syscall.SIGPROF,
			syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGSYS,
			syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.Signal(32), syscall.Signal(33):
		default:
			if !signal.Ignored(sig) {
				signals = append(signals, sig)
			}
		}
	}
	return signals
}
