package main

import (
	"errors"
	"log/slog"
	"net/http"

	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/pushgw"
)

// readerGuard lets those who may read through to next.
func readerGuard(guard *access.Guard, logger *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if admitted(w, r, guard.Reader(r), logger) {
			next.ServeHTTP(w, r)
		}
	})
}

// pusherGuard asks the guard about who pushes. It is a gateway.Rights.
type pusherGuard struct {
	guard  *access.Guard
	logger *slog.Logger
}

func (p pusherGuard) Push(w http.ResponseWriter, r *http.Request, key pushgw.GroupingKey) bool {
	return admitted(w, r, p.guard.Pusher(r, key.AllLabels()), p.logger)
}

func (p pusherGuard) PushToAll(w http.ResponseWriter, r *http.Request) bool {
	return admitted(w, r, p.guard.PusherToAll(r), p.logger)
}

func (p pusherGuard) PushToSome(w http.ResponseWriter, r *http.Request) func(pushgw.GroupingKey) bool {
	may, err := p.guard.PusherToSome(r)
	if !admitted(w, r, err, p.logger) {
		return nil
	}
	return func(key pushgw.GroupingKey) bool { return may(key.AllLabels()) }
}

// admitted tells whether err, of a guard, is none. It logs and answers one.
func admitted(w http.ResponseWriter, r *http.Request, err error, logger *slog.Logger) bool {
	if err == nil {
		return true
	}
	e, ok := errors.AsType[*access.Error](err)
	if !ok {
		http.Error(w, "Nobody may do this here.", http.StatusForbidden)
		return false
	}
	if e.Status != http.StatusTooManyRequests {
		logger.Warn("Refused", "err", e, "remote", r.RemoteAddr)
	}
	e.SetHeader(w.Header()) // A browser asks its user then.
	http.Error(w, e.Text(), e.Status)
	return false
}

// refuseUsersBeside refuses users in the web configuration file of a gateway that has an auth
// file.
func refuseUsersBeside(authFile, file string) error {
	if authFile != "" && hasUsers(file) {
		return errors.New("basic_auth_users looks at the same header as --auth.file does: say who may push and read there")
	}
	return nil
}
