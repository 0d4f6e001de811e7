package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/internal/httpclient"
)

func writeFile(t *testing.T, path, content string, perm os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, perm); err != nil { // Whatever the umask is.
		t.Fatal(err)
	}
}

// writeCertificate writes a certificate for localhost, which signs itself, and its key.
func writeCertificate(t *testing.T, cert, key string, expiry time.Time) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: expiry.Add(-time.Hour), NotAfter: expiry, DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o644)
	writeFile(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})), 0o600)
}

func TestS29S32CertificatesInMetrics(t *testing.T) {
	dir := t.TempDir()
	expiry := time.Unix(2_000_000_000, 0)
	writeCertificate(t, filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key"), expiry)
	writeFile(t, filepath.Join(dir, "web.yml"), "tls_server_config: {cert_file: a.crt, key_file: a.key}\n", 0o600)
	writeFile(t, filepath.Join(dir, "http.yml"), "tls_config: {insecure_skip_verify: true}\n", 0o600)
	client, err := httpclient.New("x", filepath.Join(dir, "http.yml"))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := httpclient.New("x", "")
	if err != nil {
		t.Fatal(err)
	}
	c := credentialsCollector{webConfigs: []string{filepath.Join(dir, "web.yml"), ""}, clients: []*httpclient.Client{client, plain}}
	want := strings.ReplaceAll(`
# HELP promferry_certificate_expiry_timestamp_seconds When a certificate that is shown to others expires, in Unix time.
# TYPE promferry_certificate_expiry_timestamp_seconds gauge
promferry_certificate_expiry_timestamp_seconds{file="DIR/a.crt"} 2e+09
# HELP promferry_insecure_skip_verify Whether an http_config file switches off the check of servers' certificates.
# TYPE promferry_insecure_skip_verify gauge
promferry_insecure_skip_verify{file="DIR/http.yml"} 1
`, "DIR", dir)
	if err := testutil.CollectAndCompare(c, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.CollectAndLint(c); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

func TestS26ExposedSecrets(t *testing.T) {
	dir := t.TempDir()
	open, closed := filepath.Join(dir, "open"), filepath.Join(dir, "closed")
	writeFile(t, open, "canary", 0o644)
	writeFile(t, closed, "canary", 0o640)
	var clients []*httpclient.Client
	for _, secret := range []string{open, closed} {
		writeFile(t, secret+".yml", "authorization: {credentials_file: "+secret+"}\n", 0o600)
		c, err := httpclient.New("x", secret+".yml")
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	var log bytes.Buffer
	warnExposed(slog.New(slog.NewTextHandler(&log, nil)), clients...)
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, open) || strings.Contains(got, "canary") {
		t.Errorf("logged %q", got)
	}
}
