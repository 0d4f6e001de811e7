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
	current    atomic.Pointer[loaded]
}

// loaded is what a file says.
type loaded struct {
	client *http.Client
	// bare is client without its credentials.
	bare *http.Client
	uses Uses
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
func (c *Client) Uses() (file string, u Uses) { return c.file, c.current.Load().uses }

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
	l := &loaded{uses: Uses{Certificate: cfg.TLSConfig.CertFile, Secrets: secretFiles(cfg), Insecure: cfg.TLSConfig.InsecureSkipVerify}}
	if cfg.TLSConfig.KeyFile != "" {
		l.uses.Secrets = append(l.uses.Secrets, cfg.TLSConfig.KeyFile)
	}
	if l.client, err = config.NewClientFromConfig(*cfg, c.name, options...); err == nil {
		l.bare, err = config.NewClientFromConfig(withoutCredentials(cfg), c.name, options...)
	}
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", c.file, withoutValues(err))
	}
	return func() {
		if old := c.current.Swap(l); old != nil {
			old.client.CloseIdleConnections()
			old.bare.CloseIdleConnections()
		}
	}, nil
}

// withoutCredentials returns what of cfg is true of every server: which certificates are
// trusted, and the egress proxy. The user-info in the proxy's URL stays, as it is sent to
// that proxy alone.
func withoutCredentials(cfg *config.HTTPClientConfig) config.HTTPClientConfig {
	bare := config.HTTPClientConfig{
		TLSConfig: cfg.TLSConfig, ProxyConfig: cfg.ProxyConfig, FollowRedirects: cfg.FollowRedirects, EnableHTTP2: cfg.EnableHTTP2,
	}
	t := &bare.TLSConfig
	t.Cert, t.CertFile, t.CertRef, t.Key, t.KeyFile, t.KeyRef = "", "", "", "", "", ""
	return bare
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
	return do(c.current.Load().client, req)
}

// CloseIdleConnections closes connections that no request uses.
func (c *Client) CloseIdleConnections() { c.current.Load().client.CloseIdleConnections() }

// Bare sends requests as a Client does, but without credentials: no basic_auth, authorization,
// oauth2, http_headers or client certificate, and no user-info of a URL. It is for servers that
// the credentials are not for. It trusts the same certificates, uses the same egress proxy, and
// follows the Client's reloads. It is safe for concurrent use.
type Bare struct{ c *Client }

// WithoutCredentials returns a client with the same file that sends no credentials.
func (c *Client) WithoutCredentials() *Bare { return &Bare{c} }

// Do sends a request as Client.Do does, without credentials.
func (b *Bare) Do(req *http.Request) (*http.Response, error) {
	if req.URL.User != nil { // net/http makes credentials of it.
		u := *req.URL
		u.User = nil
		req = req.WithContext(req.Context())
		req.URL = &u
	}
	return do(b.c.current.Load().bare, req)
}

// CloseIdleConnections closes connections that no request without credentials uses.
func (b *Bare) CloseIdleConnections() { b.c.current.Load().bare.CloseIdleConnections() }

func do(client *http.Client, req *http.Request) (*http.Response, error) {
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header.Set("User-Agent", UserAgent())
	}
	resp, err := client.Do(req)
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return resp, err
}

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
