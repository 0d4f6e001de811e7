// Command promferry ferries Prometheus metrics out of places that Prometheus cannot reach.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	_ "time/tzdata" // For CRON_TZ= where the system has no zones, as in a container.

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/version"

	"github.com/promferry/promferry/batch"
	"github.com/promferry/promferry/lockfile"
)

// The exit statuses. See README.md.
const (
	exitFailed = 1
	exitUsage  = 2
	exitLocked = 75 // EX_TEMPFAIL of sysexits.h
	// exitNotRun is that of promferry run when nothing was run, as in env(1) and timeout(1).
	exitNotRun = 125
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
	log.SetOutput(io.Discard) // net/http tells there what a server does wrong, with what it sent.
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// A command is one of promferry's commands. Its run returns the status to exit with where
// that is not for the error, or its absence, to say.
type command interface {
	name() string
	// sets returns pointers to structs of settings, whose fields name their variables, and
	// all of these settings in the order of --help.
	sets() ([]any, []anySetting)
	run(in *invocation) (int, error)
}

// invocation is what a command is run with.
type invocation struct {
	stdin, stdout, stderr *os.File
	// unknown are faults, of variables of ours in the environment that no command has.
	unknown []error
	// ignored and unusable are what settleRootEnvironment returned.
	ignored, unusable error
}

// context returns a context that a signal to end ends; a second one kills.
func (*invocation) context() context.Context {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx
}

// run does what args say and returns the exit status.
func run(args []string, stdin, stdout, stderr *os.File) int {
	version.Version = cmp.Or(version.Version, "unknown") // A plain go build does not set it.
	kingpin.EnableFileExpansion = false                  // Of arguments that begin with @.
	app := kingpin.New("promferry", "Ferries Prometheus metrics out of places that Prometheus cannot reach.")
	app.UsageWriter(stdout).ErrorWriter(stderr).HelpFlag.Short('h')
	// All behind the command that run is to run is that command's.
	app.Interspersed(len(args) == 0 || args[0] != "run")
	app.Version(version.Print("promferry"))
	app.VersionFlag.Hidden()
	var ignored, unusable error
	if len(args) > 0 && args[0] == "record" && os.Geteuid() == 0 {
		ignored, unusable = settleRootEnvironment() // Before anything looks at it.
	}
	commands, known := newCommands(app)
	// kingpin would let a command have either commands of its own or a meaning of its own.
	if words := strings.Fields(pruneName); len(args) >= 2 && slices.Equal(args[:2], words) {
		args = append([]string{pruneName}, args[2:]...)
	}

	named := func(name string) int {
		return slices.IndexFunc(commands, func(c command) bool { return c.name() == name })
	}
	selected, exited, err := parse(app, args)
	if exited {
		return 0
	}
	status := 0
	if err != nil {
		help := "promferry --help"
		if len(args) > 0 && named(args[0]) >= 0 {
			help = "promferry " + args[0] + " --help"
		}
		err = usageError{fmt.Errorf("%w; see %s", err, help)}
	} else {
		in := &invocation{stdin: stdin, stdout: stdout, stderr: stderr, unknown: unknownVariables(known, selected), ignored: ignored, unusable: unusable}
		c := commands[named(selected)]
		_, settings := c.sets()
		for _, s := range settings {
			if warning := s.renamed(); warning != "" {
				_, _ = fmt.Fprintf(stderr, "promferry: warning: %s\n", warning)
			}
		}
		status, err = c.run(in)
	}
	if err == nil {
		return status
	}
	_, _ = fmt.Fprintf(stderr, "promferry: %v\n", err)
	if status == 0 {
		status = exitStatus(err)
	}
	if status == exitUsage && len(args) > 0 && args[0] == "run" {
		return exitNotRun
	}
	return status
}

// parse reads the arguments. It tells whether that was all there was to do: --help or
// --version was asked for, and printed.
func parse(app *kingpin.Application, args []string) (selected string, exited bool, err error) {
	if len(args) == 0 { // kingpin would print the help, and call that a success.
		return "", false, errors.New("a command is missing")
	}
	if args[0] == "push" {
		// kingpin would make "" of it.
		args = slices.Clone(args)
		for i, arg := range args {
			if arg == "-" {
				args[i] = stdinName
			}
		}
	}
	type terminated struct{}
	app.Terminate(func(int) { panic(terminated{}) }) // It must not go on.
	defer func() {
		if p := recover(); p != nil {
			if _, exited = p.(terminated); !exited {
				panic(p)
			}
		}
	}()
	selected, err = app.Parse(args)
	return selected, false, err
}

// newCommands returns all commands, with what the environment says, and the variables that
// any of them has.
func newCommands(app *kingpin.Application) (commands []command, known map[string]bool) {
	commands = []command{
		newAgentCommand(app), newProxyCommand(app), newGatewayCommand(app), newExpireCommand(app), newPruneCommand(app), newRunCommand(app), newRecordCommand(app), newPushCommand(app), newDeleteCommand(app), newFlushCommand(app),
	}
	known = map[string]bool{batch.MetricsFileVariable: true}
	for _, c := range commands {
		specs, settings := c.sets()
		readEnvironment(specs)
		for _, s := range settings {
			known[s.env()], known[s.formerEnv()] = true, true
			s.register(app.GetCommand(c.name()))
		}
	}
	return commands, known
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
