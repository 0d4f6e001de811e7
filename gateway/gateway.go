// Package gateway is a gateway with the Pushgateway's API, in which each group is a target of
// its own as well.
package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/promferry/promferry/pushgw"
)

// Config says what a Gateway does.
type Config struct {
	StoreConfig
	// MaxBodyBytes is how large the body of a push may be, packed and unpacked.
	MaxBodyBytes int64
	// AdminAPI lets everybody who may push to every group delete them all.
	AdminAPI bool
	// Rights say who may push; nil: everybody.
	Rights Rights
	// Flags are told in /api/v1/status.
	Flags map[string]string
	// Gatherer has the metrics of the process, which stand on the page with all groups.
	Gatherer   prometheus.Gatherer
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// A Gateway answers pushes and scrapes. It is safe for concurrent use.
type Gateway struct {
	config  Config
	store   *Store
	started time.Time
	metrics *metrics
	// parsing has room for as many pushes as are read and rendered at a time, parsingLarge for
	// those with large bodies: who pushes small ones does not wait for these.
	parsing, parsingLarge chan struct{}
	// large has room for as many large bodies as are read at a time.
	large chan struct{}
	// pages has room for as many answers with all groups as are made at a time.
	pages chan struct{}
}

// New returns a Gateway with the groups that its file holds. It must be closed.
func New(config Config) (*Gateway, error) {
	if config.Rights == nil {
		config.Rights = everybody{}
	}
	store, err := NewStore(config.StoreConfig, config.Logger, config.Registerer)
	if err != nil {
		return nil, err
	}
	return &Gateway{
		config: config, store: store, started: time.Now(), metrics: newMetrics(config.Registerer, store),
		parsing: make(chan struct{}, 2*runtime.GOMAXPROCS(0)), parsingLarge: make(chan struct{}, runtime.GOMAXPROCS(0)),
		large: make(chan struct{}, largeBodies),
		pages: make(chan struct{}, maxPages),
	}, nil
}

// Close closes the file. It is for when no request is answered any more.
func (g *Gateway) Close() error { return g.store.Close() }

// Run does what time brings, until ctx ends: it forgets groups, and keeps on disk which are silent.
func (g *Gateway) Run(ctx context.Context) error { return g.store.Run(ctx) }

// Summary says in a line what there is.
func (g *Gateway) Summary() string {
	now := time.Now()
	silent := 0
	states := g.store.states(now)
	for _, s := range states {
		if s.in(now) == StateSilent {
			silent++
		}
	}
	return fmt.Sprintf("%d groups, %d silent", len(states), silent)
}

// writeTime is how long a step of an answer may take to be taken.
const writeTime = 30 * time.Second

// ServeHTTP answers /metrics and all below it, /groups/, /sd and /api/v1/. No path is cleaned:
// what is pushed goes where the path says, or nowhere.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(3*bodyTime + parseTime + writeTime))
	path := escapedPath(r.URL)
	switch {
	case isGroupPath(path):
		g.group(w, r, strings.TrimPrefix(path, "/metrics"))
	case path == "/metrics":
		answer(w, r, g.all)
	case strings.HasPrefix(path, "/groups/") && isGroupPath("/metrics"+strings.TrimPrefix(path, "/groups")) && strings.HasSuffix(path, "/metrics"):
		answer(w, r, g.target)
	case path == "/sd":
		answer(w, r, g.discovery)
	case path == "/api/v1/metrics":
		switch {
		case !allow(w, r, http.MethodDelete, http.MethodGet):
		case r.Method == http.MethodDelete:
			g.deleteMatching(w, r)
		default:
			g.apiMetrics(w, r)
		}
	case path == "/api/v1/status":
		answer(w, r, g.apiStatus)
	case path == "/api/v1/admin/wipe" && g.config.AdminAPI:
		if allow(w, r, http.MethodPut) && g.config.Rights.PushToAll(w, r) {
			g.wipe(w, r)
		}
	default:
		http.NotFound(w, r)
	}
}

// answer lets a handler answer GET.
func answer(w http.ResponseWriter, r *http.Request, handler http.HandlerFunc) {
	if allow(w, r, http.MethodGet) {
		handler(w, r)
	}
}

// maxPages is how many large answers with several groups are made at a time, each of which takes
// memory for a piece of each group, pageTime for how long others wait. One is large above
// largePage, in bytes of text: who asks for the gateway's own metrics only waits for nobody.
const (
	maxPages  = 2
	pageTime  = 5 * time.Second
	largePage = 1 << 20
)

