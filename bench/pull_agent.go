//go:build bench

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/e2e/real"
)

// agentName is the name of the one real client.
const agentName = "agent.example.org"

// pullFar measures how far apart the targets of one client that is far away are answered
// when all are scraped at once.
func pullFar(ctx context.Context, promferry string) (err error) {
	t, err := serveTargets(ctx)
	if err != nil {
		return err
	}
	defer t.close()
	p, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer p.close()
	way, err := startRelay(ctx, p.dial, roundTrip/2)
	if err != nil {
		return err
	}
	defer way.close()
	var paths []string
	for i := range farTargets {
		paths = append(paths, fmt.Sprintf("%s/%d", whole.path, i))
	}
	a, end, err := pulledAgent(ctx, promferry, way.addr, t.addr, paths)
	if err != nil {
		return err
	}
	defer end()
	_, port, err := net.SplitHostPort(t.addr)
	if err != nil {
		return err
	}
	var requests [][]byte
	for _, path := range paths {
		requests = append(requests, scrapeOf(agentName+":"+port, path))
	}
	scrapers, closeAll, err := newScrapers(ctx, p.dial)
	if err != nil {
		return err
	}
	defer closeAll()
	if err := scrapers[0].reach(ctx, requests[0], whole); err != nil {
		return fmt.Errorf("%w\n%s", err, a.Stderr())
	}
	if err := pause(ctx, 10*roundTrip); err != nil { // Until it has all its lines.
		return err
	}
	var firsts, spreads []float64
	for range rounds {
		took := make([]time.Duration, farTargets)
		var group errgroup.Group
		for i := range took {
			group.Go(func() error {
				a, t, err := scrapers[i].scrape(requests[i])
				took[i] = t
				return whole.check(a, err)
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		firsts = append(firsts, slices.Min(took).Seconds()/roundTrip.Seconds())
		spreads = append(spreads, (slices.Max(took)-slices.Min(took)).Seconds()/roundTrip.Seconds())
	}
	fmt.Printf("%d targets behind an agent %v away, scraped at once: the first is answered after %.2f round trips, the last %.2f (at worst %.2f) after the first; aim: at most 1.5\n\n",
		farTargets, roundTrip, median(firsts), median(spreads), slices.Max(spreads))
	return nil
}

// pullLarge measures what a huge exposition takes of the memory of proxy and agent.
func pullLarge(ctx context.Context, promferry string) error {
	t, err := serveTargets(ctx)
	if err != nil {
		return err
	}
	defer t.close()
	p, err := startProxy(ctx, promferry, "")
	if err != nil {
		return err
	}
	defer p.close()
	a, end, err := pulledAgent(ctx, promferry, p.Addr, t.addr, []string{chunked.path, huge.path})
	if err != nil {
		return err
	}
	defer end()
	_, port, err := net.SplitHostPort(t.addr)
	if err != nil {
		return err
	}
	s, err := newScraper(ctx, p.dial)
	if err != nil {
		return err
	}
	defer s.close()
	for range forwards { // As every day.
		if err := s.reach(ctx, scrapeOf(agentName+":"+port, chunked.path), chunked); err != nil {
			return fmt.Errorf("%w\n%s", err, a.Stderr())
		}
	}
	var proxies, agents []float64
	for range rounds {
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		proxyGrowth, err := growth(p.PID())
		if err != nil {
			return err
		}
		agentGrowth, err := growth(a.PID())
		if err != nil {
			return err
		}
		if err := huge.check(first(s.scrape(scrapeOf(agentName+":"+port, huge.path)))); err != nil {
			return err
		}
		grown, err := proxyGrowth()
		if err != nil {
			return err
		}
		proxies = append(proxies, grown)
		if grown, err = agentGrowth(); err != nil {
			return err
		}
		agents = append(agents, grown)
	}
	fmt.Printf("An exposition of %.0f MiB in chunks; resident memory grows, first and at worst: proxy %.1f and %.1f MiB, agent %.1f and %.1f MiB; aim: at most 2 MiB\n\n",
		mib(float64(huge.size)), mib(proxies[0]), mib(slices.Max(proxies)), mib(agents[0]), mib(slices.Max(agents)))
	return nil
}

func first(a answer, _ time.Duration, err error) (answer, error) { return a, err }

// growth returns what tells by how much a process's resident memory rose since, at its
// peak, in bytes.
func growth(pid int) (func() (float64, error), error) {
	// proc_pid_clear_refs(5): 5 makes the peak what is resident now.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		return nil, err
	}
	before, _, err := resident(pid)
	return func() (float64, error) {
		_, peak, err := resident(pid)
		return peak - before, err
	}, err
}

// pulledAgent starts an agent whose targets are scraped by way of the proxy at addr. It
// runs on the core of this process.
func pulledAgent(ctx context.Context, promferry, addr, target string, paths []string) (*real.Server, func(), error) {
	dir, err := os.MkdirTemp("", "promferry-bench-")
	if err != nil {
		return nil, nil, err
	}
	args := []string{"agent", "--proxy-url=http://" + addr, "--fqdn=" + agentName, "--state.dir=" + dir}
	for i, path := range paths {
		args = append(args, fmt.Sprintf("--pull.target=job-%d=http://%s%s", i, target, path))
	}
	a, err := real.Serve(ctx, "", real.Command{Path: promferry, Args: args})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return a, func() {
		a.Kill()
		_ = os.RemoveAll(dir)
	}, nil
}

// relay passes on connections, and all that comes over them some time later.
type relay struct {
	addr   string
	cancel context.CancelFunc
	group  sync.WaitGroup
}

// startRelay starts a relay to a server; delay is that of one way.
func startRelay(ctx context.Context, to dial, delay time.Duration) (*relay, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &relay{addr: l.Addr().String(), cancel: cancel}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	r.group.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return // Closed.
			}
			far, err := to(ctx)
			if err != nil {
				_ = near.Close()
				continue
			}
			context.AfterFunc(ctx, func() { _, _ = near.Close(), far.Close() })
			r.group.Go(func() { later(ctx, near, far, delay) })
			r.group.Go(func() { later(ctx, far, near, delay) })
		}
	})
	return r, nil
}

func (r *relay) close() {
	r.cancel()
	r.group.Wait()
}

// later writes to one connection what comes from another, after a delay. An end closes both.
func later(ctx context.Context, to, from net.Conn, delay time.Duration) {
	type piece struct {
		due  time.Time
		data []byte
	}
	pieces := make(chan piece, 1<<12)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer func() {
		_, _ = to.Close(), from.Close()
		for range pieces { // What the reader still has.
		}
	}()
	reader.Go(func() {
		defer close(pieces)
		for {
			data := make([]byte, 64<<10)
			n, err := from.Read(data)
			if err != nil {
				return
			}
			pieces <- piece{time.Now().Add(delay), data[:n]}
		}
	})
	for p := range pieces {
		if pause(ctx, time.Until(p.due)) != nil {
			return
		}
		if _, err := to.Write(p.data); err != nil {
			return
		}
	}
}
