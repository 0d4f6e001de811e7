package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	versioncollector "github.com/prometheus/client_golang/prometheus/collectors/version"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/common/version"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/batch"
	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/forwarder"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/lockfile"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/page"
	"github.com/promferry/promferry/target"
)

// shutdownBudget is how long the agent takes at most to stop: the time for two puts that
// time out. systemd/promferry-agent.service gives it some seconds more.
const shutdownBudget = 20 * time.Second

const (
	onceHelp   = "Scrape and put once, and exit: 0 when all went well, 1 otherwise. Nothing is done on stop, and the groups have no expiry unless --push.expires-after is set. What the run before it put and this one does not is deleted: runs with different targets each need a --state.dir of their own."
	dryRunHelp = "Scrape once, print what would be put and to which group and which groups would be deleted, and do neither."
)

// agentCommand is promferry agent.
type agentCommand struct {
	settings *agentSettings
	once     bool
	dryRun   bool
}

func newAgentCommand(app *kingpin.Application) *agentCommand {
	clause := app.Command("agent", "Push what targets on this host expose to Pushgateways, and let proxies scrape them.")
	a := &agentCommand{settings: newAgentSettings()}
	clause.Flag("once", onceHelp).BoolVar(&a.once)
	clause.Flag("dry-run", dryRunHelp).BoolVar(&a.dryRun)
	return a
}

func (*agentCommand) name() string { return "agent" }

func (a *agentCommand) sets() ([]any, []anySetting) { return []any{a.settings}, a.settings.all() }

// run runs the agent until it is told to stop.
func (a *agentCommand) run(in *invocation) (int, error) {
	return 0, a.serveUntilStopped(in.context(), in)
}

