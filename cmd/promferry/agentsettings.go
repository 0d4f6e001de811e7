package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/forwarder"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/target"
)

const (
	defaultStateDir = "/var/lib/promferry-agent"
	// maxTimeout is the default of a timeout, where the interval is not shorter.
	maxTimeout = 10 * time.Second
)

// agentSettings are all settings of the agent. The fields' names make the names of the
// variables.
type agentSettings struct {
	PushTargets      *setting[list[target.Target]] `split_words:"true"`
	PushUrls         *setting[list[gatewayURL]]    `split_words:"true"` // PushURLs would be PUSH_UR_LS.
	PushInterval     *setting[model.Duration]      `split_words:"true"`
	PushSchedule     *setting[cronExpression]      `split_words:"true"`
	PushTimeout      *setting[model.Duration]      `split_words:"true"`
	PushExpiresAfter *setting[model.Duration]      `split_words:"true"`
	PushLabels       *setting[list[label]]         `split_words:"true"`
	PushOnStop       *setting[forwarder.OnStop]    `split_words:"true"`
	PushFormat       *setting[exposition.Format]   `split_words:"true"`
	PushHTTPConfig   *setting[string]              `split_words:"true"`
	ScrapeTimeout    *setting[model.Duration]      `split_words:"true"`
	ScrapeMaxBytes   *setting[units.Base2Bytes]    `split_words:"true"`
	ScrapeHTTPConfig *setting[string]              `split_words:"true"`
	PullTargets      *setting[list[target.Target]] `split_words:"true"`
	PullAllows       *setting[list[allowance]]     `split_words:"true"`
	PullMaxBytes     *setting[units.Base2Bytes]    `split_words:"true"`
	ProxyUrls        *setting[list[proxyURL]]      `split_words:"true"`
	ProxyHTTPConfig  *setting[string]              `split_words:"true"`
	Fqdn             *setting[string]              `split_words:"true"`
	MetricKeep       *setting[pattern]             `split_words:"true"`
	MetricDrop       *setting[pattern]             `split_words:"true"`
	Instance         *setting[string]              `split_words:"true"`
	StateDir         *setting[string]              `split_words:"true"`
	LockFile         *setting[string]              `split_words:"true"`
	WebListenAddress *setting[string]              `split_words:"true"`
	WebConfigFile    *setting[string]              `split_words:"true"`
	WebExternalURL   *setting[siteURL]             `split_words:"true"`
	WebLifecycle     *setting[bool]                `envconfig:"WEB_ENABLE_LIFECYCLE"`
	LogLevel         *setting[string]              `split_words:"true"`
	LogFormat        *setting[string]              `split_words:"true"`
}

