//go:build bench

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// exposition60K is the size of what is scraped, as text: about node_exporter's.
const exposition60K = 60 << 10

// body is an exposition in one form.
type body struct {
	path string
	size int // on the wire, without framing
	// response is a target's response: head and rest, with an empty line between them.
	response, head, rest []byte
	// more stands repeat times between response and end.
	more   []byte
	repeat int
	end    []byte
}

// check returns what is wrong with the answer to a scrape of it.
func (b *body) check(got answer, err error) error {
	want := answer{status: 200, size: b.size}
	switch {
	case err != nil:
		return fmt.Errorf("scrape: %w", err)
	case got != want:
		return fmt.Errorf("scrape: got %+v, want %+v", got, want)
	}
	return nil
}

// The forms of an exposition: with a Content-Length; in chunks, and compressed and in
// chunks, as node_exporter answers, whose chunks are of 2,048 bytes both ways.
var (
	whole   = newBody("/metrics", text60K(), fmt.Sprintf("Content-Length: %d\r\n", exposition60K))
	chunked = newBody("/chunked", text60K(), "Transfer-Encoding: chunked\r\n")
	gzipped = newBody("/gzip", compressed(text60K()), "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n")
	huge    = newLarge("/large", 100<<20)
)

func newBody(path string, content []byte, header string) *body {
	b := &body{path: path, size: len(content), rest: content}
	if strings.Contains(header, "chunked") {
		b.rest = append(inChunks(content), lastChunk...)
	}
	b.head = []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8; escaping=underscores\r\n" +
		"Date: Sat, 21 Nov 2026 10:16:45 GMT\r\n" + header)
	b.response = bytes.Join([][]byte{b.head, b.rest}, []byte("\r\n"))
	return b
}

// newLarge returns an exposition of about size bytes, in chunks, most of which is in memory once.
func newLarge(path string, size int) *body {
	b := newBody(path, nil, "Transfer-Encoding: chunked\r\n")
	b.response = bytes.TrimSuffix(b.response, lastChunk)
	b.more, b.repeat, b.end = inChunks(text60K()), size/exposition60K, lastChunk
	b.size = b.repeat * exposition60K
	return b
}

// write writes a target's response.
func (b *body) write(w io.Writer) error {
	_, err := w.Write(b.response)
	for n := 0; n < b.repeat && err == nil; n++ {
		_, err = w.Write(b.more)
	}
	if err == nil && b.end != nil {
		_, err = w.Write(b.end)
	}
	return err
}

// text60K returns an exposition that compresses about as well as node_exporter's, to a sixth.
func text60K() []byte {
	random := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	for family := 0; b.Len() < exposition60K; family++ {
		fmt.Fprintf(&b, "# HELP node_bench_%d_total What is counted of device number %d.\n# TYPE node_bench_%d_total counter\n", family, family, family)
		for device := range random.IntN(8) {
			fmt.Fprintf(&b, "node_bench_%d_total{device=\"eth%d\"} %d\n", family, device, random.Uint64()>>(random.IntN(40)+10))
		}
	}
	b.Truncate(exposition60K - 1)
	b.WriteByte('\n')
	return b.Bytes()
}

func compressed(content []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(content)
	_ = w.Close()
	return b.Bytes()
}

func inChunks(content []byte) []byte {
	var b bytes.Buffer
	for len(content) > 0 {
		n := min(2048, len(content))
		fmt.Fprintf(&b, "%x\r\n%s\r\n", n, content[:n])
		content = content[n:]
	}
	return b.Bytes()
}

var lastChunk = []byte("0\r\n\r\n")

// Answers to requests that are no scrapes.
var (
	alive    = &body{response: []byte("HTTP/1.1 204 No Content\r\n\r\n")}
	notFound = &body{response: []byte("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")}
)

// responseTo returns what a target, or a client, answers to a request's first line.
func responseTo(line []byte) *body {
	if bytes.HasPrefix(line, []byte("OPTIONS ")) {
		return alive
	}
	for _, b := range []*body{whole, chunked, gzipped, huge} {
		if bytes.Contains(line, []byte(b.path)) {
			return b
		}
	}
	return notFound
}

// answerRequests answers requests without bodies, one after the other, until the
// connection ends. answered is called after each, if it is not nil.
func answerRequests(conn net.Conn, r *bufio.Reader, answered func()) error {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		response := responseTo(line)
		for len(line) > len("\r\n") {
			if line, err = r.ReadSlice('\n'); err != nil {
				return err
			}
		}
		if err := response.write(conn); err != nil {
			return err
		}
		if answered != nil {
			answered()
		}
	}
}

// targets serves the expositions in this process, over plain HTTP.
type targets struct {
	addr   string
	cancel context.CancelFunc
	group  sync.WaitGroup
}

func serveTargets(ctx context.Context) (*targets, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	t := &targets{addr: l.Addr().String(), cancel: cancel}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	t.group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // Closed.
			}
			context.AfterFunc(ctx, func() { _ = conn.Close() })
			t.group.Go(func() {
				_ = answerRequests(conn, bufio.NewReader(conn), nil) // The scraper sees it.
				_ = conn.Close()
			})
		}
	})
	return t, nil
}

