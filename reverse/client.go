package reverse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/safeurl"
)

// Doer sends HTTP requests. It must follow no redirect and decompress nothing.
type Doer interface {
	Do(req *http.Request) (*http.Response, error)
}

// PullTarget is what a client lets be scraped.
type PullTarget struct {
	// Job is the job label.
	Job string
	// URL is where it is scraped, scheme http or https.
	URL *url.URL
}

// announced returns the target as it is announced.
func (t PullTarget) announced() Target {
	a := Target{Job: t.Job, Port: portOfTarget(t.URL), Path: t.URL.EscapedPath(), Query: t.URL.RawQuery}
	if a.Path == "" {
		a.Path = "/"
	}
	if t.URL.Scheme == "https" {
		a.Scheme = "https"
	}
	return a
}

func portOfTarget(u *url.URL) uint16 {
	text := u.Port()
	if text == "" {
		text = "80"
		if u.Scheme == "https" {
			text = "443"
		}
	}
	n, _ := strconv.ParseUint(text, 10, 16) // The URL was checked.
	return uint16(n)
}

// Announce returns what a client announces of its targets.
func Announce(instance string, labels map[string]string, targets []PullTarget) *Announcement {
	a := &Announcement{Instance: instance, Labels: labels, Targets: make([]Target, 0, len(targets))}
	for _, t := range targets {
		a.Targets = append(a.Targets, t.announced())
	}
	return a
}

// ClientConfig is what a Client works with. All fields are needed but those that say what
// their zero value means.
type ClientConfig struct {
	// Name is the client's: the host of all URLs that it is asked for.
	Name string
	// Targets are what can be scraped.
	Targets []PullTarget
	// Allow widens this; nil does not.
	Allow []Allowance
	// HTTP scrapes the targets.
	HTTP Doer
	// OwnHTTP scrapes what Allow lets be scraped. It must connect to this host only, and send no
	// credentials: those of HTTP are for the targets.
	OwnHTTP Doer
	// Dial connects to a target for CONNECT, DialOwn to this host only.
	Dial, DialOwn func(ctx context.Context, network, address string) (net.Conn, error)
	// MaxBytes is how large an answer's body may be.
	MaxBytes int64
	// TunnelIdle is how long a CONNECT may pass no byte.
	TunnelIdle time.Duration
	// Logger is logged to.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Client answers the scrapes that come over a line. It is safe for concurrent use.
type Client struct {
	cfg     ClientConfig
	targets []Target
	scrapes map[string]prometheus.Counter

	mu   sync.Mutex
	last []ScrapeStatus
}

// clientResults are all that can become of a scrape at the client.
var clientResults = []string{"success", "bad_request", "not_allowed", "target_down", "too_large", "timeout", "broken_off", "redirect", "canceled"}

// NewClient returns a client.
func NewClient(cfg ClientConfig) *Client {
	c := &Client{cfg: cfg, scrapes: make(map[string]prometheus.Counter), last: make([]ScrapeStatus, len(cfg.Targets))}
	for _, t := range cfg.Targets {
		c.targets = append(c.targets, t.announced())
	}
	scrapes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "promferry_client_scrapes_total", Help: "Scrapes that came over a line, by what came of them.",
	}, []string{"result"})
	for _, result := range clientResults {
		c.scrapes[result] = scrapes.WithLabelValues(result)
	}
	cfg.Registerer.MustRegister(scrapes)
	return c
}

// Status returns the targets with their last scrapes.
func (c *Client) Status() []TargetStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	status := make([]TargetStatus, len(c.targets))
	for i, t := range c.targets {
		status[i] = TargetStatus{Target: t, Last: c.last[i]}
	}
	return status
}

// ServeHTTP answers a scrape, or CONNECT.
func (c *Client) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	route, f := c.route(r)
	status := 0
	if f == nil {
		if r.Method == http.MethodConnect {
			f = c.connect(w, r, route)
		} else {
			status, f = c.scrape(w, r, route)
		}
	}
	result := ScrapeStatus{At: time.Now(), Duration: time.Since(began), Status: status, Result: "success"}
	if f != nil {
		result.Result = f.result
		if f.status != 0 {
			result.Status = f.status
		}
	}
	c.scrapes[result.Result].Inc()
	if route.index >= 0 {
		c.mu.Lock()
		c.last[route.index] = result
		c.mu.Unlock()
	}
	if f == nil || f.whole {
		return
	}
	c.cfg.Logger.Debug("Scrape failed", "target", route.shown, "result", f.result, "err", f.text)
	if f.status == 0 {
		panic(http.ErrAbortHandler) // The proxy must not take what it has for the whole.
	}
	clear(w.Header()) // Of the target's.
	w.Header().Set(HeaderError, f.result)
	http.Error(w, f.text, f.status)
}

// route is where a scrape goes.
type route struct {
	// index is the target's, -1 for what is none but allowed.
	index int
	url   *url.URL
	own   bool
	shown string
}

