//go:build bench

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// dial opens a connection to a server.
type dial func(ctx context.Context) (net.Conn, error)

func dialTo(addr string) dial {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}

// overTLS returns a dial that trusts whoever answers.
func overTLS(to dial) dial {
	config := &tls.Config{InsecureSkipVerify: true}
	return func(ctx context.Context) (net.Conn, error) {
		raw, err := to(ctx)
		if err != nil {
			return nil, err
		}
		conn := tls.Client(raw, config)
		if err := conn.HandshakeContext(ctx); err != nil {
			_ = raw.Close()
			return nil, err
		}
		return inRecords{conn}, nil
	}
}

// inRecords sends as an agent does, in small TLS records.
type inRecords struct{ net.Conn }

func (c inRecords) Write(b []byte) (n int, err error) {
	for part := range slices.Chunk(b, 4<<10) {
		m, err := c.Conn.Write(part)
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// server is a process that is measured.
type server struct {
	pid  int
	dial dial
}

// load is what scrapes in a window of time took.
type load struct {
	rate     float64 // a second
	cpu      float64 // of the server, seconds for each
	busy     float64 // part of the window that the server took on its core
	ownBusy  float64 // that this process took on its own
	p50, p99 float64 // seconds
}

// measure scrapes as many clients, with as many scrapes in flight as are to be, and counts
// after a while.
func measure(ctx context.Context, s server, clients int, b *body) (load, error) {
	scrapers, closeAll, err := newScrapers(ctx, s.dial)
	if err != nil {
		return load{}, err
	}
	defer closeAll()
	var counts, over atomic.Bool
	group, ctx := errgroup.WithContext(ctx)
	for i, s := range scrapers {
		requests := requestsOf(i, clients, b.path)
		group.Go(func() error {
			for n := 0; ctx.Err() == nil; n++ {
				a, took, err := s.scrape(requests[n%len(requests)])
				if err := b.check(a, err); err != nil || over.Load() {
					return err
				}
				if counts.Load() { // What ends within the window.
					s.took = append(s.took, took)
				}
			}
			return nil
		})
	}
	took, window, err := func() (used, time.Duration, error) {
		defer over.Store(true)
		runtime.GC()
		if err := pause(ctx, warmUp); err != nil {
			return used{}, 0, err
		}
		begin := time.Now()
		before, err := usedBy(s.pid)
		if err != nil {
			return used{}, 0, err
		}
		counts.Store(true)
		select {
		case <-ctx.Done():
			return used{}, 0, context.Cause(ctx)
		case <-time.After(window):
		}
		after, err := usedBy(s.pid)
		return used{after.server - before.server, after.own - before.own}, time.Since(begin), err
	}()
	if groupErr := group.Wait(); groupErr != nil || err != nil {
		return load{}, errors.Join(groupErr, err)
	}
	var all []time.Duration
	for _, s := range scrapers {
		all = append(all, s.took...)
	}
	l := load{
		rate: float64(len(all)) / window.Seconds(),
		cpu:  took.server.Seconds() / float64(len(all)),
		busy: took.server.Seconds() / window.Seconds(), ownBusy: took.own.Seconds() / window.Seconds(),
	}
	l.p50, l.p99 = quantiles(all)
	return l, nil
}

// used is CPU time, user and system.
type used struct{ server, own time.Duration }

func usedBy(pid int) (used, error) {
	theirs, err := cpuTime(pid)
	if err != nil {
		return used{}, err
	}
	var own syscall.Rusage
	err = syscall.Getrusage(syscall.RUSAGE_SELF, &own)
	return used{theirs, time.Duration(own.Utime.Nano() + own.Stime.Nano())}, err
}

// reach scrapes each client once. One that the proxy does not know yet may take some time.
func reach(ctx context.Context, to dial, clients int, b *body) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	scrapers, closeAll, err := newScrapers(ctx, to)
	if err != nil {
		return err
	}
	defer closeAll()
	group, ctx := errgroup.WithContext(ctx)
	for i, s := range scrapers {
		requests := requestsOf(i, clients, b.path)[:max(0, clients-i+inFlight-1)/inFlight]
		group.Go(func() error {
			for _, request := range requests {
				if err := s.reach(ctx, request, b); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// requestsOf returns what scraper i asks for: no two scrape the same client, as with
// Prometheus, unless there are fewer clients than scrapers.
func requestsOf(i, clients int, path string) [][]byte {
	var requests [][]byte
	for n := i % clients; n < clients; n += inFlight {
		requests = append(requests, scrapeOf(clientName(n)+":9100", path))
	}
	return requests
}

// scrapeOf returns the request of a scrape, as Prometheus sends it with a proxy_url.
func scrapeOf(host, path string) []byte {
	return fmt.Appendf(nil, "GET http://%s%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: Prometheus/3.5.0\r\n"+
		"Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1\r\n"+
		"Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n", host, path, host)
}

// scraper scrapes over one connection.
type scraper struct {
	conn net.Conn
	r    *bufio.Reader
	took []time.Duration // by each scrape that counts
}

func newScraper(ctx context.Context, to dial) (*scraper, error) {
	conn, err := to(ctx)
	if err != nil {
		return nil, err
	}
	return &scraper{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), took: make([]time.Duration, 0, 1024)}, nil
}

func newScrapers(ctx context.Context, to dial) (scrapers []*scraper, closeAll func(), err error) {
	closeAll = func() {
		for _, s := range scrapers {
			s.close()
		}
	}
	for range inFlight {
		s, err := newScraper(ctx, to)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		scrapers = append(scrapers, s)
	}
	return scrapers, closeAll, nil
}

func (s *scraper) close() { _ = s.conn.Close() }

// scrape sends a request, reads the answer to its end, and tells how long that took.
func (s *scraper) scrape(request []byte) (answer, time.Duration, error) {
	begin := time.Now()
	if err := s.conn.SetDeadline(begin.Add(15 * time.Second)); err != nil {
		return answer{}, 0, err
	}
	if _, err := s.conn.Write(request); err != nil {
		return answer{}, 0, err
	}
	a, err := readAnswer(s.r, nil)
	return a, time.Since(begin), err
}

// reach scrapes a client until the proxy knows it, and it has a line.
func (s *scraper) reach(ctx context.Context, request []byte, b *body) error {
	a, _, err := s.scrape(request)
	for err == nil && (a.status == 404 || a.status == 503) && pause(ctx, 100*time.Millisecond) == nil {
		a, _, err = s.scrape(request)
	}
	return b.check(a, err)
}

// answer is what counts of an HTTP response.
type answer struct {
	status int
	size   int    // of the body
	fault  string // Promferry-Error
}

// readAnswer reads a response to its end. It does no more than it has to, for it runs on
// the core that all but the measured share. The body goes to keep, unless that is nil.
func readAnswer(r *bufio.Reader, keep *bytes.Buffer) (answer, error) {
	var a answer
	line, err := r.ReadSlice('\n')
	if err != nil {
		return a, err
	}
	if len(line) < len("HTTP/1.1 200\r\n") || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return a, fmt.Errorf("no HTTP response: %q", line)
	}
	if a.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return a, err
	}
	length, inChunks := 0, false
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return a, err
		}
		name, value, found := bytes.Cut(line, []byte(":"))
		if !found {
			break
		}
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return a, err
			}
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			inChunks = string(value) == "chunked"
		case bytes.EqualFold(name, []byte("Promferry-Error")):
			a.fault = string(value)
		}
	}
	take := func(n int) error {
		a.size += n
		if keep != nil {
			_, err := io.CopyN(keep, r, int64(n))
			return err
		}
		_, err := r.Discard(n)
		return err
	}
	if !inChunks {
		return a, take(length)
	}
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return a, err
		}
		n, err := strconv.ParseInt(string(bytes.TrimSpace(line)), 16, 32)
		if err != nil {
			return a, err
		}
		if err := take(int(n)); err != nil {
			return a, err
		}
		if _, err := r.Discard(len("\r\n")); err != nil || n == 0 {
			return a, err
		}
	}
}

// quantiles returns the median and the 99th percentile, in seconds.
func quantiles(took []time.Duration) (p50, p99 float64) {
	slices.Sort(took)
	return took[len(took)/2].Seconds(), took[len(took)*99/100].Seconds()
}
