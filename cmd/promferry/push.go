package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/alecthomas/kingpin/v2"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/batch"
	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/internal/statedir"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

const addHelp = "Replace only the families that are pushed, and leave the others of the group."

// pushCommand is promferry push.
type pushCommand struct {
	push  *pushSettings
	group *groupSettings
	add   bool
	files []string
}

func newPushCommand(app *kingpin.Application) *pushCommand {
	clause := app.Command("push", "Put metrics in text format from files, or stdin, to a group.")
	p := &pushCommand{push: newPushSettings(), group: newGroupSettings("Value of the job label. Required.")}
	clause.Flag("add", addHelp).BoolVar(&p.add)
	clause.Arg("file", "Files; none, or -, is stdin.").StringsVar(&p.files)
	return p
}

func (*pushCommand) name() string { return "push" }

func (p *pushCommand) sets() ([]any, []anySetting) {
	return []any{p.push, p.group}, append(p.group.all(), p.push.all()...)
}

func (p *pushCommand) run(in *invocation) (int, error) {
	if err := checkPush(in, "push", p.push, p.group); err != nil {
		return 0, err
	}
	sources, err := readSources(in.stdin, p.files)
	if err != nil {
		return 0, err
	}
	ctx := in.context() // A signal while it reads ends it at once.
	families, err := sources.check(ctx, p.group.key())
	if err != nil {
		return 0, fmt.Errorf("nothing was pushed: %w", err)
	}
	body, err := exposition.Encode(families, exposition.Text)
	if err != nil {
		return 0, err
	}
	push := batch.Push{
		Op: outbox.Put, Key: p.group.key(), At: time.Now(),
		Body: pushgw.Body{ContentType: exposition.Text.ContentType(), Gzipped: body},
	}
	if p.add {
		push.Op = outbox.Add
	}
	return deliver(ctx, in, "push", p.push, push)
}

// deleteCommand is promferry delete.
type deleteCommand struct {
	push  *pushSettings
	group *groupSettings
}

func newDeleteCommand(app *kingpin.Application) *deleteCommand {
	app.Command("delete", "Delete a group.")
	return &deleteCommand{push: newPushSettings(), group: newGroupSettings("Value of the job label. Required.")}
}

func (*deleteCommand) name() string { return "delete" }

func (d *deleteCommand) sets() ([]any, []anySetting) {
	return []any{d.push, d.group}, append(d.group.all(), d.push.all()...)
}

func (d *deleteCommand) run(in *invocation) (int, error) {
	if err := checkPush(in, "delete", d.push, d.group); err != nil {
		return 0, err
	}
	return deliver(in.context(), in, "delete", d.push, batch.Push{Op: outbox.Delete, Key: d.group.key(), At: time.Now()})
}

func checkPush(in *invocation, who string, push *pushSettings, group *groupSettings) error {
	warn := warner(in, who)
	for _, err := range in.unknown {
		warn(err)
	}
	return faults(append(group.check(), push.check()...))
}

// deliver does one push by way of the outbox. It is a failure when the push is neither
// delivered nor kept.
func deliver(ctx context.Context, in *invocation, who string, s *pushSettings, push batch.Push) (int, error) {
	courier, err := s.courier()
	if err != nil {
		return 0, usageError{err}
	}
	warn := warner(in, who)
	courier.Outbox, err = outbox.Open(s.StateDir.value)
	if newer, ok := errors.AsType[*statedir.VersionError](err); ok {
		return 0, fmt.Errorf("%s: %w", s.StateDir.name(), newer)
	} else if err != nil {
		warn(fmt.Errorf("%s: %w; should the push fail it is lost", s.StateDir.name(), err))
	} else {
		defer func() { _ = courier.Outbox.Close() }()
	}
	parcel, err := courier.Keep(ctx, push)
	if err != nil {
		warn(fmt.Errorf("%w; the push is tried once, and what waited before is untouched", err))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.PushTimeout.value))
	defer cancel()
	status := 0
	for _, err := range parcel.Deliver(ctx, nil) {
		warn(err)
		if u, ok := errors.AsType[*batch.UndeliveredError](err); ok && u.Fate != batch.Kept {
			status = exitFailed
		}
	}
	return status, nil
}

