package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/gateway"
	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/pushgw"
)

// TestS7WarnOpen: each open face is told of, where it is open to other hosts.
func TestS7WarnOpen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "auth.yml")
	writeFile(t, file, "readers: anyone\n", 0o600)
	everywhere, loopback := &net.TCPAddr{IP: net.IPv6zero, Port: 9091}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9091}
	for _, test := range []struct {
		name             string
		guard            func(string, *slog.Logger, prometheus.Registerer) (*access.Guard, error)
		file             string
		address, clients net.Addr
		faces            string // of which is told
	}{
		{"gateway", access.NewGateway, "", everywhere, nil, "pusher reader"},
		{"gateway with a file", access.NewGateway, file, everywhere, nil, "reader"},
		{"gateway on loopback", access.NewGateway, "", loopback, nil, ""},
		{"proxy", access.NewProxy, "", everywhere, everywhere, "client scraper lister"},
		{"proxy on loopback, its clients not", access.NewProxy, "", loopback, everywhere, "client"},
		{"proxy, its clients on loopback", access.NewProxy, "", everywhere, loopback, "scraper lister"},
	} {
		var log bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&log, nil))
		guard, err := test.guard(test.file, logger, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		warnOpen(guard, test.address, test.clients, logger)
		var faces []string
		for line := range strings.Lines(log.String()) {
			_, rest, _ := strings.Cut(line, "face=")
			face, can, _ := strings.Cut(rest, " ")
			faces = append(faces, face)
			if !strings.HasPrefix(can, `anybody_can="`) || strings.HasPrefix(can, `anybody_can=""`) {
				t.Errorf("%s: it is not said what anybody can: %s", test.name, line)
			}
		}
		if got := strings.Join(faces, " "); got != test.faces {
			t.Errorf("%s: told of %q, want %q", test.name, got, test.faces)
		}
	}
}

// TestReaderGuard has who may not read. A browser asks its user then; who goes on and on is told
// to wait, and logged no more.
func TestReaderGuard(t *testing.T) {
	file := filepath.Join(t.TempDir(), "auth.yml")
	writeFile(t, file, "readers: [{identity: a, san: [a]}]\n", 0o600)
	guard, err := access.NewGateway(file, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		handler := readerGuard(guard, slog.New(slog.NewTextHandler(&log, nil)), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			t.Error("let in")
		}))
		for range 12 {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			challenge, wait := w.Header().Get("WWW-Authenticate"), w.Header().Get("Retry-After")
			switch {
			case w.Code == http.StatusUnauthorized && challenge != "" && wait == "":
			case w.Code == http.StatusTooManyRequests && challenge == "" && wait != "":
			default:
				t.Errorf("%d %v: %s", w.Code, w.Header(), w.Body)
			}
		}
		if n := strings.Count(log.String(), `msg=Refused err="admit reader: no credentials" remote=192.0.2.1:1234`); n != 10 {
			t.Errorf("logged %d times, want 10:\n%s", n, &log)
		}
	})
}

// TestGatewayByCertificate deletes groups, which is the same right as to push, over TLS with a
// certificate: that with its name, and no other.
func TestGatewayByCertificate(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	// It signs itself, so it is also what the other end trusts.
	writeCertificate(t, path("x.crt"), path("x.key"), time.Now().Add(30*time.Minute))
	writeFile(t, path("web.yml"), "tls_server_config: {cert_file: x.crt, key_file: x.key, client_auth_type: VerifyClientCertIfGiven, client_ca_file: x.crt}\n", 0o600)
	writeFile(t, path("auth.yml"), "pushers: [{identity: nodes, san: [localhost]}]\n", 0o600)
	writeFile(t, path("with.yml"), "tls_config: {ca_file: x.crt, server_name: localhost, cert_file: x.crt, key_file: x.key}\n", 0o600)
	writeFile(t, path("without.yml"), "tls_config: {ca_file: x.crt, server_name: localhost}\n", 0o600)
	logger, registry := slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	guard, err := access.NewGateway(path("auth.yml"), logger, registry)
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{
		StoreConfig:  gateway.StoreConfig{ForgetAfter: time.Hour, MaxGroups: 10, MaxSeries: 10, MaxGroupBytes: 1 << 20, MaxBytes: 1 << 20},
		MaxBodyBytes: 1 << 20, Rights: pusherGuard{guard, logger}, Gatherer: registry, Registerer: registry, Logger: logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = g.Close() }()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newServer(listener, path("web.yml"), siteURL{}, g, logger)
	if err := server.cacheConfig("gateway", "web", registry); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for _, test := range []struct {
		config, instance string
		status           int // 0: it is taken
	}{
		{"with.yml", "localhost", 0},
		{"with.yml", "other", http.StatusForbidden},
		{"with.yml", "", http.StatusForbidden},
		{"without.yml", "localhost", http.StatusUnauthorized},
	} {
		client, err := httpclient.New("x", path(test.config))
		if err != nil {
			t.Fatal(err)
		}
		to := pushgw.New(&url.URL{Scheme: "https", Host: listener.Addr().String()}, client)
		err = to.Delete(t.Context(), pushgw.GroupingKey{Job: "node", Labels: map[string]string{"instance": test.instance}})
		status := 0
		if se, ok := errors.AsType[*pushgw.StatusError](err); ok {
			status = se.Code
		} else if err != nil {
			t.Fatal(err)
		}
		if status != test.status {
			t.Errorf("%s to %q: status %d, want %d", test.config, test.instance, status, test.status)
		}
	}
	const metrics = `
# HELP promferry_gateway_web_config_last_reload_successful Whether the web configuration file of an address could be used as it is now.
# TYPE promferry_gateway_web_config_last_reload_successful gauge
promferry_gateway_web_config_last_reload_successful{address="web"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(metrics), "promferry_gateway_web_config_last_reload_successful"); err != nil {
		t.Error(err)
	}
}