func (a *agentCommand) serveUntilStopped(ctx context.Context, in *invocation) error {
	s := a.settings
	errs := append(in.unknown, s.check()...)
	scrapeClient, err := httpclient.New("scrape", s.ScrapeHTTPConfig.value)
	if err != nil {
		errs = append(errs, s.ScrapeHTTPConfig.fault(err))
	}
	pushClient, err := httpclient.New("push", s.PushHTTPConfig.value)
	if err != nil {
		errs = append(errs, s.PushHTTPConfig.fault(err))
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
	var forward *forwarder.Forwarder
	var reversePull *pull
	cfg := a.config(scrapeClient, pushClient, logger, registry)
	var noLedger error
	cfg.Ledger, noLedger = a.ledger()
	if !a.once && !a.dryRun {
		cfg.Heartbeat = notifier.interval()
		cfg.OnHeartbeat = func() { notifier.alive(strings.TrimSuffix(reversePull.sentence()+a.forwarding(forward), "; ")) }
	}
	forward, err = forwarder.New(cfg)
	if err != nil {
		return err
	}
	clients := []*httpclient.Client{scrapeClient, pushClient}
	if a.dryRun {
		a.printPull(in.stdout)
		return forward.DryRun(ctx, in.stdout)
	}
	if reversePull, err = newPull(s, scrapeClient, logger, registry); err != nil {
		return err
	}
	if reversePull != nil {
		clients = append(clients, reversePull.clients...)
	}
	registry.MustRegister(credentialsCollector{webConfigs: []string{s.WebConfigFile.value}, clients: clients})
	warnExposed(logger, clients...)
	lock, err := a.lock()
	if err != nil {
		return err
	}
	defer func() {
		if err := lock.Release(); err != nil {
			logger.Warn("Lock not released", "err", err)
		}
	}()
	box, err := outbox.Open(s.StateDir.value)
	if err != nil {
		return fmt.Errorf("%s: %w", s.StateDir.name(), err)
	}
	defer func() { _ = box.Close() }()
	deliver := a.deliverer(pushClient, box, logger, registry)
	if a.once {
		err := forward.Once(ctx)
		deliver.Once(ctx)
		return err
	}
	if noLedger != nil {
		logger.Warn("No ledger of groups: those that are no longer configured after a restart are not deleted", "err", noLedger)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.WebListenAddress.value)
	if err != nil {
		return fmt.Errorf("%s: %w", s.WebListenAddress.name(), err)
	}
	r := newReloader("agent", registry, logger, func() error {
		useScrape, scrapeErr := scrapeClient.Load()
		usePush, pushErr := pushClient.Load()
		usePull, pullErr := reversePull.load()
		if err := errors.Join(scrapeErr, pushErr, pullErr, validateWebConfig(s.WebConfigFile.value)); err != nil {
			return err
		}
		usePull()
		useScrape()
		usePush()
		forward.Reload()
		return nil
	})
	r.before, r.after = notifier.reloading, notifier.ready
	web := newWeb(listener, s, registry, r.reload, func() page.AgentStatus {
		return reversePull.status(s.Instance.value, a.forwarding(forward))
	}, logger)
	return a.serve(ctx, forward, deliver, reversePull, web, r, notifier, logger)
}

// forwarding says how forwarding is; "" when there is nothing to forward.
func (a *agentCommand) forwarding(f *forwarder.Forwarder) string {
	if len(a.settings.PushTargets.value) == 0 {
		return ""
	}
	return f.Status()
}

// printPull prints what proxies may scrape.
func (a *agentCommand) printPull(w io.Writer) {
	s := a.settings
	if len(s.ProxyUrls.value) == 0 {
		return
	}
	if len(s.PushTargets.value) == 0 {
		_, _ = fmt.Fprintln(w, "# Nothing is pushed. Proxies may scrape:")
	} else {
		_, _ = fmt.Fprintln(w, "# Proxies may scrape:")
	}
	for _, t := range reverse.Announce("", nil, pullTargets(s)).Targets {
		t.Query = "" // It may hold secrets.
		_, _ = fmt.Fprintln(w, t.Job, t.URL(s.Fqdn.value))
	}
}

// deliverer returns what delivers what batch jobs on this host could not push.
func (a *agentCommand) deliverer(client *httpclient.Client, box *outbox.Outbox, logger *slog.Logger, r prometheus.Registerer) *batch.Deliverer {
	c := &batch.Courier{Outbox: box, Timeout: time.Duration(a.settings.PushTimeout.value)}
	for _, u := range a.settings.PushUrls.value {
		c.Gateways = append(c.Gateways, pushgw.New(u.URL, client))
	}
	return batch.NewDeliverer(c, logger, r)
}

// config returns the forwarder's configuration.
func (a *agentCommand) config(scrape, push *httpclient.Client, logger *slog.Logger, r prometheus.Registerer) forwarder.Config {
	s := a.settings
	cfg := forwarder.Config{
		Targets:        s.PushTargets.value,
		Scraper:        &target.Scraper{Client: scrape, Accept: exposition.Accept, MaxBytes: int64(s.ScrapeMaxBytes.value)},
		Instance:       s.Instance.value,
		Labels:         make(map[string]string),
		Schedule:       s.schedule(),
		ScrapeTimeout:  time.Duration(s.ScrapeTimeout.value),
		PushTimeout:    time.Duration(s.PushTimeout.value),
		ExpiresAfter:   s.expiresAfter(),
		OnStop:         s.PushOnStop.value,
		ShutdownBudget: shutdownBudget,
		Format:         s.PushFormat.value,
		Keep:           s.MetricKeep.value.Regexp,
		Drop:           s.MetricDrop.value.Regexp,
		Version:        version.Version,
		Logger:         logger,
		Registerer:     r,
		Shown:          scrape.Shown,
	}
	var urls []*url.URL
	for _, u := range s.PushUrls.value {
		cfg.Gateways = append(cfg.Gateways, pushgw.New(u.URL, push))
		urls = append(urls, u.URL)
	}
	// The credentials are not for a Pushgateway that was configured once, or for whatever a
	// changed ledger names.
	former := push.CredentialsFor(urls...)
	cfg.GatewayAt = func(u *url.URL) forwarder.Gateway { return pushgw.New(u, former) }
	for _, l := range s.PushLabels.value {
		cfg.Labels[l.name] = l.value
	}
	if a.once && !s.PushExpiresAfter.isSet() {
		cfg.ExpiresAfter = 0 // Nobody knows when the next one comes.
	}
	return cfg
}

// ledger returns where the groups that are put are noted; nil, and why, when the host cannot
// be told from a copy of it.
func (a *agentCommand) ledger() (*forwarder.Ledger, error) {
	id, err := machineID()
	if err != nil {
		return nil, fmt.Errorf("%w; in a container, mount the host's there, to be read only", err)
	}
	return forwarder.NewLedger(a.settings.StateDir.value, a.settings.LockFile.value, id)
}

// lock takes the lock, by default in the state directory.
func (a *agentCommand) lock() (*lockfile.Lock, error) {
	s := a.settings
	dir, err := openState(s.StateDir)
	if err != nil {
		return nil, err
	}
	_ = dir.Close()
	lock, err := lockfile.Acquire(s.LockFile.value)
	if held, ok := errors.AsType[*lockfile.HeldError](err); ok {
		return nil, fmt.Errorf("another agent runs on this host: %w", held)
	}
	return lock, err
}

// serve forwards and answers requests until ctx ends.
func (a *agentCommand) serve(ctx context.Context, forward *forwarder.Forwarder, deliver *batch.Deliverer, reversePull *pull, web *web, r *reloader, notifier *notifier, logger *slog.Logger) error {
	about := []any{"version", version.Version, "instance", a.settings.Instance.value}
	if len(a.settings.PushTargets.value) > 0 || reversePull == nil {
		about = append(about, "targets", a.settings.PushTargets.String(), "gateways", a.settings.PushUrls.String())
	}
	if reversePull != nil {
		about = append(about, "client", a.settings.Fqdn.value, "pull_targets", a.settings.PullTargets.String(), "proxies", a.settings.ProxyUrls.String())
	}
	logger.Info("Starting promferry agent", about...)
	// The address answers until the last group is left, so that a probe sees the agent
	// stopping and not gone.
	webCtx, stopWeb := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWeb()
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return web.Run(webCtx) })
	group.Go(func() error { return deliver.Run(groupCtx) })
	if reversePull != nil {
		group.Go(func() error { return reversePull.Run(groupCtx) })
	}
	group.Go(func() error {
		defer stopWeb()
		return forward.Run(groupCtx)
	})
	group.Go(func() error { return r.Run(groupCtx) })
	group.Go(func() error {
		<-groupCtx.Done()
		web.stopping()
		notifier.stopping()
		return nil
	})
	web.ready()
	notifier.ready()
	err := group.Wait()
	logger.Info("Stopped")
	return err
}

