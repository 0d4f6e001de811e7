//go:build bench

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/e2e/real"
)

// A fleet pushes, and is scraped, as agents and Prometheus do without being told otherwise.
const (
	fleetInterval = 15 * time.Second
	// shortestFleet has time for all groups to be made, to be scraped twice, and to be whole
	// again after a restart.
	shortestFleet = 6 * fleetInterval
	// fleetTimeout is how long an answer may take.
	fleetTimeout = 10 * time.Second
	// goodForCycles is for how long an agent's put is good: two intervals, and the time of a
	// put, in seconds.
	goodForCycles = 40
	// bothCores is where the gateway and its load run together.
	bothCores = serverCore + "," + measuredCore
)

// event is a put or a scrape.
type event struct {
	at   time.Duration // when it was due, since the begin
	took time.Duration // from then on, until its answer had come
	what outcome
}

// outcome is what came of it: one of these, or the status by which it was refused.
type outcome int

const (
	taken  outcome = iota // a put that was answered with 2xx, a scrape with all of the exposition
	little                // a scrape that was answered with 200, and with less than half of that
	failed                // no answer
)

// outcomeOf tells what came of a put, or of a scrape that should have at least so many bytes.
func outcomeOf(a answer, err error, least int) outcome {
	switch {
	case err != nil:
		return failed
	case a.status/100 != 2:
		return outcome(a.status)
	case a.size < least:
		return little
	}
	return taken
}

func (o outcome) String() string {
	switch o {
	case taken:
		return "whole"
	case little:
		return "200 with little"
	case failed:
		return "no answer"
	}
	return strconv.Itoa(int(o))
}

// fleet is many nodes that put at their own times, whether or not earlier puts are answered.
type fleet struct {
	to    dial
	e     *expositions
	nodes int
	begin time.Time
	// length is how long it pushes, scrapeFrom when scrapes begin; zero: there are none.
	length, scrapeFrom time.Duration

	mu            sync.Mutex
	puts, scrapes []event
	late          []time.Duration // how much later than it was due a put began
	idle          []*caller       // of the scrapes
}

// run pushes and scrapes until the fleet's time is over.
func (f *fleet) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	random := rand.New(rand.NewPCG(3, 4))
	for node := range f.nodes {
		put, scrape := time.Duration(random.Int64N(int64(fleetInterval))), time.Duration(random.Int64N(int64(fleetInterval)))
		group.Go(func() error { return f.pushNode(ctx, node, put) })
		if f.scrapeFrom > 0 {
			group.Go(func() error { return f.scrapeNode(ctx, node, f.scrapeFrom+scrape) })
		}
	}
	err := group.Wait()
	for _, c := range f.idle {
		c.close()
	}
	return err
}

