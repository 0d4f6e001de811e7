//go:build bench

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// What reverse pull is measured with.
const (
	inFlight                 = 64 // scrapes at a time
	someClients, manyClients = 100, 9000
	// warmUp is how long scrapes run before they count, window how long they do.
	warmUp, window = 250 * time.Millisecond, 1500 * time.Millisecond
	// settled is how long the proxy is left alone before its memory is read: longer than
	// its heartbeat's interval, so that each line has had one, and the garbage is gone.
	settled = 18 * time.Second
	unknown = 500 // scrapes of clients that do not exist
	// farTargets stand behind one client that is roundTrip away.
	farTargets, roundTrip = 20, 100 * time.Millisecond
)

// pullLoad measures what a scrape costs the proxy, beside reverse proxies that reach the
// same target by themselves.
func pullLoad(ctx context.Context, promferry string) (err error) {
	targets, err := serveTargets(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, targets.close()) }()
	direct, err := reverseProxy(ctx, targets.addr)
	if err != nil {
		return err
	}
	defer direct.Kill()
	engine, err := nginx(ctx, targets.addr)
	if err != nil {
		return err
	}
	defer engine.close()
	ptth, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer ptth.close()
	polled, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer polled.close()
	lines, err := startSwarm(ctx, ptth.dial, someClients, ptthClient)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lines.close()) }()
	polls, err := startSwarm(ctx, polled.dial, someClients, pushProxClient)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, polls.close()) }()

	directly, byEngine := server{direct.PID(), dialTo(direct.Addr)}, server{engine.PID(), dialTo(engine.addr)}
	compared := []contestant{
		{"Content-Length: ReverseProxy", directly, whole, someClients, nil, ""},
		{"nginx", byEngine, whole, someClients, nil, ""},
		{"promferry, PTTH", ptth.server(), whole, someClients, []int{0, 1}, "1.15, 2; p99 1.5"},
		{"promferry, long-poll", polled.server(), whole, someClients, []int{0, 1}, "2.2"},
		{"chunked: ReverseProxy", directly, chunked, someClients, nil, ""},
		{"promferry, PTTH", ptth.server(), chunked, someClients, []int{4}, "1.15"},
		{"gzip, chunked: ReverseProxy", directly, gzipped, someClients, nil, ""},
		{"promferry, PTTH", ptth.server(), gzipped, someClients, []int{6}, "1.15"},
	}
	fmt.Printf("Reverse pull: scrapes of %d bytes of text, %d (gzip: %d) on the wire, %d in flight; %d clients; %d rounds of %v:\n",
		exposition60K, whole.size, gzipped.size, inFlight, someClients, rounds, window)
	if err := compare(ctx, compared); err != nil {
		return err
	}
	return pullMany(ctx, promferry, ptth)
}

// pullMany measures what it changes that many clients are connected.
func pullMany(ctx context.Context, promferry string, few *proxy) (err error) {
	many, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer many.close()
	lines, err := startSwarm(ctx, many.dial, manyClients, ptthClient)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lines.close()) }()
	fmt.Printf("The same with %d clients, PTTH, Content-Length; the ratio of scrapes/s is to be at least 0.8:\n", manyClients)
	return compare(ctx, []contestant{
		{fmt.Sprint(someClients), few.server(), whole, someClients, nil, ""},
		{fmt.Sprint(manyClients), many.server(), whole, manyClients, []int{0}, ""},
	})
}

// contestant is one row of a comparison.
type contestant struct {
	name    string
	server  server
	body    *body
	clients int
	// beside are the rows that the ratios of CPU time are to; that of p99 and of the rate
	// are to the first of them.
	beside []int
	aim    string
}

