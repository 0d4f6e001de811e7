package ptth_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/ptth"
)

// tcp returns the two ends of a TCP connection.
func tcp(tb testing.TB) (a, b net.Conn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		tb.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// taker is a body that can be had without a copy.
type taker interface{ Take(n int64) ([]byte, bool) }

// TestTake: bodies of all sizes, in pieces of all sizes, come as they were sent, and the line is free
// when they are there; one that breaks off never counts as whole.
func TestTake(t *testing.T) {
	e := newEnd(t)
	ours, theirs := tcp(t)
	c, r := e.upgrade(t, ours, theirs)
	if _, err := io.WriteString(c, alive); err != nil {
		t.Fatal(err)
	}
	e.wait(func(s reverse.ClientStatus) bool { return s.Lines > s.Busy })
	ask := func(answer func()) (io.ReadCloser, func()) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		lease, err := e.registry.Lease(ctx, "web-1")
		if err != nil {
			t.Fatal(err)
		}
		var answering sync.WaitGroup
		answering.Go(func() {
			if _, err := http.ReadRequest(r); err != nil {
				t.Error(err)
				return
			}
			answer()
		})
		req := httptest.NewRequestWithContext(ctx, http.MethodGet, "http://web-1:9100/metrics", nil)
		resp, err := lease.Line.RoundTrip(req) //nolint:bodyclose // The caller closes it.
		if err != nil {
			t.Fatal(err)
		}
		return resp.Body, func() {
			_ = resp.Body.Close()
			lease.Done(req.URL, reverse.ScrapeStatus{}, false)
			answering.Wait()
			cancel()
		}
	}
	for _, size := range []int{0, 1, 4095, 4096, 60 << 10, 64 << 10, 64<<10 + 1, 72 << 10, 200 << 10} {
		content := bytes.Repeat([]byte("0123456789abcde\n"), size/16+1)[:size]
		message := append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size), content...)
		for _, piece := range []int{1 << 20, 64 << 10, 5000, 1400, 33} {
			body, done := ask(func() {
				for p := range slices.Chunk(message, piece) {
					if _, err := c.Write(p); err != nil {
						t.Error(err)
					}
				}
			})
			got, whole := body.(taker).Take(int64(size))
			if whole != (size <= 72<<10) {
				t.Errorf("%d bytes: whole %v", size, whole)
			}
			if s := e.registry.Status().Clients[0]; whole && s.Lines != 1 {
				t.Errorf("%d bytes: %d lines", size, s.Lines)
			}
			rest, err := io.ReadAll(body)
			if got = append(slices.Clone(got), rest...); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes in pieces of %d: %d came, %v", size, piece, len(got), err)
			}
			done()
		}
	}
	body, done := ask(func() {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhalf of it")
		_ = c.Close()
	})
	defer done()
	got, whole := body.(taker).Take(20)
	if rest, err := io.ReadAll(body); whole || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("broken off: %q %v %q %v", got, whole, rest, err)
	}
}

// records counts the bytes in each TLS record that is written.
type records struct {
	net.Conn
	header  []byte
	left    int
	largest int
}

func (c *records) Write(b []byte) (int, error) {
	for _, x := range b {
		if c.left > 0 {
			c.left--
			continue
		}
		if c.header = append(c.header, x); len(c.header) == 5 {
			c.left = int(c.header[3])<<8 | int(c.header[4])
			c.largest, c.header = max(c.largest, c.left), c.header[:0]
		}
	}
	return c.Conn.Write(b)
}

// TestSmallRecords: what a client sends over TLS does not make the proxy's buffer large.
func TestSmallRecords(t *testing.T) {
	mux := http.NewServeMux()
	server := httptest.NewUnstartedServer(mux)
	answer := bytes.Repeat([]byte("x"), 1<<20)
	got := make(chan []byte, 1)
	mux.HandleFunc("/ptth", func(w http.ResponseWriter, _ *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+ptth.Protocol+"\r\n"+
			reverse.HeaderHeartbeat+": 15\r\n\r\nGET http://web-1/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n")
		resp, err := http.ReadResponse(buffered.Reader, nil)
		if err != nil {
			t.Error(err)
			return
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		got <- body
	})
	server.StartTLS()
	defer server.Close()

	var written *records
	transport := server.Client().Transport.(*http.Transport)
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		written = &records{Conn: conn}
		return written, err
	}
	transport.TLSClientConfig.MinVersion = tls.VersionTLS13
	base, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	dialer := &ptth.Dialer{
		URL: base, HTTP: server.Client(), Header: http.Header{}, HandshakeTimeout: 10 * time.Second, Logger: slog.New(slog.DiscardHandler),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(answer) }),
	}
	line, err := dialer.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() { _ = line.Serve(ctx, time.Second, func() {}, func(bool) {}) })
	if body := <-got; !bytes.Equal(body, answer) {
		t.Errorf("%d bytes came", len(body))
	}
	cancel()
	serving.Wait()
	if written.largest == 0 || written.largest > 4<<10+256 {
		t.Errorf("the largest record has %d bytes", written.largest)
	}
}