// pushNode puts once in each interval, from a time on, over a connection of its own.
func (f *fleet) pushNode(ctx context.Context, node int, due time.Duration) error {
	c := &caller{to: f.to, timeout: fleetTimeout}
	defer c.close()
	var events []event
	var late []time.Duration
	for ; due < f.length; due += fleetInterval {
		if err := pause(ctx, time.Until(f.begin.Add(due))); err != nil {
			return err
		}
		buffer := requests.Get().(*[]byte)
		*buffer = f.e.appendPut((*buffer)[:0], node)
		late = append(late, time.Since(f.begin)-due)
		a, err := c.do(ctx, *buffer)
		requests.Put(buffer)
		events = append(events, event{due, time.Since(f.begin) - due, outcomeOf(a, err, 0)})
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.puts, f.late = append(f.puts, events...), append(f.late, late...)
	return nil
}

// requests are used again.
var requests = sync.Pool{New: func() any { return new([]byte) }}

// scrapeNode scrapes the target of a node's group once in each interval.
func (f *fleet) scrapeNode(ctx context.Context, node int, due time.Duration) error {
	request := scrapeOfGroup(node)
	_, packed := f.e.sizes()
	var events []event
	for ; due < f.length; due += fleetInterval {
		if err := pause(ctx, time.Until(f.begin.Add(due))); err != nil {
			return err
		}
		c := f.scraper()
		a, err := c.do(ctx, request)
		f.mu.Lock()
		f.idle = append(f.idle, c)
		f.mu.Unlock()
		events = append(events, event{due, time.Since(f.begin) - due, outcomeOf(a, err, packed/2)})
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.scrapes = append(f.scrapes, events...)
	return nil
}

// scraper returns a connection that nobody uses, or a new one: Prometheus keeps one for each
// scrape in flight.
func (f *fleet) scraper() *caller {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.idle); n > 0 {
		c := f.idle[n-1]
		f.idle = f.idle[:n-1]
		return c
	}
	return &caller{to: f.to, timeout: fleetTimeout}
}

// scrapeOfGroup returns the request of a scrape, as Prometheus 3 sends it.
func scrapeOfGroup(node int) []byte {
	return fmt.Appendf(nil, "GET /groups/job/node/instance/%s/metrics HTTP/1.1\r\nHost: gateway\r\nUser-Agent: Prometheus/3.5.0\r\n"+
		"Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"+
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2\r\n"+
		"Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n", nodeName(node))
}

// memoryDuring reads a process's resident memory each second until done is called. done returns the
// median of the later half, and the peak.
func memoryDuring(ctx context.Context, pid int) (done func() (steady, peak float64)) {
	ctx, stop := context.WithCancel(ctx)
	var sizes []float64
	var top float64
	var wait sync.WaitGroup
	wait.Go(func() {
		for pause(ctx, time.Second) == nil {
			if size, peak, err := resident(pid); err == nil {
				sizes, top = append(sizes, size), peak
			}
		}
	})
	return func() (float64, float64) {
		stop()
		wait.Wait()
		if len(sizes) == 0 {
			return 0, 0
		}
		return median(sizes[len(sizes)/2:]), top
	}
}

// onBothCores calls f where the load may use the cores that the server uses.
func onBothCores(ctx context.Context, f func() error) error {
	if err := pin(ctx, os.Getpid(), bothCores); err != nil {
		return err
	}
	return errors.Join(f(), pin(ctx, os.Getpid(), serverCore))
}

// fleetExpositions returns what a fleet puts.
func fleetExpositions(ctx context.Context, scale gatewayScale) (*expositions, error) {
	text, err := nodeText(ctx)
	if err != nil {
		return nil, err
	}
	if scale.nodeSeries > samples(text) {
		text = enlarged(text, scale.nodeSeries)
	}
	return newExpositions(text, goodForCycles)
}

// fleetLoad is what a fleet took.
type fleetLoad struct {
	name         string
	length       time.Duration
	puts         []event
	late         []time.Duration
	cpu, load    float64 // cores
	steady, peak float64 // bytes
}

// measureFleet lets a fleet push to a server.
func measureFleet(ctx context.Context, name string, s *real.Server, e *expositions, nodes int, length time.Duration) (fleetLoad, error) {
	f := &fleet{to: dialTo(s.Addr), e: e, nodes: nodes, begin: time.Now(), length: length}
	before, err := usedBy(s.PID())
	if err != nil {
		return fleetLoad{}, err
	}
	memory := memoryDuring(ctx, s.PID())
	err = f.run(ctx)
	took := time.Since(f.begin)
	steady, peak := memory()
	if err != nil {
		return fleetLoad{}, err
	}
	if count(f.puts, taken) == 0 {
		return fleetLoad{}, fmt.Errorf("%s took no put", name)
	}
	after, err := usedBy(s.PID())
	return fleetLoad{
		name: name, length: length, puts: f.puts, late: f.late, steady: steady, peak: peak,
		cpu: (after.server - before.server).Seconds() / took.Seconds(), load: (after.own - before.own).Seconds() / took.Seconds(),
	}, err
}

// gatewayFleet measures a gateway to which a fleet pushes, and the memory of a Pushgateway with
// the same groups.
func gatewayFleet(ctx context.Context, promferry string) error {
	return withFleet(ctx, func(dir string, scale gatewayScale, e *expositions) error {
		g, err := startGateway(ctx, promferry, bothCores, filepath.Join(dir, "state"))
		if err != nil {
			return err
		}
		defer g.Kill()
		our, err := measureFleet(ctx, ourGateway, g, e, scale.nodes, scale.fleetTime)
		if err != nil {
			return err
		}
		if err := wholeNodes(ctx, g, e, scale.nodes); err != nil {
			return err
		}
		g.Kill()

		p, err := startPushgateway(ctx, bothCores, "", withoutConsistency)
		if err != nil {
			return err
		}
		defer p.Kill()
		full := &filled{Server: p, name: uncheckedGateway, groups: scale.nodes, e: e}
		if _, err := full.puts(ctx, scale.nodes, 0); err != nil {
			return err
		}
		if err := pause(ctx, settled); err != nil {
			return err
		}
		resting, _, err := resident(p.PID())
		if err != nil {
			return err
		}
		their, err := measureFleet(ctx, uncheckedGateway, p, e, scale.nodes, scale.besideTime)
		if err != nil {
			return err
		}
		return printFleet(scale, e, our, their, resting)
	})
}

// withFleet calls f with what a fleet needs, where it may use both cores.
func withFleet(ctx context.Context, f func(dir string, scale gatewayScale, e *expositions) error) error {
	scale, err := newGatewayScale()
	if err != nil {
		return err
	}
	e, err := fleetExpositions(ctx, scale)
	if err != nil {
		return err
	}
	dir, remove, err := diskDir()
	if err != nil {
		return err
	}
	defer remove()
	return onBothCores(ctx, func() error { return f(dir, scale, e) })
}

// wholeNodes checks that some groups have what was put there.
func wholeNodes(ctx context.Context, s *real.Server, e *expositions, nodes int) error {
	c := &caller{to: dialTo(s.Addr), timeout: fleetTimeout, keep: true}
	defer c.close()
	for node := 0; node < nodes; node += max(1, nodes/20) {
		a, err := c.do(ctx, scrapeOfGroup(node))
		if err != nil {
			return err
		}
		if a.status != http.StatusOK {
			return fmt.Errorf("the target of %s answers %d: %s", nodeName(node), a.status, c.told.String())
		}
		z, err := gzip.NewReader(&c.told)
		if err != nil {
			return err
		}
		var text bytes.Buffer
		if _, err := text.ReadFrom(z); err != nil {
			return err
		}
		label := fmt.Sprintf("instance=%q", nodeName(node))
		// But for up and two more, which Prometheus makes, and with the two push times.
		if n, own := samples(text.Bytes()), strings.Count(text.String(), label); n != e.series-3+2 || own != n {
			return fmt.Errorf("the target of %s has %d series, %d of them with %s, not %d", nodeName(node), n, own, label, e.series-3+2)
		}
	}
	return nil
}

func printFleet(scale gatewayScale, e *expositions, our, their fleetLoad, resting float64) error {
	fmt.Printf("%d nodes put each %v, %v, other values each time, each over a connection of its own; gateway and load share two cores:\n",
		scale.nodes, fleetInterval, e)
	t := table()
	_, _ = fmt.Fprintln(t, "\tfor\tputs\terrors\tp50 ms\tp99 ms\tmax ms\tload late, p99 ms\tcores\tload's\tmemory MiB\tpeak MiB\t")
	for _, l := range []fleetLoad{our, their} {
		q := quantilesOf(l.puts, taken)
		_, late := quantiles(l.late)
		_, _ = fmt.Fprintf(t, "%s\t%v\t%d\t%d\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t%.2f\t%.0f\t%.0f\t\n", l.name, l.length, len(l.puts), len(l.puts)-count(l.puts, taken),
			q.p50, q.p99, q.most, 1000*late, l.cpu, l.load, mib(l.steady), mib(l.peak))
	}
	if err := endTable(t); err != nil {
		return err
	}
	for _, l := range []fleetLoad{our, their} {
		for _, what := range outcomes(l.puts) {
			if what != taken {
				fmt.Printf("%s: %d times %v\n", l.name, count(l.puts, what), what)
			}
		}
	}
	fmt.Printf("The Pushgateway when it was just filled, with one put for each group, and left alone for %v: %.0f MiB.\n"+
		"Times are from when a put was due. Memory is the median of the later half of the time.\n", settled, mib(resting))
	var asked verdicts
	asked.none("errors", len(our.puts)-count(our.puts, taken))
	asked.atMost("p99 of a put, ms", quantilesOf(our.puts, taken).p99, 250)
	asked.atMost("memory to that of the Pushgateway just filled", our.steady/resting, 0.25)
	asked.atMost("to that under the same load", our.steady/their.steady, 0)
	asked.atMost("peak to peak", our.peak/their.peak, 0)
	return asked.print()
}

func count(events []event, what outcome) int {
	n := 0
	for _, e := range events {
		if e.what == what {
			n++
		}
	}
	return n
}

// times are in milliseconds.
type times struct{ p50, p99, most float64 }

// quantilesOf returns how long those events took that had an outcome.
func quantilesOf(events []event, what outcome) times {
	var took []time.Duration
	for _, e := range events {
		if e.what == what {
			took = append(took, e.took)
		}
	}
	if len(took) == 0 {
		return times{}
	}
	p50, p99 := quantiles(took) // Which sorts.
	return times{1000 * p50, 1000 * p99, 1000 * took[len(took)-1].Seconds()}
}

// gatewayScrapes measures a gateway to which a fleet pushes and of which each group is scraped,
// and restarts it in the middle.
func gatewayScrapes(ctx context.Context, promferry string) error {
	return withFleet(ctx, func(dir string, scale gatewayScale, e *expositions) error {
		s, err := startGateway(ctx, promferry, bothCores, filepath.Join(dir, "state"))
		if err != nil {
			return err
		}
		defer func() { s.Kill() }()
		// Two intervals: in one there are no groups yet, and in the next the targets begin to be scraped.
		const steadyFrom = 2 * fleetInterval
		f := &fleet{to: dialTo(s.Addr), e: e, nodes: scale.nodes, begin: time.Now(), length: scale.fleetTime, scrapeFrom: fleetInterval + time.Second}
		group, groupCtx := errgroup.WithContext(ctx)
		group.Go(func() error { return f.run(groupCtx) })
		var r restart
		var before, after used
		var memory, memoryAfter, peak, peakAfter float64
		group.Go(func() (err error) {
			if err := pause(groupCtx, steadyFrom-time.Since(f.begin)); err != nil {
				return err
			}
			if before, err = usedBy(s.PID()); err != nil {
				return err
			}
			done := memoryDuring(groupCtx, s.PID())
			err = pause(groupCtx, scale.fleetTime/2-time.Since(f.begin))
			memory, peak = done()
			if err != nil {
				return err
			}
			if after, err = usedBy(s.PID()); err != nil {
				return err
			}
			r.at = time.Since(f.begin)
			if err := r.do(groupCtx, s); err != nil {
				return err
			}
			done = memoryDuring(groupCtx, s.PID())
			err = pause(groupCtx, scale.fleetTime-time.Second-time.Since(f.begin))
			memoryAfter, peakAfter = done()
			return err
		})
		if err := group.Wait(); err != nil {
			return err
		}
		if err := wholeNodes(ctx, s, e, scale.nodes); err != nil {
			return err
		}
		window := (r.at - steadyFrom).Seconds()
		fmt.Printf("%d nodes put each %v, %v, and each group is scraped as a target of its own each %v, gzipped; gateway and load share two cores.\n",
			scale.nodes, fleetInterval, e, fleetInterval)
		fmt.Printf("For %.0f s before a restart: gateway %.2f cores, load %.2f cores; gateway %.0f MiB, peak %.0f MiB; after the restart %.0f MiB, peak %.0f MiB.\n",
			window, (after.server-before.server).Seconds()/window, (after.own-before.own).Seconds()/window,
			mib(memory), mib(peak), mib(memoryAfter), mib(peakAfter))
		return printScrapes(f, r, steadyFrom)
	})
}

// restart is what a restart took. All times count from SIGTERM.
type restart struct {
	at           time.Duration // since the begin of the fleet
	ended, ready time.Duration
}

// do restarts a server.
func (r *restart) do(ctx context.Context, s *real.Server) error {
	begin := time.Now()
	if err := s.Stop(); err != nil {
		return err
	}
	r.ended = time.Since(begin)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.Restart(ctx) })
	addr := s.Addr // Which Restart writes as well.
	group.Go(func() error {
		c := &caller{to: dialTo(addr), timeout: time.Second}
		defer c.close()
		for {
			a, err := c.do(ctx, []byte("GET /-/ready HTTP/1.1\r\nHost: gateway\r\n\r\n"))
			if err == nil && a.status == http.StatusOK {
				r.ready = time.Since(begin)
				return nil
			}
			if err := pause(ctx, 5*time.Millisecond); err != nil {
				return err
			}
		}
	})
	return group.Wait()
}

