package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/reverse/ptth"
)

const defaultProxyStateDir = "/var/lib/promferry-proxy"

// proxySettings are all settings of the proxy. The fields' names make the names of the
// variables.
type proxySettings struct {
	WebListenAddress     *setting[string]           `split_words:"true"`
	WebConfigFile        *setting[string]           `split_words:"true"`
	WebExternalURL       *setting[siteURL]          `split_words:"true"`
	WebLifecycle         *setting[bool]             `envconfig:"WEB_ENABLE_LIFECYCLE"`
	ClientListenAddress  *setting[string]           `split_words:"true"`
	ClientConfigFile     *setting[string]           `split_words:"true"`
	AuthFile             *setting[string]           `split_words:"true"`
	RegistrationTimeout  *setting[model.Duration]   `split_words:"true"`
	ScrapeMaxTimeout     *setting[model.Duration]   `split_words:"true"`
	ScrapeDefaultTimeout *setting[model.Duration]   `split_words:"true"`
	ScrapeMaxBytes       *setting[units.Base2Bytes] `split_words:"true"`
	Heartbeat            *setting[model.Duration]   `split_words:"true"`
	TunnelIdleTimeout    *setting[model.Duration]   `split_words:"true"`
	SDForgetAfter        *setting[model.Duration]   `split_words:"true"`
	SDSettle             *setting[model.Duration]   `split_words:"true"`
	LimitClients         *setting[int]              `split_words:"true"`
	LimitClientLines     *setting[int]              `split_words:"true"`
	LimitClientScrapes   *setting[int]              `split_words:"true"`
	LimitScrapes         *setting[int]              `split_words:"true"`
	StateDir             *setting[string]           `split_words:"true"`
	LogLevel             *setting[string]           `split_words:"true"`
	LogFormat            *setting[string]           `split_words:"true"`
}

// newProxySettings returns the settings with their defaults, the only place where these stand.
func newProxySettings() *proxySettings {
	stateDir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	return &proxySettings{
		WebListenAddress:     text("web.listen-address", ":8080", "Address to listen on for Prometheus: its scrapes, /sd, /clients, /metrics and the page; and for clients, unless these have one of their own."),
		WebConfigFile:        text("web.config.file", "", "Prometheus web configuration file, for TLS of that address. Not basic_auth_users: see --auth.file."),
		WebExternalURL:       externalURL(),
		WebLifecycle:         enableLifecycle(),
		ClientListenAddress:  text("client.listen-address", "", `Address to listen on for clients. "": the one for Prometheus.`),
		ClientConfigFile:     text("client.config.file", "", "Prometheus web configuration file, for TLS of the address for clients."),
		AuthFile:             text("auth.file", "", `File that says who may be which client, who may scrape and who may list. "": everybody.`),
		RegistrationTimeout:  duration("registration.timeout", 5*time.Minute, "How long after its last line a client is listed in /clients."),
		ScrapeMaxTimeout:     duration("scrape.max-timeout", 5*time.Minute, "How long a scrape may take, whatever Prometheus says."),
		ScrapeDefaultTimeout: duration("scrape.default-timeout", 15*time.Second, "How long a scrape may take that does not say it."),
		ScrapeMaxBytes:       size("scrape.max-bytes", 256*units.MiB, "Up to which size an answer is passed on, as it comes."),
		Heartbeat:            duration("heartbeat", 15*time.Second, "How long a line is silent at most. One that is dead is found within twice of it."),
		TunnelIdleTimeout:    duration("tunnel.idle-timeout", 5*time.Minute, "How long a CONNECT may pass no byte."),
		SDForgetAfter:        duration("sd.forget-after", time.Hour, "How long a client that went away stays listed in /sd."),
		SDSettle:             duration("sd.settle", 15*time.Second, "How long after a start /sd answers 503 while clients that were known are not back."),
		LimitClients:         number("limit.clients", 20000, "How many clients are known at most."),
		LimitClientLines:     number("limit.client-lines", 64, "How many lines a client has at most."),
		LimitClientScrapes:   number("limit.client-scrapes", 64, "How many scrapes of one client there are at a time."),
		LimitScrapes:         number("limit.scrapes", 4096, "How many scrapes there are at a time."),
		StateDir:             text("state.dir", cmp.Or(stateDir, defaultProxyStateDir), "Where the proxy keeps which clients it knows."),
		LogLevel:             logLevel(),
		LogFormat:            logFormat(),
	}
}

// all returns the settings in the order of --help.
func (s *proxySettings) all() []anySetting {
	return []anySetting{
		s.WebListenAddress, s.WebConfigFile, s.WebExternalURL, s.WebLifecycle, s.ClientListenAddress, s.ClientConfigFile, s.AuthFile,
		s.RegistrationTimeout, s.ScrapeMaxTimeout, s.ScrapeDefaultTimeout, s.ScrapeMaxBytes, s.Heartbeat, s.TunnelIdleTimeout,
		s.SDForgetAfter, s.SDSettle, s.LimitClients, s.LimitClientLines, s.LimitClientScrapes, s.LimitScrapes,
		s.StateDir, s.LogLevel, s.LogFormat,
	}
}

// check returns all that is wrong.
func (s *proxySettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	errs = append(errs, checkAddress(s.WebListenAddress, "127.0.0.1:8080 or :8080")...)
	if s.ClientListenAddress.value != "" {
		errs = append(errs, checkAddress(s.ClientListenAddress, "127.0.0.1:8081 or :8081")...)
	} else if s.ClientConfigFile.value != "" {
		errs = append(errs, s.ClientConfigFile.fault(errors.New("is for --client.listen-address, which is not set")))
	}
	if time.Duration(s.Heartbeat.value) > ptth.MaxHeartbeat {
		errs = append(errs, s.Heartbeat.fault(fmt.Errorf("%v: at most %v, or no client would take it", s.Heartbeat.value, model.Duration(ptth.MaxHeartbeat))))
	}
	if s.ScrapeDefaultTimeout.value > s.ScrapeMaxTimeout.value {
		errs = append(errs, s.ScrapeDefaultTimeout.fault(fmt.Errorf("%v exceeds %s %v", s.ScrapeDefaultTimeout.value, s.ScrapeMaxTimeout.name(), s.ScrapeMaxTimeout.value)))
	}
	return errs
}

// checkAddress returns what is wrong with an address to listen on.
func checkAddress(s *setting[string], example string) []error {
	if host, _, err := net.SplitHostPort(s.value); err != nil || strings.ContainsAny(host, "/@") {
		return []error{s.fault(fmt.Errorf("%q: want host:port, as in %s", safeurl.Text(s.value), example))}
	}
	return nil
}

// number is a count above zero.
func number(flag string, value int, help string) *setting[int] {
	return &setting[int]{flag: flag, value: value, help: help, parse: func(s string) (int, error) {
		if n, err := strconv.Atoi(s); err == nil && n > 0 {
			return n, nil
		}
		return 0, fmt.Errorf("%q: want a number above zero", s)
	}}
}

func logLevel() *setting[string] {
	return oneOf("log.level", "info", "Only log from this level on: debug, info, warn or error.", "debug", "info", "warn", "error")
}

func logFormat() *setting[string] {
	return oneOf("log.format", "logfmt", "Format of the log: logfmt or json.", "logfmt", "json")
}
