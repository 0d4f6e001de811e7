package pushgw

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/safeurl"
)

// Doer sends HTTP requests.
type Doer interface {
	Do(req *http.Request) (*http.Response, error)
}

// Client puts, adds to, deletes and lists groups on one Pushgateway, or on another receiver that has a
// Pushgateway's paths below its URL. It is safe for concurrent use.
type Client struct {
	base *url.URL
	http Doer
}

// New returns a client for the Pushgateway at base, to which a path may belong, as behind
// a reverse proxy. The Doer must not follow redirects: Go would put to wherever they lead.
func New(base *url.URL, http Doer) *Client {
	u := *base
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawPath = strings.TrimRight(u.RawPath, "/")
	return &Client{base: &u, http: http}
}

// String returns the Pushgateway's URL as it may be shown.
func (c *Client) String() string { return safeurl.String(c.base) }

// Body is what a put or an add sends.
type Body struct {
	// ContentType is the Content-Type header.
	ContentType string
	// Gzipped is the exposition, gzipped.
	Gzipped []byte
}

// Put replaces the whole group. Errors are *StatusError where the Pushgateway answered.
func (c *Client) Put(ctx context.Context, key GroupingKey, body Body) error {
	return c.push(ctx, http.MethodPut, key, body)
}

// Add replaces, in the group, the families that body has, and leaves the others. Errors
// are as those of Put.
func (c *Client) Add(ctx context.Context, key GroupingKey, body Body) error {
	return c.push(ctx, http.MethodPost, key, body)
}

func (c *Client) push(ctx context.Context, method string, key GroupingKey, body Body) error {
	req, err := c.request(ctx, method, key, bytes.NewReader(body.Gzipped))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", body.ContentType)
	req.Header.Set("Content-Encoding", "gzip")
	return c.do(req)
}

// Delete deletes the group, if there is one.
func (c *Client) Delete(ctx context.Context, key GroupingKey) error {
	req, err := c.request(ctx, http.MethodDelete, key, nil)
	if err != nil {
		return err
	}
	return c.do(req)
}

func (c *Client) request(ctx context.Context, method string, key GroupingKey, body io.Reader) (*http.Request, error) {
	if err := key.Validate(); err != nil {
		return nil, err
	}
	u := c.base.JoinPath(key.Path())
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: the URL makes no request", operation(method), safeurl.String(u))
	}
	return req, nil
}

// operation returns what a method does with a group.
func operation(method string) string {
	if method == http.MethodPost {
		return "add to"
	}
	return strings.ToLower(method)
}

// maxMessage is how much is read of what a Pushgateway answers, in bytes. A refusal
// has a line, with the series, for each family it names.
const maxMessage = 64 << 10

func (c *Client) do(req *http.Request) error {
	resp, err := c.send(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	// To the end, so that the connection can be used again.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxMessage))
	return nil
}

// send returns an answer whose status is a success.
func (c *Client) send(req *http.Request) (*http.Response, error) {
	op := operation(req.Method)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", op, safeurl.String(req.URL), timedOut(req.Context(), err))
	}
	// A Pushgateway answers 200, or 202 when it does not check; other receivers 204.
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	message, err := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
	if err != nil {
		message = nil
	}
	return nil, &StatusError{
		Op:         op,
		URL:        safeurl.String(req.URL),
		Code:       resp.StatusCode,
		Message:    httpclient.Shown(resp, string(message)),
		raw:        string(message),
		RetryAfter: retryAfter(resp.Header.Get("Retry-After")),
	}
}

// timedOut returns errTimeout where err, of a request with ctx, means that.
func timedOut(ctx context.Context, err error) error {
	if httpclient.IsTimeout(ctx, err) {
		return errTimeout
	}
	return err
}

// errTimeout is in an error after which nobody knows whether the Pushgateway will still
// do what it was asked to.
var errTimeout = errors.New("timed out")

// IsTimeout tells whether err says that the time was up. What was asked for may still
// happen then: a Pushgateway does not notice that its client has gone.
func IsTimeout(err error) bool { return errors.Is(err, errTimeout) }

// IsRefused tells whether err says that nothing listens where the Pushgateway should.
func IsRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }

// StatusError is an answer whose status is no success.
type StatusError struct {
	// Op is put, add to, delete or get.
	Op string
	// URL is what was asked for, as it may be shown.
	URL string
	// Code is the HTTP status.
	Code int
	// Message is the begin of the body as it may be shown: a line of a log, without credentials.
	Message string
	// RetryAfter is how long the Pushgateway asks to wait, or 0.
	RetryAfter time.Duration
	// raw is as much of the body as was read. It may hold credentials.
	raw string
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s %s: unexpected status %d", e.Op, e.URL, e.Code)
	if e.Message != "" {
		s += ": " + e.Message
	}
	return s
}

// Temporary tells whether the same put may succeed later.
func (e *StatusError) Temporary() bool { return e.Code/100 == 5 }

// Refused tells whether the Pushgateway took offence at what was sent.
func (e *StatusError) Refused() bool { return e.Code == http.StatusBadRequest }

// httpToHTTPS matches what Go and nginx say, with a 400, when a port wants TLS: then the URL
// is wrong and not the push.
var httpToHTTPS = regexp.MustCompile(`HTTP request to an HTTPS server|plain HTTP request was sent to HTTPS port`)

// Final tells whether the same push would be refused again, however often it is tried: for
// what it says, its size or its format, and not for who asks or where.
func (e *StatusError) Final() bool {
	switch e.Code {
	case http.StatusBadRequest:
		return !httpToHTTPS.MatchString(cmp.Or(e.raw, e.Message))
	case http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return true
	default:
		return false
	}
}

// familyNamed matches the places where the consistency check of a Pushgateway (it is
// client_golang's) names a family, quoted or not.
var familyNamed = regexp.MustCompile(`(?:collected metric|metric family|named) (?:named )?"?([a-zA-Z_:][a-zA-Z0-9_:]*)`)

// Families returns the names of the families that the Pushgateway took offence at, as far
// as its message names any: two where the names of two clash, one fault on each line.
func (e *StatusError) Families() []string {
	var names []string
	for line := range strings.Lines(cmp.Or(e.raw, e.Message)) {
		// Between braces stand labels and values, which could hold anything.
		if open := strings.Index(line, "{"); open >= 0 {
			line = line[:open] + line[max(open, strings.LastIndex(line, "}")):]
		}
		for _, match := range familyNamed.FindAllStringSubmatch(line, -1) {
			if !slices.Contains(names, match[1]) {
				names = append(names, match[1])
			}
		}
	}
	return names
}

// retryAfter reads a Retry-After header: seconds, or a date (RFC 9110, section 10.2.3).
func retryAfter(s string) time.Duration {
	if seconds, err := strconv.Atoi(s); err == nil {
		return max(0, min(time.Duration(seconds), maxRetryAfterSeconds)*time.Second)
	}
	if date, err := http.ParseTime(s); err == nil {
		return max(0, time.Until(date))
	}
	return 0
}

// maxRetryAfterSeconds, a year, keeps a number of seconds from overflowing.
const maxRetryAfterSeconds = 365 * 24 * 3600
