package ptth

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/promferry/promferry/reverse"
)

// line is a connection that a client opened. It is parked until an answer comes: one goroutine
// waits for its first bytes, or for the end, and there are no buffers.
type line struct {
	hub     *Hub
	session *reverse.Session
	grant   reverse.Grant // the line's own: another one of the session may have another token
	conn    net.Conn

	mu     sync.Mutex
	ready  bool // it has answered once
	inUse  bool // a scrape has it
	moving bool // it is to end
	closed bool
	phase  uint8 // spreads heartbeats of clients that came all at once
	// Times are those since the hub's start: there are many lines.
	owed   time.Duration // when a heartbeat was sent that is not answered; zero: none
	last   time.Duration // when something was sent
	answer chan *source  // where the scrape that has the line waits for its answer
}

// park waits for an answer, or the end of the line.
func (l *line) park() {
	l.mu.Lock()
	busy := l.answer != nil
	l.mu.Unlock()
	src, err := await(l.conn, busy)
	if err != nil {
		l.end()
		return
	}
	l.mu.Lock()
	owed := l.owed != 0
	l.mu.Unlock()
	switch {
	case owed && !l.beaten(src):
		src.release()
		l.end()
	case owed && src.Buffered() == 0:
		src.release()
		// Reading the answer has made the stack larger than waiting needs it.
		l.hub.park(l)
	case !l.hand(src): // Nobody has asked for it.
		l.end()
	}
}

// hand gives the scrape that has the line its answer. The goroutine that read it has done
// its work: when the scrape is done there will be another.
func (l *line) hand(src *source) bool {
	l.mu.Lock()
	answer := l.answer
	l.answer = nil
	l.mu.Unlock()
	if answer == nil {
		src.release()
		return false
	}
	answer <- src
	return true
}

// beaten reads the answer to a heartbeat, and tells whether the line goes on. What follows in src
// is the answer to a scrape that was sent after it.
func (l *line) beaten(src *source) bool {
	last, ok := src.beaten()
	if !ok {
		return false
	}
	l.mu.Lock()
	l.owed = 0
	fresh := !l.ready
	l.ready = true
	ends := l.moving || last
	l.mu.Unlock()
	if ends {
		return false
	}
	if fresh {
		l.session.Free(l)
	}
	return true
}

// beat sends a heartbeat when it is time for one, and ends a line that does not answer.
func (l *line) beat() {
	interval := l.hub.cfg.Heartbeat
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
	case l.owed != 0:
		if l.hub.now()-l.owed >= interval {
			l.hub.halfOpen.Inc()
			l.hub.cfg.Logger.Debug("Line does not answer its heartbeat", "client", l.session.Name())
			_ = l.conn.Close()
		}
	case l.ready && !l.inUse && !l.moving && l.hub.now()-l.last >= interval/2+interval/4*time.Duration(l.phase)/256:
		l.owed = l.hub.now()
		l.write(heartbeat)
	}
}

// writeTimeout is how long sending some bytes may take. There is room for them; should there be
// none, others must not wait for it, and the line ends, since nothing more fits on it.
const writeTimeout = 100 * time.Millisecond

// write sends something short. What goes wrong with it, park sees.
func (l *line) write(s string) {
	l.last = l.hub.now()
	_ = l.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, _ = io.WriteString(l.conn, s)
	_ = l.conn.SetWriteDeadline(time.Time{})
}

// move ends the line in a way that the client takes for a wish, not for a fault.
func (l *line) move() {
	idle := l.session.Take(l)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.moving = true
	if idle {
		l.owed = l.hub.now()
		l.write(move)
	} else if !l.ready {
		_ = l.conn.Close()
	}
}

// Close ends the line at once.
func (l *line) Close() error {
	return l.conn.Close() // Whoever reads from it calls end.
}

// end takes the line out of use.
func (l *line) end() {
	_ = l.conn.Close()
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return
	}
	l.closed = true
	answer := l.answer
	l.answer = nil
	l.mu.Unlock()
	l.hub.mu.Lock()
	delete(l.hub.lines, l)
	l.hub.mu.Unlock()
	l.session.Leave(l)
	if answer != nil {
		close(answer)
	}
}

// release frees the line after a scrape.
func (l *line) release() {
	l.mu.Lock()
	l.inUse = false
	moving := l.moving
	if moving {
		l.owed = l.hub.now()
		l.write(move)
	}
	l.mu.Unlock()
	if !moving {
		l.session.Free(l) // Before anybody can see that it ends.
	}
	l.hub.park(l)
}

