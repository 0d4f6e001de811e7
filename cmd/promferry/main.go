// Command promferry ferries Prometheus metrics out of places that Prometheus cannot reach.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	_ "time/tzdata" // For CRON_TZ= where the system has no zones, as in a container.

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/version"

	"github.com/promferry/promferry/lockfile"
)

// The exit statuses. See README.md.
const (
	exitFailed = 1
	exitUsage  = 2
	exitLocked = 75 // EX_TEMPFAIL of sysexits.h
)

func main() {
	// A panic ends with SIGABRT and not with status 2, which for systemd means wrong
	// settings, after which it does not start the agent again.
	debug.SetTraceback("crash")
	if os.Getenv("GOGC") == "" {
		// Half of Go's own 100: with a large exposition a third less memory, with any no
		// more CPU time that bench could measure.
		debug.SetGCPercent(50)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal kills.
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run does what args say and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	version.Version = cmp.Or(version.Version, "unknown") // A plain go build does not set it.
	app := kingpin.New("promferry", "Ferries Prometheus metrics out of places that Prometheus cannot reach.")
	app.UsageWriter(stdout).ErrorWriter(stderr).HelpFlag.Short('h')
	exited := -1
	app.Terminate(func(status int) { exited = max(exited, status) })
	app.Version(version.Print("promferry"))
	app.VersionFlag.Hidden()
	agent := newAgentCommand(app)

	err := errors.New("a command is missing")
	if len(args) > 0 { // kingpin would print the help, and call that a success.
		_, err = app.Parse(args)
	}
	if exited >= 0 { // --help or --version was asked for, and printed.
		return exited
	}
	if err != nil {
		err = usageError{fmt.Errorf("%w; see promferry --help", err)}
	} else {
		err = agent.run(ctx, stdout, stderr) // The only command.
	}
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "promferry: %v\n", err)
	return exitStatus(err)
}

// usageError is a fault in what the user typed.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func exitStatus(err error) int {
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[*lockfile.HeldError](err); ok {
		return exitLocked
	}
	return exitFailed
}
