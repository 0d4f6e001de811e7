// Package link keeps a client connected to a proxy, over the kind of line that the proxy,
// and what lies between, allow.
package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/internal/backoff"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/longpoll"
	"github.com/promferry/promferry/reverse/ptth"
)

const (
	// maxSpare is how many free lines are kept at most.
	maxSpare = 32
	// maxLines is how many lines there are at most; the proxy has a limit of its own.
	maxLines = 64
	// The first try to connect again comes after at most firstDelay: scrapes that wait for it
	// at the proxy give up after 500 ms. With maxDelay all clients are back within the time
	// that a proxy waits for them after a start.
	firstDelay = 250 * time.Millisecond
	maxDelay   = 10 * time.Second
	// handshakeTimeout is how long opening a line may take.
	handshakeTimeout = 10 * time.Second
	// goodbyeTimeout is how long a goodbye may take.
	goodbyeTimeout = 2 * time.Second
	// maxSilent is how often in a row an upgrade may have been of no use before PTTH is given up.
	maxSilent = 2
	// takenAfter is how long all lines are in use before another one is opened: most scrapes
	// are over by then, and who waits for a line at the proxy still does.
	takenAfter = 100 * time.Millisecond
	// retryPTTH is how often it is tried again where it could not be had.
	retryPTTH = 10 * time.Minute
	// heldAfter is how long a poll is open before it counts as a line: a proxy that does not
	// want it says so sooner.
	heldAfter = time.Second
)

// Config is what a Link works with.
type Config struct {
	// URL is the proxy's.
	URL *url.URL
	// HTTP sends requests to the proxy.
	HTTP ptth.Doer
	// Header says who the client is, see docs/protocol.md.
	Header http.Header
	// Targets is how many targets there are: as many lines are kept free.
	Targets int
	// Handler answers the scrapes.
	Handler http.Handler
	// Drain is how long scrapes in flight may take when the link ends.
	Drain time.Duration
	// Logger is logged to.
	Logger *slog.Logger
	// Metrics are shared by the links of a client.
	Metrics *Metrics
}

// Link is a client's way to one proxy. Run can be called once; the rest is safe for
// concurrent use.
type Link struct {
	cfg    Config
	name   string // the proxy's URL, as it may be shown
	dialer *ptth.Dialer
	faults faultlog.Log

	mu     sync.Mutex
	kind   string
	slots  int // that hold a line, or try to
	lines  int
	busy   int
	since  time.Time
	err    error
	silent int
	more   chan struct{} // asks for another line
	// connected is closed while there is a line; greeted tells that there was one.
	connected chan struct{}
	greeted   bool
}

// New returns a link, which does nothing yet.
func New(cfg Config) *Link {
	l := &Link{cfg: cfg, name: safeurl.String(cfg.URL), more: make(chan struct{}, 1), connected: make(chan struct{}), since: time.Now()}
	logger := cfg.Logger.With("proxy", l.name)
	l.faults.Logger = logger
	l.dialer = &ptth.Dialer{
		URL: cfg.URL, HTTP: cfg.HTTP, Header: cfg.Header, Handler: cfg.Handler, HandshakeTimeout: handshakeTimeout, Logger: logger,
	}
	cfg.Metrics.start(l.name)
	return l
}

// Run keeps the client connected until ctx ends. Then it says goodbye, and scrapes in
// flight are answered.
func (l *Link) Run(ctx context.Context) error {
	lines, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var group errgroup.Group
	group.Go(func() error {
		<-ctx.Done()
		l.goodbye(ctx)
		stop()
		return nil
	})
	err := l.run(lines)
	return errors.Join(err, group.Wait())
}

func (l *Link) run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := l.ptth(ctx)
		if ctx.Err() != nil {
			break
		}
		l.cfg.Logger.Info("No PTTH to this proxy, polling it", "proxy", l.name, "err", err)
		l.longPoll(ctx, errors.Is(err, ptth.ErrNoUpgrade) || errors.Is(err, ptth.ErrSilent))
	}
	return nil
}