// newAgentSettings returns the settings with their defaults: the only place where these
// stand, but for those that depend on other settings, which agentSettings.check works out.
func newAgentSettings() *agentSettings {
	hostname, _ := os.Hostname() // Where there is none, check asks for --instance.
	stateDir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	return &agentSettings{
		PushTargets: listOf("push.target", "What to scrape, and its job label, as job=URL.",
			list[target.Target]{defaultTarget()}, target.Parse),
		PushUrls: listOf("push.url", "URL of a Pushgateway: each target is put to each.",
			list[gatewayURL]{must(parseGatewayURL("http://127.0.0.1:9091"))}, parseGatewayURL),
		PushInterval:     duration("push.interval", 15*time.Second, "How often to scrape and put."),
		PushSchedule:     schedule("push.schedule", "When to scrape and put, as a cron expression, instead of an interval."),
		PushTimeout:      duration("push.timeout", 0, "How long a put may take. 0s: 10s, or the interval when that is shorter."),
		PushExpiresAfter: duration("push.expires-after", 0, "For how long each put says it is good. 0s: 2 × interval + push timeout; with a cron expression 2 × (longest gap + push timeout)."),
		PushLabels:       listOf("push.label", "Another grouping label, as name=value.", nil, parseLabel),
		PushOnStop:       oneOf("push.on-stop", forwarder.Down, "What becomes of the groups when the agent stops: down (up 0), delete or keep.", forwarder.Down, forwarder.Delete, forwarder.Keep),
		PushFormat:       oneOf("push.format", exposition.Protobuf, "What puts are written in: protobuf or text.", exposition.Protobuf, exposition.Text),
		PushHTTPConfig:   text("push.http-config", "", "Prometheus http_config file for the way to the Pushgateways."),
		ScrapeTimeout:    duration("scrape.timeout", 0, "How long a scrape may take. 0s: 10s, or the interval when that is shorter."),
		ScrapeMaxBytes:   size("scrape.max-bytes", 64*units.MiB, "Up to which size an exposition is read, decompressed."),
		ScrapeHTTPConfig: text("scrape.http-config", "", "Prometheus http_config file for scrapes of the targets. What --pull.allow adds is scraped without its credentials."),
		PullTargets:      listOf("pull.target", "What the proxies may scrape here, and its job label, as job=URL. Without any target set, with a proxy, it is what is pushed by default.", nil, target.Parse),
		PullAllows:       listOf("pull.allow", "What else the proxies may scrape on this host, without credentials: a port, a path, both (9100/metrics), or any.", nil, parseAllowance),
		PullMaxBytes:     size("pull.max-bytes", 256*units.MiB, "Up to which size the answer of a pull target is passed on, as it comes."),
		ProxyUrls:        listOf("proxy-url", "URL of a proxy (promferry proxy, or PushProx's): lines are kept open to each.", nil, parseProxyURL),
		ProxyHTTPConfig:  text("proxy.http-config", "", "Prometheus http_config file for the way to the proxies."),
		Fqdn:             text("fqdn", "", `Name that the proxies scrape this host by. "": the host's fully qualified name.`),
		MetricKeep:       regex("metric.keep", "Put only families whose whole name matches this regular expression."),
		MetricDrop:       regex("metric.drop", "Do not put families whose whole name matches this regular expression."),
		Instance:         text("instance", hostname, "Value of the instance label."),
		StateDir:         text("state.dir", cmp.Or(stateDir, defaultStateDir), "Where the agent keeps what must survive a restart."),
		LockFile:         text("lock.file", "", `Lock that keeps a second agent from running. "": agent.pid in the state directory.`),
		WebListenAddress: text("web.listen-address", "127.0.0.1:9099", "Address to listen on for /metrics, /-/healthy, /-/ready and /-/reload."),
		WebConfigFile:    text("web.config.file", "", "Prometheus web configuration file, for TLS and authentication of that address."),
		WebExternalURL:   externalURL(),
		WebLifecycle:     enableLifecycle(),
		LogLevel:         logLevel(),
		LogFormat:        logFormat(),
	}
}

// all returns the settings in the order of --help.
func (s *agentSettings) all() []anySetting {
	return []anySetting{
		s.PushTargets, s.PushUrls, s.PushInterval, s.PushSchedule, s.PushTimeout, s.PushExpiresAfter, s.PushLabels,
		s.PushOnStop, s.PushFormat, s.PushHTTPConfig, s.ScrapeTimeout, s.ScrapeMaxBytes, s.ScrapeHTTPConfig,
		s.PullTargets, s.PullAllows, s.PullMaxBytes, s.ProxyUrls, s.ProxyHTTPConfig, s.Fqdn,
		s.MetricKeep, s.MetricDrop, s.Instance, s.StateDir, s.LockFile, s.WebListenAddress, s.WebConfigFile,
		s.WebExternalURL, s.WebLifecycle,
		s.LogLevel, s.LogFormat,
	}
}

// check works out the defaults that depend on other settings, and returns all that is
// wrong.
func (s *agentSettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	if s.PushSchedule.isSet() && s.PushInterval.isSet() {
		errs = append(errs, s.PushSchedule.fault(fmt.Errorf("cannot go with %s: set one of them", s.PushInterval.name())))
	}
	errs = append(errs, s.checkPull()...)
	if s.LockFile.value == "" {
		s.LockFile.value = filepath.Join(s.StateDir.value, "agent.pid")
	}
	shortest := s.schedule().Shortest()
	for _, timeout := range []*setting[model.Duration]{s.PushTimeout, s.ScrapeTimeout} {
		switch {
		case timeout.value == 0:
			timeout.value = model.Duration(min(maxTimeout, shortest))
		case time.Duration(timeout.value) > shortest && len(s.PushInterval.errs)+len(s.PushSchedule.errs) == 0:
			errs = append(errs, timeout.fault(fmt.Errorf("%v exceeds the time between two cycles, %v", timeout.value, model.Duration(shortest))))
		}
	}
	if s.Instance.value == "" {
		errs = append(errs, s.Instance.fault(errors.New("empty: without an instance label the groups of two hosts are one")))
	} else if err := pushgw.ValidateLabel(model.InstanceLabel, s.Instance.value); err != nil {
		errs = append(errs, s.Instance.fault(err))
	}
	errs = append(errs, checkAddress(s.WebListenAddress, "127.0.0.1:9099 or :9099")...)
	errs = append(errs, twice(s.PushTargets, func(t target.Target) string { return t.Job }, "two targets have the job %q: their groups would be one")...)
	errs = append(errs, twice(s.PushUrls, withoutSlash, "the Pushgateway %s stands there twice")...)
	errs = append(errs, twice(s.PushLabels, func(l label) string { return l.name }, "the label %q stands there twice")...)
	return errs
}