func newLogger(stderr io.Writer, level, format string) *slog.Logger {
	cfg := &promslog.Config{Level: promslog.NewLevel(), Format: promslog.NewFormat(), Writer: stderr}
	// Both were checked with the settings.
	_ = cfg.Level.Set(level)
	_ = cfg.Format.Set(format)
	return promslog.New(cfg)
}

func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		versioncollector.NewCollector("promferry"),
	)
	return registry
}

// reloader reads the files that settings name again.
type reloader struct {
	logger        *slog.Logger
	read          func() error
	before, after func()
	hangup        chan os.Signal
	mu            sync.Mutex
	total         *prometheus.CounterVec
	successful    prometheus.Gauge
	at            prometheus.Gauge
}

func newReloader(role string, r prometheus.Registerer, logger *slog.Logger, read func() error) *reloader {
	l := &reloader{
		hangup: make(chan os.Signal, 1),
		logger: logger,
		read:   read,
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "promferry_" + role + "_reloads_total", Help: "Reloads of the files that settings name.",
		}, []string{"outcome"}),
		successful: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_" + role + "_last_reload_successful", Help: "Whether the last reload succeeded, 1 before the first.",
		}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "promferry_" + role + "_last_reload_success_timestamp_seconds", Help: "When files were last read with success, in Unix time.",
		}),
	}
	r.MustRegister(l.total, l.successful, l.at)
	l.total.WithLabelValues("success")
	l.total.WithLabelValues("failure")
	l.successful.Set(1)
	l.at.SetToCurrentTime()
	signal.Notify(l.hangup, syscall.SIGHUP) // From now on it does not kill.
	return l
}

// Run reloads on each SIGHUP, until ctx ends.
func (l *reloader) Run(ctx context.Context) error {
	defer signal.Stop(l.hangup)
	for {
		select {
		case <-l.hangup:
			_ = l.reload() // Logged and counted there.
		case <-ctx.Done():
			return nil
		}
	}
}

// reload reads the files. A bad one is logged, and changes nothing.
func (l *reloader) reload() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.before()
	defer l.after()
	if err := l.read(); err != nil {
		l.total.WithLabelValues("failure").Inc()
		l.successful.Set(0)
		l.logger.Error("Reload failed, all stays as it was", "err", err)
		return err
	}
	l.total.WithLabelValues("success").Inc()
	l.successful.Set(1)
	l.at.SetToCurrentTime()
	l.logger.Info("Reloaded")
	return nil
}