// RoundTrip sends a scrape, or CONNECT, over the line.
func (l *line) RoundTrip(req *http.Request) (*http.Response, error) {
	answer := make(chan *source, 1)
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, reverse.ErrNotSent
	}
	l.inUse, l.answer, l.last = true, answer, l.hub.now()
	l.mu.Unlock()

	ctx := req.Context()
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	if err := send(l.conn, req); err != nil {
		stop()
		_ = l.conn.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, reverse.ErrNotSent // Half a request is none.
	}
	src, ok := <-answer
	if !ok {
		stop()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, reverse.ErrGone
	}
	resp, err := src.response(req)
	b := &body{line: l, src: src, stop: stop}
	if err != nil {
		b.end(false)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
			return nil, reverse.ErrGone
		}
		return nil, err
	}
	if req.Method == http.MethodConnect && resp.StatusCode == http.StatusOK {
		stop()
		resp.Body = &tunnel{src, l}
		return resp, nil
	}
	b.whole, b.left, b.reuse = resp.Body, resp.ContentLength, !resp.Close
	if req.Method == http.MethodHead || resp.StatusCode == http.StatusNoContent || resp.StatusCode == http.StatusNotModified {
		b.left = 0
	}
	resp.Body = b
	return resp, nil
}

// body is an answer's body. At its end the line is free again.
type body struct {
	line  *line
	src   *source
	stop  func() bool
	whole io.Reader // decodes chunks
	left  int64     // of a body of known length, -1 for another
	reuse bool
	err   error // after the end
}

func (b *body) Read(p []byte) (n int, err error) {
	switch {
	case b.err != nil:
		return 0, b.err
	case b.left == 0:
		err = io.EOF
	case b.left > 0:
		n, err = b.src.Read(p[:min(int64(len(p)), b.left)])
		b.left -= int64(n)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err == nil && b.left == 0 {
			err = io.EOF
		}
	default:
		n, err = b.whole.Read(p)
	}
	if err != nil {
		b.err = err
		b.end(err == io.EOF) //nolint:errorlint // Wrapped, it is not the end.
	}
	return n, err
}

// Take returns a body that has n bytes without a copy, and frees the line. The bytes are valid until
// Close.
func (b *body) Take(n int64) ([]byte, bool) {
	if b.err != nil || b.left != n {
		return nil, false
	}
	whole, err := b.src.Peek(int(n))
	if err != nil {
		return nil, false // Read says why.
	}
	_, _ = b.src.Discard(int(n))
	b.left, b.err = 0, io.EOF
	b.leave(true)
	return whole, true
}

// WriteTo copies a body of known length, where it can from socket to socket.
func (b *body) WriteTo(w io.Writer) (n int64, err error) {
	tcp, isTCP := b.line.conn.(*net.TCPConn)
	to, canRead := w.(io.ReaderFrom)
	if b.err != nil || b.left <= 0 || !isTCP || !canRead {
		return io.Copy(w, struct{ io.Reader }{b})
	}
	if buffered := int(min(b.left, int64(b.src.Buffered()))); buffered > 0 {
		head, _ := b.src.Peek(buffered)
		if _, err := w.Write(head); err != nil {
			return 0, err
		}
		_, _ = b.src.Discard(buffered)
		n = int64(buffered)
		b.left -= n
	}
	if b.left > 0 {
		m, err := to.ReadFrom(&io.LimitedReader{R: tcp, N: b.left})
		n += m
		b.left -= m
		if err == nil && b.left > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return n, err
		}
	}
	b.err = io.EOF
	b.end(true)
	return n, nil
}

// Close gives up what was not read, and with it the line.
func (b *body) Close() error {
	if b.err == nil && b.left == 0 {
		_, _ = b.Read(nil)
	}
	if b.err == nil {
		b.err = http.ErrBodyReadAfterClose
		b.end(false)
	}
	if b.src != nil { // After Take.
		b.src.release()
		b.src = nil
	}
	return nil
}

// end is for a body of which nothing is left to be read.
func (b *body) end(whole bool) {
	b.leave(whole)
	b.src.release()
	b.src = nil
}

// leave gives the line back, or ends it when the answer has not come to its end.
func (b *body) leave(whole bool) {
	if b.stop() && whole && b.reuse && b.src.Buffered() == 0 {
		b.line.release()
	} else {
		b.line.end()
	}
}

// tunnel is a line that has become a raw connection.
type tunnel struct {
	*source
	line *line
}

func (t *tunnel) Write(b []byte) (int, error) { return t.line.conn.Write(b) }

// CloseWrite tells the client that nothing more comes.
func (t *tunnel) CloseWrite() error {
	if half, ok := t.line.conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (t *tunnel) Close() error {
	t.line.end()
	return nil
}
