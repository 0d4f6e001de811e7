package pushprox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrDied is what Run returns after the fault DieAfterPoll.
var ErrDied = errors.New("died with a scrape in hand")

// Client is PushProx's client. It has one poll open at a time, polls again at once when
// it is answered, scrapes meanwhile, and never looks at the status of a poll or a push.
// The fields must not change while it runs.
type Client struct {
	// FQDN is the client's name: the host of the scrapes that it takes.
	FQDN string
	// ProxyURL is the proxy's base URL; how many slashes it ends in does not matter. A user
	// and password in it become basic authentication.
	ProxyURL string
	// TLS is for the proxy and for https targets alike. Nil means Go's defaults.
	TLS *tls.Config
	// InitialWait and MaxWait are the pause after a poll that failed, before jitter of one
	// half up and down: the first one, and where it stops to grow by half each time. Zero
	// means 1 s and 5 s.
	InitialWait, MaxWait time.Duration
	// UseLocalhost and AllowPort are flags of Rancher's fork: scrape localhost on the
	// port that was asked for, whatever the name; and refuse other ports than this, unless
	// empty. The proxy sees of them what the texts of errors say.
	UseLocalhost bool
	AllowPort    string
	// Faults are what it does worse than the real one.
	Faults Faults

	// Dial connects to the proxy and to targets. Nil means TCP. The real one would also go
	// through the proxy that the environment names.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Failed, unless nil, is called where the real one counts an error: "poll", "scrape" or
	// "push".
	Failed func(operation string, err error)
	// Pushed, unless nil, is called with the status of each answer to a push.
	Pushed func(status int)
}

// Faults are ways to misbehave. The zero value has none.
type Faults struct {
	// LatePush waits for this long after each scrape, and then pushes whether or not the
	// scrape's time is up. The real one does not push when it is.
	LatePush time.Duration
	// DoublePush pushes each response twice, one after the other.
	DoublePush bool
	// LosePush scrapes, and pushes nothing.
	LosePush bool
	// NoDeadline leaves out X-Prometheus-Scrape-Timeout.
	NoDeadline bool
	// SecondPoller polls a second time at the same time with the same name.
	SecondPoller bool
	// DieAfterPoll closes all connections when the first poll was answered with a scrape, and ends.
	// (To die with a parked poll, end Run's context.)
	DieAfterPoll bool
	// Drop closes all connections, a parked poll's among them, for each value that it
	// gives. What was under way fails, and the client goes on as it does after any failure.
	Drop <-chan struct{}
	// GarbageResponse pushes something that is no HTTP response.
	GarbageResponse bool
	// WrongID pushes with an Id that nobody has issued.
	WrongID bool
	// TruncatedPush closes the connection after half of each push, whose Content-Length
	// promised the whole.
	TruncatedPush bool
	// HTTPVersion, unless empty, is the version of each pushed response: "HTTP/1.0",
	// "HTTP/0.0", "HTTP/9.9".
	HTTPVersion string
}

// A session is one Run.
type session struct {
	*Client
	pollURL, pushURL *url.URL
	http             *http.Client
	conns            conns
	work             sync.WaitGroup // Scrapes and pushes, and what a fault adds.
}

// Run polls until ctx ends, when it drops everything, as a process that is killed does,
// and returns nil. It returns an error when it cannot begin, and ErrDied.
func (c *Client) Run(ctx context.Context) error {
	base, err := url.Parse(strings.TrimRight(c.ProxyURL, "/") + "/")
	if err != nil {
		return errors.New("parse the proxy's URL: it is none") // It may hold a password.
	}
	s := &session{
		Client:  c,
		pollURL: base.ResolveReference(&url.URL{Path: "poll"}),
		pushURL: base.ResolveReference(&url.URL{Path: "push"}),
	}
	s.conns.dial = c.Dial
	if c.Dial == nil {
		s.conns.dial = (&net.Dialer{
			Timeout:         30 * time.Second,
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 5 * time.Second, Count: 3},
		}).DialContext
	}
	transport := &http.Transport{ // The numbers are the real one's, and it has no HTTP/2.
		DialContext:         s.conns.Dial,
		TLSClientConfig:     c.TLS,
		MaxIdleConns:        100,
		IdleConnTimeout:     90 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
	}
	s.http = &http.Client{Transport: transport}

	ctx, cancel := context.WithCancelCause(ctx)
	defer func() {
		cancel(nil)
		s.conns.End()
		s.work.Wait()
	}()
	if c.Faults.Drop != nil {
		s.work.Go(func() { s.drop(ctx) })
	}
	if c.Faults.SecondPoller {
		s.work.Go(func() { s.polls(ctx, cancel) })
	}
	s.polls(ctx, cancel)
	if errors.Is(context.Cause(ctx), ErrDied) {
		return ErrDied
	}
	return nil
}

