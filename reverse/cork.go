package reverse

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// CorkListener makes connections on which an answer's header goes out together with the begin
// of its body: http.Server sends its buffer of 4 KiB first, and then the rest, and each send costs
// as much as the scrape does otherwise.
type CorkListener struct{ net.Listener }

// Accept returns the next connection.
func (l CorkListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		return &corkConn{TCPConn: tcp}, nil
	}
	return conn, err
}

// corkSize is that of http.Server's buffer.
const corkSize = 4 << 10

var corks = sync.Pool{New: func() any { return new([corkSize]byte) }}

// corkConn is a connection that can hold back one write until the next.
type corkConn struct {
	*net.TCPConn
	buffer *[corkSize]byte // nil: it holds back nothing
	held   []byte
}

func (c *corkConn) Write(b []byte) (int, error) {
	if len(c.held) == 0 {
		if c.buffer != nil && len(b) <= len(c.buffer) {
			c.held = c.buffer[:copy(c.buffer[:], b)]
			return len(b), nil
		}
		return c.TCPConn.Write(b)
	}
	before := len(c.held)
	both := net.Buffers{c.held, b}
	n, err := both.WriteTo(c.TCPConn)
	c.held = nil
	return max(int(n)-before, 0), err
}

// uncork sends what is held back.
func (c *corkConn) uncork() {
	if len(c.held) > 0 {
		_, _ = c.TCPConn.Write(c.held) // What goes wrong, the next write meets again.
		c.held = nil
	}
	corks.Put(c.buffer)
	c.buffer = nil
}

type corkKey struct{}

// ConnContext is for the http.Server of a CorkListener.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	if c, ok := conn.(*corkConn); ok {
		return context.WithValue(ctx, corkKey{}, c)
	}
	return ctx
}

// cork holds back the first write of an answer to r until the next, or until uncork is called.
func cork(r *http.Request) (uncork func()) {
	c, ok := r.Context().Value(corkKey{}).(*corkConn)
	if !ok {
		return func() {}
	}
	c.buffer = corks.Get().(*[corkSize]byte)
	return c.uncork
}

// Uncorked returns the connection without what a CorkListener made of it: one that was
// taken from its server.
func Uncorked(conn net.Conn) net.Conn {
	if c, ok := conn.(*corkConn); ok {
		return c.TCPConn
	}
	return conn
}
