// Package real starts the real programs that promferry works with (node_exporter,
// Pushgateway, Prometheus) and promferry itself, for the end-to-end tests, the
// benchmarks and the demo. Nothing that it starts outlives the program that uses it.
//
// Programs listen on ports that the kernel picks, so any number of tests may run at
// once. Everything here is safe for concurrent use.
package real

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Find returns the path of a real program: "node_exporter", "pushgateway", "nginx",
// "prometheus" or "promtool". The program's variable (PUSHGATEWAY_BIN and so on) wins
// over .tools/bin of this checkout, and that over the PATH, where Debian's name
// (prometheus-pushgateway) will do as well.
//
// A program that is missing is an error, and for a test a failure: a test that skips
// proves nothing.
func Find(name string) (string, error) {
	variable := strings.ToUpper(name) + "_BIN"
	if path := os.Getenv(variable); path != "" {
		if _, err := exec.LookPath(path); err != nil {
			return "", fmt.Errorf("%s: %w", variable, err)
		}
		return filepath.Abs(path)
	}

	var candidates []string
	if root, err := Root(); err == nil {
		candidates = append(candidates, filepath.Join(root, ".tools", "bin", name))
	}
	candidates = append(candidates, name, "prometheus-"+strings.ReplaceAll(name, "_", "-"))
	for _, candidate := range candidates {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s found: run `make tools`, or set %s to its path", name, variable)
}

// Root returns the root of the checkout: the nearest directory above the current one
// that has a go.mod.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("not within the checkout: no go.mod above the current directory")
		}
		dir = parent
	}
}

// Promferry returns the path of a promferry built from this checkout, as a release is
// built but for the version in it. It builds once per process; after that, and when
// nothing has changed, it costs next to nothing.
func Promferry(ctx context.Context) (string, error) {
	built.Lock()
	defer built.Unlock()
	if built.path != "" {
		return built.path, nil
	}
	path, err := build(ctx)
	if err != nil {
		return "", fmt.Errorf("build promferry: %w", err)
	}
	built.path = path
	return path, nil
}

var built struct {
	sync.Mutex
	path string
}

// program returns what is started. OLD_BIN names a promferry of an earlier version, and
// OLD_COMMANDS, with a comma between two, the commands for which it stands in for the one
// that Promferry built: so a test shows that both versions work together.
func (c Command) program() string {
	built.Lock()
	defer built.Unlock()
	if c.Path == built.path && len(c.Args) > 0 && slices.Contains(strings.Split(os.Getenv("OLD_COMMANDS"), ","), c.Args[0]) {
		return os.Getenv("OLD_BIN")
	}
	return c.Path
}

func build(ctx context.Context) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, ".tools", "e2e")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, "build")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)

	// Test binaries of several packages do this at once. The move at the end replaces
	// what another has built, which still runs where it runs.
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w",
		"-o", filepath.Join(tmp, "promferry"), "./cmd/promferry")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, output)
	}
	path := filepath.Join(dir, "promferry")
	return path, os.Rename(filepath.Join(tmp, "promferry"), path)
}
