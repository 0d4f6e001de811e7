package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/version"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/gateway"
	"github.com/promferry/promferry/gateway/page"
	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/lockfile"
)

// gatewayDrainBudget is how long the gateway takes at most to stop.
const gatewayDrainBudget = 20 * time.Second

// groupsDB is where the gateway keeps groups, in its state directory.
const groupsDB = "groups.db"

// gatewayKeepAlive is how often the gateway looks whether a silent connection still stands.
const gatewayKeepAlive = 30 * time.Second

// gatewayCommand is promferry gateway.
type gatewayCommand struct{ settings *gatewayServerSettings }

func newGatewayCommand(app *kingpin.Application) *gatewayCommand {
	app.Command("gateway", "Take pushes as a Pushgateway does, and let Prometheus scrape each group as a target of its own (http_sd_configs).")
	return &gatewayCommand{settings: newGatewayServerSettings()}
}

func (*gatewayCommand) name() string { return "gateway" }

func (c *gatewayCommand) sets() ([]any, []anySetting) { return []any{c.settings}, c.settings.all() }

// run runs the gateway until it is told to stop.
func (c *gatewayCommand) run(in *invocation) (int, error) {
	return 0, c.serveUntilStopped(in.context(), in)
}

func (c *gatewayCommand) serveUntilStopped(ctx context.Context, in *invocation) error {
	s := c.settings
	errs := append(in.unknown, s.check()...)
	if err := validateWebConfig(s.WebConfigFile.value); err != nil {
		errs = append(errs, s.WebConfigFile.fault(err))
	}
	if err := refuseUsersBeside(s.AuthFile.value, s.WebConfigFile.value); err != nil {
		errs = append(errs, s.WebConfigFile.fault(err))
	}
	logger := newLogger(in.stderr, s.LogLevel.value, s.LogFormat.value)
	registry := newRegistry()
	guard, err := access.NewGateway(s.AuthFile.value, logger, registry)
	if err != nil {
		errs = append(errs, s.AuthFile.fault(err))
	}
	if err := faults(errs); err != nil {
		return err
	}
	registry.MustRegister(credentialsCollector{webConfigs: []string{s.WebConfigFile.value}})
	dir, err := openState(s.StateDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	lock, err := lockfile.AcquireIn(dir, "gateway.pid")
	if held, ok := errors.AsType[*lockfile.HeldError](err); ok {
		return fmt.Errorf("another gateway has this state directory: %w", held)
	} else if err != nil {
		return err
	}
	defer func() { _ = lock.Release() }()
	g, err := gateway.New(gateway.Config{
		StoreConfig: gateway.StoreConfig{
			File:          dir.Path(groupsDB),
			ExpireDefault: time.Duration(s.ExpireDefault.value), ForgetAfter: time.Duration(s.ForgetAfter.value),
			MaxGroups: s.LimitGroups.value, MaxSeries: s.LimitGroupSeries.value, MaxGroupBytes: int(s.LimitGroupBytes.value), MaxBytes: int(s.LimitTotalBytes.value),
		},
		MaxBodyBytes: int64(s.LimitBodyBytes.value), AdminAPI: s.WebEnableAdminAPI.value, Flags: s.flags(),
		Rights:   pusherGuard{guard, logger},
		Gatherer: registry, Logger: logger, Registerer: registry,
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := g.Close(); err != nil {
			logger.Error("State not closed", "err", err)
		}
	}()
	notifier := newNotifier(logger)
	r := newReloader("gateway", registry, logger, func() error {
		return errors.Join(validateWebConfig(s.WebConfigFile.value), refuseUsersBeside(s.AuthFile.value, s.WebConfigFile.value), guard.Reload())
	})
	r.before, r.after = notifier.reloading, notifier.ready
	admin := newAdmin("gateway", s.WebLifecycle.value, r.reload)
	listener, err := httpclient.ListenConfig(gatewayKeepAlive).Listen(ctx, "tcp", s.WebListenAddress.value)
	if err != nil {
		return fmt.Errorf("%s: %w", s.WebListenAddress.name(), err)
	}
	server := newServer(listener, s.WebConfigFile.value, s.WebExternalURL.value, gatewayHandler(g, admin, guard, logger), logger)
	// The gateway sets times of its own for what takes longer.
	server.http.ReadTimeout, server.http.WriteTimeout = 30*time.Second, time.Minute
	if err := server.cacheConfig("gateway", "web", registry); err != nil {
		return fmt.Errorf("%s: %w", s.WebConfigFile.name(), err)
	}
	if !hasUsers(s.WebConfigFile.value) {
		warnOpen(guard, listener.Addr(), nil, logger)
	}
	logger.Info("Starting promferry gateway", "version", version.Version, "state_dir", s.StateDir.value)

	serveCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(serveCtx) })
	group.Go(func() error { return g.Run(serveCtx) })
	group.Go(func() error { return guard.Run(serveCtx) })
	group.Go(func() error { return r.Run(groupCtx) })
	group.Go(func() error {
		defer stop()
		gatewayAlive(groupCtx, notifier, g.Summary)
		admin.stopping()
		notifier.stopping()
		drainServer(groupCtx, server, logger)
		return nil
	})
	admin.ready()
	notifier.ready()
	err = group.Wait()
	logger.Info("Stopped")
	return err
}

// gatewayHandler asks who reads for the right to it, and leaves pushes to the gateway, which asks for
// rights of its own.
func gatewayHandler(g *gateway.Gateway, admin *admin, guard *access.Guard, logger *slog.Logger) http.Handler {
	forPeople := page.Gateway(func() gateway.Status {
		status := g.Status()
		status.Version = version.Version
		return status
	})
	// No ServeMux: that would redirect what is pushed to other paths.
	reading := readerGuard(guard, logger, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/-/"):
			admin.ServeHTTP(w, r)
		case r.URL.Path == "/":
			forPeople.ServeHTTP(w, r)
		default:
			g.ServeHTTP(w, r)
		}
	}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		pushing := r.Method == http.MethodPut || r.Method == http.MethodPost || r.Method == http.MethodDelete
		switch {
		case r.URL.Path == "/-/healthy", r.URL.Path == "/-/ready": // Probes have no credentials.
			admin.ServeHTTP(w, r)
		case pushing && !strings.HasPrefix(r.URL.Path, "/-/"):
			g.ServeHTTP(w, r)
		default:
			reading.ServeHTTP(w, r)
		}
	})
}

// gatewayAlive tells systemd that the gateway is, until ctx ends.
func gatewayAlive(ctx context.Context, n *notifier, summary func() string) {
	interval := n.interval()
	if interval == 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		n.alive(summary())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// drainServer takes no more connections, and lets requests in flight end.
func drainServer(ctx context.Context, s *server, logger *slog.Logger) {
	budget, cancel := context.WithTimeout(context.WithoutCancel(ctx), gatewayDrainBudget)
	defer cancel()
	if err := s.http.Shutdown(budget); err != nil {
		logger.Warn("Requests in flight are cut", "err", err)
	}
}
