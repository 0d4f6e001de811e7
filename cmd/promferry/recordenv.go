package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/promferry/promferry/internal/envfile"
)

// agentDefaultsFile has the settings of the agent's unit. The first drop-in for record had a file
// of its own, batchDefaultsFile, which still counts where it is there.
var (
	agentDefaultsFile = "/etc/default/promferry-agent"
	batchDefaultsFile = "/etc/default/promferry-batch"
)

// systemdVariables are those with which systemd tells how a unit ended.
var systemdVariables = []string{"SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS"}

// settleRootEnvironment makes the environment that of the agent's unit, for root's record, and
// the working directory /. Those of the unit that ended may be made by a user who is not root. Of
// the environment only systemd's own variables are left. It returns what was ignored, and why a
// file cannot be used.
func settleRootEnvironment() (ignored, unusable error) {
	_ = os.Chdir("/") // It is there.
	vars := make(map[string]string)
	for _, file := range []string{agentDefaultsFile, batchDefaultsFile} {
		read, err := readDefaults(file)
		if err != nil {
			unusable = errors.Join(unusable, fmt.Errorf("%w; its settings are ignored", err))
		}
		maps.Copy(vars, read)
	}
	var names []string
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		// An EnvironmentFile= of the unit may have the same. An empty one is not set.
		if strings.HasPrefix(name, envPrefix+"_") && value != "" && vars[name] != value {
			names = append(names, name)
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		ignored = fmt.Errorf("ignored in the unit's environment: %s; as root, record takes settings from its flags in ExecStopPost= and from %s",
			strings.Join(names, ", "), agentDefaultsFile)
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

// readDefaults returns the variables of a file, none where there is no file. Root takes them
// from a file of root's only.
func readDefaults(path string) (map[string]string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
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
		return nil, fmt.Errorf("%s: not a regular file", path)
	case !ok || owner.Uid != 0 || info.Mode()&0o002 != 0 || owner.Gid != 0 && info.Mode()&0o020 != 0:
		return nil, fmt.Errorf("%s: others than root can write to it: run chown root:root and chmod 644", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDefaults))
	if err != nil {
		return nil, err
	}
	return envfile.Parse(string(b)), nil
}
