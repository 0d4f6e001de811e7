package main

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/alecthomas/kingpin/v2"

	"github.com/promferry/promferry/batch"
)

// systemctlPath is what asks systemd.
var systemctlPath = "/usr/bin/systemctl"

// recordCommand is promferry record.
type recordCommand struct {
	settings *jobSettings
	unit     string
}

func newRecordCommand(app *kingpin.Application) *recordCommand {
	clause := app.Command("record", "Push how a systemd unit ended, as its ExecStopPost=-+/usr/bin/promferry record %n")
	r := &recordCommand{settings: newJobSettings(`Value of the job label. "": the name of the unit, without .service.`)}
	clause.Arg("unit", "The unit.").Required().StringVar(&r.unit)
	return r
}

func (*recordCommand) name() string { return "record" }

func (r *recordCommand) sets() ([]any, []anySetting) {
	return []any{r.settings, r.settings.push, r.settings.group}, r.settings.all()
}

func (r *recordCommand) run(in *invocation) (int, error) {
	if batch.IsOwnUnit(r.unit) {
		return 0, nil
	}
	forgiven := r.settings.forgive()
	job := r.settings.group.Job
	if job.value == "" {
		job.value = batch.JobOf(r.unit)
	}
	errs := r.settings.check()
	result := os.Getenv("SERVICE_RESULT")
	if result == "" {
		errs = append(errs, errors.New("SERVICE_RESULT is not set: only systemd can run this, as ExecStopPost=-+/usr/bin/promferry record %n in the unit"))
	}
	if err := faults(errs); err != nil {
		return 0, err
	}
	failed := 0
	tell := warner(in, "record "+r.unit)
	if urls := r.settings.push.PushUrls; in.unusable != nil && !urls.isSet() {
		// The default would be another Pushgateway than what was meant.
		urls.value = nil
		in.unusable = fmt.Errorf("%w; no Pushgateway is known: nothing is pushed", in.unusable)
	}
	for _, err := range slices.Concat([]error{in.unusable, in.ignored}, in.unknown, forgiven) {
		if err != nil {
			tell(err)
		}
	}
	j, closeJob := r.settings.job(func(err error) {
		tell(err)
		if u, ok := errors.AsType[*batch.UndeliveredError](err); ok && u.Fate != batch.Kept {
			failed = exitFailed
		}
	})
	defer closeJob()
	unit := &batch.Unit{
		Job: j, Name: r.unit, Systemctl: systemctlPath, ServiceResult: result, ExitCode: os.Getenv("EXIT_CODE"), ExitStatus: os.Getenv("EXIT_STATUS"),
	}
	unit.Record(in.context())
	return failed, nil
}