func (t *targets) close() error {
	t.cancel()
	t.group.Wait()
	return nil
}

// client plays a client called name until ctx or its connection ends. It calls ready when
// it may be scraped.
type client func(ctx context.Context, to dial, name string, ready func()) error

// clientName returns the name of client n.
func clientName(n int) string { return fmt.Sprintf("web-%04d.example.org", n) }

// identity returns the headers that a client of promferry says of itself.
func identity(name string) string {
	return fmt.Sprintf("Promferry-Client: %s\r\nPromferry-Session: BENCHBENCHBENCHBENCHBENCH\r\nPromferry-Version: 1.0.0\r\n"+
		`Promferry-Announce: {"instance":"%s","targets":[{"job":"node","port":9100,"path":"/metrics"}]}`+"\r\n", name, name)
}

// ptthClient has one line.
func ptthClient(ctx context.Context, to dial, name string, ready func()) error {
	conn, err := to(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if _, err := fmt.Fprintf(conn, "GET /ptth HTTP/1.1\r\nHost: proxy\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n%s\r\n", identity(name)); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	if err := expect(r, nil, 101); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	return answerRequests(conn, r, sync.OnceFunc(ready))
}

// pushProxClient behaves as PushProx's client does, with a connection for its polls and,
// from its first scrape on, one for what it pushes.
func pushProxClient(ctx context.Context, to dial, name string, ready func()) error {
	return longPoll(ctx, to, name, "", ready)
}

// pollClient is the same with the headers of promferry's client.
func pollClient(ctx context.Context, to dial, name string, ready func()) error {
	return longPoll(ctx, to, name, identity(name), ready)
}

func longPoll(ctx context.Context, to dial, name, header string, ready func()) error {
	poll, err := to(ctx)
	if err != nil {
		return err
	}
	defer poll.Close()
	defer context.AfterFunc(ctx, func() { _ = poll.Close() })()
	ask := fmt.Appendf(nil, "POST /poll HTTP/1.1\r\nHost: proxy\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n"+
		"Content-Type: \r\nAccept-Encoding: gzip\r\n%s\r\n%s", len(name), header, name)
	if _, err := poll.Write(ask); err != nil {
		return err
	}
	ready()
	polled := bufio.NewReader(poll)
	var push net.Conn
	var pushed *bufio.Reader
	var scrape bytes.Buffer
	for {
		scrape.Reset()
		if err := expect(polled, &scrape, 200, 204); err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		if _, err := poll.Write(ask); err != nil {
			return err
		}
		if scrape.Len() == 0 {
			continue // 204: poll again.
		}
		if push == nil {
			if push, err = to(ctx); err != nil {
				return err
			}
			defer push.Close()
			defer context.AfterFunc(ctx, func() { _ = push.Close() })()
			pushed = bufio.NewReader(push)
		}
		_, after, _ := bytes.Cut(scrape.Bytes(), []byte("\r\nId: "))
		id, _, _ := bytes.Cut(after, []byte("\r\n"))
		head := fmt.Appendf(nil, "POST /push HTTP/1.1\r\nHost: proxy\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n"+
			"Accept-Encoding: gzip\r\n%s\r\n%sId: %s\r\n\r\n", len(whole.head)+len("Id: \r\n\r\n")+len(id)+len(whole.rest), header, whole.head, id)
		parts := net.Buffers{head, whole.rest}
		if _, err := parts.WriteTo(push); err != nil {
			return err
		}
		if err := expect(pushed, nil, 200); err != nil {
			return fmt.Errorf("push: %w", err)
		}
	}
}

// expect reads a response that must have one of these statuses.
func expect(r *bufio.Reader, keep *bytes.Buffer, statuses ...int) error {
	a, err := readAnswer(r, keep)
	if err == nil && !slices.Contains(statuses, a.status) {
		err = fmt.Errorf("unexpected status %d", a.status)
	}
	return err
}

// swarm is many clients in this process.
type swarm struct {
	cancel context.CancelFunc
	group  *errgroup.Group
}

// startSwarm starts n clients and returns when all are ready.
func startSwarm(ctx context.Context, to dial, n int, kind client) (*swarm, error) {
	ctx, cancel := context.WithCancel(ctx)
	group, groupCtx := errgroup.WithContext(ctx)
	s := &swarm{cancel, group}
	starting := make(chan struct{}, inFlight)
	for i := range n {
		select {
		case starting <- struct{}{}:
		case <-groupCtx.Done():
			return nil, s.close()
		}
		group.Go(func() error {
			err := kind(groupCtx, to, clientName(i), func() { <-starting })
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("client %s: %w", clientName(i), err)
		})
	}
	for range inFlight {
		select {
		case starting <- struct{}{}:
		case <-groupCtx.Done():
			return nil, s.close()
		}
	}
	return s, nil
}

// close ends all clients, and returns why one of them ended before.
func (s *swarm) close() error {
	defer s.cancel()
	s.cancel()
	return s.group.Wait()
}
