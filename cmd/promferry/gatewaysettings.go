package main

import (
	"cmp"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"
)

// defaultGatewayStateDir is for a gateway that systemd gives none.
const defaultGatewayStateDir = "/var/lib/promferry-gateway"

// gatewayServerSettings are all settings of the gateway. The fields' names make the names of
// the variables.
type gatewayServerSettings struct {
	WebListenAddress  *setting[string]           `split_words:"true"`
	WebConfigFile     *setting[string]           `split_words:"true"`
	WebExternalURL    *setting[siteURL]          `split_words:"true"`
	WebLifecycle      *setting[bool]             `envconfig:"WEB_ENABLE_LIFECYCLE"`
	WebEnableAdminAPI *setting[bool]             `envconfig:"WEB_ENABLE_ADMIN_API"`
	AuthFile          *setting[string]           `split_words:"true"`
	ExpireDefault     *setting[model.Duration]   `split_words:"true"`
	ForgetAfter       *setting[model.Duration]   `split_words:"true"`
	LimitBodyBytes    *setting[units.Base2Bytes] `split_words:"true"`
	LimitGroupBytes   *setting[units.Base2Bytes] `split_words:"true"`
	LimitTotalBytes   *setting[units.Base2Bytes] `split_words:"true"`
	LimitGroupSeries  *setting[int]              `split_words:"true"`
	LimitGroups       *setting[int]              `split_words:"true"`
	StateDir          *setting[string]           `split_words:"true"`
	LogLevel          *setting[string]           `split_words:"true"`
	LogFormat         *setting[string]           `split_words:"true"`
}

// newGatewayServerSettings returns the settings with their defaults, the only place where these
// stand.
func newGatewayServerSettings() *gatewayServerSettings {
	stateDir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	return &gatewayServerSettings{
		WebListenAddress:  text("web.listen-address", ":9091", "Address to listen on: for pushes, for scrapes of /metrics and of /groups/, and for /sd."),
		WebConfigFile:     text("web.config.file", "", "Prometheus web configuration file, for TLS of that address; and basic_auth_users, unless there is --auth.file."),
		WebExternalURL:    externalURL(),
		WebLifecycle:      enableLifecycle(),
		WebEnableAdminAPI: toggle("web.enable-admin-api", "Let everybody who may push to every group delete them all at once, by a PUT to /api/v1/admin/wipe."),
		AuthFile:          text("auth.file", "", `File that says who may push to which groups, and who may read. "": everybody.`),
		ExpireDefault:     duration("expire.default", 0, "How long after its last push a group goes silent that has no promferry_expires_after_seconds. 0s: never."),
		ForgetAfter:       duration("forget-after", 24*time.Hour, "How long a silent group is kept, and listed in /sd as a target that is down."),
		LimitBodyBytes:    size("limit.body-bytes", 64*units.MiB, "How large the body of a push may be, packed and unpacked. Beyond it the answer is 413."),
		LimitGroupBytes:   size("limit.group-bytes", 128*units.MiB, "Maximum size of the text of a group, with the grouping labels in each series. Beyond it the answer is 413."),
		LimitTotalBytes:   size("limit.total-bytes", units.GiB, "Maximum memory of the metrics of all groups together, compressed. A push that needs more is answered with 429."),
		LimitGroupSeries:  number("limit.group-series", 100000, "How many series a group may have. Beyond it the answer is 422."),
		LimitGroups:       number("limit.groups", 20000, "How many groups there may be. Beyond it the answer is 429."),
		StateDir:          text("state.dir", cmp.Or(stateDir, defaultGatewayStateDir), "Where the gateway keeps groups that do not expire, and which groups there are."),
		LogLevel:          logLevel(),
		LogFormat:         logFormat(),
	}
}

func (s *gatewayServerSettings) all() []anySetting {
	return []anySetting{
		s.WebListenAddress, s.WebConfigFile, s.WebExternalURL, s.WebLifecycle, s.WebEnableAdminAPI, s.AuthFile, s.ExpireDefault, s.ForgetAfter,
		s.LimitBodyBytes, s.LimitGroupBytes, s.LimitTotalBytes, s.LimitGroupSeries, s.LimitGroups, s.StateDir, s.LogLevel, s.LogFormat,
	}
}

// check returns all that is wrong.
func (s *gatewayServerSettings) check() []error {
	var errs []error
	for _, setting := range s.all() {
		errs = append(errs, setting.check()...)
	}
	return append(errs, checkAddress(s.WebListenAddress, "127.0.0.1:9091 or :9091")...)
}

// flags returns the settings in force by the names of their flags. None of them is a secret.
func (s *gatewayServerSettings) flags() map[string]string {
	flags := make(map[string]string)
	for _, setting := range s.all() {
		flags[setting.flagName()] = setting.String()
	}
	return flags
}

// toggle is off unless the user says otherwise. Its flag needs no value.
func toggle(flag, help string) *setting[bool] {
	return &setting[bool]{flag: flag, help: help, parse: func(s string) (bool, error) {
		on, err := strconv.ParseBool(s)
		if err != nil {
			return false, fmt.Errorf("%q: want true or false", s)
		}
		return on, nil
	}}
}

// IsBoolFlag tells kingpin which flags need no value.
func (s *setting[T]) IsBoolFlag() bool {
	_, ok := any(s.value).(bool)
	return ok
}
