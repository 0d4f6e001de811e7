package target

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/safeurl"
)

// A Reason says what was wrong with a scrape.
type Reason string

// The reasons of a ScrapeError.
const (
	// ReasonConnect: no answer at all; refused, unreachable, or the TLS handshake went wrong.
	ReasonConnect Reason = "connect"
	// ReasonTimeout: not done when the time was up.
	ReasonTimeout Reason = "timeout"
	// ReasonStatus: the status was not 200; redirects are not followed.
	ReasonStatus Reason = "status"
	// ReasonTooLarge: more bytes than the limit.
	ReasonTooLarge Reason = "too_large"
	// ReasonCutShort: the answer ended before its end.
	ReasonCutShort Reason = "cut_short"
	// ReasonNotMetrics: whole, but not an exposition.
	ReasonNotMetrics Reason = "not_metrics"
	// ReasonEmpty: an exposition without any sample.
	ReasonEmpty Reason = "empty"
)

// Reasons are all reasons, for a metric that has one series for each.
var Reasons = []Reason{
	ReasonConnect, ReasonTimeout, ReasonStatus, ReasonTooLarge, ReasonCutShort, ReasonNotMetrics, ReasonEmpty,
}

// ScrapeError is what a failed scrape returns.
type ScrapeError struct {
	// Reason sorts the error, for a metric.
	Reason Reason
	// URL is what was scraped, as it may be shown.
	URL string
	// Err tells more.
	Err error
}

func (e *ScrapeError) Error() string { return "scrape " + e.URL + ": " + safeurl.Cut(e.Err.Error()) }

func (e *ScrapeError) Unwrap() error { return e.Err }

// Doer sends HTTP requests.
type Doer interface {
	Do(req *http.Request) (*http.Response, error)
}

// Scraper reads targets. It is safe for concurrent use.
type Scraper struct {
	// Client sends the requests. It must not follow redirects.
	Client Doer
	// Accept is the Accept header of each request.
	Accept string
	// MaxBytes is the size up to which an exposition is read, after decompression.
	MaxBytes int64
}

// Scrape reads the whole exposition of t, decompressed, and its content type. Nothing but
// a status 200 whose body came to its end within ctx and MaxBytes passes; every error is a
// *ScrapeError. (A body that the target ends by closing the connection, with neither a
// length nor gzip, has an end that cannot be told from a break.)
func (s *Scraper) Scrape(ctx context.Context, t Target) (body []byte, contentType string, err error) {
	fail := func(reason Reason, err error) ([]byte, string, error) {
		if httpclient.IsTimeout(ctx, err) {
			reason, err = ReasonTimeout, errors.New("timed out")
		}
		return nil, "", &ScrapeError{Reason: reason, URL: safeurl.String(t.URL), Err: err}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.URL.String(), nil)
	if err != nil {
		return fail(ReasonConnect, errors.New("the URL makes no request"))
	}
	req.Header.Set("Accept", s.Accept)
	req.Header.Set("Accept-Encoding", "gzip")
	if deadline, ok := ctx.Deadline(); ok {
		req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", strconv.FormatFloat(time.Until(deadline).Seconds(), 'f', -1, 64))
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return fail(ReasonConnect, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fail(ReasonStatus, fmt.Errorf("unexpected status %d", resp.StatusCode))
	}
	var r io.Reader = resp.Body
	switch encoding := strings.ToLower(resp.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
	case "gzip":
		gz, err := gzip.NewReader(resp.Body)
		switch {
		case errors.Is(err, gzip.ErrHeader):
			return fail(ReasonNotMetrics, errors.New("body is not gzip, as its Content-Encoding says"))
		case err != nil:
			return fail(ReasonCutShort, cutShort(err))
		}
		r = gz
	default:
		return fail(ReasonNotMetrics, fmt.Errorf("unexpected content encoding %q", httpclient.Shown(resp, encoding)))
	}
	// One byte over the limit tells a body that is too large from one that just fits.
	body, err = io.ReadAll(io.LimitReader(r, s.MaxBytes+1))
	switch {
	case int64(len(body)) > s.MaxBytes:
		return fail(ReasonTooLarge, fmt.Errorf("more than %d bytes", s.MaxBytes))
	case err != nil:
		return fail(ReasonCutShort, cutShort(err))
	}
	return body, resp.Header.Get("Content-Type"), nil
}

func cutShort(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return errors.New("body ended before its end")
	}
	return fmt.Errorf("read body: %w", err)
}
