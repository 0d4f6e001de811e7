package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/batch"
	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/outbox"
	"github.com/promferry/promferry/pushgw"
)

// pushSettings are those of every command that pushes and ends.
type pushSettings struct {
	PushUrls       *setting[list[gatewayURL]] `split_words:"true"`
	PushTimeout    *setting[model.Duration]   `split_words:"true"`
	PushHTTPConfig *setting[string]           `split_words:"true"`
	StateDir       *setting[string]           `split_words:"true"`
}

// newPushSettings returns the settings with their defaults.
func newPushSettings() *pushSettings {
	return &pushSettings{
		PushUrls: listOf("push.url", "URL of a Pushgateway: every push goes to each.",
			list[gatewayURL]{must(parseGatewayURL("http://127.0.0.1:9091"))}, parseGatewayURL),
		PushTimeout:    duration("push.timeout", maxTimeout, "How long pushing may take; what has not got there by then is kept."),
		PushHTTPConfig: text("push.http-config", "", "Prometheus http_config file for the way to the Pushgateways."),
		StateDir:       text("state.dir", batchStateDir(), "Where what could not be pushed is kept, and runs are counted: for root the agent's directory."),
	}
}

func (s *pushSettings) all() []anySetting {
	return []anySetting{s.PushUrls, s.PushTimeout, s.PushHTTPConfig, s.StateDir}
}

// batchStateDir returns the agent's directory for root, who may give it files, and one of
// their own for all others. Unlike a daemon this takes no $STATE_DIRECTORY, which is that
// of the unit whose command we are.
func batchStateDir() string {
	if os.Geteuid() == 0 {
		return defaultStateDir
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "promferry")
	}
	home := os.Getenv("HOME")
	if u, err := user.Current(); home == "" && err == nil {
		home = u.HomeDir
	}
	return filepath.Join(cmp.Or(home, "/"), ".local", "state", "promferry")
}

// check returns all that is wrong.
func (s *pushSettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	return append(errs, s.twice()...)
}

func (s *pushSettings) twice() []error {
	return twice(s.PushUrls, withoutSlash, "the Pushgateway %s stands there twice")
}

// courier returns a courier without an outbox. The error is in the http_config file: then
// every push fails with it.
func (s *pushSettings) courier() (*batch.Courier, error) {
	c := &batch.Courier{Timeout: time.Duration(s.PushTimeout.value)}
	var doer pushgw.Doer
	client, err := httpclient.New("push", s.PushHTTPConfig.value)
	if err != nil {
		err = s.PushHTTPConfig.fault(err)
		doer = broken{err}
	} else {
		doer = client
	}
	for _, u := range s.PushUrls.value {
		c.Gateways = append(c.Gateways, pushgw.New(u.URL, doer))
	}
	return c, err
}

// broken stands for a client that cannot be made.
type broken struct{ err error }

func (b broken) Do(*http.Request) (*http.Response, error) { return nil, b.err }

// groupSettings name a group.
type groupSettings struct {
	Job      *setting[string]      `split_words:"true"`
	Labels   *setting[list[label]] `split_words:"true"`
	Instance *setting[string]      `split_words:"true"`
}

func newGroupSettings(jobHelp string) *groupSettings {
	hostname, _ := os.Hostname()
	return &groupSettings{
		Job:      text("job", "", jobHelp),
		Labels:   listOf("label", "Another label of the group, as name=value.", nil, parseLabel),
		Instance: text("instance", hostname, `Value of the instance label; --instance="" leaves it out.`),
	}
}

func (s *groupSettings) all() []anySetting { return []anySetting{s.Job, s.Labels, s.Instance} }

// check returns all that is wrong.
func (s *groupSettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	if s.Job.value == "" {
		errs = append(errs, s.Job.fault(errors.New("missing: it names the group, as in --job=backup")))
	}
	errs = append(errs, s.twice()...)
	if err := s.key().Validate(); err != nil && s.Job.value != "" {
		errs = append(errs, err)
	}
	return errs
}

func (s *groupSettings) twice() []error {
	return twice(s.Labels, func(l label) string { return l.name }, "the label %q stands there twice")
}

func (s *groupSettings) key() pushgw.GroupingKey {
	key := pushgw.GroupingKey{Job: s.Job.value, Labels: make(map[string]string)}
	if s.Instance.value != "" {
		key.Labels[model.InstanceLabel] = s.Instance.value
	}
	for _, l := range s.Labels.value {
		key.Labels[l.name] = l.value
	}
	return key
}

