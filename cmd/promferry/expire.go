package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/version"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/expiry"
	"github.com/promferry/promferry/internal/httpclient"
)

const (
	expireOnceHelp   = "Sweep each Pushgateway once, and exit: 0 when all went well, 1 otherwise."
	expireDryRunHelp = "List once, say which groups would be put down or deleted, and change nothing."
)

// expireCommand is promferry expire.
type expireCommand struct {
	gateways *gatewaySettings
	settings *expireSettings
	once     bool
	dryRun   bool
}

func newExpireCommand(app *kingpin.Application) *expireCommand {
	clause := app.Command("expire", "Put the groups on Pushgateways down (up 0) whose agent went silent, and later delete them. Groups without an expiry are never touched. It may run more than once.")
	e := &expireCommand{gateways: newGatewaySettings("URL of a Pushgateway to sweep."), settings: newExpireSettings()}
	clause.Flag("once", expireOnceHelp).BoolVar(&e.once)
	clause.Flag("dry-run", expireDryRunHelp).BoolVar(&e.dryRun)
	return e
}

func (*expireCommand) name() string { return "expire" }

func (e *expireCommand) sets() ([]any, []anySetting) {
	return []any{e.gateways, e.settings}, append(e.gateways.all(), e.settings.all()...)
}

// run sweeps until it is told to stop.
func (e *expireCommand) run(in *invocation) (int, error) {
	return 0, e.sweepUntilStopped(in.context(), in)
}

func (e *expireCommand) sweepUntilStopped(ctx context.Context, in *invocation) error {
	s := e.settings
	errs := append(in.unknown, e.gateways.check()...)
	errs = append(errs, s.check()...)
	client, err := httpclient.New("push", e.gateways.PushHTTPConfig.value)
	if err != nil {
		errs = append(errs, e.gateways.PushHTTPConfig.fault(err))
	}
	if err := validateWebConfig(s.WebConfigFile.value); err != nil {
		errs = append(errs, s.WebConfigFile.fault(err))
	}
	if err := faults(errs); err != nil {
		return err
	}
	logger := newLogger(in.stderr, s.LogLevel.value, s.LogFormat.value)
	registry := newRegistry()
	notifier := newNotifier(logger)
	cfg := expiry.Config{
		Interval:    time.Duration(s.SweepInterval.value),
		ListTimeout: time.Duration(e.gateways.SweepTimeout.value),
		PushTimeout: time.Duration(e.gateways.PushTimeout.value),
		ForgetAfter: time.Duration(s.ForgetAfter.value),
		Logger:      logger,
		Registerer:  registry,
	}
	for _, g := range e.gateways.clients(client) {
		cfg.Gateways = append(cfg.Gateways, g)
	}
	var expirer *expiry.Expirer
	if !e.once && !e.dryRun {
		cfg.Heartbeat = notifier.interval()
		cfg.OnHeartbeat = func() { notifier.alive(expirer.Status()) }
	}
	expirer = expiry.New(cfg)
	switch {
	case e.dryRun:
		return expirer.DryRun(ctx, in.stdout)
	case e.once:
		return expirer.Once(ctx)
	}
	registry.MustRegister(credentialsCollector{webConfigs: []string{s.WebConfigFile.value}, clients: []*httpclient.Client{client}})
	warnExposed(logger, client)
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.WebListenAddress.value)
	if err != nil {
		return fmt.Errorf("%s: %w", s.WebListenAddress.name(), err)
	}
	r := newReloader("expiry", registry, logger, func() error {
		use, err := client.Load()
		if err := errors.Join(err, validateWebConfig(s.WebConfigFile.value)); err != nil {
			return err
		}
		use()
		return nil
	})
	r.before, r.after = notifier.reloading, notifier.ready
	return e.serve(ctx, expirer, listener, registry, r, notifier, logger)
}

// serve sweeps and answers requests until ctx ends.
func (e *expireCommand) serve(ctx context.Context, expirer *expiry.Expirer, listener net.Listener, registry *prometheus.Registry, r *reloader, notifier *notifier, logger *slog.Logger) error {
	admin := newAdmin("expire", e.settings.WebLifecycle.value, r.reload)
	admin.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Registry: registry}))
	web := newServer(listener, e.settings.WebConfigFile.value, e.settings.WebExternalURL.value, admin, logger)
	web.http.ReadTimeout, web.http.WriteTimeout = 30*time.Second, time.Minute
	logger.Info("Starting promferry expire", "version", version.Version, "gateways", e.gateways.PushUrls.String())
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return web.Run(groupCtx) })
	group.Go(func() error { return expirer.Run(groupCtx) })
	group.Go(func() error { return r.Run(groupCtx) })
	group.Go(func() error {
		<-groupCtx.Done()
		admin.stopping()
		notifier.stopping()
		return nil
	})
	admin.ready()
	notifier.ready()
	err := group.Wait()
	logger.Info("Stopped")
	return err
}
