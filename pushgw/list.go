package pushgw

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/safeurl"
)

// Group is what a Pushgateway lists of one group: its key, and what tells whether its owner
// still pushes.
type Group struct {
	// Key is the grouping key. Its job is empty where the listing does not tell the key, as
	// that of a group with a family called labels, which stands in its place.
	Key GroupingKey
	// Families is how many families the group has, with those that the Pushgateway adds.
	Families int
	// Pushed is when a push last succeeded, by the Pushgateway's clock. Zero means never.
	Pushed time.Time
	// ExpiresAfter is for how many seconds after a push the group says that it is good. Zero
	// means that it does not say that, or says what is no finite number above zero.
	ExpiresAfter float64
	// SilentSince is since when the group says that its owner is silent. Zero means that it
	// does not.
	SilentSince time.Time
}

// The families that Group has values of.
const (
	pushTimeName     = "push_time_seconds"
	expiresAfterName = "promferry_expires_after_seconds"
	silentSinceName  = "promferry_silent_since_timestamp_seconds"
)

// Status is what a Pushgateway tells of itself.
type Status struct {
	// Now is the time by the Pushgateway's clock, cut to a second: the Date of its answer.
	Now time.Time
	// Started is when it was started, by its clock.
	Started time.Time
}

// FormatError is an answer that is none of a Pushgateway's API.
type FormatError struct {
	// URL is what was asked for, as it may be shown.
	URL string
	// Err says what is wrong.
	Err error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("get %s: the answer is not a Pushgateway's: %v", e.URL, e.Err)
}

func (e *FormatError) Unwrap() error { return e.Err }

// formatError returns the error for an answer of which err, which may quote it, says what is
// wrong.
func formatError(resp *http.Response, err error) error {
	return &FormatError{URL: safeurl.String(resp.Request.URL), Err: errors.New(httpclient.Shown(resp, err.Error()))}
}

// maxStatus is up to which size a status is read, in bytes: it has every flag of the
// Pushgateway.
const maxStatus = 1 << 20

// Status asks the Pushgateway for its time and its start. Errors are *StatusError where it
// answered with no success, and *FormatError where the answer is not understood.
func (c *Client) Status(ctx context.Context) (Status, error) {
	resp, err := c.get(ctx, "/api/v1/status")
	if err != nil {
		return Status{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus))
	if err != nil {
		return Status{}, fmt.Errorf("get %s: %w", safeurl.String(resp.Request.URL), timedOut(ctx, err))
	}
	var answer struct {
		Data struct {
			StartTime time.Time `json:"start_time"`
		} `json:"data"`
	}
	now, dateErr := http.ParseTime(resp.Header.Get("Date"))
	err = json.Unmarshal(body, &answer)
	switch {
	case err != nil:
	case answer.Data.StartTime.IsZero():
		err = errors.New("it has no start_time")
	case dateErr != nil:
		err = errors.New("it has no Date header")
	default:
		return Status{Now: now, Started: answer.Data.StartTime}, nil
	}
	return Status{}, formatError(resp, err)
}

// Groups lists all groups, one after the other as they are read, in memory that grows neither
// with their number nor with their size. An error is the last of the sequence, and what came
// before is not all; errors are as those of Status. The Pushgateway holds the whole listing in
// its memory until it is read, so nothing should be waited for on the way.
func (c *Client) Groups(ctx context.Context) iter.Seq2[Group, error] {
	return func(yield func(Group, error) bool) {
		resp, err := c.get(ctx, "/api/v1/metrics")
		if err != nil {
			yield(Group{}, err)
			return
		}
		defer func() { _ = resp.Body.Close() }()
		body := &failing{r: resp.Body}
		err = scanListing(newScanner(body), func(g Group) error {
			if !yield(g, nil) {
				return errStop
			}
			return nil
		})
		switch {
		case err == nil || errors.Is(err, errStop):
		case body.err != nil:
			yield(Group{}, fmt.Errorf("get %s: %w", safeurl.String(resp.Request.URL), timedOut(ctx, body.err)))
		default:
			yield(Group{}, formatError(resp, err))
		}
	}
}

// errStop ends a listing of which no more is wanted.
var errStop = errors.New("no more is wanted")

// failing keeps the error of a reader, to tell it from those in what was read.
type failing struct {
	r   io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

func (c *Client) get(ctx context.Context, path string) (*http.Response, error) {
	u := c.base.JoinPath(path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: the URL makes no request", safeurl.String(u))
	}
	// A listing is read from nearby, where packing and unpacking costs more than it saves.
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := c.send(req)
	if se, ok := errors.AsType[*StatusError](err); ok && se.Code == http.StatusNotFound {
		return nil, fmt.Errorf("%w; is that the Pushgateway's own URL?", se)
	}
	return resp, err
}

// scanListing reads the answer to /api/v1/metrics.
func scanListing(s *scanner, each func(Group) error) error {
	status, listed := "", false
	err := s.object(func(name []byte) error {
		switch string(name) {
		case "status":
			err := s.keep()
			_ = json.Unmarshal(s.kept, &status)
			return err
		case "data":
			listed = true
			return s.array(func() error {
				g, err := readGroup(s)
				if err != nil {
					return err
				}
				return each(g)
			})
		default:
			return s.skip()
		}
	})
	if err == nil {
		err = s.atEnd()
	}
	switch {
	case err != nil:
		return err
	case status != "success":
		return fmt.Errorf("its status is %q", status)
	case !listed:
		return errors.New("it has no groups")
	}
	return nil
}

// readGroup reads one group: an object with the key under labels, and each family under its
// name.
func readGroup(s *scanner) (Group, error) {
	var g Group
	err := s.object(func(name []byte) error {
		switch string(name) {
		case "labels":
			err := s.keep()
			g.Key = s.key()
			return err
		case "last_push_successful":
			return s.skip()
		}
		g.Families++
		switch string(name) {
		case pushTimeName:
			err := s.keep()
			g.Pushed = unixTime(s.gauge())
			return err
		case expiresAfterName:
			err := s.keep()
			g.ExpiresAfter = s.gauge()
			return err
		case silentSinceName:
			err := s.keep()
			g.SilentSince = unixTime(s.gauge())
			return err
		default:
			return s.skip()
		}
	})
	return g, err
}

// key returns the grouping key that was kept, or one without a job.
func (s *scanner) key() GroupingKey {
	var labels map[string]string
	if s.tooLong || json.Unmarshal(s.kept, &labels) != nil {
		return GroupingKey{}
	}
	key := GroupingKey{Job: labels[model.JobLabel], Labels: labels}
	delete(labels, model.JobLabel)
	return key
}

// gauge returns the value of the only series of the family that was kept: a finite number
// above zero, or 0.
func (s *scanner) gauge() float64 {
	var family struct {
		Metrics []struct {
			Value string `json:"value"`
		} `json:"metrics"`
	}
	if s.tooLong || json.Unmarshal(s.kept, &family) != nil || len(family.Metrics) != 1 {
		return 0
	}
	value, err := strconv.ParseFloat(family.Metrics[0].Value, 64)
	if err != nil || math.IsNaN(value) || math.IsInf(value, 0) || value < 0 {
		return 0
	}
	return value
}

// unixTime returns a time in seconds since 1970; 0, or what is too much for a time, is none.
func unixTime(seconds float64) time.Time {
	if seconds <= 0 || seconds > math.MaxUint32*100 {
		return time.Time{}
	}
	whole, fraction := math.Modf(seconds)
	return time.Unix(int64(whole), int64(fraction*1e9))
}
