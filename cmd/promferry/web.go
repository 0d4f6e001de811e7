package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/version"
	toolkit "github.com/prometheus/exporter-toolkit/web"
)

// web answers requests on the agent's own address.
type web struct {
	listener net.Listener
	server   *http.Server
	config   string
	logger   *slog.Logger
	isReady  atomic.Bool
}

func newWeb(listener net.Listener, config string, registry *prometheus.Registry, reload func() error, logger *slog.Logger) *web {
	w := &web{listener: listener, config: config, logger: logger}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Registry: registry}))
	mux.HandleFunc("GET /-/healthy", func(rw http.ResponseWriter, _ *http.Request) { say(rw, http.StatusOK, "promferry agent is healthy.") })
	mux.HandleFunc("GET /-/ready", func(rw http.ResponseWriter, _ *http.Request) {
		if !w.isReady.Load() {
			say(rw, http.StatusServiceUnavailable, "promferry agent is not ready.")
			return
		}
		say(rw, http.StatusOK, "promferry agent is ready.")
	})
	mux.HandleFunc("POST /-/reload", func(rw http.ResponseWriter, _ *http.Request) {
		if err := reload(); err != nil {
			say(rw, http.StatusInternalServerError, "reload: "+err.Error())
			return
		}
		say(rw, http.StatusOK, "Reloaded.")
	})
	landing, err := toolkit.NewLandingPage(toolkit.LandingConfig{
		Name:        "promferry agent",
		Description: "Puts what targets on this host expose to Pushgateways",
		Version:     version.Version,
		Profiling:   "false",
		Links: []toolkit.LandingLinks{
			{Address: "/metrics", Text: "Metrics"},
			{Address: "/-/healthy", Text: "Health"},
			{Address: "/-/ready", Text: "Readiness"},
		},
	})
	if err != nil {
		panic(err) // The template of a library with our constants in it.
	}
	mux.Handle("GET /{$}", landing)
	w.server = &http.Server{
		// A page of another site that somebody on this host looks at must not reload.
		Handler:           http.NewCrossOriginProtection().Handler(mux),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	return w
}

func say(rw http.ResponseWriter, status int, sentence string) {
	rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
	rw.WriteHeader(status)
	_, _ = io.WriteString(rw, sentence+"\n")
}

func (w *web) ready()    { w.isReady.Store(true) }
func (w *web) stopping() { w.isReady.Store(false) }

// Run answers until ctx ends.
func (w *web) Run(ctx context.Context) error {
	stopped := context.AfterFunc(ctx, func() { _ = w.server.Close() })
	defer stopped()
	err := toolkit.Serve(w.listener, w.server, &toolkit.FlagConfig{WebConfigFile: &w.config}, w.logger)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// validateWebConfig checks a web configuration file and the files it names. Its secrets
// are hashes and keys, which the errors do not quote.
func validateWebConfig(file string) error { return toolkit.Validate(file) }
