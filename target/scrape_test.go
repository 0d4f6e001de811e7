package target_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/target"
)

const limit = 1000

func scrape(t *testing.T, address string) ([]byte, string, error) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	client, err := httpclient.New("scrape", "")
	if err != nil {
		t.Fatal(err)
	}
	s := &target.Scraper{Client: client, Accept: "text/plain", MaxBytes: limit}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	return s.Scrape(ctx, target.Target{Job: "node", URL: u})
}

// TestErrorShowsNoCredential has a target that answers with the credentials that it was sent.
func TestErrorShowsNoCredential(t *testing.T) {
	for name, answer := range map[string]string{
		"encoding":  "HTTP/1.1 200 OK\r\nContent-Encoding: canary-token\r\n\r\n",
		"no HTTP":   "HTTP/1.1 canary-token\r\n\r\n",
		"a trailer": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\ncanary-token\r\n\r\n",
	} {
		server := httptest.NewServer(raw(answer))
		file := filepath.Join(t.TempDir(), "http.yml")
		if err := os.WriteFile(file, []byte("authorization: {credentials: canary-token}"), 0o600); err != nil {
			t.Fatal(err)
		}
		client, err := httpclient.New("scrape", file)
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = (&target.Scraper{Client: client, MaxBytes: limit}).Scrape(t.Context(), target.Target{Job: "node", URL: u})
		server.Close()
		if err == nil || !strings.Contains(err.Error(), `"..."`) && !strings.Contains(err.Error(), ": ...") || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	_, _ = gz.Write(b)
	_ = gz.Close()
	return out.Bytes()
}

// raw answers with bytes as they are, then closes the connection.
func raw(answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(conn, answer)
		_ = conn.Close()
	}
}

func TestScrapePasses(t *testing.T) {
	fits := bytes.Repeat([]byte("x"), limit)
	for name, handle := range map[string]http.HandlerFunc{
		"plain": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept") != "text/plain" || r.Header.Get("Accept-Encoding") != "gzip" ||
				!strings.HasPrefix(r.Header.Get("User-Agent"), "promferry/") {
				t.Errorf("headers %v", r.Header)
			}
			if f, err := strconv.ParseFloat(r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64); err != nil || f <= 0 || f > 0.5 {
				t.Errorf("timeout header %v, %v", f, err)
			}
			w.Header().Set("Content-Type", "text/x")
			_, _ = w.Write(fits)
		},
		"gzip": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/x")
			w.Header().Set("Content-Encoding", "GZIP")
			_, _ = w.Write(gzipped(fits))
		},
		"chunked": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/x")
			for i := range fits {
				_, _ = w.Write(fits[i : i+1])
				_ = http.NewResponseController(w).Flush()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(handle)
			defer s.Close()
			body, contentType, err := scrape(t, s.URL)
			if err != nil || !bytes.Equal(body, fits) || contentType != "text/x" {
				t.Errorf("got %d bytes of %q, %v", len(body), contentType, err)
			}
		})
	}
}

func TestScrapeFails(t *testing.T) {
	over := bytes.Repeat([]byte("x"), limit+1)
	bomb := gzipped(bytes.Repeat(over, 1000)) // Before the time of a scrape runs.
	whole := gzipped(bytes.Repeat([]byte("metric 1\n"), 100))
	for name, tc := range map[string]struct {
		want   target.Reason
		handle http.HandlerFunc
	}{
		"status":   {target.ReasonStatus, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }},
		"no 200":   {target.ReasonStatus, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }},
		"redirect": {target.ReasonStatus, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }},
		"one byte over": {target.ReasonTooLarge, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(over)
		}},
		"endless": {target.ReasonTooLarge, func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(over); err != nil {
					return
				}
			}
		}},
		"gzip bomb": {target.ReasonTooLarge, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb)
		}},
		"slow drip": {target.ReasonTimeout, func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, "x")
				_ = http.NewResponseController(w).Flush()
				select {
				case <-r.Context().Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		}},
		"no answer":       {target.ReasonTimeout, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		"length cut":      {target.ReasonCutShort, raw("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nmetric 1\n")},
		"chunk cut":       {target.ReasonCutShort, raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nmetric 1\n\r\n")},
		"gzip cut":        {target.ReasonCutShort, raw("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + string(whole[:len(whole)-9]))},
		"gzip header cut": {target.ReasonCutShort, raw("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + string(whole[:4]))},
		"no gzip":         {target.ReasonNotMetrics, raw("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nmetric 1\nmetric 2\n")},
		"zstd":            {target.ReasonNotMetrics, raw("HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\n\r\nmetric 1\n")},
		"no HTTP":         {target.ReasonConnect, raw("SSH-2.0-OpenSSH\r\n")},
		"closed at once":  {target.ReasonConnect, raw("")},
	} {
		t.Run(name, func(t *testing.T) {
			mux := http.NewServeMux()
			mux.Handle("/", tc.handle)
			mux.HandleFunc("/elsewhere", func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") })
			s := httptest.NewServer(mux)
			defer s.Close()
			body, _, err := scrape(t, s.URL+"/metrics?token=canary")
			se, ok := errors.AsType[*target.ScrapeError](err)
			if !ok || se.Reason != tc.want || body != nil {
				t.Fatalf("got %d bytes, %v, want reason %s", len(body), err, tc.want)
			}
			if want := fmt.Sprintf("scrape %s/metrics?...: ", s.URL); !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "canary") {
				t.Errorf("error %q, want it to begin with %q", err, want)
			}
		})
	}
}

// TestScrapeCutsItsErrors has targets that answer with what an error would quote at length.
func TestScrapeCutsItsErrors(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	for name, answer := range map[string]string{
		"encoding": "HTTP/1.1 200 OK\r\nContent-Encoding: " + long + "\r\n\r\n",
		"no HTTP":  long + "\r\n",
		"status":   "HTTP/1.1 " + long + " OK\r\n\r\n",
	} {
		s := httptest.NewServer(raw(answer))
		_, _, err := scrape(t, s.URL)
		if err == nil || len(err.Error()) > 500 {
			t.Errorf("%s: %.500v", name, err)
		}
		s.Close()
	}
}

func TestScrapeRefused(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	_, _, err = scrape(t, "http://"+l.Addr().String())
	if se, ok := errors.AsType[*target.ScrapeError](err); !ok || se.Reason != target.ReasonConnect || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}
