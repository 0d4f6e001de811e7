package longpoll

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
)

// Accept returns connections that an HTTP server is to serve again.
func (h *Hub) Accept() (net.Conn, error) {
	select {
	case c := <-h.back:
		return c, nil
	case <-h.closing:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *Hub) Close() error {
	h.closeOnce.Do(func() { close(h.closing) })
	return nil
}

// Addr is for net.Listener.
func (h *Hub) Addr() net.Addr { return &net.TCPAddr{} }

// returned is a connection that is served again, with the byte that was read of the next request.
type returned struct {
	net.Conn
	first []byte
}

func (c *returned) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

type tlsKey struct{}

// ConnContext is for the http.Server: it keeps what the server cannot see of a connection that
// is served again.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if r, ok := c.(*returned); ok {
		if t, ok := r.Conn.(*tls.Conn); ok {
			state := t.ConnectionState()
			return context.WithValue(ctx, tlsKey{}, &state)
		}
	}
	return ctx
}

// RestoreTLS lets next see the TLS state of connections that are served again.
func RestoreTLS(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			if state, ok := r.Context().Value(tlsKey{}).(*tls.ConnectionState); ok {
				r.TLS = state
			}
		}
		next.ServeHTTP(w, r)
	})
}