// longPoll polls the proxy until ctx ends, or it turns out that PTTH can be had again. It may be
// known already that the proxy is promferry's.
func (l *Link) longPoll(ctx context.Context, known bool) {
	l.mu.Lock()
	l.kind, l.slots = reverse.KindPushProx, 0
	l.mu.Unlock()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	scrapes, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	p := &longpoll.Poller{
		URL: l.cfg.URL, HTTP: l.cfg.HTTP, Name: l.cfg.Header.Get(reverse.HeaderClient), Header: l.cfg.Header, Logger: l.cfg.Logger,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			l.count(1)
			defer l.count(-1)
			l.cfg.Handler.ServeHTTP(w, r)
		}),
		Responded: func(err error) {
			if err != nil {
				l.cfg.Metrics.failures.WithLabelValues(l.name, "response").Inc()
			}
		},
	}
	var polling sync.WaitGroup
	// Several polls at a time only where the proxy has said that it is ours.
	ours := make(chan struct{})
	isOurs := sync.OnceFunc(func() { close(ours) })
	if known {
		isOurs()
	}
	poll := func() {
		l.poll(ctx, scrapes, p, isOurs, func() {
			select {
			case <-ours:
				stop() // Another proxy has come in its place.
			default:
			}
		})
	}
	polling.Go(poll)
	polling.Go(func() {
		select {
		case <-ours:
			l.setKind(reverse.KindLongPoll)
			for range min(max(l.cfg.Targets, 1), maxSpare) - 1 {
				polling.Go(poll)
			}
		case <-ctx.Done():
		}
	})
	for again := time.NewTicker(retryPTTH); ; {
		select {
		case <-again.C:
			line, err := l.dialer.Open(ctx)
			if err != nil {
				continue
			}
			line.Close()
			stop()
		case <-ctx.Done():
			again.Stop()
			polling.Wait()
			timer := time.AfterFunc(l.cfg.Drain, giveUp)
			p.Wait()
			timer.Stop()
			return
		}
	}
}

// poll keeps one poll open until ctx ends.
func (l *Link) poll(ctx, scrapes context.Context, p *longpoll.Poller, ours, theirs func()) {
	connected := false
	up := func() {
		l.mu.Lock()
		fresh := !connected
		connected = true
		l.mu.Unlock()
		if fresh {
			l.opened()
		}
	}
	down := func(err error) {
		l.mu.Lock()
		was := connected
		connected = false
		l.mu.Unlock()
		if was {
			l.closed(err)
		}
	}
	defer down(nil)
	heartbeat := time.Duration(0)
	for attempt := 0; ctx.Err() == nil; {
		pollCtx, cancel := context.WithCancel(ctx)
		if heartbeat > 0 {
			cancel()
			pollCtx, cancel = context.WithTimeout(ctx, 2*heartbeat)
		}
		began := time.Now()
		held := time.AfterFunc(heldAfter, up)
		a, err := p.Poll(pollCtx)
		cancel()
		held.Stop()
		delay := time.Duration(0)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			up()
			if heartbeat = a.Heartbeat; heartbeat > 0 {
				ours()
			} else {
				theirs()
			}
			p.Start(scrapes, a)
			held := heldAfter
			if heartbeat > 0 {
				held = min(held, heartbeat/2)
			}
			if a.HasScrape() || time.Since(began) >= held {
				attempt = 0
				continue
			}
			// Not as fast as can be.
			err = errors.New("the proxy ends polls at once")
			if a.Displaced {
				err = errors.New("another client polls under this name")
			}
		}
		down(err)
		if c, ok := l.cfg.HTTP.(interface{ CloseIdleConnections() }); ok {
			c.CloseIdleConnections() // They may be as dead.
		}
		_ = l.failed(ctx, err)
		delay = l.delay(attempt, err)
		attempt++
		l.pause(ctx, delay)
	}
}