// jobSettings are those of the commands that tell how a job ended.
type jobSettings struct {
	Textfile *setting[string] `split_words:"true"`

	push  *pushSettings
	group *groupSettings
}

func newJobSettings(jobHelp string) *jobSettings {
	return &jobSettings{
		Textfile: text("textfile", "", "Directory of a node_exporter's textfile collector, to write the metrics to as well; or instead, where no --push.url is set."),
		push:     newPushSettings(),
		group:    newGroupSettings(jobHelp),
	}
}

func (s *jobSettings) all() []anySetting {
	return append(append(s.group.all(), s.push.all()...), s.Textfile)
}

// check returns all that is wrong.
func (s *jobSettings) check() []error {
	errs := append(s.push.check(), s.group.check()...)
	return append(errs, s.labelFaults()[len(s.group.twice()):]...)
}

// forgive takes out what is wrong in the environment, which must not stop a job that ran
// before somebody changed it, and returns it.
func (s *jobSettings) forgive() []error {
	errs := forgive(s.all()...)
	if slices.ContainsFunc(errs, func(err error) bool { return strings.HasPrefix(err.Error(), s.push.PushUrls.env()) }) {
		// The default would be another Pushgateway than what was meant.
		s.push.PushUrls.value = nil
		errs = append(errs, errors.New("no Pushgateway is known: nothing is pushed"))
	}
	// And what is wrong between several values, or only in a group.
	ignored := func(faults ...error) {
		for _, err := range faults {
			errs = append(errs, fmt.Errorf("%w; ignored", err))
		}
	}
	if urls := s.push.PushUrls; urls.fromEnvironment() {
		ignored(s.push.twice()...)
		seen := make(map[string]bool)
		urls.value = slices.DeleteFunc(urls.value, func(u gatewayURL) bool {
			again := seen[withoutSlash(u)]
			seen[withoutSlash(u)] = true
			return again
		})
	}
	if faults := s.labelFaults(); len(faults) > 0 && s.group.Labels.fromEnvironment() {
		ignored(faults...)
		s.group.Labels.reset()
	}
	if instance := s.group.Instance; instance.fromEnvironment() {
		if err := pushgw.ValidateLabel(model.InstanceLabel, instance.value); err != nil {
			ignored(instance.fault(err))
			instance.reset()
		}
	}
	return errs
}

// labelFaults returns what is wrong with the labels together.
func (s *jobSettings) labelFaults() []error {
	errs := s.group.twice()
	for _, l := range s.group.Labels.value {
		if slices.Contains(batch.OwnLabels, l.name) {
			errs = append(errs, s.group.Labels.fault(fmt.Errorf("%q: the metrics of a job have a label %s of their own", l, l.name)))
		}
	}
	return errs
}

func forgive(settings ...anySetting) []error {
	var errs []error
	for _, setting := range settings {
		for _, err := range setting.forgive() {
			errs = append(errs, fmt.Errorf("%w; ignored", err))
		}
	}
	return errs
}

// job returns what the runs have in common, and how to close it. What is wrong by now must
// not stop a job, so that goes to warn.
func (s *jobSettings) job(warn func(error)) (batch.Job, func()) {
	if s.Textfile.isSet() && !s.push.PushUrls.isSet() {
		s.push.PushUrls.value = nil // Instead of a push.
	}
	courier, _ := s.push.courier() // An error comes with each push as well.
	j := batch.Job{
		Key: s.group.key(), Courier: courier, PushTimeout: time.Duration(s.push.PushTimeout.value), Textfile: s.Textfile.value, Warn: warn,
	}
	dir := s.push.StateDir.value
	var err error
	courier.Outbox, err = outbox.Open(dir)
	if err == nil {
		j.Jobs, err = batch.OpenJobs(dir)
	}
	if err != nil {
		warn(fmt.Errorf("%s: %w; the run is not counted, and should a push fail it is lost", s.push.StateDir.name(), err))
	}
	return j, func() {
		if courier.Outbox != nil {
			_ = courier.Outbox.Close()
		}
		if j.Jobs != nil {
			_ = j.Jobs.Close()
		}
	}
}

// warner returns a function that prints what is wrong, a line each.
func warner(in *invocation, who string) func(error) {
	return func(err error) {
		_, _ = fmt.Fprintf(in.stderr, "promferry %s: %s\n", who, strings.Join(strings.Split(err.Error(), "\n"), "; "))
	}
}
