package reverse

import (
	"fmt"
	"net/http"
	"slices"
	"time"
)

// Session is one process of a client.
type Session struct {
	client   *client
	registry *Registry
	id       string
	kind     string
	grant    Grant
	free     []Line // the last one is taken first
	lines    int
	ready    bool      // a line has been free
	empty    time.Time // when the last line ended, while there is none
	goodbye  bool
	revoked  bool
	// What this process announced, with the hash of it.
	announced    uint64
	announcement *Announcement
}

// The limits of sessions.
const (
	// maxSessions is how many processes of one name have lines at a time: the old one and the
	// new one, and some that are dead and not found out yet.
	maxSessions = 4
	// linger is how long a session without lines is taken for connected: longer than
	// the pause that PushProx's client makes after an error.
	linger = 2 * time.Second
)

func (c *client) join(r *Registry, h Hello) (*Session, *Refusal) {
	var s *Session
	for _, other := range c.sessions {
		if identity(other.grant) != identity(h.Grant) {
			r.cfg.Logger.Warn("Client refused, another identity has its name", "client", c.name, "identity", identity(h.Grant),
				"holder", identity(other.grant), "remote", h.Remote)
			return nil, &Refusal{Status: http.StatusConflict, Text: "another identity holds this name"}
		}
		if other.id == h.Session {
			s = other
		}
	}
	switch {
	case s != nil && s.lines >= r.cfg.MaxLines:
		return nil, &Refusal{Status: http.StatusTooManyRequests, Text: fmt.Sprintf("the client has its %d lines", r.cfg.MaxLines), RetryAfter: 10 * time.Second}
	case s == nil && len(c.sessions) >= maxSessions:
		return nil, &Refusal{Status: http.StatusTooManyRequests, Text: fmt.Sprintf("the client has its %d sessions", maxSessions), RetryAfter: 10 * time.Second}
	case s == nil:
		s = &Session{client: c, registry: r, id: h.Session}
		if len(c.sessions) > 0 {
			r.metrics.duplicateSessions.Inc()
			r.cfg.Logger.Warn("Client has a second session, the newest is scraped", "client", c.name, "identity", identity(h.Grant),
				"remote", h.Remote, "other_remote", c.remote)
		} else {
			c.since = time.Now()
			r.present(c, true)
			r.cfg.Logger.Info("Client connected", "client", c.name, "kind", h.Kind, "identity", identity(h.Grant), "remote", h.Remote)
		}
		r.metrics.sessions.Inc()
		c.sessions = append(c.sessions, s)
		c.goodbye = false
		r.dirty.Store(true)
	}
	s.grant, s.kind = h.Grant, h.Kind
	s.lines++
	return s, nil
}

func identity(g Grant) string {
	if g == nil {
		return ""
	}
	return g.Identity()
}

// Free puts a line at the disposal of scrapes.
func (s *Session) Free(l Line) {
	c := s.client
	c.mu.Lock()
	defer c.mu.Unlock()
	s.ready = true
	c.progress = time.Now()
	if s == c.active() && len(c.waiting) > 0 {
		w := c.waiting[0]
		c.waiting = slices.Delete(c.waiting, 0, 1)
		w.session = s
		w.line <- l
		return
	}
	s.free = append(s.free, l)
}

// Take takes back a line that is free; false means that a scrape has it.
func (s *Session) Take(l Line) bool {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.take(l)
}

func (s *Session) take(l Line) bool {
	i := slices.Index(s.free, l)
	if i >= 0 {
		s.free = slices.Delete(s.free, i, i+1)
	}
	return i >= 0
}

// Leave tells that a line has ended.
func (s *Session) Leave(l Line) {
	c := s.client
	c.mu.Lock()
	defer c.mu.Unlock()
	s.take(l)
	s.lines--
	c.progress = time.Now()
	if s.lines > 0 {
		return
	}
	s.empty = c.progress
	if s.goodbye {
		s.end()
	}
}

// Revoke ends the sessions of clients that are not valid any more, so that others may have their
// names. It must be called before the Revoke of what makes lines, which closes theirs.
func (r *Registry) Revoke(valid func(g Grant, name string) bool) {
	for _, c := range r.all() {
		c.mu.Lock()
		for _, s := range slices.Clone(c.sessions) { // end takes it out.
			if s.grant == nil || valid(s.grant, c.name) {
				continue
			}
			s.revoked = true
			if s.lines > 0 {
				s.empty = time.Now()
			}
			s.end()
		}
		c.mu.Unlock()
	}
}

// Revoked tells whether Revoke has ended the session. No line of it is used any more.
func (s *Session) Revoked() bool {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.revoked
}

// Name returns the client's name.
func (s *Session) Name() string { return s.client.name }

// Grant returns what the session's client is allowed by.
func (s *Session) Grant() Grant {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.grant
}

// end removes a session without lines. The client's lock is held.
func (s *Session) end() {
	c := s.client
	i := slices.Index(c.sessions, s)
	if i < 0 {
		return
	}
	s.registry.metrics.ended.Inc()
	c.sessions = slices.Delete(c.sessions, i, i+1)
	if len(c.sessions) > 0 {
		s.registry.cfg.Logger.Info("Session of a client ended, another one is left", "client", c.name, "goodbye", s.goodbye)
		c.adopt()
		return
	}
	c.sessions = nil
	c.since, c.goodbye = s.empty, s.goodbye
	s.registry.present(c, false)
	s.registry.dirty.Store(true)
	s.registry.cfg.Logger.Info("Client went away", "client", c.name, "goodbye", s.goodbye)
}

// active returns the session that is scraped: of those that have had a free line and have not
// said goodbye the newest that has a line; or else the newest.
func (c *client) active() *Session {
	var newest *Session
	for _, s := range slices.Backward(c.sessions) {
		switch {
		case !s.ready || s.goodbye:
		case s.lines > 0 || s.kind != KindPTTH && time.Since(s.empty) < reconnectPatience: // The next poll is on its way.
			return s
		case newest == nil:
			newest = s
		}
	}
	return newest
}

// connected tells whether there is a line, or was one a moment ago.
func (c *client) connected() bool {
	s := c.active()
	return s != nil && (s.lines > 0 || time.Since(s.empty) < reconnectPatience)
}

// adopt takes what the session that is scraped now announced for what the client offers.
func (c *client) adopt() {
	if s := c.active(); s != nil && s.announced != c.announced {
		s.registry.announce(c, identity(s.grant), s.announced, s.announcement)
	}
}

// connecting tells whether there is a line that has not shown yet that it works.
func (c *client) connecting() bool {
	return slices.ContainsFunc(c.sessions, func(s *Session) bool { return !s.ready && !s.goodbye && s.lines > 0 })
}

// Goodbye tells that a process of a client is about to stop.
func (r *Registry) Goodbye(h Hello) {
	c := r.lookup(h.Name)
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.sessions {
		if s.id == h.Session && identity(s.grant) == identity(h.Grant) {
			s.goodbye = true
			if s.lines == 0 {
				s.end()
			} else {
				c.adopt()
			}
			r.dirty.Store(true)
			break
		}
	}
	if c.active() == nil {
		c.goodbye = true
		for _, w := range c.waiting {
			close(w.line)
		}
		c.waiting = nil
	}
}

// Lines returns how many lines there are.
func (s *Session) Lines() int {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.lines
}

// Leaving tells whether the client has said goodbye.
func (s *Session) Leaving() bool {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.goodbye
}
