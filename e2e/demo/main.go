// Command demo shows promferry's main job on this machine: a real node_exporter, a
// real Pushgateway, and the agent that carries the metrics of the one to the other.
// It runs until Ctrl-C, which stops all of it and leaves nothing behind.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
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

// shown matches the two series in the Pushgateway that tell the story.
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
	defer func() { err = errors.Join(err, exporter.Stop()) }()
	gateway, err := real.Pushgateway(start, preferred(start, "127.0.0.1:9091"))
	if err != nil {
		return quiet(ctx, err)
	}
	defer func() { err = errors.Join(err, gateway.Stop()) }()

	args := []string{
		"agent",
		"--push.target=node=" + exporter.URL + "/metrics",
		"--push.url=" + gateway.URL,
		"--push.interval=" + interval.String(),
		"--state.dir=" + dir,
	}
	agent, err := real.Serve(start, "", real.Command{Path: promferry, Args: args})
	if err != nil {
		return quiet(ctx, err)
	}
	defer agent.Kill() // after the Stop below it has nothing to do

	fmt.Fprintf(w, "node_exporter     %s/metrics   what is scraped\n", exporter.URL)
	fmt.Fprintf(w, "promferry agent   %s/metrics   its own metrics; it runs as\n", agent.URL)
	fmt.Fprintf(w, "  promferry %s --web.listen-address=%s\n", strings.Join(args, " "), agent.Addr)
	fmt.Fprintf(w, "Pushgateway       %s   what receives, every %v\n\n", gateway.URL, interval)

	lines, err := arrived(start, gateway)
	if err != nil {
		return quiet(ctx, fmt.Errorf("nothing has arrived in the Pushgateway: %w\n%s", err, agent.Stderr()))
	}
	fmt.Fprintf(w, "In the Pushgateway now:\n%s\n", lines)
	fmt.Fprintf(w, "Look yourself: curl -s %s/metrics | grep -E '^(up|node_load1)\\{'\n", gateway.URL)

	if !once {
		fmt.Fprintln(w, "Ctrl-C stops all of it.")
		select {
		case <-ctx.Done():
			fmt.Fprintln(w)
		case <-agent.Done():
			return fmt.Errorf("the agent ended: %s\n%s", agent.State(), agent.Stderr())
		case <-gateway.Done():
			return fmt.Errorf("the Pushgateway ended: %s\n%s", gateway.State(), gateway.Stderr())
		case <-exporter.Done():
			return fmt.Errorf("node_exporter ended: %s\n%s", exporter.State(), exporter.Stderr())
		}
	}

	// The agent first: it tells the Pushgateway that it stops.
	if err := agent.Stop(); err != nil {
		return err
	}
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	metrics, err := gateway.Get(after, "/metrics")
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "After the agent's stop the node is down, and its series have ended:\n%s", bytes.Join(shown.FindAll(metrics, -1), nil))
	return nil
}

// arrived waits for the target's metrics in the gateway and returns the lines to show.
func arrived(ctx context.Context, gateway *real.Gateway) ([]byte, error) {
	var lines []byte
	err := real.Until(ctx, func(ctx context.Context) error {
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
	return lines, err
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
