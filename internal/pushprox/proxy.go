// Package pushprox has peers for tests: a proxy and a client that behave on the wire as
// PushProx's programs at commit 88b46ad do, with their weaknesses, and on request with
// faults on top. Where a comment says "the real one", it means those. Both are held to
// recordings of the real ones, see testdata.
package pushprox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The headers of the wire. The client tells the proxy how much time is left under another
// name than the one that the proxy looks for; both are spelled as the real ones do.
const (
	headerID        = "Id"
	headerTimeout   = "X-Prometheus-Scrape-Timeout-Seconds"
	headerRemaining = "X-Prometheus-Scrape-Timeout"
)

// ProxyConfig is what the real proxy has as flags, and a hook. The zero value is the real
// one's defaults.
type ProxyConfig struct {
	// RegistrationTimeout is for how long after the start of its last poll a client
	// stands in /clients. Zero means 5 min.
	RegistrationTimeout time.Duration
	// MaxTimeout is the most that a scrape or a push may wait. Zero means 5 min.
	MaxTimeout time.Duration
	// DefaultTimeout is for how long they wait when they do not say. Zero means 15 s.
	DefaultTimeout time.Duration
	// Parked, unless nil, is called each time that a poll was parked because there is no
	// scrape for this name. What comes for the name from then on gets to this poll.
	Parked func(name string)
}

// Proxy is PushProx's proxy without its /metrics. It serves everything on one listener:
// scrapes, which have a host in their request-target, and /poll, /push and /clients. As with the
// real one, a poll is parked for ever, also when its client is gone. Mount it below a
// prefix with http.StripPrefix. It is safe for concurrent use.
type Proxy struct {
	cfg    ProxyConfig
	mux    *http.ServeMux
	closed chan struct{}
	once   sync.Once

	mu     sync.Mutex
	seen   map[string]time.Time           // When the last poll of a name began.
	parked map[string]chan *http.Request  // By name. Closed when a newer poll comes.
	queued map[string][]*scrape           // By name, oldest first: there is no poll for them.
	slots  map[string]chan *http.Response // By Id: where a scrape waits for its response.
}

// A scrape waits for a poll.
type scrape struct {
	request *http.Request
	taken   chan struct{} // Closed by the poll that takes it.
}

// NewProxy returns a proxy without clients. Close it before the server it runs in.
func NewProxy(cfg ProxyConfig) *Proxy {
	cfg.RegistrationTimeout = cmp.Or(cfg.RegistrationTimeout, 5*time.Minute)
	cfg.MaxTimeout = cmp.Or(cfg.MaxTimeout, 5*time.Minute)
	cfg.DefaultTimeout = cmp.Or(cfg.DefaultTimeout, 15*time.Second)
	p := &Proxy{
		cfg:    cfg,
		mux:    http.NewServeMux(),
		closed: make(chan struct{}),
		seen:   make(map[string]time.Time),
		parked: make(map[string]chan *http.Request),
		queued: make(map[string][]*scrape),
		slots:  make(map[string]chan *http.Response),
	}
	// The real one checks no methods.
	p.mux.HandleFunc("/poll", p.poll)
	p.mux.HandleFunc("/push", p.push)
	p.mux.HandleFunc("/clients", p.clients)
	return p
}

// Close ends everything that waits as the death of the real proxy does: the connections
// break off without an answer. Later requests fare no better.
func (p *Proxy) Close() {
	p.once.Do(func() { close(p.closed) })
}

// ServeHTTP tells scrapes from the rest. It panics with http.ErrAbortHandler after Close.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case <-p.closed:
		panic(http.ErrAbortHandler)
	default:
	}
	if r.URL.Host != "" { // Absolute form, or CONNECT.
		p.scrape(w, r)
		return
	}
	p.mux.ServeHTTP(w, r)
}

func (p *Proxy) poll(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	name := strings.TrimSpace(string(body))
	request := p.next(name)
	if request == nil {
		http.Error(w, "Error WaitForScrapeInstruction: request is expired", http.StatusRequestTimeout)
		return
	}
	_ = request.WriteProxy(w) // To a client that is gone the scrape is lost.
}

// next returns a scrape for name as soon as there is one, or nil when a newer poll came.
func (p *Proxy) next(name string) *http.Request {
	mine, request := p.park(name)
	if request != nil {
		return request
	}
	if p.cfg.Parked != nil {
		p.cfg.Parked(name)
	}
	select {
	case request = <-mine:
		return request
	case <-p.closed:
		panic(http.ErrAbortHandler)
	}
}

