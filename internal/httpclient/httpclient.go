// Package httpclient makes HTTP clients from Prometheus http_config files.
package httpclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/prometheus/common/config"
	"github.com/prometheus/common/version"

	"github.com/promferry/promferry/internal/safeyaml"
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
	cfg    *config.HTTPClientConfig
	tokens *tokens // nil without OAuth 2
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
// changes before use is called; requests on their way end as they began. Its error shows
// nothing of what the file says.
func (c *Client) Load() (use func(), err error) {
	cfg := &config.HTTPClientConfig{}
	var content []byte
	if c.file != "" {
		if content, err = os.ReadFile(c.file); err != nil {
			return nil, fmt.Errorf("read %s: %w", c.file, err)
		}
		if cfg, err = config.LoadHTTPConfig(string(content)); err != nil {
			return nil, fmt.Errorf("read %s: %w", c.file, safeyaml.Error(err, content))
		}
		cfg.SetDirectory(filepath.Dir(c.file))
	}
	if err := readable(cfg); err != nil {
		return nil, fmt.Errorf("use %s: %w", c.file, err)
	}
	l, err := c.load(cfg)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", c.file, safeyaml.Error(err, content))
	}
	return func() {
		if old := c.current.Swap(l); old != nil {
			old.client.CloseIdleConnections()
			old.bare.CloseIdleConnections()
		}
	}, nil
}

func (c *Client) load(cfg *config.HTTPClientConfig) (*loaded, error) {
	cfg.FollowRedirects = false
	// HTTP/1.1 alone: one request at a time needs no multiplexing, and a dead HTTP/2
	// connection stays in use after its requests have timed out.
	cfg.EnableHTTP2 = false
	options := []config.HTTPClientOption{config.WithHTTP2Disabled()}
	if c.dial != nil {
		options = append(options, config.WithDialContextFunc(config.DialContextFunc(c.dial)))
	}
	l := &loaded{cfg: cfg, uses: Uses{Certificate: cfg.TLSConfig.CertFile, Insecure: cfg.TLSConfig.InsecureSkipVerify}}
	for _, f := range secretFiles(cfg) {
		l.uses.Secrets = append(l.uses.Secrets, f.name)
	}
	var err error
	if l.bare, err = config.NewClientFromConfig(withoutCredentials(cfg), c.name, options...); err != nil {
		return nil, err
	}
	withoutOAuth2 := *cfg
	withoutOAuth2.OAuth2 = nil
	if l.client, err = config.NewClientFromConfig(withoutOAuth2, c.name, options...); err != nil || cfg.OAuth2 == nil {
		return l, err
	}
	if l.tokens, err = newTokens(cfg.OAuth2, l.client.Transport, c.name); err == nil {
		l.client.Transport = l.tokens
	}
	return l, err
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

// namedFile is a file that an http_config names in a field.
type namedFile struct{ field, name string }

// secretFiles returns the files with secrets.
func secretFiles(cfg *config.HTTPClientConfig) []namedFile {
	var files []namedFile
	if b := cfg.BasicAuth; b != nil {
		files = append(files, namedFile{"basic_auth: username_file", b.UsernameFile}, namedFile{"basic_auth: password_file", b.PasswordFile})
	}
	if a := cfg.Authorization; a != nil {
		files = append(files, namedFile{"authorization: credentials_file", a.CredentialsFile})
	}
	if o := cfg.OAuth2; o != nil {
		files = append(files,
			namedFile{"oauth2: client_secret_file", o.ClientSecretFile},
			namedFile{"oauth2: client_certificate_key_file", o.ClientCertificateKeyFile},
			namedFile{"oauth2: tls_config: key_file", o.TLSConfig.KeyFile})
	}
	if h := cfg.HTTPHeaders; h != nil {
		for _, header := range h.Headers {
			for _, name := range header.Files {
				files = append(files, namedFile{"http_headers: files", name})
			}
		}
	}
	files = append(files, namedFile{"tls_config: key_file", cfg.TLSConfig.KeyFile})
	return slices.DeleteFunc(files, func(f namedFile) bool { return f.name == "" })
}

// readable checks files that are otherwise read with each request only. Their names are not
// in its errors: one may be a secret in the wrong field.
func readable(cfg *config.HTTPClientConfig) error {
	for _, f := range append(secretFiles(cfg),
		namedFile{"tls_config: ca_file", cfg.TLSConfig.CAFile}, namedFile{"tls_config: cert_file", cfg.TLSConfig.CertFile}) {
		if f.name == "" {
			continue
		}
		if _, err := os.ReadFile(f.name); err != nil {
			if pe, ok := errors.AsType[*fs.PathError](err); ok {
				err = pe.Err
			}
			return fmt.Errorf("%s: %w", f.field, err)
		}
	}
	return nil
}

// Do sends a request, with our User-Agent if it says none. Its errors, and those of reading
// the body, leave out the URL, which the caller knows, and credentials that the server sent
// back: see Shown.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	l := c.current.Load()
	return l.do(l.client, req)
}

// CloseIdleConnections closes connections that no request uses.
func (c *Client) CloseIdleConnections() { c.current.Load().client.CloseIdleConnections() }

// Limited sends requests as a Client does, but with credentials to some servers only. To
// others it sends none: no basic_auth, authorization, oauth2, http_headers or client
// certificate, and no user-info of a URL. For all it trusts the same certificates and uses the
// same egress proxy. It follows the Client's reloads. It is safe for concurrent use.
type Limited struct {
	c       *Client
	origins []string
}

// WithoutCredentials returns a client with the same file that sends no credentials.
func (c *Client) WithoutCredentials() *Limited { return c.CredentialsFor() }

// CredentialsFor returns a client with the same file that sends credentials only to the
// origins (scheme, host and port) of urls.
func (c *Client) CredentialsFor(urls ...*url.URL) *Limited {
	l := &Limited{c: c}
	for _, u := range urls {
		l.origins = append(l.origins, origin(u))
	}
	return l
}

// origin returns what two URLs of one server have in common (RFC 6454, section 4).
func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// Do sends a request as Client.Do does.
func (s *Limited) Do(req *http.Request) (*http.Response, error) {
	if slices.Contains(s.origins, origin(req.URL)) {
		return s.c.Do(req)
	}
	if req.URL.User != nil { // net/http makes credentials of it.
		u := *req.URL
		u.User = nil
		req = req.WithContext(req.Context())
		req.URL = &u
	}
	l := s.c.current.Load()
	return l.do(l.bare, req)
}

// CloseIdleConnections closes connections that no request uses.
func (s *Limited) CloseIdleConnections() {
	if len(s.origins) > 0 {
		s.c.CloseIdleConnections()
	}
	s.c.current.Load().bare.CloseIdleConnections()
}

// loadedKey is for the loaded that a request is sent with, in its context.
type loadedKey struct{}

func (l *loaded) do(client *http.Client, req *http.Request) (*http.Response, error) {
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header.Set("User-Agent", UserAgent())
	}
	resp, err := client.Do(req.WithContext(context.WithValue(req.Context(), loadedKey{}, l)))
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		return nil, l.showable(req, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols { // That one can be written to.
		resp.Body = &body{resp.Body, l, resp.Request}
	}
	return resp, nil
}

// body is a response's body whose errors may be shown.
type body struct {
	io.ReadCloser
	l   *loaded
	req *http.Request
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // A reader's end is not wrapped.
		err = b.l.showable(b.req, err)
	}
	return n, err
}

// IsTimeout tells whether err, of a request with ctx, means that the time was up.
func IsTimeout(ctx context.Context, err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ctx.Err() != nil || ok && ne.Timeout()
}
