package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kingpin/v2"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

const listHelp = "Show what waits and what was refused, and deliver nothing."

// flushCommand is promferry flush.
type flushCommand struct {
	push *pushSettings
	list bool
}

func newFlushCommand(app *kingpin.Application) *flushCommand {
	clause := app.Command("flush", "Deliver what could not be pushed before.")
	f := &flushCommand{push: newPushSettings()}
	clause.Flag("list", listHelp).BoolVar(&f.list)
	return f
}

func (*flushCommand) name() string { return "flush" }

func (f *flushCommand) sets() ([]any, []anySetting) { return []any{f.push}, f.push.all() }

func (f *flushCommand) run(in *invocation) (int, error) {
	warn := warner(in, "flush")
	for _, err := range in.unknown {
		warn(err)
	}
	if err := faults(f.push.check()); err != nil {
		return 0, err
	}
	box, err := outbox.Open(f.push.StateDir.value)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", f.push.StateDir.name(), err)
	}
	defer func() { _ = box.Close() }()
	if f.list {
		hide := func(text string) string { return text }
		// An older version kept what a Pushgateway said as it came.
		if client, err := httpclient.New("push", f.push.PushHTTPConfig.value); err == nil {
			hide = client.Hide
		}
		return 0, printList(in.stdout, box, hide)
	}
	return f.flush(in.context(), in, box)
}

// flush delivers what waits for the Pushgateways that are set, one after the other. It is
// a failure when some of that still waits, or was refused.
func (f *flushCommand) flush(ctx context.Context, in *invocation, box *outbox.Outbox) (int, error) {
	courier, err := f.push.courier()
	if err != nil {
		return 0, usageError{err}
	}
	courier.Outbox = box
	warn := warner(in, "flush")
	status, delivered := 0, 0
	var names []string
	for _, g := range courier.Gateways {
		names = append(names, g.String())
		d := courier.DeliverAll(ctx, g)
		delivered += d.Delivered
		for _, err := range append(d.Rejected, d.Err) {
			if err != nil {
				warn(err)
				status = exitFailed
			}
		}
	}
	stats, err := box.Stats(names...)
	if err != nil {
		return 0, err
	}
	_, _ = fmt.Fprintf(in.stdout, "%d delivered\n", delivered)
	for _, name := range names {
		if n := stats.Waiting[name]; n > 0 {
			_, _ = fmt.Fprintf(in.stdout, "%d wait for %s\n", n, name)
			status = exitFailed
		}
	}
	if stats.Other > 0 {
		_, _ = fmt.Fprintf(in.stdout, "%d wait for Pushgateways that --push.url does not name; promferry flush --list shows them\n", stats.Other)
	}
	if stats.Rejected > 0 {
		_, _ = fmt.Fprintf(in.stdout, "%d were refused, now or before; promferry flush --list shows why\n", stats.Rejected)
	}
	return status, nil
}

// printList prints a line for each entry. Hide hides credentials in why one was refused.
func printList(w io.Writer, box *outbox.Outbox, hide func(string) string) error {
	all, err := box.List()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		_, _ = fmt.Fprintln(w, "nothing waits in "+box.Path())
		return nil
	}
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "SINCE\tSTATE\tPUSH\tGROUP\tPUSHGATEWAY\tFILE")
	for _, l := range all {
		state := "waits"
		if l.Rejected != "" {
			state = "refused"
		}
		since, group := "-", "-" // Of one that cannot be read.
		if l.Entry.Job != "" {
			since = l.Entry.At.Local().Format(time.DateTime)
			group = pushgw.GroupingKey{Job: l.Entry.Job, Labels: l.Entry.Labels}.String()
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", since, state, l.Entry.Op, group, safeurl.Line(l.Entry.Gateway), l.Path)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, l := range all {
		if l.Rejected != "" {
			_, _ = fmt.Fprintf(w, "\n%s\n  %s\n", l.Path, safeurl.Line(hide(l.Rejected)))
		}
	}
	return nil
}
