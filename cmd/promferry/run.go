package main

import (
	"context"
	"errors"
	"fmt"
	"os"
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
	return []any{r.own, r.settings, r.settings.push, r.settings.group}, append([]anySetting{r.own.Timeout, r.own.KillAfter}, r.settings.all()...)
}

func (r *runCommand) run(in *invocation) (int, error) {
	forgiven := append(forgive(r.own.Timeout, r.own.KillAfter), r.settings.forgive()...)
	errs := append(append(r.own.Timeout.check(), r.own.KillAfter.check()...), r.settings.push.check()...)
	if err := faults(append(errs, r.settings.group.check()...)); err != nil {
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
	b := &batch.Run{
		Job: job, Args: r.args, Env: os.Environ(), Stdin: in.stdin, Stdout: in.stdout, Stderr: in.stderr,
		Timeout: time.Duration(r.own.Timeout.value), KillAfter: time.Duration(r.own.KillAfter.value),
		NoOverlap: r.noOverlap, StartPush: !r.noStartPush,
	}
	// Signals are the command's.
	return b.Run(context.Background()), nil
}
