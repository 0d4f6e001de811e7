package real

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// listening matches what exporter-toolkit logs when the listener stands, in logfmt and
// in JSON. All programs of this field use it, promferry among them.
var listening = regexp.MustCompile(`"Listening on",?\s*"?address"?[=:]"?([^\s",]+)`)

// listenFlag is the flag that all of them take.
const listenFlag = "--web.listen-address="

// A Server is a program that serves HTTP. Restart must not run beside other methods.
type Server struct {
	*Process

	Addr string // host:port
	URL  string // http://Addr

	command Command
}

// Serve starts a program that serves HTTP and waits until it listens, on addr or, when
// that is empty, on a free port of the loopback interface. Serve adds the flag for it
// to command.Args.
func Serve(ctx context.Context, addr string, command Command) (*Server, error) {
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	s := &Server{Addr: addr, command: command}
	if err := s.Restart(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Restart starts the program again, with the arguments and the address that it had.
// The caller has ended it with Stop or Kill.
func (s *Server) Restart(ctx context.Context) error {
	command := s.command
	command.Args = append(slices.Clone(command.Args), listenFlag+s.Addr) // after a subcommand
	process, err := Start(command)
	if err != nil {
		return err
	}
	match, err := process.WaitLog(ctx, listening)
	if err != nil {
		process.Kill()
		return err
	}
	s.Process, s.Addr, s.URL = process, match[1], "http://"+match[1]
	return nil
}

// Get returns the body of the answer to a GET of path, which must have status 200.
func (s *Server) Get(ctx context.Context, path string) ([]byte, error) {
	return Get(ctx, s.URL+path)
}

// Get returns the body of the answer to a GET of url, which must have status 200.
func Get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: unexpected status %d: %s", url, resp.StatusCode, body)
	}
	return body, nil
}

// NodeExporter starts a node_exporter on addr (empty: a free port).
func NodeExporter(ctx context.Context, addr string, args ...string) (*Server, error) {
	path, err := Find("node_exporter")
	if err != nil {
		return nil, err
	}
	return Serve(ctx, addr, Command{Path: path, Args: args})
}

// A Gateway is a running Pushgateway.
type Gateway struct{ *Server }

// Pushgateway starts a Pushgateway on addr (empty: a free port). It keeps its groups in
// memory unless args has --persistence.file.
func Pushgateway(ctx context.Context, addr string, args ...string) (*Gateway, error) {
	path, err := Find("pushgateway")
	if err != nil {
		return nil, err
	}
	// Debian's would keep its groups in /var/lib.
	if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--persistence.file") }) {
		args = append(slices.Clone(args), "--persistence.file=")
	}
	s, err := Serve(ctx, addr, Command{Path: path, Args: args})
	if err != nil {
		return nil, err
	}
	return &Gateway{s}, nil
}

// A PrometheusServer is a running Prometheus.
type PrometheusServer struct{ *Server }

// Prometheus starts a Prometheus that scrapes every second, with its data and its
// configuration file, prometheus.yml, in dir. scrapeConfigs is the YAML list that
// stands under scrape_configs, its dashes in the first column.
//
// Prometheus 2 waits about five seconds before its first scrape.
func Prometheus(ctx context.Context, dir, scrapeConfigs string, args ...string) (*PrometheusServer, error) {
	path, err := Find("prometheus")
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "prometheus.yml")
	content := "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\nscrape_configs:\n" + scrapeConfigs
	if err := os.WriteFile(config, []byte(strings.TrimRight(content, "\n")+"\n"), 0o600); err != nil {
		return nil, err
	}
	s, err := Serve(ctx, "", Command{Path: path, Args: append([]string{
		"--config.file=" + config,
		"--storage.tsdb.path=" + filepath.Join(dir, "data"),
		"--scrape.discovery-reload-interval=100ms", // Prometheus 3: no wait; 2: no effect
	}, args...)})
	if err != nil {
		return nil, err
	}
	err = Until(ctx, func(ctx context.Context) error {
		_, err := s.Get(ctx, "/-/ready")
		return err
	})
	if err != nil {
		s.Kill()
		return nil, err
	}
	return &PrometheusServer{s}, nil
}