func (l *Link) setKind(kind string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kind = kind
}

func (l *Link) count(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy += n
}

// delay returns how long to wait after a fault.
func (l *Link) delay(attempt int, err error) time.Duration {
	if refusal, ok := errors.AsType[*reverse.Refusal](err); ok && refusal.RetryAfter > 0 {
		return refusal.RetryAfter + backoff.Delay(0, refusal.RetryAfter, maxDelay)
	}
	return backoff.Delay(attempt, firstDelay, maxDelay)
}

func (l *Link) goodbye(ctx context.Context) {
	l.mu.Lock()
	connected := l.lines > 0 && l.kind != reverse.KindPushProx
	l.mu.Unlock()
	if !connected {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbyeTimeout)
	defer cancel()
	if err := l.dialer.Goodbye(ctx); err != nil {
		l.cfg.Logger.Debug("Goodbye not said", "proxy", l.name, "err", err)
	}
}

// ptth keeps PTTH lines open until ctx ends, or it turns out that they cannot be had.
func (l *Link) ptth(ctx context.Context) error {
	want := min(max(l.cfg.Targets, 1), maxSpare)
	l.mu.Lock()
	l.kind, l.slots, l.silent = reverse.KindPTTH, 0, 0
	l.mu.Unlock()
	group, ctx := errgroup.WithContext(ctx)
	// The others begin when the first has shown that it works.
	works := make(chan struct{})
	var once sync.Once
	slot := func(keep, first bool) {
		l.mu.Lock()
		l.slots++
		l.mu.Unlock()
		group.Go(func() error {
			defer func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.slots--
			}()
			return l.hold(ctx, keep, first, func() { once.Do(func() { close(works) }) })
		})
	}
	slot(true, true)
	group.Go(func() error {
		select {
		case <-works:
		case <-ctx.Done():
			return nil
		}
		for range want - 1 {
			slot(true, false)
		}
		for {
			select {
			case <-l.more:
				slot(false, false)
			case <-ctx.Done():
				return nil
			}
		}
	})
	return group.Wait()
}

// hold keeps one line open; one that is not to be kept, until it ends. While there is none at
// all only the first is tried.
func (l *Link) hold(ctx context.Context, keep, first bool, works func()) error {
	for attempt := 0; ; attempt++ {
		if !first {
			select {
			case <-l.anyLine():
			case <-ctx.Done():
				return nil
			}
		}
		line, err := l.dialer.Open(ctx)
		if err == nil {
			began, used, last := time.Now(), atomic.Bool{}, atomic.Int64{}
			up := func() {
				works()
				l.opened()
			}
			use := func(begins bool) {
				used.Store(true)
				last.Store(int64(time.Since(began)))
				l.use(begins)
			}
			if err = line.Serve(ctx, l.cfg.Drain, up, use); !errors.Is(err, ptth.ErrSilent) {
				l.closed(err)
				// One that ends again and again without any use is not asked for in haste.
				if used.Load() || time.Since(began) > maxDelay {
					attempt = 0
				}
				// Prometheus has given up a scrape, which is no fault of the line's.
				if keep && used.Load() && time.Since(began)-time.Duration(last.Load()) < firstDelay && !errors.Is(err, ptth.ErrMoved) {
					l.pause(ctx, backoff.Delay(0, firstDelay, maxDelay))
					attempt = -1
					if ctx.Err() == nil {
						continue
					}
				}
			}
		}
		if ctx.Err() != nil || !keep {
			return nil
		}
		if err := l.failed(ctx, err); err != nil {
			return err
		}
		l.pause(ctx, l.delay(attempt, err))
		if ctx.Err() != nil {
			return nil
		}
	}
}

func (l *Link) pause(ctx context.Context, delay time.Duration) {
	select {
	case <-time.After(delay):
	case <-ctx.Done():
	}
}