// printScrapes prints what came of puts and scrapes, before a restart and from then on.
func printScrapes(f *fleet, r restart, steadyFrom time.Duration) error {
	t := table()
	_, _ = fmt.Fprintln(t, "\tover\t\tnumber\tp50 ms\tp99 ms\tmax ms\tfirst s\tlast s\t")
	var asked verdicts
	lastNotWhole := time.Duration(0)
	for _, kind := range []struct {
		name   string
		events []event
	}{{"puts", f.puts}, {"scrapes", f.scrapes}} {
		over := func(e event) bool { return e.at+e.took < r.at } // Before the restart.
		for _, part := range []struct {
			name string
			in   func(event) bool
		}{
			{"before", func(e event) bool { return e.at >= steadyFrom && over(e) }},
			{"after", func(e event) bool { return e.at < f.length && !over(e) }},
		} {
			events := slices.DeleteFunc(slices.Clone(kind.events), func(e event) bool { return !part.in(e) })
			slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.at, b.at) })
			for _, what := range outcomes(events) {
				q := quantilesOf(events, what)
				first, last := span(events, what)
				_, _ = fmt.Fprintf(t, "%s\t%s\t%v\t%d\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t\n", kind.name, part.name, what, count(events, what),
					q.p50, q.p99, q.most, (first - r.at).Seconds(), (last - r.at).Seconds())
				if what != taken && part.name == "after" {
					lastNotWhole = max(lastNotWhole, last-r.at)
				}
			}
			if part.name == "before" {
				if count(events, taken) == 0 {
					return fmt.Errorf("no %s went well before the restart", kind.name)
				}
				asked.none(kind.name+" before the restart that failed", len(events)-count(events, taken))
				if kind.name == "puts" {
					asked.atMost("p99 of a put before it, ms", quantilesOf(events, taken).p99, 250)
				} else {
					asked.atMost("p99 of a scrape before it, ms", quantilesOf(events, taken).p99, 0)
				}
			} else if kind.name == "scrapes" {
				asked.none("scrapes after it that say a living node is down or gone, 503 or 404",
					count(events, http.StatusServiceUnavailable)+count(events, http.StatusNotFound))
			}
		}
	}
	if err := endTable(t); err != nil {
		return err
	}
	fmt.Printf("first and last: when those were due, in seconds since SIGTERM. The gateway had ended after %.3f s, and was ready after %.3f s;\n"+
		"the last put or scrape that failed or was not whole was due %.1f s after SIGTERM. Nothing is tried again before the next interval.\n",
		r.ended.Seconds(), r.ready.Seconds(), lastNotWhole.Seconds())
	return asked.print()
}

// outcomes returns which outcomes events have, sorted.
func outcomes(events []event) []outcome {
	var all []outcome
	for _, e := range events {
		if !slices.Contains(all, e.what) {
			all = append(all, e.what)
		}
	}
	slices.Sort(all)
	return all
}

// span returns when the first and the last of those events were due that had an outcome.
func span(events []event, what outcome) (first, last time.Duration) {
	found := false
	for _, e := range events {
		if e.what == what {
			if !found {
				first, found = e.at, true
			}
			last = e.at
		}
	}
	return first, last
}
