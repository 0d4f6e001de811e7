//go:build bench

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// The environment makes the parts of the gateway shorter or otherwise, to try them. Then their
// figures say nothing of what is asked.
const (
	shortVariable       = "BENCH_SHORT"        // not empty: everything small
	fleetTimeVariable   = "BENCH_FLEET_TIME"   // how long a fleet pushes, as 1m
	fleetNodesVariable  = "BENCH_FLEET_NODES"  // how many nodes it has
	fleetSeriesVariable = "BENCH_FLEET_SERIES" // and series of each, at least
)

// gatewayScale is what a gateway is measured with.
type gatewayScale struct {
	few, some, many int // groups
	rounds          int
	window          time.Duration
	// checked and checkedMany are how many puts a checked Pushgateway gets with some and with
	// many groups. Each takes it seconds.
	checked, checkedMany int
	largeSeries          int

	nodes, nodeSeries int
	fleetTime         time.Duration
	// besideTime is how long the same fleet pushes to a Pushgateway.
	besideTime  time.Duration
	batchGroups int
	batchWindow time.Duration
}

func newGatewayScale() (gatewayScale, error) {
	s := gatewayScale{
		few: 100, some: 1000, many: 5000, rounds: rounds, window: 6 * time.Second, checked: 16, checkedMany: 6, largeSeries: 3000,
		nodes: 5000, fleetTime: 5 * time.Minute, besideTime: time.Minute, batchGroups: 1024, batchWindow: 3 * time.Second,
	}
	if os.Getenv(shortVariable) != "" {
		s.few, s.some, s.many, s.rounds, s.window, s.checked, s.checkedMany = 10, 50, 200, 2, time.Second, 8, 4
		s.nodes, s.fleetTime, s.besideTime, s.batchGroups, s.batchWindow = 500, shortestFleet, 30*time.Second, 128, 500*time.Millisecond
	}
	var errs []error
	for name, to := range map[string]*int{fleetNodesVariable: &s.nodes, fleetSeriesVariable: &s.nodeSeries} {
		if value := os.Getenv(name); value != "" {
			n, err := strconv.Atoi(value)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
			*to = n
		}
	}
	if value := os.Getenv(fleetTimeVariable); value != "" {
		d, err := time.ParseDuration(value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", fleetTimeVariable, err))
		}
		s.fleetTime, s.besideTime = d, min(d, s.besideTime)
	}
	if s.fleetTime < shortestFleet {
		errs = append(errs, fmt.Errorf("a fleet has to push for %v at least, not %v", shortestFleet, s.fleetTime))
	}
	return s, errors.Join(errs...)
}

// goodForADay is how long what is put to compare is good, in seconds: nothing expires meanwhile.
const goodForADay = 86400

// putCallers is how many connections put at the same time, where a put is measured.
const putCallers = 4

// gatewayPuts measures puts of whole nodes, beside a real Pushgateway.
func gatewayPuts(ctx context.Context, promferry string) error {
	scale, err := newGatewayScale()
	if err != nil {
		return err
	}
	text, err := nodeText(ctx)
	if err != nil {
		return err
	}
	if err := comparePuts(ctx, promferry, scale, text, []int{scale.some, scale.many}); err != nil {
		return err
	}
	fmt.Printf("(The next has no Pushgateway with %d groups: it would take more than 10 GB of memory.)\n", scale.many)
	return comparePuts(ctx, promferry, scale, enlarged(text, scale.largeSeries), []int{scale.some})
}

// filled is a server that has groups.
type filled struct {
	*real.Server
	name   string
	groups int
	e      *expositions
	// file is where a Pushgateway leaves what it has, when it ends.
	file string
	next int // number of the next put
	took pushed
}

// put puts to one group after the other, and adds what that took.
func (f *filled) put(ctx context.Context, most int, window time.Duration) error {
	took, err := f.puts(ctx, most, window)
	f.took.add(took)
	return err
}

func (f *filled) puts(ctx context.Context, most int, window time.Duration) (pushed, error) {
	took, err := pushing{
		callers: putCallers, most: most, window: window, first: f.next,
		push: func(b []byte, n int) []byte { return f.e.appendPut(b, n%f.groups) },
	}.do(ctx, server{f.PID(), dialTo(f.Addr)})
	f.next += took.count
	if err != nil {
		err = fmt.Errorf("%s, %d groups: %w", f.name, f.groups, err)
	}
	return took, err
}

