package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/version"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/internal/statedir"
	"github.com/promferry/promferry/lockfile"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/longpoll"
	"github.com/promferry/promferry/reverse/page"
	"github.com/promferry/promferry/reverse/ptth"
)

// drainBudget is how long the proxy takes at most to stop: what a scrape may take by default,
// and a little more. systemd/promferry-proxy.service gives it some seconds more.
const drainBudget = 20 * time.Second

// proxyCommand is promferry proxy.
type proxyCommand struct{ settings *proxySettings }

func newProxyCommand(app *kingpin.Application) *proxyCommand {
	app.Command("proxy", "Let Prometheus scrape clients over connections that they opened (proxy_url, http_sd_configs).")
	return &proxyCommand{settings: newProxySettings()}
}

func (*proxyCommand) name() string { return "proxy" }

func (p *proxyCommand) sets() ([]any, []anySetting) { return []any{p.settings}, p.settings.all() }

// run runs the proxy until it is told to stop.
func (p *proxyCommand) run(in *invocation) (int, error) {
	return 0, p.serveUntilStopped(in.context(), in)
}

// knownClients is where the proxy keeps the clients that it knows.
type knownClients struct{ dir *statedir.Dir }

const knownClientsFile = "clients.json"

func (k knownClients) Load() ([]byte, error) {
	f, err := k.dir.OpenFile(knownClientsFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(f)
}

// largeSave is from when on what saving needed is given back at once.
const largeSave = 1 << 20

func (k knownClients) Save(b []byte) error {
	if err := k.dir.WriteFile(knownClientsFile, b); err != nil {
		return err
	}
	if len(b) > largeSave {
		debug.FreeOSMemory()
	}
	return nil
}

func (p *proxyCommand) serveUntilStopped(ctx context.Context, in *invocation) error {
	s := p.settings
	errs := append(in.unknown, s.check()...)
	for _, file := range []*setting[string]{s.WebConfigFile, s.ClientConfigFile} {
		if err := validateWebConfig(file.value); err != nil {
			errs = append(errs, file.fault(err))
		}
	}
	if err := refuseBasicAuth(s.WebConfigFile.value); err != nil {
		errs = append(errs, s.WebConfigFile.fault(err))
	}
	logger := newLogger(in.stderr, s.LogLevel.value, s.LogFormat.value)
	registry := newRegistry()
	guard, err := access.NewProxy(s.AuthFile.value, logger, registry)
	if err != nil {
		errs = append(errs, s.AuthFile.fault(err))
	}
	if err := faults(errs); err != nil {
		return err
	}
	registry.MustRegister(credentialsCollector{webConfigs: []string{s.WebConfigFile.value, s.ClientConfigFile.value}})
	dir, err := openState(s.StateDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	lock, err := lockfile.AcquireIn(dir, "proxy.pid")
	if held, ok := errors.AsType[*lockfile.HeldError](err); ok {
		return fmt.Errorf("another proxy has this state directory: %w", held)
	} else if err != nil {
		return err
	}
	defer func() { _ = lock.Release() }()

	clients, err := reverse.NewRegistry(reverse.RegistryConfig{
		Authorize:  clientGuard(guard, logger),
		MaxClients: s.LimitClients.value, MaxLines: s.LimitClientLines.value, MaxScrapes: s.LimitClientScrapes.value,
		ForgetAfter: time.Duration(s.SDForgetAfter.value), Settle: time.Duration(s.SDSettle.value),
		Store: knownClients{dir}, Logger: logger, Registerer: registry,
	})
	if err != nil {
		return fmt.Errorf("%s: %w", dir.Path(knownClientsFile), err)
	}
	hub := ptth.NewHub(ptth.HubConfig{Registry: clients, Heartbeat: time.Duration(s.Heartbeat.value), Logger: logger, Registerer: registry})
	polls := longpoll.NewHub(longpoll.HubConfig{
		Registry: clients, Heartbeat: time.Duration(s.Heartbeat.value),
		Logger: logger, Registerer: registry,
	})
	proxy := reverse.NewProxy(reverse.ProxyConfig{
		Registry: clients, Authorize: scraperGuard(guard, logger),
		MaxTimeout: time.Duration(s.ScrapeMaxTimeout.value), DefaultTimeout: time.Duration(s.ScrapeDefaultTimeout.value),
		TunnelIdle: time.Duration(s.TunnelIdleTimeout.value), MaxScrapes: s.LimitScrapes.value, MaxBytes: int64(s.ScrapeMaxBytes.value),
		Logger: logger, Registerer: registry,
	})
	notifier := newNotifier(logger)
	r := newReloader("proxy", registry, logger, func() error {
		return errors.Join(validateWebConfig(s.WebConfigFile.value), refuseBasicAuth(s.WebConfigFile.value),
			validateWebConfig(s.ClientConfigFile.value), guard.Reload())
	})
	r.before, r.after = notifier.reloading, notifier.ready

	d := &proxyDaemon{settings: s, clients: clients, hub: hub, polls: polls, proxy: proxy, guard: guard, logger: logger, notifier: notifier, reloader: r}
	guard.OnChange(d.revoke)
	return d.run(ctx, registry)
}

// revoke ends what nobody would be let in for any more.
func (d *proxyDaemon) revoke() {
	valid := func(g reverse.Grant, name string) bool {
		grant, ok := g.(access.Grant)
		return ok && d.guard.Valid(grant, name)
	}
	d.clients.Revoke(valid)
	d.hub.Revoke(valid)
	d.polls.Revoke(valid)
	d.proxy.Revoke(func(g reverse.Grant) bool { return valid(g, "") })
}

// recheck ends the lines of certificates that have expired, until ctx ends.
func (d *proxyDaemon) recheck(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.revoke()
		case <-ctx.Done():
			return nil
		}
	}
}

