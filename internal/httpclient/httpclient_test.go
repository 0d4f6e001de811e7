package httpclient_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/promferry/promferry/internal/httpclient"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// answer returns status and body of a GET, or the error.
func answer(t *testing.T, c interface {
	Do(*http.Request) (*http.Response, error)
}, url string,
) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(resp.StatusCode, " ", string(b))
}

// TestConfigs has each way that an http_config has to show who asks, and to get there.
func TestConfigs(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Header.Get("Authorization")) }
	plain := httptest.NewServer(http.HandlerFunc(echo))
	defer plain.Close()
	secure := httptest.NewTLSServer(http.HandlerFunc(echo))
	defer secure.Close()
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, secret, _ := r.BasicAuth(); secret != "canary" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"access_token":"from-oauth","token_type":"Bearer","expires_in":60}`)
	}))
	defer tokens.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "proxied "+r.URL.String())
	}))
	defer proxy.Close()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), "canary")
	for _, tc := range []struct{ name, config, url, want string }{
		{"nothing", "{}", plain.URL, "200 "},
		{"basic auth", "basic_auth:\n  username: me\n  password_file: secret\n", plain.URL, "200 Basic bWU6Y2FuYXJ5"},
		{"bearer", "authorization:\n  credentials_file: secret\n", plain.URL, "200 Bearer canary"},
		{"OAuth 2", "oauth2:\n  client_id: me\n  client_secret_file: secret\n  token_url: " + tokens.URL + "\n", plain.URL, "200 Bearer from-oauth"},
		{"egress proxy", "proxy_url: " + proxy.URL + "\n", "http://pgw.example/x", "200 proxied http://pgw.example/x"},
		{"unknown CA", "{}", secure.URL, "tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		{"no verification", "tls_config:\n  insecure_skip_verify: true\n", secure.URL, "200 "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(dir, "http.yml")
			write(t, file, tc.config)
			c, err := httpclient.New("push", file)
			if err != nil {
				t.Fatal(err)
			}
			if got := answer(t, c, tc.url); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// TestWithoutCredentials has each kind of credential that an http_config can have: none of them
// is sent, and what else the file says is done.
func TestWithoutCredentials(t *testing.T) {
	var asked atomic.Int32
	tokens := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer tokens.Close()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name := range r.Header {
			if !slices.Contains([]string{"Accept-Encoding", "User-Agent"}, name) {
				_, _ = fmt.Fprintf(w, " header %s", name)
			}
		}
		_, _ = fmt.Fprintf(w, " %d certificates", len(r.TLS.PeerCertificates))
	}))
	server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	server.StartTLS()
	defer server.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "proxied "+r.URL.String()+" "+r.Header.Get("Proxy-Authorization")+r.Header.Get("Authorization"))
	}))
	defer proxy.Close()
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	write(t, filepath.Join(dir, "ca"), string(ca))
	key, err := x509.MarshalPKCS8PrivateKey(server.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	trusted := "tls_config:\n  ca_file: ca\n"
	withUser := strings.Replace(server.URL, "https://", "https://me:canary@", 1)
	for _, tc := range []struct{ name, config, url, want string }{
		{"basic auth", trusted + "basic_auth:\n  username: me\n  password: canary\n", server.URL, "200  0 certificates"},
		{"bearer", trusted + "authorization:\n  credentials: canary\n", server.URL, "200  0 certificates"},
		{"bearer_token", trusted + "bearer_token: canary\n", server.URL, "200  0 certificates"},
		{"OAuth 2", trusted + "oauth2:\n  client_id: me\n  client_secret: canary\n  token_url: " + tokens.URL + "\n", server.URL, "200  0 certificates"},
		{"headers", trusted + "http_headers:\n  X-Token:\n    secrets: [canary]\n", server.URL, "200  0 certificates"},
		{"client certificate", trusted + "  cert_file: ca\n  key_file: key\n", server.URL, "200  0 certificates"},
		{"user-info", trusted, withUser, "200  0 certificates"},
		{"nothing is trusted", "{}", server.URL, "tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		{"no verification", "tls_config:\n  insecure_skip_verify: true\n", server.URL, "200  0 certificates"},
		{"server name", trusted + "  server_name: other.test\n", server.URL, "tls: failed to verify certificate: x509: certificate is valid for example.com, *.example.com, not other.test"},
		{"TLS version", trusted + "  max_version: TLS10\n", server.URL, "tls: no supported versions satisfy MinVersion and MaxVersion"},
		// The egress proxy's own credentials go to it.
		{
			"egress proxy", "proxy_url: " + strings.Replace(proxy.URL, "http://", "http://me:canary@", 1) + "\nbasic_auth:\n  username: me\n  password: other\n",
			"http://pgw.example/x", "200 proxied http://pgw.example/x Basic bWU6Y2FuYXJ5",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(dir, "http.yml")
			write(t, file, "{}")
			c, err := httpclient.New("push", file)
			if err != nil {
				t.Fatal(err)
			}
			bare := c.WithoutCredentials()
			write(t, file, tc.config)
			use, err := c.Load()
			if err != nil {
				t.Fatal(err)
			}
			use() // It follows reloads.
			if got := answer(t, bare, tc.url); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("%d tokens were asked for", n)
	}
}

// TestCredentialsFor has URLs of the servers that the credentials are for, and of others.
func TestCredentialsFor(t *testing.T) {
	// Every host is one of these two.
	shows := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
	}))
	defer shows.Close()
	secure := httptest.NewTLSServer(shows.Config.Handler)
	defer secure.Close()
	file := filepath.Join(t.TempDir(), "http.yml")
	write(t, file, "basic_auth: {username: me, password: canary}\ntls_config: {insecure_skip_verify: true}\n")
	plainAddress, secureAddress := shows.Listener.Addr().String(), secure.Listener.Addr().String()
	c, err := httpclient.NewWithDial("push", file, func(ctx context.Context, network, address string) (net.Conn, error) {
		if strings.HasSuffix(address, "443") {
			return (&net.Dialer{}).DialContext(ctx, network, secureAddress)
		}
		return (&net.Dialer{}).DialContext(ctx, network, plainAddress)
	})
	if err != nil {
		t.Fatal(err)
	}
	var urls []*url.URL
	for _, text := range []string{"https://hub/a", "http://hub:9091", "http://[::1]/", "http://hub:8443"} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		urls = append(urls, u)
	}
	limited := c.CredentialsFor(urls...)
	for u, want := range map[string]bool{
		"https://hub": true, "https://hub:443/other/path": true, "https://HUB/": true, "http://hub:9091/x": true, "http://[::1]:80": true,
		"http://hub": false, "https://hub:8443": false, "https://hub.example": false, "https://hub.": false,
		"http://me:canary@hub": false, "http://[::2]": false, "http://hub:9092": false, "http://hub@other:9091": false,
	} {
		wanted := "200 "
		if want {
			wanted = "200 Basic bWU6Y2FuYXJ5"
		}
		if got := answer(t, limited, u); got != wanted {
			t.Errorf("%s: got %q, want %q", u, got, wanted)
		}
	}
}

// TestTokenIsKept has an OAuth 2 client whose secret changes: a token is asked for once for each.
func TestTokenIsKept(t *testing.T) {
	var asked []string
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, secret, _ := r.BasicAuth()
		asked = append(asked, secret)
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"access_token":"for-%s","token_type":"Bearer","expires_in":3600}`, secret)
	}))
	defer tokens.Close()
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
	}))
	defer plain.Close()
	dir := t.TempDir()
	file, secret := filepath.Join(dir, "http.yml"), filepath.Join(dir, "secret")
	write(t, file, "oauth2:\n  client_id: me\n  client_secret_file: secret\n  token_url: "+tokens.URL+"\n")
	write(t, secret, "one\n")
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "one", "two", "two"} {
		write(t, secret, want+"\n")
		if got := answer(t, c, plain.URL); got != "200 Bearer for-"+want {
			t.Errorf("got %q, want that for %s", got, want)
		}
	}
	if !slices.Equal(asked, []string{"one", "two"}) {
		t.Errorf("asked for tokens with %q", asked)
	}
}

