package access_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/promferry/promferry/internal/access"
)

// sum is the digest of a token, as the file has it.
func sum(token string) string {
	s := sha256.Sum256([]byte(token))
	return hex.EncodeToString(s[:])
}

// example has an entry of each kind.
var example = fmt.Sprintf(`
clients:
  - identity: web
    names: ["web-*.example.org", gate.example.org]
    token_sha256: [%s, %s]
  - identity: db
    names: ["db-[0-9].example.org"]
    token_sha256: [%s]
  - identity: nodes
    san: ["*.nodes.example.org", "10.1.*", "spiffe://example.org/node/*"]
  - identity: gateways
    san: ["gw.example.org"]
    names: ["*.branch.example.org"]
scrapers:
  - identity: prometheus
    username: prom
    token_sha256: [%s]
    san: [prometheus.example.org]
listers:
  - identity: sd
    token_sha256: [%s]
`, sum("web-old"), sum("web-new"), sum("db-token"), sum("scrape-token"), sum("list-token"))

// guarded is a guard with all that it says, for tests.
type guarded struct {
	*access.Guard
	path     string
	registry *prometheus.Registry
	log      *buffer
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newGuard(t testing.TB, content string) *guarded {
	t.Helper()
	return newGuarded(t, access.NewProxy, content)
}

func newGuarded(t testing.TB, guard func(string, *slog.Logger, prometheus.Registerer) (*access.Guard, error), content string) *guarded {
	t.Helper()
	g := &guarded{path: filepath.Join(t.TempDir(), "auth.yml"), registry: prometheus.NewPedanticRegistry(), log: &buffer{}}
	write(t, g.path, content)
	var err error
	g.Guard, err = guard(g.path, slog.New(slog.NewTextHandler(g.log, nil)), g.registry)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// metrics is the text of all metrics.
func (g *guarded) metrics(t testing.TB) string {
	t.Helper()
	families, err := g.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// wantMetric fails unless the metrics have this line.
func (g *guarded) wantMetric(t testing.TB, line string) {
	t.Helper()
	if text := g.metrics(t); !strings.Contains(text, line+"\n") {
		t.Errorf("want %s in\n%s", line, text)
	}
}

// caller makes requests with what somebody has to show.
type caller struct {
	bearer, username, password string
	raw                        []string
	certificate                *x509.Certificate
	address                    string
}

// request returns one with the credential in header.
func (c caller) request(header string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	switch {
	case c.raw != nil:
		r.Header[header] = c.raw
	case c.bearer != "":
		r.Header.Set(header, "Bearer "+c.bearer)
	case c.password != "":
		r.SetBasicAuth(c.username, c.password)
		value := r.Header.Get("Authorization")
		r.Header.Del("Authorization")
		r.Header.Set(header, value)
	}
	if c.certificate != nil {
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{c.certificate}}}
	}
	if c.address != "" {
		r.RemoteAddr = c.address
	}
	return r
}

func (g *guarded) client(c caller, name string) (access.Grant, error) {
	return g.Client(c.request("Authorization"), name)
}

func (g *guarded) scraper(c caller) (access.Grant, error) {
	return g.Scraper(c.request("Proxy-Authorization"))
}

func (g *guarded) lister(c caller) (access.Grant, error) {
	return g.Lister(c.request("Authorization"))
}

// certificate is one with these names: URIs, addresses, mail addresses and DNS names.
func certificate(commonName string, names ...string) *x509.Certificate {
	c := &x509.Certificate{Subject: pkix.Name{CommonName: commonName}, NotAfter: time.Now().Add(time.Hour)}
	for _, name := range names {
		u, err := url.Parse(name)
		switch ip := net.ParseIP(name); {
		case ip != nil:
			c.IPAddresses = append(c.IPAddresses, ip)
		case err == nil && u.Scheme != "":
			c.URIs = append(c.URIs, u)
		case strings.Contains(name, "@"):
			c.EmailAddresses = append(c.EmailAddresses, name)
		default:
			c.DNSNames = append(c.DNSNames, name)
		}
	}
	return c
}

// want fails unless the outcome is a grant of identity, or a refusal "STATUS reason".
func want(t testing.TB, what, outcome string, grant access.Grant, err error) {
	t.Helper()
	got := "identity " + grant.Identity()
	if err != nil {
		e, ok := errors.AsType[*access.Error](err)
		if !ok {
			t.Fatalf("%s: %v, no *access.Error", what, err)
		}
		got = fmt.Sprintf("%d %s", e.Status, e.Reason)
		if grant != (access.Grant{}) {
			t.Errorf("%s: refused, with a grant", what)
		}
	}
	if got != outcome {
		t.Errorf("%s: got %s, want %s", what, got, outcome)
	}
}