// drop closes the connections whenever the fault says so.
func (s *session) drop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case _, more := <-s.Faults.Drop:
			if !more {
				return
			}
			s.conns.Drop()
		}
	}
}

// polls polls until ctx ends.
func (s *session) polls(ctx context.Context, cancel context.CancelCauseFunc) {
	initial, limit := cmp.Or(s.InitialWait, time.Second), cmp.Or(s.MaxWait, 5*time.Second)
	wait := initial
	for {
		request, err := s.poll(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && s.Faults.DieAfterPoll:
			cancel(ErrDied)
			return
		case err == nil:
			wait = initial
			s.work.Go(func() { s.scrape(ctx, request) })
			continue
		}
		s.failed("poll", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait+1)): //nolint:gosec // Jitter.
		}
		wait = min(wait+wait/2, limit)
	}
}

// poll waits for a scrape. Whatever the answer's status, its body is taken for one.
func (s *session) poll(ctx context.Context) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.pollURL.String(), strings.NewReader(s.FQDN))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "")
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	request, err := http.ReadRequest(bufio.NewReader(resp.Body))
	if err != nil {
		return nil, err
	}
	request.RequestURI = "" // Which a client must not set.
	return request, nil
}

// scrape does one scrape and pushes what came of it.
func (s *session) scrape(run context.Context, request *http.Request) {
	ctx, deadline := run, time.Time{}
	seconds, err := strconv.ParseFloat(request.Header.Get(headerTimeout), 64)
	if err == nil {
		deadline = time.Now().Add(time.Duration(seconds * float64(time.Second)))
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(run, deadline)
		defer cancel()
	}
	resp, err := s.fetch(ctx, request, err)
	if err != nil && run.Err() != nil {
		return
	}
	if err != nil {
		s.failed("scrape", err)
		// As in the real one it has no version, and goes out as HTTP/0.0.
		resp = &http.Response{
			StatusCode: http.StatusInternalServerError,
			Header:     http.Header{},
			Body:       io.NopCloser(strings.NewReader(err.Error())),
		}
	}
	defer func() { _ = resp.Body.Close() }()
	if s.Faults.LosePush {
		return
	}
	if s.Faults.LatePush > 0 {
		ctx = run
		select {
		case <-ctx.Done():
			return
		case <-time.After(s.Faults.LatePush):
		}
	}
	pushed := s.encode(resp, request.Header.Get(headerID), deadline)
	if err := s.push(ctx, pushed); err != nil && run.Err() == nil {
		s.failed("push", err)
	}
}

// fetch asks the target, unless err says already that it must not.
func (s *session) fetch(ctx context.Context, request *http.Request, err error) (*http.Response, error) {
	if err != nil {
		return nil, err
	}
	u := request.URL
	if query := u.Query(); query.Get("_scheme") == "https" {
		query.Del("_scheme")
		u.Scheme, u.RawQuery = "https", query.Encode()
	}
	if u.Hostname() != s.FQDN {
		return nil, errors.New("scrape target doesn't match client fqdn")
	}
	if port := u.Port(); port != "" {
		if s.AllowPort != "" && port != s.AllowPort {
			return nil, fmt.Errorf("client does not have permissions to scrape port %s", port)
		}
		if s.UseLocalhost {
			u.Host = net.JoinHostPort("localhost", port)
		}
	}
	resp, err := s.http.Do(request.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("failed to scrape %s: %w", u, err)
	}
	return resp, nil
}

