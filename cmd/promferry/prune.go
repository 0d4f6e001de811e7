package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/expiry"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/labelmatch"
	"github.com/promferry/promferry/pushgw"
)

const pruneName = "expire prune"

const (
	olderThanHelp   = "How long ago the last push to a group must be, as in 30d. Required."
	matchHelp       = "Which groups, by labels of their grouping keys, as job=backup or {job=\"node\",instance=~\"web-.*\"}. Can be repeated: all must match."
	allHelp         = "Delete whatever is old enough, without a --match."
	yesHelp         = "Delete without asking."
	pruneDryRunHelp = "List the groups, and delete none."
)

// pruneCommand is promferry expire prune. What to delete is said on the command line only: a
// variable that was forgotten must not say it.
type pruneCommand struct {
	gateways         *gatewaySettings
	olderThan        string
	match            []string
	all, yes, dryRun bool
}

func newPruneCommand(app *kingpin.Application) *pruneCommand {
	clause := app.Command(pruneName, "Delete groups that nobody has pushed to for long, with an expiry or without. It lists them first, and asks.")
	p := &pruneCommand{gateways: newGatewaySettings("URL of a Pushgateway to clean up.")}
	clause.Flag("older-than", olderThanHelp).PlaceHolder("TIME").StringVar(&p.olderThan)
	clause.Flag("match", matchHelp).PlaceHolder("MATCHERS").StringsVar(&p.match)
	clause.Flag("all", allHelp).BoolVar(&p.all)
	clause.Flag("yes", yesHelp).BoolVar(&p.yes)
	clause.Flag("dry-run", pruneDryRunHelp).BoolVar(&p.dryRun)
	return p
}

func (*pruneCommand) name() string { return pruneName }

func (p *pruneCommand) sets() ([]any, []anySetting) {
	return []any{p.gateways}, p.gateways.all()
}

func (p *pruneCommand) run(in *invocation) (int, error) {
	errs := append(in.unknown, p.gateways.check()...)
	prune, wrong := p.prune()
	errs = append(errs, wrong...)
	if !p.dryRun && !p.yes && !isTerminal(in.stdin) {
		errs = append(errs, errors.New("--yes: missing: there is no terminal to ask at; --dry-run lists only"))
	}
	client, err := httpclient.New("push", p.gateways.PushHTTPConfig.value)
	if err != nil {
		errs = append(errs, p.gateways.PushHTTPConfig.fault(err))
	}
	if err := faults(errs); err != nil {
		return 0, err
	}
	return 0, p.clean(context.Background(), in, prune, p.gateways.clients(client))
}

// prune returns what the flags say, and all that is wrong with them.
func (p *pruneCommand) prune() (expiry.Prune, []error) {
	var errs []error
	prune := expiry.Prune{
		ListTimeout: time.Duration(p.gateways.SweepTimeout.value),
		PushTimeout: time.Duration(p.gateways.PushTimeout.value),
	}
	olderThan, err := model.ParseDuration(p.olderThan)
	switch {
	case p.olderThan == "":
		errs = append(errs, errors.New("--older-than: missing: how long ago the last push must be, as in --older-than=30d"))
	case err != nil || olderThan <= 0:
		errs = append(errs, fmt.Errorf("--older-than: %q: want a time above zero with its unit, as in 12h or 30d", p.olderThan))
	}
	prune.OlderThan = time.Duration(olderThan)
	for _, text := range p.match {
		m, err := labelmatch.Parse(text)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("--match: %w", err))
		case m.All():
			errs = append(errs, fmt.Errorf("--match: %q is every group: --all says that", text))
		}
		prune.Match = append(prune.Match, m)
	}
	switch {
	case len(p.match) == 0 && !p.all:
		errs = append(errs, errors.New("--match: missing: which groups, as in --match=job=backup; --all is for every group that is old enough"))
	case len(p.match) > 0 && p.all:
		errs = append(errs, errors.New("--all: cannot go with --match: set one of them"))
	}
	return prune, errs
}

// clean lists the groups of all Pushgateways, asks, and deletes them.
func (p *pruneCommand) clean(ctx context.Context, in *invocation, prune expiry.Prune, gateways []*pushgw.Client) error {
	found := make([][]expiry.Old, len(gateways))
	total := 0
	var errs []error
	for i, g := range gateways {
		var err error
		found[i], err = prune.Find(ctx, g)
		errs = append(errs, err)
		total += len(found[i])
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("nothing was deleted: %w", err)
	}
	if total == 0 {
		_, err := fmt.Fprintln(in.stdout, "no group is so old")
		return err
	}
	if err := printOld(in.stdout, gateways, found); err != nil {
		return err
	}
	if p.dryRun {
		return nil
	}
	if !p.yes && !ask(in, fmt.Sprintf("Delete %s?", groups(total))) {
		return errors.New("nothing was deleted")
	}
	ctx = in.context() // Until here a signal just ends the process.
	deleted := 0
	for i, g := range gateways {
		if len(found[i]) == 0 {
			continue
		}
		done, err := prune.Delete(ctx, g, found[i])
		errs = append(errs, err)
		deleted += len(done)
	}
	_, _ = fmt.Fprintf(in.stdout, "%s deleted\n", groups(deleted))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if left := total - deleted; left > 0 {
		_, _ = fmt.Fprintf(in.stdout, "%s left alone: pushed to since, or gone\n", groups(left))
	}
	return nil
}

func groups(n int) string {
	if n == 1 {
		return "1 group"
	}
	return fmt.Sprintf("%d groups", n)
}

// printOld prints a line for each group.
func printOld(w io.Writer, gateways []*pushgw.Client, found [][]expiry.Old) error {
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "AGE\tFAMILIES\tGROUP\tPUSHGATEWAY")
	for i, g := range gateways {
		for _, old := range found[i] {
			_, _ = fmt.Fprintf(table, "%s\t%d\t%s\t%s\n", age(old.Age), old.Families, old.Key, g)
		}
	}
	return table.Flush()
}

// age writes a time in the two largest of its units: 31d4h.
func age(d time.Duration) string {
	for _, u := range []struct{ large, small time.Duration }{{24 * time.Hour, time.Hour}, {time.Hour, time.Minute}} {
		if d >= u.large {
			return model.Duration(d.Truncate(u.large)).String() + shown(d%u.large, u.small)
		}
	}
	return model.Duration(d.Truncate(time.Second)).String()
}

func shown(d, unit time.Duration) string {
	if d < unit {
		return ""
	}
	return model.Duration(d.Truncate(unit)).String()
}

// ask asks on stderr, and reads the answer from stdin.
func ask(in *invocation, question string) bool {
	_, _ = fmt.Fprint(in.stderr, question+" [y/N] ")
	line, _ := bufio.NewReader(in.stdin).ReadString('\n')
	line = strings.ToLower(strings.TrimSpace(line))
	return line == "y" || line == "yes"
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
