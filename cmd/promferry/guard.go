package main

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"go.yaml.in/yaml/v2"

	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/reverse"
)

// clientGuard asks the guard about clients.
func clientGuard(guard *access.Guard, logger *slog.Logger) func(*http.Request, string) (reverse.Grant, error) {
	return func(r *http.Request, name string) (reverse.Grant, error) {
		grant, err := guard.Client(r, name)
		return granted(grant, err, r, logger)
	}
}

// scraperGuard asks the guard about who scrapes.
func scraperGuard(guard *access.Guard, logger *slog.Logger) func(*http.Request) (reverse.Grant, error) {
	return func(r *http.Request) (reverse.Grant, error) {
		grant, err := guard.Scraper(r)
		return granted(grant, err, r, logger)
	}
}

func granted(grant access.Grant, err error, r *http.Request, logger *slog.Logger) (reverse.Grant, error) {
	if err != nil {
		return nil, refusal(err, r, logger)
	}
	return grant, nil
}

// refusal logs who was not let in, and returns what that is told.
func refusal(err error, r *http.Request, logger *slog.Logger) *reverse.Refusal {
	e, ok := errors.AsType[*access.Error](err)
	if !ok {
		return &reverse.Refusal{Status: http.StatusForbidden, Text: "Nobody may do this here."}
	}
	if e.Status == http.StatusTooManyRequests {
		return &reverse.Refusal{Status: e.Status, Text: e.Text(), RetryAfter: time.Second}
	}
	logger.Warn("Refused", "err", e, "remote", r.RemoteAddr)
	return &reverse.Refusal{Status: e.Status, Text: e.Text()}
}

// listerGuard lets those who may list through to next.
func listerGuard(guard *access.Guard, logger *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := guard.Lister(r); err != nil {
			if e, ok := errors.AsType[*access.Error](err); ok {
				e.SetHeader(w.Header()) // A browser asks its user then.
			}
			reverse.Refuse(w, refusal(err, r, logger))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// warnOpen warns of each face that is open to whoever reaches it from elsewhere. Clients may have
// an address of their own.
func warnOpen(guard *access.Guard, address, clients net.Addr, logger *slog.Logger) {
	can := map[access.Face]string{
		access.FaceClient:  "be any client, and answer its scrapes",
		access.FaceScraper: "scrape every client",
		access.FaceLister:  "list all clients and targets",
		access.FacePusher:  "push to every group, and delete it",
		access.FaceReader:  "read all groups",
	}
	for _, face := range guard.Faces() {
		at := address
		if face == access.FaceClient {
			at = clients
		}
		if a, ok := at.(*net.TCPAddr); guard.Open(face) && (!ok || !a.IP.IsLoopback()) {
			logger.Warn("Open to everybody who reaches this address: set --auth.file", "address", at.String(), "face", face, "anybody_can", can[face])
		}
	}
}

// refuseBasicAuth refuses users in the web configuration file of a proxy's address for scrapes.
func refuseBasicAuth(file string) error {
	if hasUsers(file) {
		return errors.New("basic_auth_users looks at Authorization, which in a scrape belongs to the target: say who may scrape and list in --auth.file")
	}
	return nil
}

// hasUsers tells whether a web configuration file has users. One that cannot be read has none:
// validateWebConfig says it.
func hasUsers(file string) bool {
	if file == "" {
		return false
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	var config struct {
		Users map[string]any `yaml:"basic_auth_users"`
	}
	return yaml.Unmarshal(b, &config) == nil && len(config.Users) > 0
}
