package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/promferry/promferry/internal/envfile"
)

// agentDefaultsFile has the settings of the agent's unit.
var agentDefaultsFile = "/etc/default/promferry-agent"

// systemdVariables are those with which systemd tells how a unit ended.
var systemdVariables = []string{"SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS"}

// settleRootEnvironment makes the environment that of the agent's unit, for root's record: that
// of the unit that ended may be made by somebody who is not root, as may what is in its
// directories. Of it only systemd's own variables are left. What was ignored is returned, as an
// error for the user, and why the file cannot be used.
func settleRootEnvironment() (ignored, unusable error) {
	vars, unusable := readAgentDefaults()
	if unusable != nil {
		unusable = fmt.Errorf("%w; its settings are ignored", unusable)
	}
	var names []string
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		// An EnvironmentFile= of the unit may have the same.
		if strings.HasPrefix(name, envPrefix+"_") && vars[name] != value {
			names = append(names, name)
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		ignored = fmt.Errorf("ignored in the unit's environment: %s; as root, record takes settings from its flags in ExecStopPost= and from %s",
			strings.Join(names, ", "), agentDefaultsFile)
	}
	if vars == nil {
		vars = make(map[string]string)
	}
	for _, name := range systemdVariables {
		vars[name] = os.Getenv(name)
	}
	os.Clearenv()
	for name, value := range vars {
		_ = os.Setenv(name, value) // The names were checked.
	}
	return ignored, unusable
}

// maxDefaults is up to which size, in bytes, the file is read.
const maxDefaults = 1 << 20

// readAgentDefaults returns the variables of the file, none where there is no file. Root takes
// it from root only.
func readAgentDefaults() (map[string]string, error) {
	f, err := os.OpenFile(agentDefaultsFile, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil //nolint:nilnil // No variables.
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: not a regular file", agentDefaultsFile)
	case !ok || owner.Uid != 0 || info.Mode()&0o002 != 0 || owner.Gid != 0 && info.Mode()&0o020 != 0:
		return nil, fmt.Errorf("%s: others than root can write to it: run chown root:root and chmod 644", agentDefaultsFile)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDefaults))
	if err != nil {
		return nil, err
	}
	return envfile.Parse(string(b)), nil
}
