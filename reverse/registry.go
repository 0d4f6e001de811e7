package reverse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/internal/safeurl"
)

// Refusal is what a client is told that gets no line.
type Refusal struct {
	// Status is the HTTP status.
	Status int
	// Text tells why.
	Text string
	// RetryAfter is when to try again. Zero means that it is not said.
	RetryAfter time.Duration
}

func (r *Refusal) Error() string { return r.Text }

// Grant is what a client has shown to be allowed to have its name. It must be comparable.
type Grant interface {
	// Identity tells whose credential it was, "" when none was asked for.
	Identity() string
}

// Hello is what a client says with each line.
type Hello struct {
	// Name is the client's.
	Name string
	// Session tells processes of one name apart.
	Session string
	// Kind of line, as in ClientStatus.
	Kind string
	// Version is the client's, "" when it does not say.
	Version string
	// Remote is the IP address that it comes from.
	Remote string
	// Grant is what it is allowed by; nil where nothing is asked for.
	Grant Grant
	// Announce is the announcement as it came, "" when there is none.
	Announce string
}

// RegistryConfig is what a Registry works with.
type RegistryConfig struct {
	// Authorize tells whether a request may come from the client called name, and returns a
	// *Refusal when not. Nil means that it may.
	Authorize func(r *http.Request, name string) (Grant, error)
	// MaxClients is how many clients are known at most, those that are away included.
	MaxClients int
	// MaxLines and MaxScrapes are how many lines and scrapes a client has at most.
	MaxLines, MaxScrapes int
	// ForgetAfter is how long a client that is away is remembered.
	ForgetAfter time.Duration
	// Settle is how long, after the start, clients that were known before are waited for.
	Settle time.Duration
	// Store keeps what is known through a restart; nil keeps nothing.
	Store Store
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Store keeps a file.
type Store interface {
	// Load returns what was saved last, nil when nothing was.
	Load() ([]byte, error)
	// Save replaces it.
	Save(b []byte) error
}

// Registry knows the clients and their lines. It is safe for concurrent use.
type Registry struct {
	cfg     RegistryConfig
	metrics *registryMetrics
	seed    maphash.Seed

	// mu is taken before a client's own, and claimsMu after it.
	mu      sync.RWMutex
	clients map[string]*client
	// expected are clients that are waited for after the start, while not settled.
	expected map[string]bool
	settled  bool
	stopping bool
	dirty    atomic.Bool
	full     faultlog.Log
	saves    faultlog.Log

	claimsMu sync.Mutex
	claims   map[claim]*place
	// announcements counts the clients that announced something.
	announcements uint64
}

// client is all that is known of a client.
type client struct {
	name string

	mu       sync.Mutex
	sessions []*Session // oldest first: the last one is the one that is scraped
	waiting  []*waiter
	scrapes  int
	progress time.Time // when a line was last free, or ended
	since    time.Time
	goodbye  bool
	gone     bool // forgotten

	kind, version, remote string
	announced             uint64 // hash of the announcement
	announcement          *Announcement
	order                 uint64         // of its first announcement among those of all clients
	last                  []ScrapeStatus // of each target
	lastOther             *ScrapeStatus  // nil: none

	// These are written under claimsMu and the client's lock, and read under either.
	owner owner
	here  bool // it has a session
}

// NewRegistry returns a registry with what its store knows.
func NewRegistry(cfg RegistryConfig) (*Registry, error) {
	r := &Registry{
		cfg: cfg, seed: maphash.MakeSeed(),
		clients: make(map[string]*client), claims: make(map[claim]*place), expected: make(map[string]bool),
	}
	r.full.Logger, r.saves.Logger = cfg.Logger, cfg.Logger
	r.metrics = newRegistryMetrics(cfg.Registerer, r)
	if err := r.load(); err != nil {
		return nil, err
	}
	r.settled = len(r.expected) == 0
	return r, nil
}

// Hello reads from a request who the client is, and whether it may be that. Session and
// name may come from elsewhere than the headers: in PushProx's poll the name is the body.
// An error is a *Refusal.
func (r *Registry) Hello(req *http.Request, name, kind string) (Hello, error) {
	remote, _, err := net.SplitHostPort(req.RemoteAddr)
	if err != nil {
		remote = req.RemoteAddr
	}
	h := Hello{
		Name: name, Session: req.Header.Get(HeaderSession), Kind: kind, Version: req.Header.Get(HeaderVersion), Remote: remote,
		Announce: req.Header.Get(HeaderAnnounce),
	}
	if err := ValidateName(name); err != nil {
		return h, &Refusal{Status: http.StatusBadRequest, Text: err.Error()}
	}
	if r.cfg.Authorize != nil {
		if h.Grant, err = r.cfg.Authorize(req, name); err != nil {
			return h, err
		}
	}
	if h.Session == "" { // PushProx's client.
		h.Session = remote
	} else if err := validateSession(h.Session); err != nil {
		return h, &Refusal{Status: http.StatusBadRequest, Text: err.Error()}
	}
	if len(h.Version) > 40 {
		h.Version = h.Version[:40]
	}
	if len(h.Announce) > MaxAnnouncement {
		return h, &Refusal{Status: http.StatusBadRequest, Text: fmt.Sprintf("announcement: more than %d bytes", MaxAnnouncement)}
	}
	return h, nil
}

// Join adds a line, which is not free yet. The caller calls Free when it is, and Leave when
// it has ended. An error is a *Refusal.
func (r *Registry) Join(h Hello) (*Session, error) {
	announced := uint64(0)
	var announcement *Announcement
	if h.Announce != "" {
		announced = maphash.String(r.seed, h.Announce)
	}
again: // A client that was forgotten is another one when it comes back.
	c, err := r.client(h.Name)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	news := announced != c.announced
	c.mu.Unlock()
	if news && h.Announce != "" {
		if announcement, err = ParseAnnouncement(h.Announce); err != nil {
			r.forgetIfNew(c)
			return nil, &Refusal{Status: http.StatusBadRequest, Text: "announcement: " + safeurl.Cut(err.Error())}
		}
	}

	c.mu.Lock()
	if c.gone { // It was forgotten this moment.
		c.mu.Unlock()
		goto again
	}
	s, refusal := c.join(r, h)
	if refusal != nil {
		c.mu.Unlock()
		r.forgetIfNew(c)
		r.metrics.refused.WithLabelValues(refusedReason(refusal)).Inc()
		return nil, refusal
	}
	// An older session that gets another line does not say what there is.
	if active := c.sessions[len(c.sessions)-1]; active == s {
		c.kind, c.version, c.remote = h.Kind, h.Version, h.Remote
		if !news {
			announced, announcement = c.announced, c.announcement
		}
		if id := identity(h.Grant); news || id != c.owner.identity {
			r.announce(c, id, announced, announcement)
		}
		s.announced, s.announcement = c.announced, c.announcement
	}
	c.mu.Unlock()
	r.arrived(h.Name)
	return s, nil
}

// client returns the client called name, which it makes if there is none.
func (r *Registry) client(name string) (*client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return nil, &Refusal{Status: http.StatusServiceUnavailable, Text: "the proxy is about to stop", RetryAfter: time.Second}
	}
	c := r.clients[name]
	if c != nil {
		return c, nil
	}
	if len(r.clients) >= r.cfg.MaxClients {
		r.metrics.refused.WithLabelValues("clients").Inc()
		r.full.Failed(context.Background(), "Client refused, no more may be known", fmt.Errorf("client %q: the limit is %d", name, r.cfg.MaxClients))
		return nil, &Refusal{Status: http.StatusServiceUnavailable, Text: fmt.Sprintf("the proxy has its %d clients", r.cfg.MaxClients), RetryAfter: time.Minute}
	}
	c = &client{name: name, since: time.Now()}
	r.clients[name] = c
	return c, nil
}

