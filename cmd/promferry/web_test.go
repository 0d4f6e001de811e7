package main

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	toolkit "github.com/prometheus/exporter-toolkit/web"
)

// exhausted is a listener of a process that has no file descriptors left, and then is closed.
type exhausted struct {
	net.Listener
	left int
}

func (e *exhausted) Accept() (net.Conn, error) {
	if e.left--; e.left < 0 {
		return nil, errors.New("closed")
	}
	return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
}

func (*exhausted) Close() error { return nil }

func (*exhausted) Addr() net.Addr { return &net.TCPAddr{} }

// TestNoFileDescriptors shows that an operator is told why no connection is taken, and not each
// time, and nothing of what clients do.
func TestNoFileDescriptors(t *testing.T) {
	var log bytes.Buffer
	s := newServer(&exhausted{left: 3}, "", siteURL{}, nil, slog.New(slog.NewTextHandler(&log, nil)))
	_ = s.http.Serve(s.listener)
	if got := log.String(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, "too many open files") || !strings.Contains(got, "LimitNOFILE=") {
		t.Errorf("the log is %q", got)
	}
	log.Reset()
	s.http.ErrorLog.Print("http: TLS handshake error from 127.0.0.1:1: EOF")
	if log.Len() > 0 {
		t.Errorf("the log is %q", &log)
	}
}

// TestHandshakeErrorShowsNoSecret has what exporter-toolkit says of a web configuration file that
// is none any more.
func TestHandshakeErrorShowsNoSecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "web.yml")
	if err := os.WriteFile(file, []byte("canary: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := newServer(&exhausted{}, file, siteURL{}, nil, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	s.http.ErrorLog.Print("http: TLS handshake error from 127.0.0.1:1: " + toolkit.Validate(file).Error())
	if got := log.String(); strings.Contains(got, "canary") || !strings.Contains(got, "TLS handshake error: line 1: unknown field") {
		t.Errorf("the log is %q", got)
	}
}