// route returns where a scrape goes, if it may.
func (c *Client) route(r *http.Request) (route, *failure) {
	to := route{index: -1, shown: "?"}
	bad := func(text string) (route, *failure) {
		return to, &failure{status: http.StatusBadRequest, result: "bad_request", text: text}
	}
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodConnect:
		return to, &failure{status: http.StatusMethodNotAllowed, result: "bad_request", text: "a scrape is a GET or HEAD"}
	case r.URL.Host == "" || r.Method != http.MethodConnect && r.URL.Scheme != "http":
		return bad("want an absolute URL that begins with http://")
	case r.ContentLength != 0:
		return bad("a scrape has no body")
	}
	to.shown = safeurl.String(r.URL)
	denied := &failure{
		status: http.StatusForbidden, result: "not_allowed",
		text: fmt.Sprintf("%s is no pull target of this client, and not allowed by its --pull.allow", to.shown),
	}
	if r.URL.Hostname() != c.cfg.Name || r.URL.User != nil {
		return to, denied
	}
	if r.Method == http.MethodConnect {
		return c.routeTunnel(r, to, denied)
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return bad("the query is malformed")
	}
	https := query.Get(schemeParam) == "https"
	delete(query, schemeParam)
	port, path := portOf(r.URL), r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	otherQuery := false
	for i, t := range c.targets {
		if t.Port != port || t.plainPath() != cmp.Or(r.URL.Path, "/") || https && t.Scheme != "https" {
			continue
		}
		switch {
		case t.Query == "":
			to.index = i // Unless another one has the very query.
		case sameQuery(query, t.Query):
			to.index, to.url = i, c.cfg.Targets[i].URL // As it is configured.
			return to, nil
		default:
			otherQuery = true
		}
	}
	rest := withoutParam(r.URL.RawQuery, schemeParam)
	if to.index >= 0 {
		u := *c.cfg.Targets[to.index].URL
		u.RawQuery = rest
		to.url = &u
		return to, nil
	}
	for _, a := range c.cfg.Allow {
		if !a.allows(port, path) {
			continue
		}
		u := *r.URL
		if a.Path != "" {
			u.Path, _ = url.PathUnescape(a.Path) // It was checked.
			u.RawPath = a.Path
		}
		u.RawQuery = rest
		if https {
			u.Scheme = "https"
		}
		to.url, to.own = &u, true
		return to, nil
	}
	if otherQuery {
		denied.text = fmt.Sprintf("%s: the query is not that of the --pull.target: "+
			"set no params in Prometheus, or set all of them there and none in --pull.target", to.shown)
	}
	return to, denied
}

// routeTunnel returns where CONNECT goes: to a target that is scraped by https, or a port all
// paths of which are allowed. What goes through the tunnel nobody sees.
func (c *Client) routeTunnel(r *http.Request, to route, denied *failure) (route, *failure) {
	n, err := strconv.ParseUint(r.URL.Port(), 10, 16)
	if err != nil || n == 0 {
		return to, denied
	}
	port := uint16(n)
	for i, t := range c.targets {
		if t.Port == port && t.Scheme == "https" {
			to.index, to.url = i, c.cfg.Targets[i].URL
			return to, nil
		}
	}
	if slices.ContainsFunc(c.cfg.Allow, func(a Allowance) bool { return a.Path == "" && a.allows(port, "") }) {
		to.url, to.own = &url.URL{Scheme: "https", Host: r.URL.Host}, true
		return to, nil
	}
	return to, denied
}

// sameQuery tells whether a query has the parameters of a configured one and no others. Prometheus
// may write them in another order, and with other escapes.
func sameQuery(query url.Values, configured string) bool {
	params, err := url.ParseQuery(configured)
	return err == nil && maps.EqualFunc(query, params, slices.Equal)
}

// withoutParam removes a parameter from a query, and leaves the rest as it is, byte for byte.
func withoutParam(query, name string) string {
	parts := strings.Split(query, "&")
	parts = slices.DeleteFunc(parts, func(part string) bool {
		key, _, _ := strings.Cut(part, "=")
		plain, err := url.QueryUnescape(key)
		return err == nil && plain == name
	})
	return strings.Join(parts, "&")
}