// park registers name, releases the older poll if there is one, and takes a scrape that
// waits or else parks.
func (p *Proxy) park(name string) (chan *http.Request, *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen[name] = time.Now()
	if older := p.parked[name]; older != nil {
		close(older)
		delete(p.parked, name)
	}
	for len(p.queued[name]) > 0 {
		s := p.queued[name][0]
		p.queued[name] = p.queued[name][1:]
		if s.request.Context().Err() == nil {
			close(s.taken)
			return nil, s.request
		}
	}
	mine := make(chan *http.Request, 1)
	p.parked[name] = mine
	return mine, nil
}

func (p *Proxy) scrape(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), p.timeout(r.Header))
	defer cancel()
	request := r.WithContext(ctx)
	id := newID()
	request.Header.Add(headerID, id) // One that the scraper sent stays the first, and hides it.
	slot := make(chan *http.Response)
	p.mu.Lock()
	p.slots[id] = slot
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.slots, id)
	}()

	if err := p.hand(request); err != nil {
		err = fmt.Errorf("timeout reached for %q: %w", r.URL, err)
		http.Error(w, fmt.Sprintf("Error scraping %q: %s", r.URL, err), http.StatusInternalServerError)
		return
	}
	select {
	case resp := <-slot:
		defer func() { _ = resp.Body.Close() }()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body) // A body that breaks off looks whole to the scraper.
	case <-ctx.Done():
		http.Error(w, fmt.Sprintf("Error scraping %q: %s", r.URL, ctx.Err()), http.StatusInternalServerError)
	case <-p.closed:
		panic(http.ErrAbortHandler)
	}
}

// hand gives the scrape to a poll for its host, or waits for one.
func (p *Proxy) hand(request *http.Request) error {
	ctx, name := request.Context(), request.URL.Hostname()
	if err := ctx.Err(); err != nil {
		return err
	}
	p.mu.Lock()
	if poll := p.parked[name]; poll != nil {
		delete(p.parked, name)
		poll <- request
		p.mu.Unlock()
		return nil
	}
	s := &scrape{request: request, taken: make(chan struct{})}
	p.queued[name] = append(p.queued[name], s)
	p.mu.Unlock()
	select {
	case <-s.taken:
		return nil
	case <-ctx.Done(): // It stays in the queue, where the next poll drops it.
		return ctx.Err()
	case <-p.closed:
		panic(http.ErrAbortHandler)
	}
}

func (p *Proxy) push(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)                                               // Of a push that breaks off, what came of it counts.
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(body)), nil) //nolint:bodyclose // The scrape reads it, perhaps after this has returned.
	if err != nil {
		http.Error(w, "Error pushing: "+err.Error(), http.StatusInternalServerError)
		return
	}
	id := resp.Header.Get(headerID)
	// Not of the request: that the client has gone is not noticed.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), p.timeout(resp.Header))
	defer cancel()
	resp.Header.Del(headerID)
	resp.Header.Del(headerTimeout)
	p.mu.Lock()
	slot := p.slots[id] // Nil, where sending blocks, for an Id that nobody waits for.
	p.mu.Unlock()
	select {
	case slot <- resp:
	case <-ctx.Done():
		http.Error(w, "Error pushing: "+ctx.Err().Error(), http.StatusInternalServerError)
	case <-p.closed:
		panic(http.ErrAbortHandler)
	}
}

// timeout returns for how long the sender of these headers is to wait. What is no sensible
// number of seconds becomes, as in the real one, whatever the conversion makes of it.
func (p *Proxy) timeout(h http.Header) time.Duration {
	seconds, err := strconv.ParseFloat(h.Get(headerTimeout), 64)
	if err != nil {
		return min(p.cfg.DefaultTimeout, p.cfg.MaxTimeout)
	}
	return min(time.Duration(seconds*float64(time.Second)), p.cfg.MaxTimeout)
}

func (p *Proxy) clients(w http.ResponseWriter, _ *http.Request) {
	type group struct {
		Targets []string          `json:"targets"`
		Labels  map[string]string `json:"labels"`
	}
	groups := []group{}
	p.mu.Lock()
	for name, seen := range p.seen {
		if time.Since(seen) < p.cfg.RegistrationTimeout {
			groups = append(groups, group{Targets: []string{name}})
		}
	}
	p.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(groups)
}

// newID returns a UUID, version 4 (RFC 9562).
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // It never fails.
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
