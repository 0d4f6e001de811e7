package ptth_test

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/ptth"
)

// FuzzLine: whatever a client sends over its line, before and after it is asked, nothing breaks, no
// scrape is left, and no fewer lines than none are in use.
func FuzzLine(f *testing.F) {
	f.Add([]byte(alive), []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
	f.Add([]byte(alive+alive), []byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 204 x\r\n\r\n"), []byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 x\r\n\r\n"))
	f.Add([]byte(""), []byte("\x00"))
	f.Fuzz(func(t *testing.T, first, answer []byte) {
		e := newEnd(t)
		defer e.stop()
		c, r := e.open(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = c.Write(first)
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = c.Write(answer)
			}
			_ = c.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		_, _ = e.scrape(ctx)
		e.stop()
		_ = c.Close()
		<-done
		for _, s := range e.registry.Status().Clients {
			if s.Busy != 0 || s.Lines != 0 {
				t.Fatalf("%d lines, %d in use at the end", s.Lines, s.Busy)
			}
		}
	})
}

// FuzzHeartbeat: a heartbeat that is taken is a time that makes sense.
func FuzzHeartbeat(f *testing.F) {
	for _, s := range []string{"15", "0.5", "1e-9", "NaN", "0x1p4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ptth.Heartbeat(&http.Response{Header: http.Header{reverse.HeaderHeartbeat: {s}}}); err == nil && (d <= 0 || d > ptth.MaxHeartbeat) {
			t.Fatalf("%q is %v", s, d)
		}
	})
}

// FuzzProxyOverLine: whatever a proxy sends over a line, the client's end of it ends.
func FuzzProxyOverLine(f *testing.F) {
	f.Add("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\nGET http://web-1:9100/m HTTP/1.1\r\nHost: x\r\n\r\n")
	f.Add("OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	f.Add("CONNECT web-1:1 HTTP/1.1\r\nHost: x\r\n\r\nabc")
	f.Fuzz(func(t *testing.T, said string) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		_ = serveLine(ctx, t, said)
	})
}