// checkPull works out the targets of both kinds, and returns what is wrong with reverse pull.
func (s *agentSettings) checkPull() []error {
	proxies := len(s.ProxyUrls.value) > 0
	switch {
	case s.PushTargets.isSet():
	case s.PullTargets.isSet():
		s.PushTargets.value = nil
	case proxies:
		s.PushTargets.value, s.PullTargets.value = nil, list[target.Target]{defaultTarget()}
	}
	if !proxies {
		var errs []error
		for _, set := range []struct {
			isSet bool
			fault func(error) error
		}{{s.PullTargets.isSet(), s.PullTargets.fault}, {s.PullAllows.isSet(), s.PullAllows.fault}} {
			if set.isSet && !s.ProxyUrls.isSet() {
				errs = append(errs, set.fault(errors.New("nobody could scrape that: set --proxy-url")))
			}
		}
		return errs
	}
	var errs []error
	if s.Fqdn.value == "" {
		s.Fqdn.value = hostFQDN(net.DefaultResolver)
		if s.Fqdn.value == "localhost" || s.Fqdn.value == "unknown" || s.Fqdn.value == "" {
			errs = append(errs, s.Fqdn.fault(fmt.Errorf("this host's own name is %q, as that of others may be: set one that no other host has", s.Fqdn.value)))
		}
	}
	if err := reverse.ValidateName(s.Fqdn.value); err != nil && s.Fqdn.value != "" {
		errs = append(errs, s.Fqdn.fault(err))
	}
	mapped := make(map[string]string)
	for _, t := range s.PullTargets.value {
		announced := reverse.Announce(cmp.Or(s.Instance.value, "x"), nil, []reverse.PullTarget{{Job: t.Job, URL: t.URL}})
		if err := announced.Validate(); err != nil {
			errs = append(errs, s.PullTargets.fault(err))
			continue
		}
		place := announced.Targets[0]
		place.Scheme = ""
		u := place.URL(s.Fqdn.value)
		if other, ok := mapped[u]; ok {
			errs = append(errs, s.PullTargets.fault(fmt.Errorf("the targets %q and %q would both be scraped as %s: give one of them another port or path", other, t.Job, safeurl.Text(u))))
		}
		mapped[u] = t.Job
	}
	all := announcement(s)
	if err := (&reverse.Announcement{Instance: cmp.Or(s.Instance.value, "x"), Labels: all.Labels}).Validate(); err != nil && len(s.PullTargets.value) > 0 {
		errs = append(errs, s.PushLabels.fault(err))
	}
	errs = append(errs, twice(s.PullTargets, func(t target.Target) string { return t.Job }, "two targets have the job %q: their series would be the same")...)
	if len(errs) == 0 && s.Instance.value != "" {
		if err := all.Validate(); err != nil {
			errs = append(errs, s.PullTargets.fault(err))
		} else if size := len(all.String()); size > reverse.MaxAnnouncement {
			errs = append(errs, s.PullTargets.fault(fmt.Errorf("too many to announce: %d bytes, at most %d", size, reverse.MaxAnnouncement)))
		}
	}
	return append(errs, twice(s.ProxyUrls, func(u proxyURL) string { return strings.TrimRight(u.String(), "/") }, "the proxy %s stands there twice")...)
}