// proxyDaemon is the proxy while it runs.
type proxyDaemon struct {
	settings *proxySettings
	clients  *reverse.Registry
	hub      *ptth.Hub
	polls    *longpoll.Hub
	guard    *access.Guard
	proxy    *reverse.Proxy
	logger   *slog.Logger
	notifier *notifier
	reloader *reloader
}

func (d *proxyDaemon) run(ctx context.Context, registry *prometheus.Registry) error {
	s := d.settings
	forClients := http.NewServeMux()
	lines := func(mux *http.ServeMux) {
		mux.Handle("/ptth", d.hub)
		mux.HandleFunc("/poll", d.polls.Poll)
		mux.HandleFunc("/push", d.polls.Push)
	}
	lines(forClients)
	admin := newAdmin("proxy", s.WebLifecycle.value, d.reloader.reload)
	own := http.NewServeMux()
	own.Handle("/-/", admin)
	own.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Registry: registry}))
	own.Handle("GET /{$}", page.Proxy(func() reverse.ProxyStatus {
		status := d.clients.Status()
		status.Version = version.Version
		return status
	}))
	own.HandleFunc("GET /sd", d.clients.Discovery)
	own.Handle("GET /clients", d.clients.ListClients(time.Duration(s.RegistrationTimeout.value)))
	if s.ClientListenAddress.value == "" {
		lines(own)
	}
	listed := listerGuard(d.guard, d.logger, own)
	guarded := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Lines ask for credentials of their own, and probes have none.
		switch r.URL.Path {
		case "/ptth", "/poll", "/push", "/-/healthy", "/-/ready":
			own.ServeHTTP(w, r)
		default:
			listed.ServeHTTP(w, r)
		}
	})
	bounded := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			control := http.NewResponseController(w)
			write := time.Minute
			if r.URL.Path == "/push" { // It is answered when the scrape is done.
				write += time.Duration(s.ScrapeMaxTimeout.value)
			}
			_ = control.SetWriteDeadline(time.Now().Add(write))
			if r.ContentLength != 0 { // Polls and responses set their own.
				_ = control.SetReadDeadline(time.Now().Add(10 * time.Second))
			}
			next.ServeHTTP(w, r)
		})
	}

	type face struct {
		address, config *setting[string]
		role            string
	}
	faces := []face{{s.WebListenAddress, s.WebConfigFile, "web"}}
	handlers := []http.Handler{bounded(guarded)}
	if s.ClientListenAddress.value != "" {
		faces = append(faces, face{s.ClientListenAddress, s.ClientConfigFile, "client"})
		handlers = append(handlers, bounded(forClients))
	}
	var servers []*server
	for i, f := range faces {
		// Polls of PushProx's clients have no heartbeat but TCP's.
		listener, err := httpclient.ListenConfig(2*time.Duration(s.Heartbeat.value)).Listen(ctx, "tcp", f.address.value)
		if err != nil {
			return fmt.Errorf("%s: %w", f.address.name(), err)
		}
		if f.config.value == "" {
			listener = reverse.CorkListener{Listener: listener}
		}
		server := newServer(listener, f.config.value, s.WebExternalURL.value, handlers[i], d.logger)
		if f.role == "web" {
			server.http.Handler = scrapesTo(d.proxy, server.http.Handler)
		}
		server.http.Handler = longpoll.RestoreTLS(server.http.Handler)
		server.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
			return reverse.ConnContext(longpoll.ConnContext(ctx, c), c)
		}
		if err := server.cacheConfig("proxy", f.role, registry); err != nil {
			return fmt.Errorf("%s: %w", f.config.name(), err)
		}
		servers = append(servers, server)
	}

	warnOpen(d.guard, servers[0].listener.Addr(), servers[len(servers)-1].listener.Addr(), d.logger)
	d.logger.Info("Starting promferry proxy", "version", version.Version, "state_dir", s.StateDir.value)
	// All goes on until what is in flight is done.
	serveCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, groupCtx := errgroup.WithContext(ctx)
	for _, server := range servers {
		group.Go(func() error { return server.Run(serveCtx) })
	}
	group.Go(func() error {
		forClients := servers[len(servers)-1] // The last one is where clients come.
		select {
		case <-forClients.serving:
		case <-serveCtx.Done():
			return nil
		}
		if err := forClients.http.Serve(d.polls); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error { return d.guard.Run(serveCtx) })
	group.Go(func() error { return d.recheck(serveCtx) })
	group.Go(func() error { return keepMemory(serveCtx) })
	group.Go(func() error { return d.polls.Run(serveCtx) })
	group.Go(func() error { return d.hub.Run(serveCtx) })
	group.Go(func() error { return d.clients.Run(serveCtx) })
	group.Go(func() error { return d.reloader.Run(groupCtx) })
	group.Go(func() error {
		defer stop()
		d.alive(groupCtx)
		admin.stopping()
		d.notifier.stopping()
		d.drain(groupCtx)
		return nil
	})
	admin.ready()
	d.notifier.ready()
	err := group.Wait()
	d.logger.Info("Stopped")
	return err
}

// scrapesTo passes scrapes on to proxy: their Host is that of the target, and they have a time of
// their own.
func scrapesTo(proxy *reverse.Proxy, others http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if reverse.IsScrape(r) {
			proxy.ServeHTTP(w, r)
			return
		}
		others.ServeHTTP(w, r)
	})
}

// alive tells systemd that the proxy is, until ctx ends.
func (d *proxyDaemon) alive(ctx context.Context) {
	interval := d.notifier.interval()
	if interval == 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		d.notifier.alive(d.clients.Summary())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// drain lets scrapes in flight end, and clients go elsewhere.
func (d *proxyDaemon) drain(ctx context.Context) {
	d.proxy.Stopping()
	d.clients.Stopping()
	d.hub.Move()
	d.polls.Move()
	limit := time.After(drainBudget)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for d.proxy.InFlight() > 0 {
		select {
		case <-tick.C:
		case <-limit:
			d.logger.Warn("Scrapes in flight are cut", "scrapes", d.proxy.InFlight(), "err", context.Cause(ctx))
			return
		}
	}
}
