package longpoll

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/promferry/promferry/reverse"
)

// Push answers POST /push.
func (h *Hub) Push(w http.ResponseWriter, r *http.Request) {
	if !h.post(w, r) {
		return
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(readTimeout))
	limited := &pushBody{r: r.Body, left: maxHeader}
	src := readers.Get().(*bufio.Reader)
	src.Reset(limited)
	defer func() {
		src.Reset(nil)
		readers.Put(src)
	}()
	// One of our clients says at once which scrape it responds to, and learns from the answer
	// that nobody waits any more.
	var s *scrape
	var watch func() bool
	gone := false
	if id := r.Header.Get(headerID); id != "" {
		var refusal *reverse.Refusal
		if s, refusal = h.take(r, id); refusal != nil {
			refuse(w, r, refusal)
			return
		}
		defer s.giveUp(reverse.ErrGone) // Unless it has its answer.
		_ = control.SetReadDeadline(time.Time{})
		interrupted := make(chan struct{})
		stop := context.AfterFunc(s.ctx, func() {
			defer close(interrupted)
			_ = control.SetReadDeadline(time.Now())
		})
		var stopped atomic.Bool
		watch = func() bool {
			ok := stop()
			stopped.Store(ok)
			return ok
		}
		defer func() {
			if !stopped.Load() && !stop() {
				<-interrupted // Later, it would be the connection's next request that it ends.
				if !gone {    // For what is left of the body.
					_ = control.SetReadDeadline(time.Now().Add(readTimeout))
				}
			}
		}()
	}
	id := ""
	if s == nil {
		id = idIn(src)
	}
	answer := asHTTP11(src)
	resp, err := http.ReadResponse(answer, nil) //nolint:bodyclose // The body is what the handler reads, and goes with it.
	switch {
	case err != nil && s != nil && s.ctx.Err() != nil:
		gone = true
		h.gone(w, r)
		return
	case err != nil || resp.StatusCode < http.StatusOK:
		if id != "" {
			s, _ = h.take(r, id)
		}
		if s != nil {
			s.giveUp(malformed(err, limited))
		}
		http.Error(w, "want an HTTP response as the body", http.StatusBadRequest)
		return
	}
	limited.left = -1
	if s == nil {
		var refusal *reverse.Refusal
		if s, refusal = h.take(r, resp.Header.Get(headerID)); refusal != nil {
			refuse(w, r, refusal)
			return
		}
	}
	if deadline, ok := s.ctx.Deadline(); ok {
		_ = control.SetReadDeadline(deadline)
	}
	body := &pushed{ReadCloser: resp.Body, s: s, stop: watch, done: make(chan error, 1), more: func() bool {
		return answer.Buffered() > 0 || src.Buffered() > 0 || r.ContentLength > limited.read
	}}
	resp.Body = body
	if s.method == http.MethodHead {
		body.err = io.EOF
		body.end(nil)
	}
	s.answer <- resp
	select {
	case err = <-body.done:
	case <-s.done:
		select {
		case err = <-body.done:
		default: // Whoever scraped has gone.
			err = context.Canceled
		}
	case <-s.lost: // The client's credential was revoked.
		_ = control.SetReadDeadline(time.Now())
		<-s.done
		err = context.Canceled
	}
	switch {
	case errors.Is(err, context.Canceled):
		gone = true
		h.gone(w, r)
	case err != nil:
		http.Error(w, "the response broke off", http.StatusBadRequest)
	}
}

// refuse answers a response that is not wanted: one that comes as it is made at once, without
// waiting for the rest of its body.
func refuse(w http.ResponseWriter, r *http.Request, refusal *reverse.Refusal) {
	if r.Header.Get(headerID) != "" {
		w.Header().Set("Connection", "close")
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
	}
	reverse.Refuse(w, refusal)
}

func (h *Hub) gone(w http.ResponseWriter, r *http.Request) {
	h.late.Inc()
	refuse(w, r, &reverse.Refusal{Status: http.StatusGone, Text: "nobody waits for this response any more"})
}