// forgetIfNew forgets a client that never had a line.
func (r *Registry) forgetIfNew(c *client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sessions) == 0 && c.kind == "" {
		c.gone = true
		delete(r.clients, c.name)
	}
}

func (r *Registry) lookup(name string) *client {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.clients[name]
}

// arrived counts a client that was known before the start.
func (r *Registry) arrived(name string) {
	r.mu.RLock()
	settled := r.settled
	r.mu.RUnlock()
	if settled {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.expected, name)
	if len(r.expected) == 0 && !r.settled {
		r.settled = true
		r.cfg.Logger.Info("All clients that were known are back")
	}
}

// Status returns all that is known.
func (r *Registry) Status() ProxyStatus {
	r.mu.RLock()
	settling := !r.settled
	r.mu.RUnlock()
	clients := r.all()
	status := ProxyStatus{Settling: settling, Now: time.Now(), Clients: make([]ClientStatus, 0, len(clients))}
	for _, c := range clients {
		status.Clients = append(status.Clients, r.status(c))
	}
	slices.SortFunc(status.Clients, func(a, b ClientStatus) int { return cmp.Compare(a.Name, b.Name) })
	return status
}

func (r *Registry) status(c *client) ClientStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ClientStatus{
		Name: c.name, Kind: c.kind, Version: c.version, Remote: c.remote, Connected: c.connected(),
		Since: c.since, Goodbye: c.goodbye, Sessions: len(c.sessions),
	}
	if c.lastOther != nil {
		s.Last = *c.lastOther
	}
	for _, session := range c.sessions {
		s.Lines += session.lines
		s.Busy += session.lines - len(session.free)
	}
	if a := c.announcement; a != nil {
		s.Instance, s.Labels = a.Instance, a.Labels
		s.Targets = make([]TargetStatus, len(a.Targets))
		for i, t := range a.Targets {
			s.Targets[i] = TargetStatus{Target: t, Last: c.last[i]}
			if holder, conflict := r.holder(c, claim{t.Job, a.Instance}); holder != nil {
				s.Targets[i].Holder, s.Targets[i].Duplicate = holder.name, conflict
			}
		}
	}
	return s
}

func (r *Registry) all() []*client {
	r.mu.RLock()
	defer r.mu.RUnlock()
	clients := make([]*client, 0, len(r.clients))
	for _, c := range r.clients {
		clients = append(clients, c)
	}
	return clients
}

// Refuse answers a client that gets no line. What is no *Refusal is not shown.
func Refuse(w http.ResponseWriter, err error) {
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok {
		refusal = &Refusal{Status: http.StatusInternalServerError, Text: "internal error"}
	}
	if refusal.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(refusal.RetryAfter.Seconds()))))
	}
	if refusal.Status == http.StatusUnauthorized && w.Header().Get("WWW-Authenticate") == "" {
		w.Header().Set("WWW-Authenticate", `Bearer realm="promferry"`)
	}
	http.Error(w, refusal.Text, refusal.Status)
}
