package longpoll

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/promferry/promferry/reverse"
)

// poll is a client that waits for a scrape: a line for one.
type poll struct {
	hub     *Hub
	session *reverse.Session
	grant   reverse.Grant // the poll's own: another one of the session may have another token
	conn    net.Conn
	ours    bool
	began   time.Time
	older   *poll // of the same session, where it is not ours
	gone    bool

	mu       sync.Mutex
	answered bool
}

// park waits for the next request on the connection, or its end.
func (p *poll) park() {
	var b [1]byte
	_, err := p.conn.Read(b[:])
	p.hub.mu.Lock()
	delete(p.hub.polls, p)
	next := p.hub.ended(p)
	p.hub.mu.Unlock()
	p.mu.Lock()
	answered := p.answered
	p.answered = true
	p.mu.Unlock()
	if !answered {
		// The client went away, or spoke without waiting.
		_ = p.conn.Close()
		p.session.Leave(p)
		if next != nil {
			next.giveBack()
		} else {
			p.hub.lost(p.session)
		}
		return
	}
	if err != nil {
		_ = p.conn.Close()
		return
	}
	_ = p.conn.SetDeadline(time.Time{})
	conn := p.conn
	if _, ok := conn.(*returned); ok {
		conn = conn.(*returned).Conn // It has given its byte long ago.
	}
	select {
	case p.hub.back <- &returned{Conn: conn, first: []byte{b[0]}}:
	case <-p.hub.closing:
		_ = p.conn.Close()
	}
}

// ended takes a poll out of the chain of those of its session, and returns the one that is the
// newest now, if it was that. The hub's lock is held.
func (h *Hub) ended(p *poll) *poll {
	p.gone = true
	if h.newest[p.session] != p {
		return nil
	}
	next := p.older
	for next != nil && next.gone {
		next = next.older
	}
	p.older = nil
	if next == nil {
		delete(h.newest, p.session)
		return nil
	}
	h.newest[p.session] = next
	return next
}

// answer makes the poll's answer ours to write; false means that it is too late.
func (p *poll) answer() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.answered {
		return false
	}
	p.answered = true
	_ = p.conn.SetReadDeadline(time.Now().Add(idleTimeout))
	_ = p.conn.SetWriteDeadline(time.Now().Add(time.Second)) // It is some bytes, for which there is room.
	return true
}

// giveBack frees a poll that a scrape has and does not need.
func (p *poll) giveBack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.answered {
		p.session.Free(p)
	}
}

// finish answers a poll that no scrape has.
func (p *poll) finish(text string) {
	if !p.session.Take(p) || !p.answer() {
		return
	}
	p.session.Leave(p)
	if _, err := io.WriteString(p.conn, text); err != nil {
		_ = p.conn.Close()
	}
}

// Close ends the poll.
func (p *poll) Close() error { return p.conn.Close() }

// scrape is one that a client has taken.
type scrape struct {
	session *reverse.Session
	grant   reverse.Grant // of the poll
	method  string
	ctx     context.Context //nolint:containedctx // That of the request that it is.
	answer  chan *http.Response
	done    chan struct{}
	taken   bool // a response to it has come; the hub's lock guards this
	lost    chan struct{}
	fault   error // why it is lost
	once    sync.Once
}

// lost ends the scrapes of a session that has no poll any more: the client is gone. One that
// has said goodbye still responds.
func (h *Hub) lost(s *reverse.Session) {
	if s.Lines() > 0 || s.Leaving() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, scrape := range h.scrapes {
		if scrape.session == s && !scrape.taken {
			scrape.giveUp(reverse.ErrGone)
		}
	}
}

// giveUp tells who waits for the answer, or reads it, why it will not come.
func (s *scrape) giveUp(fault error) {
	s.once.Do(func() {
		s.fault = fault
		close(s.lost)
	})
}

var buffers = sync.Pool{New: func() any { return &bytes.Buffer{} }}

// RoundTrip answers the poll with a scrape, and waits for the response.
func (p *poll) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method == http.MethodConnect {
		p.giveBack()
		return nil, reverse.ErrNoTunnel
	}
	if !p.answer() {
		return nil, reverse.ErrNotSent
	}
	id := rand.Text()
	s := &scrape{
		session: p.session, grant: p.grant, method: req.Method, ctx: req.Context(), answer: make(chan *http.Response, 1), done: make(chan struct{}),
		lost: make(chan struct{}),
	}
	h := p.hub
	h.mu.Lock()
	h.scrapes[id] = s
	h.mu.Unlock()
	end := func() {
		h.mu.Lock()
		delete(h.scrapes, id)
		h.mu.Unlock()
	}
	err := p.send(req, id)
	p.session.Leave(p)
	if err != nil {
		end()
		close(s.done)
		_ = p.conn.Close()
		return nil, reverse.ErrNotSent // Half an answer holds no scrape.
	}
	select {
	case resp := <-s.answer:
		passed := *resp // The other one is the handler's that got it.
		passed.Body = &answered{ReadCloser: resp.Body, end: func() {
			end()
			close(s.done)
		}}
		return &passed, nil
	case <-s.lost:
		err = s.fault
	case <-req.Context().Done():
		err = req.Context().Err()
	}
	end()
	close(s.done)
	return nil, err
}

// answered is a response's body, after which nobody waits.
type answered struct {
	io.ReadCloser
	end  func()
	once sync.Once
}

func (a *answered) Close() error {
	err := a.ReadCloser.Close()
	a.once.Do(a.end)
	return err
}

// send writes the answer to the poll: the scrape's request.
func (p *poll) send(req *http.Request, id string) error {
	buf := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buf)
	buf.Reset()
	uri := req.RequestURI
	fmt.Fprintf(buf, "%s %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n", req.Method, uri, req.Host, headerID, id)
	if err := req.Header.Write(buf); err != nil {
		return err
	}
	buf.WriteString("\r\n")
	extra := ""
	if p.ours {
		extra = p.hub.headers()
	}
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n%s\r\n", buf.Len(), extra)
	// One write, one packet.
	whole := append([]byte(head), buf.Bytes()...)
	_, err := p.conn.Write(whole)
	return err
}
