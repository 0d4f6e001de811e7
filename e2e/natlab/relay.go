//go:build e2e

package natlab

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"
)

// Relay listens on addr in the namespace and passes what comes on to the address to, and
// the answers back, each byte after delay: a long way between two ends. It ends with the
// test. It returns the address that it listens on. Both addr and to must have IP addresses.
func (n *Node) Relay(t *testing.T, addr, to string, delay time.Duration) string {
	t.Helper()
	listener := n.Listen(t, addr)
	relay(t, listener, func(ctx context.Context) (net.Conn, error) { return n.Dial(ctx, "tcp", to) }, delay)
	return listener.Addr().String()
}

func relay(t *testing.T, listener net.Listener, dial func(context.Context) (net.Conn, error), delay time.Duration) {
	t.Helper()
	ctx := t.Context() // ends before the cleanups run
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { pass(ctx, conn, dial, delay) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
}

// pass passes bytes both ways between a connection and another that it dials, until both
// ways have ended or ctx has.
func pass(ctx context.Context, a net.Conn, dial func(context.Context) (net.Conn, error), delay time.Duration) {
	defer a.Close()
	b, err := dial(ctx)
	if err != nil {
		return
	}
	defer b.Close()
	defer context.AfterFunc(ctx, func() {
		a.Close()
		b.Close()
	})()
	var ways sync.WaitGroup
	ways.Go(func() { copyLate(ctx, a, b, delay) })
	ways.Go(func() { copyLate(ctx, b, a, delay) })
	ways.Wait()
}

// A chunk is what was read at once, and when it is to be written.
type chunk struct {
	data []byte
	due  time.Time
}

// copyLate copies src to dst, and then src's end. A fault of either closes both.
func copyLate(ctx context.Context, dst, src net.Conn, delay time.Duration) {
	chunks := make(chan chunk, 64)
	var reader sync.WaitGroup
	defer reader.Wait()
	reader.Go(func() {
		defer close(chunks)
		for {
			data := make([]byte, 32<<10)
			n, err := src.Read(data)
			if n > 0 {
				select {
				case chunks <- chunk{data[:n], time.Now().Add(delay)}:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	failed := false
	for c := range chunks {
		if failed {
			continue // so that the reader sees that src is closed
		}
		select {
		case <-time.After(time.Until(c.due)):
			_, err := dst.Write(c.data)
			failed = err != nil
		case <-ctx.Done():
			failed = true
		}
		if failed {
			src.Close()
			dst.Close()
		}
	}
	if tcp, ok := dst.(*net.TCPConn); ok && !failed {
		_ = tcp.CloseWrite() // fails when dst is closed
	}
}