// TestTokenForAnAssertion has the grant of RFC 7523.
func TestTokenForAnAssertion(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	var assertion string
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assertion = r.FormValue("assertion")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, "not "+r.FormValue("assertion"))
	}))
	defer tokens.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "http.yml")
	write(t, filepath.Join(dir, "key"), string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	write(t, file, "oauth2:\n  client_id: me\n  grant_type: urn:ietf:params:oauth:grant-type:jwt-bearer\n  signature_algorithm: RS384\n  client_certificate_key_file: "+filepath.Join(dir, "key")+"\n  token_url: "+tokens.URL+"\n")
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	got := answer(t, c, tokens.URL)
	header, _, _ := strings.Cut(assertion, ".")
	if b, err := base64.RawURLEncoding.DecodeString(header); err != nil || !strings.Contains(string(b), "RS384") {
		t.Errorf("asked with %q", assertion)
	}
	if !strings.Contains(got, "not ...") || strings.Contains(got, header) {
		t.Errorf("got %q", got)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	s := httptest.NewServer(http.RedirectHandler("/elsewhere", http.StatusTemporaryRedirect))
	defer s.Close()
	file := filepath.Join(t.TempDir(), "http.yml")
	write(t, file, "follow_redirects: true\n")
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	if got := answer(t, c, s.URL); !strings.HasPrefix(got, "307 ") {
		t.Errorf("got %q", got)
	}
}

func TestLoadChangesNothingUntilUsed(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
	}))
	defer s.Close()
	file := filepath.Join(t.TempDir(), "http.yml")
	write(t, file, "authorization:\n  credentials: one\n")
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, "authorization:\n  credentials: two\n")
	use, err := c.Load()
	if err != nil {
		t.Fatal(err)
	}
	if got := answer(t, c, s.URL); got != "200 Bearer one" {
		t.Errorf("before use: %q", got)
	}
	use()
	if got := answer(t, c, s.URL); got != "200 Bearer two" {
		t.Errorf("after use: %q", got)
	}
}

