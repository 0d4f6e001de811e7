package access_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/push"
	"github.com/prometheus/common/config"

	"github.com/promferry/promferry/internal/access"
)

// What Prometheus and our agent send is made by prometheus/common from a configuration;
// these tests take the very same code and the lines of the documentation.

// get sends a request as an http_config says, and returns the status or the error.
func get(t *testing.T, httpConfig, url string) string {
	t.Helper()
	cfg, err := config.LoadHTTPConfig(httpConfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := config.NewClientFromConfig(*cfg, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	return do(t, client, url)
}

func do(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.Status
}

// answer writes an outcome as a proxy does.
func answer(w http.ResponseWriter, err error) {
	if e, ok := errors.AsType[*access.Error](err); ok {
		e.SetHeader(w.Header())
		http.Error(w, e.Text(), e.Status)
	}
}

// Prometheus authorises itself by the user and password of proxy_url: for a plain target in
// the request, and for one of https in the CONNECT.
func TestPrometheusProxyURL(t *testing.T) {
	g := newGuard(t, example)
	connects := 0
	target := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Proxy-Authorization") != "" {
			t.Error("the target sees the proxy's credential")
		}
	}))
	defer target.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer for-the-target" && r.Method != http.MethodConnect {
			t.Errorf("headers %v", r.Header)
		}
		_, err := g.Scraper(r)
		if err != nil || r.Method != http.MethodConnect {
			answer(w, err)
			return
		}
		connects++
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		// The target's end of the tunnel is a server for this one connection.
		inner := tls.Server(&readAhead{conn, buffered}, target.TLS.Clone())
		defer func() { _ = inner.Close() }()
		inside, err := http.ReadRequest(bufio.NewReader(inner))
		if err != nil {
			t.Error(err)
			return
		}
		target.Config.Handler.ServeHTTP(httptest.NewRecorder(), inside)
		_, _ = io.WriteString(inner, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}))
	defer proxy.Close()
	host := strings.TrimPrefix(proxy.URL, "http://")
	const common = "authorization: {credentials: for-the-target}\ntls_config: {insecure_skip_verify: true}\nproxy_url: http://"
	for _, tc := range []struct{ userInfo, url, want string }{
		{"prom:scrape-token@", "http://web-1.example.org:9100/metrics", "200 OK"},
		{"prom:wrong@", "http://web-1.example.org:9100/metrics", "407 Proxy Authentication Required"},
		{"", "http://web-1.example.org:9100/metrics", "407 Proxy Authentication Required"},
		{"prom:scrape-token@", "https://web-1.example.org:9100/metrics", "200 OK"},
		{"prom:wrong@", "https://web-1.example.org:9100/metrics", "Proxy Authentication Required"},
	} {
		if got := get(t, common+tc.userInfo+host, tc.url); !strings.HasSuffix(got, tc.want) {
			t.Errorf("%s by %s: %s, want %s", tc.url, tc.userInfo, got, tc.want)
		}
	}
	if connects != 1 {
		t.Errorf("%d CONNECT", connects)
	}
}

// readAhead is a connection of which some was read already.
type readAhead struct {
	net.Conn
	r io.Reader
}

func (c *readAhead) Read(p []byte) (int, error) { return c.r.Read(p) }

// Prometheus's http_sd_configs and the agent read a token from a file.
func TestCredentialsFile(t *testing.T) {
	g := newGuard(t, example)
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if r.URL.Path == "/sd" {
			_, err = g.Lister(r)
		} else {
			_, err = g.Client(r, "web-1.example.org")
		}
		answer(w, err)
	}))
	defer hub.Close()
	file := filepath.Join(t.TempDir(), "token")
	for token, want := range map[string][2]string{
		"list-token\n": {"200 OK", "401 Unauthorized"},
		"web-new":      {"401 Unauthorized", "200 OK"},
	} {
		write(t, file, token)
		for _, httpConfig := range []string{
			"authorization: {credentials_file: " + file + "}",
			"basic_auth: {username: any, password_file: " + file + "}",
		} {
			if got := get(t, httpConfig, hub.URL+"/sd"); got != want[0] {
				t.Errorf("%q to /sd: %s", token, got)
			}
			if got := get(t, httpConfig, hub.URL+"/ptth"); got != want[1] {
				t.Errorf("%q to /ptth: %s", token, got)
			}
		}
	}
}

// PushProx's client calls a URL with the user-info of its --proxy-url, which net/http makes
// a header of.
func TestPushProxURL(t *testing.T) {
	g := newGuard(t, example)
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := g.Client(r, "web-1.example.org")
		answer(w, err)
	}))
	defer hub.Close()
	host := strings.TrimPrefix(hub.URL, "http://")
	for userInfo, want := range map[string]string{"any:web-new@": "200 OK", "any:x@": "401 Unauthorized"} {
		if got := do(t, hub.Client(), "http://"+userInfo+host+"/poll"); got != want {
			t.Errorf("%s: %s", userInfo, got)
		}
	}
}

// authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) sign(t *testing.T, template *x509.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(2)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// A certificate counts when the server has verified it, over real TLS.
func TestS1CertificateIsVerified(t *testing.T) {
	g := newGuard(t, example)
	ours, theirs := newAuthority(t), newAuthority(t)
	pool := x509.NewCertPool()
	pool.AddCert(ours.certificate)
	for _, tc := range []struct {
		what        string
		auth        tls.ClientAuthType
		certificate *tls.Certificate
		want        string
	}{
		{"verified", tls.VerifyClientCertIfGiven, new(ours.sign(t, certificate("", "a.nodes.example.org"))), "200 OK"},
		{"verified, another's name", tls.VerifyClientCertIfGiven, new(ours.sign(t, certificate("", "b.nodes.example.org"))), "403 Forbidden"},
		{"none", tls.VerifyClientCertIfGiven, nil, "401 Unauthorized"},
		{"another authority's, asked for but not verified", tls.RequestClientCert, new(theirs.sign(t, certificate("", "a.nodes.example.org"))), "401 Unauthorized"},
		{"ours, asked for but not verified", tls.RequireAnyClientCert, new(ours.sign(t, certificate("", "a.nodes.example.org"))), "401 Unauthorized"},
	} {
		hub := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if len(r.TLS.PeerCertificates) == 0 != (tc.certificate == nil) {
				t.Errorf("%s: %d certificates", tc.what, len(r.TLS.PeerCertificates))
			}
			_, err := g.Client(r, "a.nodes.example.org")
			answer(w, err)
		}))
		hub.TLS = &tls.Config{ClientAuth: tc.auth, ClientCAs: pool, MinVersion: tls.VersionTLS13}
		hub.StartTLS()
		client := hub.Client()
		if tc.certificate != nil {
			client.Transport.(*http.Transport).TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return tc.certificate, nil
			}
		}
		if got := do(t, client, hub.URL); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
		hub.Close()
	}
}

// What pushes to a gateway shows its credential as one of these, over real TLS.
func TestPusherCredentials(t *testing.T) {
	g := newGatewayGuard(t, gatewayExample)
	ours, theirs := newAuthority(t), newAuthority(t)
	pool := x509.NewCertPool()
	pool.AddCert(ours.certificate)
	const node = "a.nodes.example.org"
	hub := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// As /metrics/job/JOB/instance/INSTANCE.
		segments := strings.Split(r.URL.Path, "/")
		answer(w, g.Pusher(r, labels(segments[2], segments[3], segments[4], segments[5])))
	}))
	hub.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool, MinVersion: tls.VersionTLS13}
	hub.StartTLS()
	defer hub.Close()
	// by returns a client that shows a certificate, or none.
	by := func(a *authority, names ...string) *http.Client {
		transport := hub.Client().Transport.(*http.Transport).Clone()
		if a != nil {
			own := a.sign(t, certificate("", names...))
			transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil }
		}
		return &http.Client{Transport: transport, Timeout: 10 * time.Second}
	}
	to := func(client *http.Client, instance string) *push.Pusher {
		return push.New(hub.URL, "node").Grouping("instance", instance).Client(client)
	}
	for _, tc := range []struct {
		what string
		*push.Pusher
		refused string // the status
	}{
		{"certificate", to(by(ours, node), node), ""},
		{"certificate of another node", to(by(ours, "b.nodes.example.org"), node), "403"},
		{"certificate of who is nobody", to(by(ours, "x.net"), "x.net"), "401"},
		{"certificate of another authority", to(by(theirs, node), node), "remote error: tls"},
		{"nothing", to(by(nil), node), "401"},
		{"client library with basic auth", to(by(nil), "web-1").BasicAuth("any", "web-new"), ""},
		{"the same for another group", to(by(nil), "db-1").BasicAuth("any", "web-new"), "403"},
		{"token beside a certificate", to(by(ours, node), "web-1").BasicAuth("any", "web-new"), ""},
	} {
		err := tc.Push()
		if tc.refused == "" && err != nil || tc.refused != "" && (err == nil || !strings.Contains(err.Error(), tc.refused)) {
			t.Errorf("%s: %v, want %q", tc.what, err, tc.refused)
		}
	}
	// The agent and promferry push show what an http_config file says.
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "web-new\n")
	for path, want := range map[string]string{"/metrics/job/node/instance/web-1": "200 OK", "/metrics/job/node/instance/db-1": "403 Forbidden"} {
		if got := get(t, "authorization: {credentials_file: "+file+"}\ntls_config: {insecure_skip_verify: true}", hub.URL+path); got != want {
			t.Errorf("credentials_file to %s: %s, want %s", path, got, want)
		}
	}
}
