package pushprox_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/internal/pushprox"
)

// A network has servers by host and port, in memory, for use in a synctest bubble. Nobody
// listens at other addresses.
type network map[string]*listener

// A listener accepts one end of each pipe that Dial makes.
type listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	open   atomic.Int64 // Connections that the server has not seen the end of.
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (*listener) Addr() net.Addr { return &net.TCPAddr{} }

// serve runs a server at address until the test ends.
func (n network) serve(t *testing.T, address string, handler http.Handler) {
	t.Helper()
	l := &listener{conns: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: handler, ConnState: func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			l.open.Add(1)
		case http.StateClosed, http.StateHijacked:
			l.open.Add(-1)
		case http.StateActive, http.StateIdle:
		}
	}}
	n[address] = l
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

// Dial connects to a server.
func (n network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	refused := &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	l := n[address]
	if l == nil {
		return nil, refused
	}
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, refused
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// client returns an HTTP client in this network, which sends requests to other hosts than
// hub through the proxy there. It follows no redirect.
func (n network) client(t *testing.T) *http.Client {
	t.Helper()
	transport := &http.Transport{DialContext: n.Dial, Proxy: func(r *http.Request) (*url.URL, error) {
		if r.URL.Hostname() == "hub" {
			return nil, nil
		}
		return &url.URL{Scheme: "http", Host: "hub:80"}, nil
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// serveProxy runs a proxy at hub:80.
func (n network) serveProxy(t *testing.T, cfg pushprox.ProxyConfig) *pushprox.Proxy {
	t.Helper()
	proxy := pushprox.NewProxy(cfg)
	n.serve(t, "hub:80", proxy)
	t.Cleanup(proxy.Close)
	return proxy
}

// An answer to a request, or the error that there was instead.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
	after  time.Duration
}

// send sends a request and gives the answer when it comes.
func send(t *testing.T, client *http.Client, method, url, body string, header http.Header) <-chan answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	answers := make(chan answer, 1)
	go func() {
		began := time.Now()
		resp, err := client.Do(req)
		if err != nil {
			answers <- answer{err: err, after: time.Since(began)}
			return
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		answers <- answer{resp.StatusCode, resp.Header, string(b), err, time.Since(began)}
	}()
	return answers
}

// pending fails the test if there is an answer already.
func pending(t *testing.T, what string, answers <-chan answer) {
	t.Helper()
	synctest.Wait()
	select {
	case a := <-answers:
		t.Fatalf("%s: answered %d %q, %v", what, a.status, a.body, a.err)
	default:
	}
}

// expect fails the test unless there is, now, this answer.
func expect(t *testing.T, what string, answers <-chan answer, status int, body string) answer {
	t.Helper()
	synctest.Wait()
	select {
	case a := <-answers:
		if a.err != nil || a.status != status || a.body != body {
			t.Errorf("%s: got %d %q, %v, want %d %q", what, a.status, a.body, a.err, status, body)
		}
		return a
	default:
		t.Fatalf("%s: no answer", what)
		return answer{}
	}
}

func timeout(seconds string) http.Header {
	return http.Header{"X-Prometheus-Scrape-Timeout-Seconds": {seconds}}
}
