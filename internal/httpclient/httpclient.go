// Package httpclient makes HTTP clients from Prometheus http_config files.
package httpclient

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"sync/atomic"

	"github.com/prometheus/common/config"
	"github.com/prometheus/common/version"
)

// UserAgent names this program and its version to the servers it calls.
func UserAgent() string { return "promferry/" + version.Version }

// Client sends requests as an http_config file says. It has no timeout of its own, so
// each request needs a context with a deadline, and it follows no redirect: a redirected
// put would land in another group. It is safe for concurrent use.
type Client struct {
	name, file string
	current    atomic.Pointer[http.Client]
}

// New returns a client for the http_config in file; an empty file name means plain
// requests without credentials. Name stands in errors, and tells clients apart.
func New(name, file string) (*Client, error) {
	c := &Client{name: name, file: file}
	return c, c.Reload()
}

// Reload reads the file again, and every certificate and key it names. Requests on their
// way end as they began. On an error nothing changes.
func (c *Client) Reload() error {
	cfg := &config.HTTPClientConfig{}
	if c.file != "" {
		var err error
		if cfg, _, err = config.LoadHTTPConfigFile(c.file); err != nil {
			return fmt.Errorf("read %s: %w", c.file, withoutValues(err))
		}
	}
	cfg.FollowRedirects = false
	// HTTP/1.1 alone: one request at a time needs no multiplexing, and a dead HTTP/2
	// connection stays in use after its requests have timed out.
	cfg.EnableHTTP2 = false
	client, err := config.NewClientFromConfig(*cfg, c.name, config.WithHTTP2Disabled(), config.WithUserAgent(UserAgent()))
	if err != nil {
		return fmt.Errorf("use %s: %w", c.file, withoutValues(err))
	}
	if old := c.current.Swap(client); old != nil {
		old.CloseIdleConnections()
	}
	return nil
}

// Do sends a request. Its errors leave out the URL, which the caller knows and which may
// hold secrets.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	resp, err := c.current.Load().Do(req)
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return resp, err
}

var quoted = regexp.MustCompile("`[^`]*`|\"[^\"]*\"")

// withoutValues hides what YAML and URL errors quote of the file, which may be a
// password in the wrong place.
func withoutValues(err error) error {
	return errors.New(quoted.ReplaceAllString(err.Error(), "(value hidden)"))
}