// chosen returns what the groups are that a request selects, all where it says nothing of it, and
// waits until not too many others are answered. Where it is not ok the request is answered.
// Leave is to be called when the answer is made.
func (g *Gateway) chosen(w http.ResponseWriter, r *http.Request) (states []*state, leave func(), ok bool) {
	leave = func() {}
	matchers, err := matchersOf(r)
	if err != nil {
		refuse(w, asRefusal(err))
		return nil, leave, false
	}
	states = g.store.states(time.Now())
	if matchers != nil {
		states = slices.DeleteFunc(states, func(s *state) bool { return !selected(matchers, s.group.key) })
	}
	size := 0
	for _, s := range states {
		if s.content != nil {
			size += s.content.size()
		}
	}
	if size <= largePage {
		return states, leave, true
	}
	ctx, cancel := context.WithTimeout(r.Context(), pageTime)
	defer cancel()
	if leave, err = take(ctx, g.pages); err != nil {
		http.Error(w, fmt.Sprintf("%d answers with many groups are being made or read, and take long: scrape each group as a target (/sd)", maxPages), http.StatusServiceUnavailable)
		return nil, leave, false
	}
	return states, leave, true
}

// allow tells whether a request has one of the methods. It answers others.
func allow(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	if slices.Contains(methods, r.Method) {
		return true
	}
	allowed := append(slices.Clone(methods), http.MethodOptions)
	slices.Sort(allowed)
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	if r.Method != http.MethodOptions {
		http.Error(w, "Method Not Allowed: want one of "+strings.Join(allowed, ", "), http.StatusMethodNotAllowed)
	}
	return false
}

// group answers a push to a group, or its deletion.
func (g *Gateway) group(w http.ResponseWriter, r *http.Request, path string) {
	if !allow(w, r, http.MethodDelete, http.MethodPost, http.MethodPut) {
		return
	}
	if r.Method == http.MethodDelete {
		key, err := parseKey(path)
		if err != nil {
			refuse(w, asRefusal(err))
			return
		}
		if !g.config.Rights.Push(w, r, key) {
			return
		}
		if err := g.store.Delete(key); err != nil {
			refuse(w, asRefusal(err))
			return
		}
		w.WriteHeader(http.StatusAccepted)
		return
	}
	start := time.Now()
	key, err := parseKey(path)
	if err == nil && !g.config.Rights.Push(w, r, key) {
		g.metrics.pushes[reasonRights].Inc()
		return
	}
	if err == nil {
		err = g.push(w, r, key)
	}
	g.metrics.duration.Observe(time.Since(start).Seconds())
	if err == nil {
		g.metrics.pushes[resultSuccess].Inc()
		return // With 200.
	}
	refusal := asRefusal(err)
	g.metrics.pushes[refusal.Reason].Inc()
	g.config.Logger.Debug("Push refused", "method", r.Method, "path", r.URL.Path, "status", refusal.Status, "err", refusal)
	refuse(w, refusal)
}

func refuse(w http.ResponseWriter, r *Refusal) { http.Error(w, r.Text, r.Status) }

func (g *Gateway) push(w http.ResponseWriter, r *http.Request, key pushgw.GroupingKey) error {
	p, err := g.read(w, r, key)
	if err != nil {
		g.store.Refused(key, asRefusal(err))
		return err
	}
	defer p.release()
	return g.store.apply(p)
}

// all answers a scrape of all groups, or of those that the query selects, with the gateway's own
// metrics. It is always text: Prometheus refuses all of a page in protobuf for one native
// histogram that is wrong.
func (g *Gateway) all(w http.ResponseWriter, r *http.Request) {
	states, leave, ok := g.chosen(w, r)
	defer leave()
	if !ok {
		return
	}
	scheme := expfmt.NegotiateAccept(r.Header, expfmt.DefaultAcceptedFormats()...).ToEscapingScheme()
	p := newPage(scheme)
	own, err := g.config.Gatherer.Gather()
	if err != nil {
		g.config.Logger.Warn("Own metrics not complete", "err", err)
	}
	b := getBuffer()
	defer putBuffer(b)
	rendered, err := render(b, own)
	if err == nil {
		var c *content
		if c, err = build(rendered, math.MaxInt); err == nil {
			p.add(c, []byte("{}"))
		}
	}
	if err != nil {
		g.config.Logger.Warn("Own metrics left out", "err", err)
	}
	for _, s := range states {
		p.state(s)
	}
	body, done := packed(w, r)
	w.Header().Set("Content-Type", string(expfmt.FmtText.WithEscapingScheme(scheme)))
	_ = p.write(body)
	done()
	if !r.URL.Query().Has(matchParameter) {
		g.metrics.leftOut.Set(float64(p.leftOut))
	}
}