// source is a text to be pushed.
type source struct {
	name  string
	text  []byte
	lines int
}

type sources []source

// stdinName is where Linux has a process's stdin.
const stdinName = "/dev/stdin"

// maxSource is up to which size a source is read, in bytes.
const maxSource = 64 << 20

func readSources(stdin io.Reader, files []string) (sources, error) {
	if len(files) == 0 {
		files = []string{stdinName}
	}
	var all sources
	for _, name := range files {
		r := stdin
		if name == stdinName || name == "-" {
			name = "stdin"
		} else {
			f, err := os.Open(name)
			if err != nil {
				return nil, err
			}
			defer func() { _ = f.Close() }()
			r = f
		}
		text, err := io.ReadAll(io.LimitReader(r, maxSource+1))
		if err == nil && len(text) > maxSource {
			err = fmt.Errorf("larger than %d MiB", maxSource>>20)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if len(text) > 0 && text[len(text)-1] != '\n' { // As echo -n and printf leave it.
			text = append(text, '\n')
		}
		all = append(all, source{name: name, text: text, lines: bytes.Count(text, []byte{'\n'})})
	}
	return all, nil
}

// check returns what is to be pushed, or all that a Pushgateway would refuse.
func (all sources) check(ctx context.Context, key pushgw.GroupingKey) ([]*dto.MetricFamily, error) {
	var text []byte
	for _, s := range all {
		text = append(text, s.text...)
	}
	families, left, err := exposition.Read(ctx, text, "")
	if errors.Is(err, exposition.ErrEmpty) {
		return nil, fmt.Errorf("%s: no sample in it; a group is emptied by promferry delete", all[0].name)
	}
	if err != nil {
		if fault := exposition.FaultOf(err); fault != nil {
			err = all.at(fault)
		}
		return nil, err
	}
	families, more := exposition.Rules{Grouping: key.LabelNames()}.Check(families)
	var wrong []*exposition.Fault
	if line, name := exposition.Timestamps(text); line != 0 {
		wrong = append(wrong, &exposition.Fault{Line: line, Text: name + ": has a timestamp, which a Pushgateway refuses: Prometheus sets the time when it scrapes"})
	}
	for _, l := range append(left, more...) {
		wrong = append(wrong, exposition.Explain(text, l))
	}
	slices.SortStableFunc(wrong, func(a, b *exposition.Fault) int { return cmp.Compare(a.Line, b.Line) })
	var errs []error
	for _, f := range wrong {
		errs = append(errs, all.at(f))
	}
	switch len(errs) {
	case 0:
		return families, nil
	case 1:
		return nil, errs[0]
	}
	return nil, fmt.Errorf("%d faults\n%w", len(errs), errors.Join(errs...))
}

// at gives a fault in all sources, one after the other, the name and lines of its own.
func (all sources) at(f *exposition.Fault) error {
	if f.Line == 0 {
		return f
	}
	name, line := all.line(f.Line)
	text := fmt.Sprintf("%s: line %d: %s", name, line, f.Text)
	if f.First != 0 {
		first, line := all.line(f.First)
		if first != name {
			return fmt.Errorf("%s, first in line %d of %s", text, line, first)
		}
		return fmt.Errorf("%s, first in line %d", text, line)
	}
	return errors.New(text)
}

// line returns which source a line is in, and its number there.
func (all sources) line(number int) (source string, line int) {
	for _, s := range all {
		if number <= s.lines {
			return s.name, number
		}
		number -= s.lines
	}
	return all[len(all)-1].name, number // Behind the last one: an end that is missing.
}
