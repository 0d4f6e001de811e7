package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// look makes the next look at the files happen now.
func (c *webConfig) look() *loadedWebConfig {
	c.mu.Lock()
	c.looked = time.Time{}
	c.mu.Unlock()
	return c.now()
}

func serial(t *testing.T, l *loadedWebConfig) time.Time {
	t.Helper()
	leaf, err := x509.ParseCertificate(l.tls.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf.NotAfter
}

// TestS27WebConfig: certificates and the file that names them can be replaced in any way, and a
// bad one changes nothing.
func TestS27WebConfig(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	first, second, third := time.Unix(2_000_000_000, 0), time.Unix(2_100_000_000, 0), time.Unix(2_200_000_000, 0)
	writeCertificate(t, path("hub.crt"), path("hub.key"), first)
	const good = "tls_server_config: {cert_file: hub.crt, key_file: hub.key}\nhttp_server_config: {headers: {X-Frame-Options: deny}}\n"
	writeFile(t, path("web.yml"), good, 0o600)
	var log bytes.Buffer
	c, err := newWebConfig(path("web.yml"), "proxy", "web", slog.New(slog.NewTextHandler(&log, nil)), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	before := c.look()
	if !serial(t, before).Equal(first) || before.headers["X-Frame-Options"] != "deny" {
		t.Errorf("read: %+v", before)
	}
	if c.look() != before {
		t.Error("read again without a change")
	}
	// By a rename, key first: for a moment the two do not fit.
	writeCertificate(t, path("new.crt"), path("new.key"), second)
	if err := os.Rename(path("new.key"), path("hub.key")); err != nil {
		t.Fatal(err)
	}
	if c.look() != before || testutil.ToFloat64(c.good) != 0 {
		t.Error("a key that does not fit is used")
	}
	if err := os.Rename(path("new.crt"), path("hub.crt")); err != nil {
		t.Fatal(err)
	}
	if got := serial(t, c.look()); !got.Equal(second) || testutil.ToFloat64(c.good) != 1 {
		t.Errorf("after a rename: %v", got)
	}
	// By a link that leads elsewhere, as Kubernetes does it.
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(path(name), 0o700); err != nil {
			t.Fatal(err)
		}
		expiry := map[string]time.Time{"a": second, "b": third}[name]
		writeCertificate(t, path(name+"/hub.crt"), path(name+"/hub.key"), expiry)
	}
	if err := os.Symlink("a", path("current")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path("web.yml"), strings.ReplaceAll(good, "hub.", "current/hub."), 0o600)
	if got := serial(t, c.look()); !got.Equal(second) {
		t.Errorf("by way of a link: %v", got)
	}
	if err := os.Symlink("b", path("next")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path("next"), path("current")); err != nil {
		t.Fatal(err)
	}
	if got := serial(t, c.look()); !got.Equal(third) {
		t.Errorf("after the link was swapped: %v", got)
	}
	// What is wrong changes nothing, and is told once.
	last := c.look()
	for name, bad := range map[string]string{
		"no YAML":     "tls_server_config: [canary",
		"no TLS":      "http_server_config: {http2: false}\n",
		"users":       strings.ReplaceAll(good, "hub.", "current/hub.") + "basic_auth_users: {me: $2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi}\n",
		"no such":     strings.ReplaceAll(good, "hub.", "none/hub."),
		"old ciphers": "tls_server_config: {cert_file: current/hub.crt, key_file: current/hub.key, min_version: TLS99}\n",
	} {
		log.Reset()
		writeFile(t, path("web.yml"), bad, 0o600)
		c.look() // Once more is not told again.
		if c.look() != last || testutil.ToFloat64(c.good) != 0 {
			t.Errorf("%s: used", name)
		}
		if strings.Count(log.String(), "\n") != 1 {
			t.Errorf("%s: logged %q", name, log.String())
		}
	}
	if last.tls.MinVersion != tls.VersionTLS12 { // S29
		t.Errorf("TLS from version %x on", last.tls.MinVersion)
	}
}

// TestS10OwnAddressesOnly: what --pull.allow lets be scraped is on this host, whatever the
// name resolves to.
func TestS10OwnAddressesOnly(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{
		"localhost", "127.0.0.1", "::ffff:127.0.0.1", "no-such-name.invalid",
		// Of others, with nothing but loopback left to connect to.
		"169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "192.0.2.1", "10.255.255.1", "224.0.0.1", "0.0.0.0", "2852039166",
	} {
		conn, err := dialOwn(t.Context(), "tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		if ip := conn.RemoteAddr().(*net.TCPAddr).IP; !ip.IsLoopback() {
			t.Errorf("%s: connected to %v", host, ip)
		}
		_ = conn.Close()
	}
}
