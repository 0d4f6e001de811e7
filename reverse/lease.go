package reverse

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// Line is what a scrape can be sent over to one client, one at a time.
//
// RoundTrip sends a request whose URL is absolute. Its context bounds all of it, the body
// included. It returns ErrNotSent when the client has certainly not got the request. The
// answer's body must be closed; then the line is free again, which it tells its session, or
// has ended. The answer to a CONNECT with status 200 has an io.ReadWriteCloser as its body.
type Line interface {
	http.RoundTripper
	// Close ends the line at once.
	Close() error
}

// What Lease and a line's RoundTrip return.
var (
	// ErrUnknown: there is no client of this name.
	ErrUnknown = errors.New("no client of this name is known")
	// ErrAway: the client is not connected.
	ErrAway = errors.New("the client is not connected")
	// ErrNoFreeLine: the client is connected, and all its lines are in use.
	ErrNoFreeLine = errors.New("no line to the client became free in time")
	// ErrClientLimit: there are as many scrapes of the client as may be.
	ErrClientLimit = errors.New("too many scrapes of this client at a time")
	// ErrNotSent: the line had ended before the request was sent.
	ErrNotSent = errors.New("the line ended before the request was sent")
	// ErrNoTunnel: the line is for scrapes only.
	ErrNoTunnel = errors.New("connected by long-poll, which has no CONNECT: set params {_scheme: [https]} and scheme: http")
	// ErrGone: the line ended with the request on its way.
	ErrGone = errors.New("the line to the client ended in the middle")
	// ErrMalformed: what the client answered is no HTTP response, or more than one.
	ErrMalformed = errors.New("the client's answer is not one HTTP response")
)

// reconnectPatience is how long a scrape waits for a line: a client's first try to connect
// again comes sooner than that.
const reconnectPatience = 500 * time.Millisecond

// Lease is a line that a scrape has.
type Lease struct {
	Line    Line
	Session *Session
	client  *client
}

// Lease returns a free line to the client called name, which it waits for until some
// hundred milliseconds have passed without one. The caller ends it by Done.
func (r *Registry) Lease(ctx context.Context, name string) (Lease, error) {
	c := r.lookup(name)
	if c == nil {
		return Lease{}, ErrUnknown
	}
	c.mu.Lock()
	if c.scrapes >= r.cfg.MaxScrapes {
		c.mu.Unlock()
		return Lease{}, ErrClientLimit
	}
	s := c.active()
	if s != nil && len(s.free) > 0 {
		l := s.free[len(s.free)-1]
		s.free[len(s.free)-1] = nil
		s.free = s.free[:len(s.free)-1]
		c.scrapes++
		c.mu.Unlock()
		return Lease{l, s, c}, nil
	}
	// A client whose last line ended this moment may be about to come back.
	if !c.connected() && !c.connecting() && (c.goodbye || time.Since(c.progress) >= reconnectPatience) {
		c.mu.Unlock()
		return Lease{}, ErrAway
	}
	w := &waiter{line: make(chan Line, 1)}
	c.waiting = append(c.waiting, w)
	c.scrapes++
	c.mu.Unlock()
	return r.wait(ctx, c, w)
}

// wait waits for a line. While lines come, be it one by one as from PushProx's client, it
// goes on.
func (r *Registry) wait(ctx context.Context, c *client, w *waiter) (Lease, error) {
	began := time.Now()
	timer := time.NewTimer(reconnectPatience)
	defer timer.Stop()
	err := ErrNoFreeLine
	for {
		select {
		case l, ok := <-w.line:
			if ok {
				return Lease{l, w.session, c}, nil
			}
			c.mu.Lock()
			c.scrapes--
			c.mu.Unlock()
			return Lease{}, ErrAway
		case <-timer.C:
			c.mu.Lock()
			latest := began
			if c.progress.After(latest) {
				latest = c.progress
			}
			left := reconnectPatience - time.Since(latest)
			if !c.connected() {
				err = ErrAway
			}
			c.mu.Unlock()
			if left > 0 {
				timer.Reset(left)
				continue
			}
		case <-ctx.Done():
			err = ctx.Err()
		}
		break
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.waiting, w); i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
	} else if l, ok := <-w.line; ok { // It came this moment.
		return Lease{l, w.session, c}, nil
	}
	c.scrapes--
	return Lease{}, err
}

// Done tells what came of a scrape of u; void, that there was none.
func (l Lease) Done(u *url.URL, status ScrapeStatus, void bool) {
	c := l.client
	c.mu.Lock()
	defer c.mu.Unlock()
	c.scrapes--
	if !void {
		c.record(u, status)
	}
}

// record keeps the status with the target, of those that have this port and path the one
// with the same query, or else the first.
func (c *client) record(u *url.URL, status ScrapeStatus) {
	best := -1
	if c.announcement != nil {
		port := portOf(u)
		for i, t := range c.announcement.Targets {
			if t.Port == port && (t.Path == u.EscapedPath() || u.Path == "") && (best < 0 || t.Query == u.RawQuery) {
				best = i
			}
		}
	}
	if best < 0 {
		c.lastOther = &status
		return
	}
	c.last[best] = status
}

// portOf returns the port that a scrape of u is for, 0 when it is none.
func portOf(u *url.URL) uint16 {
	text := u.Port()
	if text == "" {
		text = "80"
		if u.Scheme == "https" || u.Query().Get(schemeParam) == "https" {
			text = "443"
		}
	}
	n, _ := strconv.ParseUint(text, 10, 16) // 0 if it is none.
	return uint16(n)
}

type waiter struct {
	line chan Line // of capacity 1
	// session is what line belongs to.
	session *Session
}