// hostFQDN returns the host's fully qualified name, or what it has.
func hostFQDN(resolver *net.Resolver) string {
	hostname, err := os.Hostname()
	if err != nil || strings.Contains(hostname, ".") {
		return hostname
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if name, err := resolver.LookupCNAME(ctx, hostname); err == nil && strings.HasPrefix(name, hostname+".") {
		return strings.TrimSuffix(name, ".")
	}
	addresses, _ := resolver.LookupHost(ctx, hostname)
	for _, address := range addresses {
		names, _ := resolver.LookupAddr(ctx, address)
		for _, name := range names {
			if strings.HasPrefix(name, hostname+".") {
				return strings.TrimSuffix(name, ".")
			}
		}
	}
	return hostname
}

func defaultTarget() target.Target { return must(target.Parse("node=http://127.0.0.1:9100/metrics")) }

// proxyURL is the URL of a proxy.
type proxyURL struct{ *url.URL }

func (u proxyURL) String() string { return safeurl.String(u.URL) }

func parseProxyURL(s string) (proxyURL, error) {
	u, err := target.ParseURL(s)
	if err != nil {
		return proxyURL{}, fmt.Errorf("%q: %w", safeurl.Text(s), err)
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return proxyURL{}, fmt.Errorf("%q: want the proxy's own URL, without a query, as in http://hub:8080", safeurl.Text(s))
	}
	return proxyURL{u}, nil
}

// allowance is a reverse.Allowance.
type allowance = reverse.Allowance

func parseAllowance(s string) (allowance, error) { return reverse.ParseAllowance(s) }

// schedule returns the cron expression's, or the interval's.
func (s *agentSettings) schedule() forwarder.Schedule {
	if s.PushSchedule.isSet() {
		return s.PushSchedule.value.Schedule
	}
	return forwarder.Every(time.Duration(s.PushInterval.value))
}

// expiresAfter returns what each put says it is good for.
func (s *agentSettings) expiresAfter() time.Duration {
	if s.PushExpiresAfter.value > 0 {
		return time.Duration(s.PushExpiresAfter.value)
	}
	return s.schedule().ExpiresAfter(time.Duration(s.PushTimeout.value))
}

// twice returns a fault for each name that two parts of a list have.
func twice[T fmt.Stringer](s *setting[list[T]], name func(T) string, format string) []error {
	var errs []error
	seen := make(map[string]int)
	for _, part := range s.value {
		if seen[name(part)]++; seen[name(part)] == 2 {
			errs = append(errs, s.fault(fmt.Errorf(format, name(part))))
		}
	}
	return errs
}

// withoutSlash names a Pushgateway: a slash at the end makes no other.
func withoutSlash(u gatewayURL) string { return strings.TrimRight(u.String(), "/") }

// gatewayURL is the URL of a Pushgateway.
type gatewayURL struct{ *url.URL }

func (u gatewayURL) String() string { return safeurl.String(u.URL) }

func parseGatewayURL(s string) (gatewayURL, error) {
	u, err := target.ParseURL(s)
	if err != nil {
		return gatewayURL{}, fmt.Errorf("%q: %w", safeurl.Text(s), err)
	}
	if before, _, ok := strings.Cut(u.Path, "/metrics/job"); ok {
		u.Path, u.RawQuery = before, ""
		return gatewayURL{}, fmt.Errorf("%q: want the Pushgateway's own URL, as in %s; the group is named by --push.target, --instance and --push.label",
			safeurl.Text(s), safeurl.String(u))
	}
	return gatewayURL{u}, nil
}

// cronExpression is a schedule as it was typed.
type cronExpression struct {
	forwarder.Schedule
	text string
}

func (c cronExpression) String() string { return c.text }

func schedule(flag, help string) *setting[cronExpression] {
	return &setting[cronExpression]{flag: flag, help: help, parse: func(s string) (cronExpression, error) {
		parsed, err := forwarder.Cron(s)
		if err != nil {
			return cronExpression{}, fmt.Errorf("%q: no cron expression, as in */5 * * * *: %w", s, err)
		}
		return cronExpression{parsed, s}, nil
	}}
}

// label is a grouping label.
type label struct{ name, value string }

func (l label) String() string { return l.name + "=" + l.value }

func parseLabel(s string) (label, error) {
	name, value, ok := strings.Cut(s, "=")
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	switch {
	case !ok:
		return label{}, fmt.Errorf("%q: want name=value, as in env=prod", s)
	case name == model.InstanceLabel:
		return label{}, fmt.Errorf("%q: set the instance label by --instance", s)
	}
	if err := pushgw.ValidateLabel(name, value); err != nil {
		return label{}, fmt.Errorf("%q: %w", s, err)
	}
	return label{name, value}, nil
}

// must is for defaults, which are right.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
