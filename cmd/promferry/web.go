package main

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	toolkit "github.com/prometheus/exporter-toolkit/web"

	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/internal/safeyaml"
	"github.com/promferry/promferry/reverse/page"
)

// admin answers what a daemon is asked about itself: /-/healthy, /-/ready and /-/reload.
type admin struct {
	*http.ServeMux
	isReady atomic.Bool
}

// newAdmin returns the admin of a role. lifecycle tells whether a request may reload.
func newAdmin(role string, lifecycle bool, reload func() error) *admin {
	a := &admin{ServeMux: http.NewServeMux()}
	a.HandleFunc("GET /-/healthy", func(rw http.ResponseWriter, _ *http.Request) {
		say(rw, http.StatusOK, "promferry "+role+" is healthy.")
	})
	a.HandleFunc("GET /-/ready", func(rw http.ResponseWriter, _ *http.Request) {
		if !a.isReady.Load() {
			say(rw, http.StatusServiceUnavailable, "promferry "+role+" is not ready.")
			return
		}
		say(rw, http.StatusOK, "promferry "+role+" is ready.")
	})
	onRequest := func(rw http.ResponseWriter, _ *http.Request) {
		if !lifecycle {
			say(rw, http.StatusForbidden, "Lifecycle API is not enabled. Set --web.enable-lifecycle, or send SIGHUP.")
			return
		}
		if err := reload(); err != nil {
			say(rw, http.StatusInternalServerError, "reload: "+err.Error())
			return
		}
		say(rw, http.StatusOK, "Reloaded.")
	}
	a.HandleFunc("POST /-/reload", onRequest)
	a.HandleFunc("PUT /-/reload", onRequest) // As in Prometheus.
	return a
}

func (a *admin) ready()    { a.isReady.Store(true) }
func (a *admin) stopping() { a.isReady.Store(false) }

// web answers requests on the agent's own address.
type web struct {
	*server
	*admin
}

func newWeb(listener net.Listener, s *agentSettings, registry *prometheus.Registry, reload func() error, status func() page.AgentStatus, logger *slog.Logger) *web {
	w := &web{admin: newAdmin("agent", s.WebLifecycle.value, reload)}
	mux := w.ServeMux
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Registry: registry}))
	mux.Handle("GET /{$}", page.Agent(status))
	w.server = newServer(listener, s.WebConfigFile.value, s.WebExternalURL.value, mux, logger)
	w.http.ReadTimeout, w.http.WriteTimeout = 30*time.Second, time.Minute
	return w
}

func say(rw http.ResponseWriter, status int, sentence string) {
	rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
	rw.WriteHeader(status)
	_, _ = io.WriteString(rw, sentence+"\n")
}

// server serves HTTP on one address, with a web configuration file.
type server struct {
	listener net.Listener
	http     *http.Server
	config   string
	// cached serves in place of exporter-toolkit, where that costs too much; nil: not.
	cached *webConfig
	logger *slog.Logger
	// serving is closed when http is set up, and takes connections.
	serving chan struct{}
}

// announcing is a listener that tells when it is first asked for a connection.
type announcing struct {
	net.Listener
	once sync.Once
	what chan struct{}
}

func (a *announcing) Accept() (net.Conn, error) {
	a.once.Do(func() { close(a.what) })
	return a.Listener.Accept()
}

// serverErrors logs what net/http tells: what a client did at debug level, and that no connection
// can be taken, mostly for want of file descriptors, as a fault of this host.
type serverErrors struct {
	logger *slog.Logger
	config string // the web configuration file
	accept faultlog.Log
}

func (s *serverErrors) Write(b []byte) (int, error) {
	text := strings.TrimSpace(string(b))
	if strings.HasPrefix(text, "http: Accept error: ") {
		s.accept.Failed(context.Background(), "No connection taken; how many files may be open? (LimitNOFILE=)", errors.New(text))
		return len(b), nil
	}
	if !s.logger.Enabled(context.Background(), slog.LevelDebug) {
		return len(b), nil
	}
	const handshake = "http: TLS handshake error"
	if strings.HasPrefix(text, handshake) {
		// exporter-toolkit reads the file anew for each, and its error quotes it.
		if err := validateWebConfig(s.config); err != nil {
			text = handshake + ": " + err.Error()
		}
	}
	s.logger.Debug(text) //nolint:sloglint // It comes from net/http.
	return len(b), nil
}

// newServer returns a server that answers no request of another site's page; external is what
// browsers call it. Handlers bound the time of reading bodies and of writing.
func newServer(listener net.Listener, config string, external siteURL, handler http.Handler, logger *slog.Logger) *server {
	serving := make(chan struct{})
	s := &server{listener: &announcing{Listener: listener, what: serving}, config: config, logger: logger, serving: serving, http: &http.Server{
		Handler:           newSite(listener.Addr(), external, logger).protect(handler),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       6 * time.Minute, // Longer than Prometheus keeps its own idle connections.
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          log.New(&serverErrors{logger: logger, config: config, accept: faultlog.Log{Logger: logger}}, "", 0),
		Protocols:         &http.Protocols{},
	}}
	s.http.Protocols.SetHTTP1(true) // A line cannot be made of an HTTP/2 stream.
	return s
}

// Run answers until ctx ends.
func (s *server) Run(ctx context.Context) error {
	stopped := context.AfterFunc(ctx, func() { _ = s.http.Close() })
	defer stopped()
	var err error
	if s.cached != nil {
		err = s.cached.serve(s)
	} else {
		err = toolkit.Serve(s.listener, s.http, &toolkit.FlagConfig{WebConfigFile: &s.config}, slog.New(webConfigErrors{s.logger.Handler(), s.config}))
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// validateWebConfig checks a web configuration file and the files it names. Its error shows
// nothing of what the file says: a password may stand there in the wrong place.
func validateWebConfig(file string) error { return webConfigError(file, toolkit.Validate(file)) }

// webConfigError returns what can be shown of an error about a web configuration file.
func webConfigError(file string, err error) error {
	if err == nil {
		return nil
	}
	content, readErr := os.ReadFile(file)
	if readErr != nil {
		return readErr
	}
	return safeyaml.Error(err, content)
}

// webConfigErrors logs what exporter-toolkit does, which reads the file anew for each request,
// without what its errors quote of the file.
type webConfigErrors struct {
	slog.Handler
	file string
}

func (h webConfigErrors) Handle(ctx context.Context, record slog.Record) error {
	shown := slog.NewRecord(record.Time, record.Level, record.Message, record.PC)
	for a := range record.Attrs {
		if a.Key == "err" {
			a = slog.Any("err", webConfigError(h.file, errors.New(a.Value.String())))
		}
		shown.AddAttrs(a)
	}
	return h.Handler.Handle(ctx, shown)
}