// asHTTP11 returns src with what it says of its version replaced: PushProx's client says 0.0 of
// its own answers, and with 1.0 chunks would not be read.
func asHTTP11(src *bufio.Reader) *bufio.Reader {
	const version = "HTTP/1.1"
	said, err := src.Peek(len(version))
	if err != nil || string(said) == version || string(said[:5]) != version[:5] {
		return src
	}
	_, _ = src.Discard(len(version))
	return bufio.NewReader(io.MultiReader(strings.NewReader(version), src))
}

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 16<<10) }}

// take returns the scrape with this ID, for once, to the client that it was issued to.
func (h *Hub) take(r *http.Request, id string) (*scrape, *reverse.Refusal) {
	gone := &reverse.Refusal{Status: http.StatusGone, Text: "nobody waits for this response"}
	h.mu.Lock()
	s := h.scrapes[id]
	taken := s != nil && s.taken
	h.mu.Unlock()
	if s == nil || taken {
		h.late.Inc()
		return nil, gone
	}
	name := s.session.Name()
	if said := r.Header.Get(reverse.HeaderClient); said != "" && said != name {
		return nil, &reverse.Refusal{Status: http.StatusForbidden, Text: "this scrape was another client's"}
	}
	hello, err := h.cfg.Registry.Hello(r, name, reverse.KindPushProx)
	if err != nil {
		refusal, _ := errors.AsType[*reverse.Refusal](err)
		return nil, refusal
	}
	if g := s.session.Grant(); g != nil && (hello.Grant == nil || g.Identity() != hello.Grant.Identity()) {
		return nil, &reverse.Refusal{Status: http.StatusForbidden, Text: "this scrape was another client's"}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.scrapes[id] != s || s.taken {
		h.late.Inc()
		return nil, gone
	}
	s.taken = true
	return s, nil
}

// idIn returns the ID that stands in the head of a response, which need not be well-formed: "" if
// there is none in what has come at once.
func idIn(src *bufio.Reader) string {
	_, _ = src.Peek(1)
	head, _ := src.Peek(src.Buffered())
	for line := range bytes.Lines(head) {
		name, value, found := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		switch {
		case len(name) == 0 && !found: // The end of the head.
			return ""
		case found && bytes.EqualFold(name, []byte(headerID)):
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

// malformed returns what came of a response whose head cannot be read, with the error of that; nil
// is one that has no status of a response.
func malformed(err error, from *pushBody) error {
	switch {
	case from.broken:
		return reverse.ErrGone
	case err == nil:
		return reverse.ErrMalformed
	}
	return fmt.Errorf("%w: %w", reverse.ErrMalformed, err)
}

// pushBody is the body of a push, of which what is read as a header is bounded.
type pushBody struct {
	r      io.Reader
	left   int   // below zero: no limit any more
	read   int64 // bytes
	broken bool  // the connection is
}

func (l *pushBody) Read(b []byte) (int, error) {
	if l.left == 0 {
		return 0, errors.New("the header is too large")
	}
	if l.left > 0 && len(b) > l.left {
		b = b[:l.left]
	}
	n, err := l.r.Read(b)
	if l.left > 0 {
		l.left -= n
	}
	l.read += int64(n)
	l.broken = l.broken || err != nil && err != io.EOF
	return n, err
}

// pushed is the body of a response, which tells when it has been read.
type pushed struct {
	io.ReadCloser
	s    *scrape
	once sync.Once
	stop func() bool // ends the watch over the scrape; nil: there is none
	more func() bool // tells whether bytes are left in the push
	err  error       // after the end, when the rest is not to be touched any more
	done chan error
}

func (p *pushed) Read(b []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	n, err := p.ReadCloser.Read(b)
	switch err {
	case nil:
		return n, nil
	case io.EOF:
		if p.more() {
			// A wrong length, or a second response. What is held back keeps this one from looking whole.
			n, err = 0, reverse.ErrMalformed
		}
	default:
		select {
		case <-p.s.lost:
			err = p.s.fault
		default:
		}
	}
	p.err = err
	p.end(err)
	return n, err
}

func (p *pushed) end(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	p.once.Do(func() {
		if p.stop != nil && err == nil {
			p.stop() // Before who scrapes can know that it is done.
		}
		p.done <- err
	})
}

// Close is not the body's own: that belongs to the handler that has the connection.
func (p *pushed) Close() error {
	p.end(context.Canceled)
	return nil
}