func TestFaultsShowNoSecret(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "http.yml")
	for _, config := range []string{
		"basic_auth: canary\n", "authorization:\n  credentials: [canary]\n", "canary\n", "proxy_url: \"http://me:canary@pro xy\"\n",
		"basic_auth:\n  username: me\n  password_file: missing\n", "tls_config:\n  ca_file: missing\n", "tls_config:\n  cert_file: missing\n  key_file: missing\n",
		"basic_auth:\n  username: me\n  pasword: canary\n", "canary: x\n", "authorization:\n  credentials: x\n  canary: y\n",
		"authorization:\n  credentials: *canary\n", "tls_config:\n  min_version: canary\n", "proxy_url: http://me:canary@[::1\n",
		"authorization:\n  credentials_file: canary\n", "basic_auth:\n  username_file: canary\n", "http_headers:\n  X-Key:\n    files: [canary]\n",
		"http_headers:\n  X-Key: canary\n", "http_headers:\n  X-Key:\n    canary: [x]\n", "http_headers:\n  Host:\n    secrets: [canary]\n",
		"tls_config:\n  ca_file: canary\n", "tls_config:\n  ca: canary\n", "tls_config:\n  cert: canary\n  key: canary\n",
		"oauth2:\n  client_id: me\n  client_secret_file: canary\n  token_url: http://h\n", "oauth2:\n  client_id: me\n  client_secret: canary\n",
		"oauth2:\n  client_id: me\n  client_secret: canary\n  token_url: http://h\n  tls_config:\n    ca_file: canary\n",
		"oauth2:\n  client_id: me\n  signature_algorithm: canary\n  token_url: http://h\n  grant_type: urn:ietf:params:oauth:grant-type:jwt-bearer\n",
		"follow_redirects: canary\n", "basic_auth:\n  username: me\n\tpassword: canary\n",
	} {
		write(t, file, config)
		_, err := httpclient.New("push", file)
		if err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%q: got %v, want an error that names the file", config, err)
			continue
		}
		if strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: error shows the secret: %v", config, err)
		}
	}
	if _, err := httpclient.New("push", filepath.Join(dir, "none.yml")); err == nil {
		t.Error("a missing file: no error")
	}
}
