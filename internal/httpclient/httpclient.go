// Package httpclient makes HTTP clients from Prometheus http_config files.
package httpclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
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
	dial       Dial
	current    atomic.Pointer[http.Client]
	uses       atomic.Pointer[Uses]
}

// Uses is what an http_config file makes use of.
type Uses struct {
	// Certificate is the file of the client certificate, "" without one.
	Certificate string
	// Secrets are the files that hold secrets.
	Secrets []string
	// Insecure tells that servers' certificates are not checked.
	Insecure bool
}

// Uses returns the name of the http_config file, "" without one, and what it makes use of.
func (c *Client) Uses() (file string, u Uses) { return c.file, *c.uses.Load() }

// Dial connects, as net.Dialer's DialContext does.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// New returns a client for the http_config in file; an empty file name means plain
// requests without credentials. Name stands in errors, and tells clients apart.
func New(name, file string) (*Client, error) { return NewWithDial(name, file, nil) }

// NewWithDial returns a client that connects by dial; nil means as always.
func NewWithDial(name, file string, dial Dial) (*Client, error) {
	c := &Client{name: name, file: file, dial: dial}
	use, err := c.Load()
	if err != nil {
		return nil, err
	}
	use()
	return c, nil
}

// Load reads the file again, and every certificate, key and secret that it names. Nothing
// changes before use is called; requests on their way end as they began.
func (c *Client) Load() (use func(), err error) {
	cfg := &config.HTTPClientConfig{}
	if c.file != "" {
		if cfg, _, err = config.LoadHTTPConfigFile(c.file); err != nil {
			return nil, fmt.Errorf("read %s: %w", c.file, withoutValues(err))
		}
		if err := readable(secretFiles(cfg)); err != nil {
			return nil, fmt.Errorf("use %s: %w", c.file, err)
		}
	}
	cfg.FollowRedirects = false
	// HTTP/1.1 alone: one request at a time needs no multiplexing, and a dead HTTP/2
	// connection stays in use after its requests have timed out.
	cfg.EnableHTTP2 = false
	options := []config.HTTPClientOption{config.WithHTTP2Disabled()}
	if c.dial != nil {
		options = append(options, config.WithDialContextFunc(config.DialContextFunc(c.dial)))
	}
	client, err := config.NewClientFromConfig(*cfg, c.name, options...)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", c.file, withoutValues(err))
	}
	uses := &Uses{Certificate: cfg.TLSConfig.CertFile, Secrets: secretFiles(cfg), Insecure: cfg.TLSConfig.InsecureSkipVerify}
	if cfg.TLSConfig.KeyFile != "" {
		uses.Secrets = append(uses.Secrets, cfg.TLSConfig.KeyFile)
	}
	return func() {
		c.uses.Store(uses)
		if old := c.current.Swap(client); old != nil {
			old.CloseIdleConnections()
		}
	}, nil
}

// secretFiles returns the files with secrets that are read with each request.
func secretFiles(cfg *config.HTTPClientConfig) []string {
	var files []string
	if cfg.BasicAuth != nil {
		files = append(files, cfg.BasicAuth.UsernameFile, cfg.BasicAuth.PasswordFile)
	}
	if cfg.Authorization != nil {
		files = append(files, cfg.Authorization.CredentialsFile)
	}
	if cfg.OAuth2 != nil {
		files = append(files, cfg.OAuth2.ClientSecretFile)
	}
	return slices.DeleteFunc(files, func(file string) bool { return file == "" })
}

// readable checks files that are otherwise read with each request only.
func readable(files []string) error {
	for _, file := range files {
		if _, err := os.ReadFile(file); err != nil {
			return err
		}
	}
	return nil
}

// Do sends a request, with our User-Agent if it says none. Its errors leave out the URL,
// which the caller knows and which may hold secrets.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header.Set("User-Agent", UserAgent())
	}
	resp, err := c.current.Load().Do(req)
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return resp, err
}

// CloseIdleConnections closes connections that no request uses.
func (c *Client) CloseIdleConnections() { c.current.Load().CloseIdleConnections() }

// IsTimeout tells whether err, of a request with ctx, means that the time was up.
func IsTimeout(ctx context.Context, err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ctx.Err() != nil || ok && ne.Timeout()
}

var quoted = regexp.MustCompile("`[^`]*`|\"[^\"]*\"")

// withoutValues hides what YAML and URL errors quote of the file, which may be a
// password in the wrong place.
func withoutValues(err error) error {
	return errors.New(quoted.ReplaceAllString(err.Error(), "(value hidden)"))
}
