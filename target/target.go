// Package target holds what is scraped: its name, its URL, and how it is read.
package target

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/promferry/promferry/internal/safeurl"
)

// Target is an endpoint that exposes metrics.
type Target struct {
	// Job is the value of the job label of everything that is read from it.
	Job string
	// URL is where it is read, scheme http or https.
	URL *url.URL
}

// Parse reads a target written as job=URL.
func Parse(s string) (Target, error) {
	job, address, ok := strings.Cut(s, "=")
	job, address = strings.TrimSpace(job), strings.TrimSpace(address)
	switch {
	case !ok || strings.Contains(job, "://"):
		return Target{}, fmt.Errorf("%q: want job=URL, as in node=http://127.0.0.1:9100/metrics", safeurl.Text(s))
	case job == "":
		return Target{}, fmt.Errorf("%q: the job before = is empty", safeurl.Text(s))
	case !utf8.ValidString(job):
		return Target{}, fmt.Errorf("%q: the job is not UTF-8", safeurl.Text(s))
	}
	u, err := ParseURL(address)
	if err != nil {
		return Target{}, fmt.Errorf("%q: %w", job+"="+safeurl.Text(address), err)
	}
	return Target{Job: job, URL: u}, nil
}

// ParseURL reads an absolute http or https URL. User-info is refused, for whoever lists
// the processes of a host would read it. Errors do not show s.
func ParseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		// The error that url.Parse gives quotes s or a part of it.
		return nil, errors.New("not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("want a URL that begins with http:// or https://")
	case u.Hostname() == "":
		return nil, errors.New("the URL names no host")
	case !validPort(u.Port()):
		return nil, fmt.Errorf("the port %s is none: ports go up to 65535", u.Port())
	case u.User != nil:
		return nil, errors.New("a user and password do not belong in a URL, where others can read them: name an http_config file that has basic_auth")
	}
	return u, nil
}

func validPort(port string) bool {
	if port == "" {
		return true
	}
	_, err := strconv.ParseUint(port, 10, 16)
	return err == nil
}

// String returns the target as it is written, without what may be secret in its URL.
func (t Target) String() string { return t.Job + "=" + safeurl.String(t.URL) }
