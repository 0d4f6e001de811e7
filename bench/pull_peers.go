//go:build bench

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// reverseProxyRole is the argument that makes this program a reverse proxy.
const reverseProxyRole = "reverse-proxy"

// reverseProxy starts this program a second time, as a reverse proxy to addr.
func reverseProxy(ctx context.Context, addr string) (*real.Server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return real.Serve(ctx, "", real.Command{Path: "taskset", Args: []string{"-c", measuredCore, self, reverseProxyRole, addr}})
}

// serveReverseProxy is that reverse proxy: Go's own, which does what promferry's proxy does
// where the target can be reached. Its arguments are the target's address and the flag
// that [real.Serve] adds.
func serveReverseProxy(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%s: want two arguments", reverseProxyRole)
	}
	target := &url.URL{Scheme: "http", Host: args[0]}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", strings.TrimPrefix(args[1], "--web.listen-address="))
	if err != nil {
		return err
	}
	s := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: &httputil.ReverseProxy{
			Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
			Transport: &http.Transport{MaxIdleConnsPerHost: 2 * inFlight, DisableCompression: true},
			// Without one it takes twice the CPU time, for garbage.
			BufferPool: &buffers{},
		},
	}
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Info("Listening on", "address", l.Addr())
	context.AfterFunc(ctx, func() { _ = s.Close() })
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// buffers are what the reverse proxy copies bodies with.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if buffer, ok := b.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, 32<<10) // As it makes itself.
}

func (b *buffers) Put(buffer []byte) { b.pool.Put(&buffer) }

// nginxServer is a running nginx.
type nginxServer struct {
	*real.Process
	addr, dir string
}

// nginx starts an nginx of one process on the measured core, which passes all on to target.
func nginx(ctx context.Context, target string) (_ *nginxServer, err error) {
	path, err := real.Find("nginx")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "promferry-bench-")
	if err != nil {
		return nil, err
	}
	n := &nginxServer{dir: dir}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if n.addr, err = freeAddress(ctx); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, nginxConfig, target, n.addr), 0o600); err != nil {
		return nil, err
	}
	n.Process, err = real.Start(real.Command{Path: "taskset", Args: []string{"-c", measuredCore, path, "-p", dir, "-c", config, "-e", "stderr"}})
	if err != nil {
		return nil, err
	}
	return n, real.Until(ctx, func(ctx context.Context) error {
		conn, err := dialTo(n.addr)(ctx)
		if err != nil {
			return fmt.Errorf("nginx: %w\n%s", err, n.Stderr())
		}
		return conn.Close()
	})
}

// nginxConfig makes the most of one nginx: a whole exposition fits into its buffers, and no
// connection ends early.
const nginxConfig = `
daemon off;
master_process off;
worker_rlimit_nofile 20000;
error_log stderr;
pid nginx.pid;
events { worker_connections 4096; }
http {
	access_log off;
	keepalive_requests 1000000000;
	client_body_temp_path client;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	upstream targets {
		server %s;
		keepalive 128;
		keepalive_requests 1000000000;
	}
	server {
		listen %s backlog=4096;
		location / {
			proxy_pass http://targets;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffer_size 16k;
			proxy_buffers 8 16k;
			proxy_max_temp_file_size 0;
		}
	}
}
`

func (n *nginxServer) close() {
	if n.Process != nil {
		n.Kill()
	}
	_ = os.RemoveAll(n.dir)
}

// freeAddress returns an address that nobody listens on, for a program that must be told one.
func freeAddress(ctx context.Context) (string, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// writeWebConfig writes a certificate of its own and a web configuration file that names
// it, and returns that file's path.
func writeWebConfig(dir string) (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return "", err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	config := filepath.Join(dir, "web.yml")
	for path, content := range map[string][]byte{
		filepath.Join(dir, "cert.pem"): pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}),
		filepath.Join(dir, "key.pem"):  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		config:                         []byte("tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\n"),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return "", err
		}
	}
	return config, nil
}
