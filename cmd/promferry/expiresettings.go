package main

import (
	"time"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/pushgw"
)

// gatewaySettings say where Pushgateways are, and how to ask them.
type gatewaySettings struct {
	PushUrls       *setting[list[gatewayURL]] `split_words:"true"`
	PushTimeout    *setting[model.Duration]   `split_words:"true"`
	PushHTTPConfig *setting[string]           `split_words:"true"`
	SweepTimeout   *setting[model.Duration]   `split_words:"true"`
}

// newGatewaySettings returns the settings with their defaults.
func newGatewaySettings(help string) *gatewaySettings {
	return &gatewaySettings{
		PushUrls:       listOf("push.url", help, list[gatewayURL]{must(parseGatewayURL("http://127.0.0.1:9091"))}, parseGatewayURL),
		PushTimeout:    duration("push.timeout", maxTimeout, "How long one put or delete may take."),
		PushHTTPConfig: text("push.http-config", "", "Prometheus http_config file for the way to the Pushgateways."),
		SweepTimeout:   duration("sweep.timeout", time.Minute, "How long reading the list of all groups may take."),
	}
}

// all returns the settings in the order of --help.
func (s *gatewaySettings) all() []anySetting {
	return []anySetting{s.PushUrls, s.PushTimeout, s.PushHTTPConfig, s.SweepTimeout}
}

// clients returns a client for each Pushgateway.
func (s *gatewaySettings) clients(doer pushgw.Doer) []*pushgw.Client {
	var clients []*pushgw.Client
	for _, u := range s.PushUrls.value {
		clients = append(clients, pushgw.New(u.URL, doer))
	}
	return clients
}

// expireSettings are all settings of promferry expire, but for those of the Pushgateways.
// The fields' names make the names of the variables.
type expireSettings struct {
	SweepInterval    *setting[model.Duration] `split_words:"true"`
	ForgetAfter      *setting[model.Duration] `split_words:"true"`
	WebListenAddress *setting[string]         `split_words:"true"`
	WebConfigFile    *setting[string]         `split_words:"true"`
	WebExternalURL   *setting[siteURL]        `split_words:"true"`
	WebLifecycle     *setting[bool]           `envconfig:"WEB_ENABLE_LIFECYCLE"`
	LogLevel         *setting[string]         `split_words:"true"`
	LogFormat        *setting[string]         `split_words:"true"`
}

// newExpireSettings returns the settings with their defaults, the only place where these
// stand.
func newExpireSettings() *expireSettings {
	return &expireSettings{
		SweepInterval:    duration("sweep.interval", 5*time.Second, "How often the groups of each Pushgateway are looked through. A Pushgateway that needs long for its list is asked less often."),
		ForgetAfter:      duration("forget-after", 24*time.Hour, "How long after it was put down a group is deleted whose owner stays silent."),
		WebListenAddress: text("web.listen-address", "127.0.0.1:9098", "Address to listen on for /metrics, /-/healthy, /-/ready and /-/reload."),
		WebConfigFile:    text("web.config.file", "", "Prometheus web configuration file, for TLS and authentication of that address."),
		WebExternalURL:   externalURL(),
		WebLifecycle:     enableLifecycle(),
		LogLevel:         logLevel(),
		LogFormat:        logFormat(),
	}
}

// all returns the settings in the order of --help.
func (s *expireSettings) all() []anySetting {
	return []anySetting{s.SweepInterval, s.ForgetAfter, s.WebListenAddress, s.WebConfigFile, s.WebExternalURL, s.WebLifecycle, s.LogLevel, s.LogFormat}
}

// check returns all that is wrong.
func (s *gatewaySettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	return append(errs, twice(s.PushUrls, withoutSlash, "the Pushgateway %s stands there twice")...)
}

// check returns all that is wrong.
func (s *expireSettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	return append(errs, checkAddress(s.WebListenAddress, "127.0.0.1:9098 or :9098")...)
}
