package reverse

import (
	"io"
	"sync"
	"time"
)

// Tunnel passes bytes between two ends, each with what is read from it, until either is at
// its end or none has come for idle; then it closes both.
func Tunnel(a io.WriteCloser, fromA io.Reader, b io.WriteCloser, fromB io.Reader, idle time.Duration) {
	timer := time.AfterFunc(idle, func() {
		_ = a.Close()
		_ = b.Close()
	})
	defer timer.Stop()
	var both sync.WaitGroup
	pass := func(to io.WriteCloser, from io.Reader) {
		_, _ = io.Copy(to, &watched{from, timer, idle})
		// The other direction may go on: a TLS client that has said all still reads.
		if half, ok := to.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
			return
		}
		_ = to.Close()
	}
	both.Go(func() { pass(b, fromA) })
	both.Go(func() { pass(a, fromB) })
	both.Wait()
	_ = a.Close()
	_ = b.Close()
}

// watched puts off the end of a tunnel with each read that gives something.
type watched struct {
	from  io.Reader
	timer *time.Timer
	idle  time.Duration
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.from.Read(b)
	if n > 0 {
		w.timer.Reset(w.idle)
	}
	return n, err
}