// encode returns the whole response as it is pushed. One whose body breaks off is pushed
// as far as it came.
func (s *session) encode(resp *http.Response, id string, deadline time.Time) []byte {
	if s.Faults.GarbageResponse {
		return []byte("no HTTP response\n")
	}
	if s.Faults.WrongID {
		id = newID()
	}
	resp.Header.Set(headerID, id)
	if !s.Faults.NoDeadline {
		resp.Header.Set(headerRemaining, fmt.Sprintf("%f", time.Until(deadline).Seconds()))
	}
	var b bytes.Buffer
	_ = resp.Write(&b)
	if s.Faults.HTTPVersion == "" {
		return b.Bytes()
	}
	_, rest, _ := bytes.Cut(b.Bytes(), []byte(" "))
	return append([]byte(s.Faults.HTTPVersion+" "), rest...)
}

// push sends a response, and does not care what the proxy says to it.
func (s *session) push(ctx context.Context, response []byte) error {
	times := 1
	if s.Faults.DoublePush {
		times = 2
	}
	for range times {
		body := io.NopCloser(bytes.NewReader(response)) // Hidden from net/http, which would learn to send it again.
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.pushURL.String(), body)
		if err != nil {
			return err
		}
		req.ContentLength = int64(len(response))
		if s.Faults.TruncatedPush {
			return s.pushHalf(req)
		}
		resp, err := s.http.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close() // Unread: the connection of a push that was refused is lost.
		if s.Pushed != nil {
			s.Pushed(resp.StatusCode)
		}
	}
	return nil
}

// pushHalf sends the head of a push and half of its body on a connection of its own.
func (s *session) pushHalf(req *http.Request) error {
	req.Header.Set("Accept-Encoding", "gzip")
	if user := req.URL.User; user != nil {
		password, _ := user.Password()
		req.SetBasicAuth(user.Username(), password)
	}
	var b bytes.Buffer
	if err := req.Write(&b); err != nil {
		return err
	}
	port := map[string]string{"http": "80", "https": "443"}[req.URL.Scheme]
	conn, err := s.conns.Dial(req.Context(), "tcp", net.JoinHostPort(req.URL.Hostname(), cmp.Or(req.URL.Port(), port)))
	if err != nil {
		return err
	}
	if req.URL.Scheme == "https" {
		cfg := &tls.Config{MinVersion: tls.VersionTLS12}
		if s.TLS != nil {
			cfg = s.TLS.Clone()
		}
		cfg.ServerName = cmp.Or(cfg.ServerName, req.URL.Hostname())
		conn = tls.Client(conn, cfg)
	}
	_, err = conn.Write(b.Bytes()[:b.Len()-int(req.ContentLength)/2])
	return errors.Join(err, conn.Close())
}

func (s *session) failed(operation string, err error) {
	if s.Failed != nil {
		s.Failed(operation, err)
	}
}

// conns are the open connections of one Run.
type conns struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu    sync.Mutex
	open  map[*conn]bool
	ended bool
}

// A conn tells conns when it is closed.
type conn struct {
	net.Conn
	of *conns
}

// Close closes the connection.
func (c *conn) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}

// Dial opens a connection that Drop and End can close.
func (cs *conns) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := cs.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.ended {
		return nil, errors.Join(net.ErrClosed, raw.Close())
	}
	c := &conn{Conn: raw, of: cs}
	if cs.open == nil {
		cs.open = make(map[*conn]bool)
	}
	cs.open[c] = true
	return c, nil
}

// Drop closes all connections.
func (cs *conns) Drop() {
	cs.mu.Lock()
	open := cs.open
	cs.open = nil
	cs.mu.Unlock()
	for c := range open {
		_ = c.Conn.Close()
	}
}

// End closes all connections, and each new one at once.
func (cs *conns) End() {
	cs.mu.Lock()
	cs.ended = true
	cs.mu.Unlock()
	cs.Drop()
}
