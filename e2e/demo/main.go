// Command demo shows promferry's main job on this machine: a real node_exporter, the
// agent that carries its metrics away, and the gateway that takes them.
// It runs until Ctrl-C, which stops all of it and leaves nothing behind.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

func main() {
	// `make demo` builds promferry and names it; on its own the demo builds one.
	promferry := flag.String("promferry", "", "the promferry to run; built from this checkout if not given")
	once := flag.Bool("once", false, "end as soon as the metrics have arrived")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Stdout, *promferry, *once)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// interval is short, so that there is something to see soon.
const interval = 5 * time.Second

// shown matches the two series in the gateway that tell the story.
var shown = regexp.MustCompile(`(?m)^(?:up|node_load1)\{.*\n`)

// run returns nil when ctx ends. Whatever it started has ended by then.
func run(ctx context.Context, w io.Writer, promferry string, once bool) (err error) {
	dir, err := os.MkdirTemp("", "promferry-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	// Nothing below takes longer than this; the demo itself runs for ever.
	start, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if promferry == "" {
		if promferry, err = real.Promferry(start); err != nil {
			return quiet(ctx, err)
		}
	}
	exporter, err := real.NodeExporter(start, preferred(start, "127.0.0.1:9100"))
	if err != nil {
		return quiet(ctx, err)
	}
	defer exporter.Kill() // it has nothing to do at its end

	gatewayArgs := []string{"gateway", "--state.dir=" + filepath.Join(dir, "gateway")}
	gateway, err := real.Serve(start, preferred(start, "127.0.0.1:9091"), real.Command{Path: promferry, Args: gatewayArgs})
	if err != nil {
		return quiet(ctx, err)
	}
	defer func() { err = errors.Join(err, gateway.Stop()) }()

	agentArgs := []string{
		"agent",
		"--push.target=node=" + exporter.URL + "/metrics",
		"--push.url=" + gateway.URL,
		"--push.interval=" + interval.String(),
		"--state.dir=" + filepath.Join(dir, "agent"),
	}
	agent, err := real.Serve(start, "", real.Command{Path: promferry, Args: agentArgs})
	if err != nil {
		return quiet(ctx, err)
	}
	defer agent.Kill() // after the Stop below it has nothing to do

	fmt.Fprintf(w, "node_exporter       %s/metrics   what is scraped\n", exporter.URL)
	fmt.Fprintf(w, "promferry agent     %s/   what it does; it runs as\n", agent.URL)
	fmt.Fprintf(w, "  promferry %s --web.listen-address=%s\n", strings.Join(agentArgs, " "), agent.Addr)
	fmt.Fprintf(w, "promferry gateway   %s/   what has arrived, each %v; it runs as\n", gateway.URL, interval)
	fmt.Fprintf(w, "  promferry %s --web.listen-address=%s\n\n", strings.Join(gatewayArgs, " "), gateway.Addr)

	lines, target, err := arrived(start, gateway)
	if err != nil {
		return quiet(ctx, fmt.Errorf("nothing has arrived in the gateway: %w\n%s", err, agent.Stderr()))
	}
	fmt.Fprintf(w, "In the gateway now:\n%s\n", lines)

	if !once {
		fmt.Fprintf(w, "Look yourself:\n")
		fmt.Fprintf(w, "  curl %s/sd   # the targets that Prometheus finds\n", gateway.URL)
		fmt.Fprintf(w, "  curl %s   # and scrapes\n", target)
		fmt.Fprintf(w, "  kill %d   # what if node_exporter dies?\n", exporter.PID())
		fmt.Fprintln(w, "Ctrl-C stops all of it.")
		dead := exporter.Done()
		for ctx.Err() == nil {
			select {
			case <-ctx.Done():
				fmt.Fprintln(w)
			case <-agent.Done():
				return fmt.Errorf("the agent ended: %s\n%s", agent.State(), agent.Stderr())
			case <-gateway.Done():
				return fmt.Errorf("the gateway ended: %s\n%s", gateway.State(), gateway.Stderr())
			case <-dead:
				dead = nil
				if err := down(ctx, w, "node_exporter is dead.", gateway, target); err != nil {
					return quiet(ctx, err)
				}
			}
		}
	}

	// The agent first: it tells the gateway that it stops.
	if err := agent.Stop(); err != nil {
		return err
	}
	return down(context.WithoutCancel(ctx), w, "The agent has stopped.", gateway, target)
}

// arrived waits for the node's metrics in the gateway, and returns the lines to show and the
// target that Prometheus would scrape.
func arrived(ctx context.Context, gateway *real.Server) (lines []byte, target string, err error) {
	err = real.Until(ctx, func(ctx context.Context) error {
		metrics, err := gateway.Get(ctx, "/metrics")
		if err != nil {
			return err
		}
		lines = bytes.Join(shown.FindAll(metrics, -1), nil)
		if !bytes.HasPrefix(lines, []byte("node_load1{")) || !bytes.Contains(lines, []byte("\nup{")) {
			return fmt.Errorf("node_load1 and up are not both there: %q", lines)
		}
		return nil
	})
	if err != nil {
		return nil, "", err
	}
	listed, err := gateway.Get(ctx, "/sd")
	if err != nil {
		return nil, "", err
	}
	var targets []struct {
		Targets []string
		Labels  map[string]string
	}
	if err := json.Unmarshal(listed, &targets); err != nil || len(targets) != 1 || len(targets[0].Targets) != 1 {
		return nil, "", fmt.Errorf("/sd does not list one target: %s, %w", listed, err)
	}
	return lines, "http://" + targets[0].Targets[0] + targets[0].Labels["__metrics_path__"], nil
}

// down waits until the node is down in the gateway, and shows that after why.
func down(ctx context.Context, w io.Writer, why string, gateway *real.Server, target string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second+2*interval)
	defer cancel()
	var answer string
	err := real.Until(ctx, func(ctx context.Context) (err error) {
		answer, err = unavailable(ctx, target)
		return err
	})
	if err != nil {
		return err
	}
	metrics, err := gateway.Get(ctx, "/metrics")
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s The node is down, and its series have ended:\n%s%s answers\n  %s\n",
		why, bytes.Join(shown.FindAll(metrics, -1), nil), target, answer)
	return nil
}

// unavailable returns what a target says that answers 503.
func unavailable(ctx context.Context, target string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusServiceUnavailable {
		err = fmt.Errorf("get %s: status %s, want 503", target, resp.Status)
	}
	return fmt.Sprintf("%s: %s", resp.Status, bytes.TrimSpace(body)), err
}

// preferred returns addr, a program's usual one, if nothing listens there. Empty
// means any free port.
func preferred(ctx context.Context, addr string) string {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return ""
	}
	_ = listener.Close()
	return addr
}

// quiet turns an error that Ctrl-C caused into none.
func quiet(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