func (l *Link) opened() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines++
	l.cfg.Metrics.connects.WithLabelValues(l.name).Inc()
	l.cfg.Metrics.lines.WithLabelValues(l.name).Set(float64(l.lines))
	if l.lines > 1 {
		return
	}
	close(l.connected)
	l.since, l.err = time.Now(), nil
	if !l.faults.Succeeded(context.Background(), "Connected again") && !l.greeted {
		l.cfg.Logger.Info("Connected", "proxy", l.name, "client", l.cfg.Header.Get(reverse.HeaderClient), "kind", l.kind)
	}
	l.greeted = true
}

func (l *Link) closed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines--
	l.cfg.Metrics.lines.WithLabelValues(l.name).Set(float64(l.lines))
	if l.lines == 0 {
		l.since, l.err = time.Now(), err
		l.connected = make(chan struct{})
	}
}

// anyLine returns a channel that is closed while there is a line.
func (l *Link) anyLine() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.connected
}

// use counts the lines that scrapes have, and asks for another one when all are taken.
func (l *Link) use(begins bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !begins {
		l.busy--
		return
	}
	if l.busy++; l.allTaken() {
		time.AfterFunc(takenAfter, l.grow)
	}
}

// allTaken tells whether another line would be of use.
func (l *Link) allTaken() bool { return l.busy >= l.slots && l.slots < maxLines }

// grow asks for another line, if all are still taken.
func (l *Link) grow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.allTaken() {
		select {
		case l.more <- struct{}{}:
		default:
		}
	}
}

// failed notes why there is no line. It returns an error when PTTH is to be given up.
func (l *Link) failed(ctx context.Context, err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	reason := "connect"
	switch refusal, refused := errors.AsType[*reverse.Refusal](err); {
	case errors.Is(err, ptth.ErrNoPTTH) && l.kind == reverse.KindPTTH:
		return err
	case errors.Is(err, ptth.ErrSilent):
		if l.silent++; l.silent >= maxSilent {
			return fmt.Errorf("%w: %w", ptth.ErrNoPTTH, err)
		}
		reason = "silent"
	case errors.Is(err, ptth.ErrMoved):
		if l.lines == 0 {
			l.cfg.Logger.Info("Proxy is about to stop, connecting anew", "proxy", l.name)
		}
		return nil
	case refused:
		reason = refusedReason(refusal)
	}
	l.cfg.Metrics.failures.WithLabelValues(l.name, reason).Inc()
	if l.lines == 0 {
		l.err = err
		l.faults.Failed(ctx, "Not connected", err)
	}
	return nil
}

func refusedReason(r *reverse.Refusal) string {
	switch r.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return "unauthorized"
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return "busy"
	default:
		return "refused"
	}
}

// Status returns how the link is.
func (l *Link) Status() reverse.LineStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := reverse.LineStatus{Proxy: l.name, Kind: l.kind, Lines: l.lines, Busy: l.busy, Since: l.since}
	if l.lines == 0 {
		s.Kind = ""
		if l.err != nil {
			s.Err = l.err.Error()
		}
	}
	return s
}

// Metrics are those of a client's links.
type Metrics struct {
	lines              *prometheus.GaugeVec
	connects, failures *prometheus.CounterVec
}

// NewMetrics registers the metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		lines: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "promferry_client_lines", Help: "Lines to a proxy.",
		}, []string{"proxy"}),
		connects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_client_connects_total", Help: "Lines that were opened to a proxy.",
		}, []string{"proxy"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_client_connect_failures_total", Help: "Lines that could not be opened, or ended by themselves.",
		}, []string{"proxy", "reason"}),
	}
	r.MustRegister(m.lines, m.connects, m.failures)
	return m
}

func (m *Metrics) start(proxy string) {
	m.lines.WithLabelValues(proxy)
	m.connects.WithLabelValues(proxy)
	for _, reason := range []string{"connect", "silent", "unauthorized", "busy", "refused", "response"} {
		m.failures.WithLabelValues(proxy, reason)
	}
}
