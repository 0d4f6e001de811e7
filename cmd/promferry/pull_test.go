package main

import (
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/promslog"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/reverse"
)

// TestS11ScrapeCredentials: the credentials of --scrape.http-config go to the targets, and not to what
// --pull.allow adds, which has the same trust in certificates. So it is after a reload.
func TestS11ScrapeCredentials(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		_, _ = fmt.Fprintf(w, "%s %s %s", r.Host, password, r.Header.Get("X-Token"))
	}
	target, other := httptest.NewTLSServer(http.HandlerFunc(echo)), httptest.NewTLSServer(http.HandlerFunc(echo))
	defer target.Close()
	defer other.Close()
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: target.Certificate().Raw})
	writeFile(t, filepath.Join(dir, "ca"), string(ca), 0o600)
	file := filepath.Join(dir, "http.yml")
	config := func(password string) {
		writeFile(t, file, "tls_config: {ca_file: ca, server_name: example.com}\nbasic_auth: {username: me, password: "+password+
			"}\nhttp_headers: {X-Token: {secrets: ["+password+"]}}\n", 0o600)
	}
	config("canary")
	port := func(s *httptest.Server) string { return s.URL[strings.LastIndex(s.URL, ":")+1:] }
	s := newAgentSettings()
	for setting, text := range map[anySetting]string{
		s.PullTargets: "node=" + target.URL + "/metrics", s.PullAllows: port(other), s.ProxyUrls: "http://127.0.0.1:1",
		s.ScrapeHTTPConfig: file, s.Fqdn: "web-1",
	} {
		if err := setting.Set(text); err != nil {
			t.Fatal(err)
		}
	}
	scrape, err := httpclient.New("scrape", file)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPull(s, scrape, promslog.NewNopLogger(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	for _, password := range []string{"canary", "reloaded"} {
		config(password)
		use, err := p.load()
		if err != nil {
			t.Fatal(err)
		}
		useScrape, err := scrape.Load()
		if err != nil {
			t.Fatal(err)
		}
		use()
		useScrape()
		for address, want := range map[string]string{
			"web-1:" + port(target) + "/metrics":              "127.0.0.1:" + port(target) + " " + password + " " + password,
			"web-1:" + port(other) + "/metrics?_scheme=https": "web-1:" + port(other) + "  ",
		} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address, nil)
			r.Header.Set(reverse.HeaderTimeout, "10")
			w := httptest.NewRecorder()
			p.client.ServeHTTP(w, r)
			if body, _ := io.ReadAll(w.Body); w.Code != http.StatusOK || string(body) != want {
				t.Errorf("%s: got %d %q, want %q", address, w.Code, body, want)
			}
		}
	}
}