// alone lets a server run, and lets it rest again at the end. So no other takes its core, as
// for the collection of garbage.
func (f *filled) alone(do func() error) error {
	if err := f.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	return errors.Join(do(), f.Signal(syscall.SIGSTOP))
}

// The names of what is compared.
const (
	ourGateway         = "promferry gateway"
	uncheckedGateway   = "Pushgateway, unchecked"
	checkedGateway     = "Pushgateway, checked"
	withoutConsistency = "--push.disable-consistency-check"
)

// startGateway starts a promferry gateway with a state directory.
func startGateway(ctx context.Context, promferry, cores, dir string) (*real.Server, error) {
	return real.Serve(ctx, "", real.Command{Path: "taskset", Args: []string{"-c", cores, promferry, "gateway", "--state.dir=" + dir}})
}

// startPushgateway starts a Pushgateway that writes what it has to a file only when it ends.
func startPushgateway(ctx context.Context, cores, file string, args ...string) (*real.Server, error) {
	path, err := real.Find("pushgateway")
	if err != nil {
		return nil, err
	}
	return real.Serve(ctx, "", real.Command{Path: "taskset", Args: append([]string{
		"-c", cores, path, "--persistence.file=" + file, "--persistence.interval=24h",
	}, args...)})
}

// comparePuts measures gateways with few to many groups, and Pushgateways with so many groups
// each. All are filled first, and rest but for the one that is measured.
func comparePuts(ctx context.Context, promferry string, scale gatewayScale, text []byte, beside []int) error {
	e, err := newExpositions(text, goodForADay)
	if err != nil {
		return err
	}
	forEver, err := newExpositions(text, 0)
	if err != nil {
		return err
	}
	dir, remove, err := diskDir()
	if err != nil {
		return err
	}
	defer remove()
	var all, unchecked []*filled
	defer func() {
		for _, f := range all {
			f.Kill()
		}
	}()
	start := func(f *filled, start func() (*real.Server, error)) (err error) {
		if f.Server, err = start(); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		all = append(all, f)
		if _, err := f.puts(ctx, f.groups, 0); err != nil {
			return err
		}
		return f.Signal(syscall.SIGSTOP)
	}
	for _, f := range []*filled{
		{name: ourGateway, groups: scale.few, e: e},
		{name: ourGateway, groups: scale.some, e: e},
		{name: ourGateway, groups: scale.many, e: e},
		{name: ourGateway + ", without expiry", groups: scale.some, e: forEver},
	} {
		state := filepath.Join(dir, "gateway-"+strconv.Itoa(len(all)))
		if err := start(f, func() (*real.Server, error) { return startGateway(ctx, promferry, measuredCore, state) }); err != nil {
			return err
		}
	}
	for _, groups := range beside {
		f := &filled{name: uncheckedGateway, groups: groups, e: e, file: filepath.Join(dir, "pushgateway-"+strconv.Itoa(groups))}
		if err := start(f, func() (*real.Server, error) { return startPushgateway(ctx, measuredCore, f.file, withoutConsistency) }); err != nil {
			return err
		}
		unchecked = append(unchecked, f)
	}
	for range scale.rounds {
		for _, f := range all {
			if err := f.alone(func() error {
				if _, err := f.puts(ctx, 0, warmUp); err != nil {
					return err
				}
				return f.put(ctx, 0, scale.window)
			}); err != nil {
				return err
			}
		}
	}
	for _, f := range all {
		if f.file != "" {
			continue // A Pushgateway.
		}
		if err := allThere(ctx, f); err != nil {
			return err
		}
	}
	// To fill a checked one takes hours. So it takes over what an unchecked one had.
	for _, f := range unchecked {
		c := &filled{name: checkedGateway, groups: f.groups, e: e}
		if c.Server, err = heir(ctx, f); err != nil {
			return err
		}
		all = append(all, c)
		if err := c.put(ctx, checkedPuts(scale, c.groups), 0); err != nil {
			return err
		}
		c.Kill()
	}
	fmt.Printf("Puts of %v, other values each time, over %d connections; %d rounds of %v, all of which count, with all garbage that was collected in them:\n",
		e, putCallers, scale.rounds, scale.window)
	return printPuts(all, scale)
}

