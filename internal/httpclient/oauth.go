package httpclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/prometheus/common/config"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// assertionGrant is the grant_type of RFC 7523.
const assertionGrant = "urn:ietf:params:oauth:grant-type:jwt-bearer"

// tokenTimeout bounds a request for a token, should that of the request that needs it not.
const tokenTimeout = 30 * time.Second

// tokens sends requests with an OAuth 2 token, which it gets as an http_config says.
// Prometheus's own would follow a redirect of the token's URL, and repeat the client's secret
// wherever that leads; and what it asks for has no deadline.
type tokens struct {
	next   http.RoundTripper
	cfg    *config.OAuth2
	client *http.Client // for the token's URL

	// fetching has room for one request for a token at a time: others wait for as long as their
	// own time lasts.
	fetching chan struct{}

	mu     sync.Mutex // never held over a request
	secret string
	token  *oauth2.Token
	// sent are the secrets of the last request for a token, former the token before this one.
	sent   []string
	former string
}

// newTokens returns tokens for requests that next sends.
func newTokens(cfg *config.OAuth2, next http.RoundTripper, name string) (*tokens, error) {
	client, err := config.NewClientFromConfig(
		config.HTTPClientConfig{TLSConfig: cfg.TLSConfig, ProxyConfig: cfg.ProxyConfig}, name, config.WithHTTP2Disabled())
	if err != nil {
		return nil, fmt.Errorf("oauth2: %w", err)
	}
	t := &tokens{next: next, cfg: cfg, client: client, fetching: make(chan struct{}, 1)}
	client.Transport, client.Timeout = noting{t, client.Transport}, tokenTimeout
	return t, nil
}

// RoundTrip sends a request with a token.
func (t *tokens) RoundTrip(req *http.Request) (*http.Response, error) {
	token, err := t.get(req.Context())
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	return (&oauth2.Transport{Base: t.next, Source: oauth2.StaticTokenSource(token)}).RoundTrip(req)
}

// get returns a token that is valid, for the secret as its file has it now.
func (t *tokens) get(ctx context.Context) (*oauth2.Token, error) {
	secret, err := t.readSecret()
	if err != nil {
		return nil, err
	}
	if token := t.known(secret); token.Valid() {
		return token, nil
	}
	select {
	case t.fetching <- struct{}{}:
		defer func() { <-t.fetching }()
	case <-ctx.Done():
		return nil, fmt.Errorf("oauth2: wait for a token: %w", ctx.Err())
	}
	if token := t.known(secret); token.Valid() { // Another request has fetched it.
		return token, nil
	}
	token, err := t.sourceWith(secret)(context.WithValue(ctx, oauth2.HTTPClient, t.client)).Token()
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = fmt.Errorf("oauth2: cannot fetch token: %w", ue.Err) // The URL may have user-info.
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil && t.secret == secret {
		t.token = token
	}
	return token, err
}

// known returns the token for a secret, nil where there is none. One that is not valid any more is
// forgotten.
func (t *tokens) known(secret string) *oauth2.Token {
	t.mu.Lock()
	defer t.mu.Unlock()
	if secret != t.secret || !t.token.Valid() {
		t.secret = secret
		t.forget()
	}
	return t.token
}

// forget has the token asked for anew. A server may still show it.
func (t *tokens) forget() {
	if t.token != nil {
		t.former, t.token = t.token.AccessToken, nil
	}
}

// readSecret returns the client's secret, or its key.
func (t *tokens) readSecret() (string, error) {
	secret, file := t.cfg.ClientSecret, t.cfg.ClientSecretFile
	if t.cfg.GrantType == assertionGrant {
		secret, file = t.cfg.ClientCertificateKey, t.cfg.ClientCertificateKeyFile
	}
	if secret != "" || file == "" {
		return string(secret), nil
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("oauth2: read the client's secret: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// sourceWith returns what asks for a token, as Prometheus does.
func (t *tokens) sourceWith(secret string) func(context.Context) oauth2.TokenSource {
	params := make(url.Values)
	for name, value := range t.cfg.EndpointParams {
		params.Set(name, value)
	}
	if t.cfg.GrantType != assertionGrant {
		return (&clientcredentials.Config{
			ClientID: t.cfg.ClientID, ClientSecret: secret, Scopes: t.cfg.Scopes, TokenURL: t.cfg.TokenURL, EndpointParams: params,
		}).TokenSource
	}
	algorithm := jwt.SigningMethodRS256
	for _, other := range []*jwt.SigningMethodRSA{jwt.SigningMethodRS384, jwt.SigningMethodRS512} {
		if t.cfg.SignatureAlgorithm == other.Name {
			algorithm = other
		}
	}
	return (&config.JwtGrantTypeConfig{
		PrivateKey: []byte(secret), PrivateKeyID: t.cfg.ClientCertificateKeyID, SigningAlgorithm: algorithm,
		Iss: cmp.Or(t.cfg.Iss, t.cfg.ClientID), Subject: t.cfg.ClientID, Audience: t.cfg.Audience, PrivateClaims: t.cfg.Claims,
		Scopes: t.cfg.Scopes, TokenURL: t.cfg.TokenURL, EndpointParams: params,
	}).TokenSource
}

// secrets returns the values of tokens and of requests for them that nobody must see.
func (t *tokens) secrets() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	values := append([]string{t.former}, t.sent...)
	if t.token != nil {
		values = append(values, t.token.AccessToken)
	}
	return values
}

// CloseIdleConnections closes connections that no request uses.
func (t *tokens) CloseIdleConnections() {
	t.client.CloseIdleConnections()
	(&http.Client{Transport: t.next}).CloseIdleConnections()
}

// noting notes the secrets in requests for a token.
type noting struct {
	t    *tokens
	next http.RoundTripper
}

func (n noting) RoundTrip(req *http.Request) (*http.Response, error) {
	sent := sentSecrets(req)
	if body, err := req.GetBody(); err == nil { // It is a form, which can be read again.
		content, _ := io.ReadAll(body)
		form, _ := url.ParseQuery(string(content))
		for name, values := range form {
			if name != "grant_type" && name != "scope" && name != "client_id" {
				sent = append(sent, values...)
			}
		}
	}
	n.t.mu.Lock()
	n.t.sent = sent
	n.t.mu.Unlock()
	if _, ok := req.Header["User-Agent"]; !ok {
		req = req.Clone(req.Context())
		req.Header.Set("User-Agent", UserAgent())
	}
	return n.next.RoundTrip(req)
}

func (n noting) CloseIdleConnections() { (&http.Client{Transport: n.next}).CloseIdleConnections() }