// compare measures contestants in alternating rounds and prints a table.
func compare(ctx context.Context, all []contestant) error {
	loads := make([][]load, len(all))
	for _, c := range all {
		if err := reach(ctx, c.server.dial, c.clients, c.body); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for range rounds {
		for i, c := range all {
			l, err := measure(ctx, c.server, c.clients, c.body)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			loads[i] = append(loads[i], l)
		}
	}
	rate := func(l load) float64 { return l.rate }
	cpu := func(l load) float64 { return l.cpu }
	p99 := func(l load) float64 { return l.p99 }
	t := table()
	_, _ = fmt.Fprintln(t, "\tscrapes/s\tCPU µs\tcore\tload's\tp50 ms\tp99 ms\tratio of CPU\tof p99\tof scrapes/s\taim\t")
	for i, c := range all {
		_, _ = fmt.Fprintf(t, "%s\t%.0f\t%.1f\t%.0f %%\t%.0f %%\t%.2f\t%.2f\t", c.name, medianOf(loads[i], rate), 1e6*medianOf(loads[i], cpu),
			100*medianOf(loads[i], func(l load) float64 { return l.busy }), 100*medianOf(loads[i], func(l load) float64 { return l.ownBusy }),
			1000*medianOf(loads[i], func(l load) float64 { return l.p50 }), 1000*medianOf(loads[i], p99))
		if len(c.beside) == 0 {
			_, _ = fmt.Fprintln(t, "\t\t\t\t")
			continue
		}
		ratios := make([]string, len(c.beside))
		for j, other := range c.beside {
			ratios[j] = fmt.Sprintf("%.2f", ratioOf(loads[i], loads[other], cpu))
		}
		first := loads[c.beside[0]]
		_, _ = fmt.Fprintf(t, "%s\t%.2f\t%.2f\t%s\t\n", strings.Join(ratios, ", "), ratioOf(loads[i], first, p99), ratioOf(loads[i], first, rate), c.aim)
	}
	return endTable(t)
}

// pullMemory measures what a connected client takes of the proxy's memory.
func pullMemory(ctx context.Context, promferry string) error {
	fmt.Printf("Resident memory of the proxy for each of %d clients with one target, after %v:\n", manyClients, settled)
	t := table()
	_, _ = fmt.Fprintln(t, "\tof the proxy, MiB\tidle, KiB\taim\teach scraped once, KiB\taim\t")
	for _, k := range []struct {
		name      string
		scheme    string
		client    client
		idle, aim string
	}{
		{"PTTH", "http", ptthClient, "6", "6"},
		{"PTTH over TLS", "https", ptthClient, "16", "36"},
		{"long-poll", "http", pollClient, "14", ""},
	} {
		none, idle, scraped, err := memoryOfClients(ctx, promferry, k.scheme, k.client)
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		each := func(resident float64) float64 { return (resident - none) / manyClients / 1024 }
		_, _ = fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%s\t%.1f\t%s\t\n", k.name, mib(none), each(idle), k.idle, each(scraped), k.aim)
	}
	return endTable(t)
}

// memoryOfClients returns the resident memory of a proxy without clients, with those that
// were never scraped, and when each was scraped once, in bytes.
func memoryOfClients(ctx context.Context, promferry, scheme string, kind client) (none, idle, scraped float64, err error) {
	p, err := startProxy(ctx, promferry, scheme)
	if err != nil {
		return 0, 0, 0, err
	}
	defer p.close()
	if none, err = settledMemory(ctx, p, 2*time.Second); err != nil {
		return 0, 0, 0, err
	}
	s, err := startSwarm(ctx, p.dial, manyClients, kind)
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if idle, err = settledMemory(ctx, p, settled); err != nil {
		return 0, 0, 0, err
	}
	if err := reach(ctx, p.dial, manyClients, whole); err != nil { // Each was connected all the time.
		return 0, 0, 0, err
	}
	scraped, err = settledMemory(ctx, p, settled)
	return none, idle, scraped, err
}

// settledMemory returns a proxy's resident memory when it was left alone for some time.
func settledMemory(ctx context.Context, p *proxy, wait time.Duration) (float64, error) {
	if err := pause(ctx, wait); err != nil {
		return 0, err
	}
	size, _, err := resident(p.PID())
	return size, err
}

// pullUnknown measures how soon a scrape of a client that does not exist is answered.
func pullUnknown(ctx context.Context, promferry string) error {
	p, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer p.close()
	s, err := newScraper(ctx, p.dial)
	if err != nil {
		return err
	}
	defer s.close()
	for i := range unknown {
		a, took, err := s.scrape(scrapeOf(fmt.Sprintf("unknown-%d.example.org:9100", i), "/metrics"))
		if err != nil {
			return err
		}
		s.took = append(s.took, took)
		if a.status != 404 || a.fault != "unknown_client" {
			return fmt.Errorf("an unknown client was answered with %d %q", a.status, a.fault)
		}
	}
	p50, p99 := quantiles(s.took)
	fmt.Printf("An unknown client is answered within %.2f ms, p99 of %d %.2f ms; aim: at most 10 ms\n\n", 1000*p50, unknown, 1000*p99)
	return nil
}

// proxy is a running promferry proxy, alone on its core.
type proxy struct {
	*real.Server
	dial dial
	dir  string
}

// startProxy starts a proxy. scheme is "https" for TLS.
func startProxy(ctx context.Context, promferry, scheme string) (*proxy, error) {
	dir, err := os.MkdirTemp("", "promferry-bench-")
	if err != nil {
		return nil, err
	}
	p := &proxy{dir: dir}
	args := []string{"-c", measuredCore, promferry, "proxy", "--state.dir=" + dir}
	if scheme == "https" {
		config, err := writeWebConfig(dir)
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		args = append(args, "--web.config.file="+config)
	}
	if p.Server, err = real.Serve(ctx, "", real.Command{Path: "taskset", Args: args}); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	p.dial = dialTo(p.Addr)
	if scheme == "https" {
		p.dial = overTLS(p.dial)
	}
	return p, nil
}

func (p *proxy) server() server { return server{p.PID(), p.dial} }

func (p *proxy) close() {
	p.Kill()
	_ = os.RemoveAll(p.dir)
}

// pause waits.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