// heir ends a Pushgateway, and starts a checked one that has its groups. Both takes a while.
func heir(ctx context.Context, f *filled) (*real.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := errors.Join(f.Signal(syscall.SIGCONT), f.Signal(syscall.SIGTERM)); err != nil {
		return nil, err
	}
	status, err := f.Wait(ctx)
	if err == nil && status != 0 {
		err = fmt.Errorf("%s ended with status %d: %s", f.name, status, f.Stderr())
	}
	if err != nil {
		return nil, err
	}
	return startPushgateway(ctx, measuredCore, f.file)
}

func checkedPuts(scale gatewayScale, groups int) int {
	if groups == scale.many {
		return scale.checkedMany
	}
	return scale.checked
}

// allThere checks that a gateway lists all groups that it should have.
func allThere(ctx context.Context, f *filled) error {
	return f.alone(func() error {
		list, err := f.Get(ctx, "/sd")
		if err != nil {
			return err
		}
		if n := strings.Count(string(list), `"__metrics_path__"`); n != f.groups {
			return fmt.Errorf("%s lists %d groups, not %d", f.name, n, f.groups)
		}
		return nil
	})
}

// printPuts prints what puts took, and what was asked of that.
func printPuts(all []*filled, scale gatewayScale) error {
	find := func(name string, groups int) *pushed {
		for _, f := range all {
			if f.name == name && f.groups == groups {
				return &f.took
			}
		}
		return nil
	}
	t := table()
	_, _ = fmt.Fprintln(t, "\tgroups\tputs\tputs/s\tCPU ms\tcore\tload's\tp50 ms\tp99 ms\t")
	for _, f := range all {
		p50, p99 := quantiles(f.took.took)
		_, _ = fmt.Fprintf(t, "%s\t%d\t%d\t%.1f\t%.2f\t%.0f %%\t%.0f %%\t%.2f\t%.2f\t\n", f.name, f.groups, f.took.count, f.took.rate(),
			1000*f.took.cost(), 100*f.took.busy(), 100*f.took.loads(), 1000*p50, 1000*p99)
	}
	if err := endTable(t); err != nil {
		return err
	}
	var asked verdicts
	for _, groups := range []int{scale.some, scale.many} {
		our, unchecked, checked := find(ourGateway, groups), find(uncheckedGateway, groups), find(checkedGateway, groups)
		if unchecked == nil {
			continue
		}
		least := 0.0
		if groups == scale.some {
			least = 100
		}
		asked.atLeast(fmt.Sprintf("puts/s to a checked one's, %d groups", groups), our.rate()/checked.rate(), least)
		asked.atLeast(fmt.Sprintf("puts/s to an unchecked one's, %d groups", groups), our.rate()/unchecked.rate(), 1)
		asked.atMost(fmt.Sprintf("CPU of a put to that of an unchecked one, %d groups", groups), our.cost()/unchecked.cost(), 0)
	}
	few, many := find(ourGateway, scale.few), find(ourGateway, scale.many)
	p50few, _ := quantiles(few.took)
	p50many, _ := quantiles(many.took)
	asked.atMost(fmt.Sprintf("CPU of a put with %d groups to that with %d", scale.many, scale.few), many.cost()/few.cost(), 1.3)
	asked.atMost("the same, p50", p50many/p50few, 1.3)
	return asked.print()
}

// verdicts say what was asked, and what came of it.
type verdicts []string

func (v *verdicts) add(what string, ok bool) {
	verdict := "missed"
	if ok {
		verdict = "ok"
	}
	*v = append(*v, what+"\t"+verdict)
}

// atLeast and atMost compare a figure with what was asked. Zero means that nothing was.
func (v *verdicts) atLeast(what string, got, least float64) {
	if least == 0 {
		*v = append(*v, fmt.Sprintf("%s\t%.2f\t\t", what, got))
		return
	}
	v.add(fmt.Sprintf("%s\t%.2f\tat least %g", what, got, least), got >= least)
}

func (v *verdicts) atMost(what string, got, most float64) {
	if most == 0 {
		*v = append(*v, fmt.Sprintf("%s\t%.2f\t\t", what, got))
		return
	}
	v.add(fmt.Sprintf("%s\t%.2f\tat most %g", what, got, most), got <= most)
}

// none tells of something that should not be.
func (v *verdicts) none(what string, n int) { v.add(fmt.Sprintf("%s\t%d\tnone", what, n), n == 0) }

func (v verdicts) print() error {
	t := table()
	_, _ = fmt.Fprintln(t, "\t\tasked\t\t")
	for _, line := range v {
		_, _ = fmt.Fprintln(t, line+"\t")
	}
	return endTable(t)
}