// timeout returns how long the proxy waits.
func timeout(r *http.Request) (time.Duration, *failure) {
	seconds, err := strconv.ParseFloat(r.Header.Get(HeaderTimeout), 64)
	if err != nil || !(seconds > 0 && seconds < 1e6) {
		return 0, &failure{status: http.StatusBadRequest, result: "bad_request", text: HeaderTimeout + " is missing or wrong"}
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// scrape sends a scrape to its target and copies the answer.
func (c *Client) scrape(w http.ResponseWriter, r *http.Request, to route) (int, *failure) {
	limit, f := timeout(r)
	if f != nil {
		return 0, f
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(limit + time.Second))
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.Method, to.url.String(), nil)
	if err != nil {
		return 0, &failure{status: http.StatusBadRequest, result: "bad_request", text: "the URL makes no request"}
	}
	req.Header = outgoing(ctx, r).Header
	if r.Header["User-Agent"] == nil {
		req.Header["User-Agent"] = nil // So that none is made up.
	}
	http1 := c.cfg.HTTP
	if to.own {
		http1 = c.cfg.OwnHTTP
	}
	resp, err := http1.Do(req)
	if err != nil {
		return 0, c.explain(ctx, r, to, err, limit)
	}
	defer func() { _ = resp.Body.Close() }()
	if f := redirected(r.URL, resp); f != nil {
		return resp.StatusCode, f
	}
	copyAllowed(w.Header(), resp.Header)
	if _, sent, err := passOn(w, r, resp, c.cfg.MaxBytes); err != nil {
		f := c.explain(ctx, r, to, err, limit)
		if f.result == "target_down" {
			f.result, f.text = "broken_off", fmt.Sprintf("target %s: the answer broke off: %s", to.shown, safeurl.Line(err.Error()))
		}
		if sent {
			f.status = 0
		}
		return resp.StatusCode, f
	}
	return resp.StatusCode, nil
}

func (c *Client) explain(ctx context.Context, r *http.Request, to route, err error, limit time.Duration) *failure {
	switch {
	case errors.Is(err, errTooLarge):
		return &failure{status: http.StatusRequestEntityTooLarge, result: "too_large", text: fmt.Sprintf("the answer of %s is larger than %d bytes", to.shown, c.cfg.MaxBytes)}
	case r.Context().Err() != nil:
		return &failure{result: "canceled", text: "the proxy gave up"}
	case httpclient.IsTimeout(ctx, err):
		return &failure{status: http.StatusGatewayTimeout, result: "timeout", text: fmt.Sprintf("target %s: no answer within %v", to.shown, limit.Round(time.Millisecond))}
	}
	return &failure{status: http.StatusBadGateway, result: "target_down", text: fmt.Sprintf("target %s: %s", to.shown, safeurl.Line(err.Error()))}
}

// connect makes a tunnel to a target.
func (c *Client) connect(w http.ResponseWriter, r *http.Request, to route) *failure {
	limit, f := timeout(r)
	if f != nil {
		return f
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	dial := c.cfg.Dial
	if to.own {
		dial = c.cfg.DialOwn
	}
	address := net.JoinHostPort(to.url.Hostname(), strconv.Itoa(int(portOfTarget(to.url))))
	target, err := dial(ctx, "tcp", address)
	if err != nil {
		return c.explain(ctx, r, to, err, limit)
	}
	line, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = target.Close()
		return &failure{status: http.StatusInternalServerError, result: "bad_request", text: "this line makes no tunnel"}
	}
	if _, err := io.WriteString(line, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		_ = target.Close()
		_ = line.Close()
		return &failure{result: "canceled", whole: true}
	}
	Tunnel(line, Rest(buffered.Reader, line), target, target, c.cfg.TunnelIdle)
	return nil
}

// Rest returns what was buffered and then what comes.
func Rest(buffered interface {
	Buffered() int
	Peek(n int) ([]byte, error)
}, next io.Reader,
) io.Reader {
	n := buffered.Buffered()
	if n == 0 {
		return next
	}
	head, _ := buffered.Peek(n)
	return io.MultiReader(strings.NewReader(string(head)), next)
}

// Allowance is what may be scraped besides the targets.
type Allowance struct {
	// Port is the only one; zero means any.
	Port uint16
	// Path is the only one, as it is sent: escaped as in a URL; "" means any.
	Path string
}

// ParseAllowance reads "any", "9100", "/metrics" or "9100/metrics".
func ParseAllowance(s string) (Allowance, error) {
	if s == "any" {
		return Allowance{}, nil
	}
	a := Allowance{}
	port := s
	if i := strings.IndexByte(s, '/'); i >= 0 {
		port, a.Path = s[:i], s[i:]
	}
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return a, fmt.Errorf("%q: want a port, a path, both or any, as in 9100, /metrics, 9100/metrics", s)
		}
		a.Port = uint16(n)
	}
	u, err := url.Parse("http://host" + a.Path)
	if s == "" || strings.ContainsAny(a.Path, "?#") || err != nil {
		return a, fmt.Errorf("%q: want a port, a path, both or any, as in 9100, /metrics, 9100/metrics", s)
	}
	a.Path = u.EscapedPath()
	return a, nil
}

// String returns the allowance as ParseAllowance reads it.
func (a Allowance) String() string {
	switch {
	case a == Allowance{}:
		return "any"
	case a.Port == 0:
		return a.Path
	default:
		return strconv.Itoa(int(a.Port)) + a.Path
	}
}

// allows tells whether a scrape may have this port and path, which is escaped.
func (a Allowance) allows(port uint16, path string) bool {
	return port != 0 && (a.Port == 0 || a.Port == port) && (a.Path == "" || samePath(a.Path, path))
}

// samePath tells whether two paths are the same but for how they are escaped. A slash that is
// written %2F belongs to a segment, and is none between two.
func samePath(a, b string) bool {
	return slices.EqualFunc(strings.Split(a, "/"), strings.Split(b, "/"), func(a, b string) bool {
		plainA, errA := url.PathUnescape(a)
		plainB, errB := url.PathUnescape(b)
		return errA == nil && errB == nil && plainA == plainB
	})
}
