//go:build bench

// Command bench measures the figures that the README claims, as ratios against real
// programs in one run. It fails for no figure: machines differ. Servers run on one core, what
// is measured on another; rounds alternate; medians are printed. The arguments name the
// parts to measure, out of forward, batch, add, open, deliver, expire, and pull-load, pull-memory,
// pull-far, pull-large and pull-unknown, which are pull together, and gateway-puts, gateway-fleet,
// gateway-scrapes and gateway-batch, which are gateway; without any it is all of them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

const (
	serverCore, measuredCore = "0", "1"
	rounds                   = 5
	forwards                 = 100 // in each round
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only []string) error {
	if len(only) > 0 && only[0] == reverseProxyRole {
		return serveReverseProxy(ctx, only[1:])
	}
	if runtime.NumCPU() < 2 {
		return fmt.Errorf("two cores are needed, this machine has %d", runtime.NumCPU())
	}
	for _, program := range []string{"taskset", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			return err
		}
	}
	promferry, err := real.Promferry(ctx)
	if err != nil {
		return err
	}
	if err := pin(ctx, os.Getpid(), serverCore); err != nil {
		return err
	}
	fmt.Printf("%s, %d cores, %s/%s\n\n", runtime.Version(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
	parts := []struct {
		name    string
		measure func(ctx context.Context, promferry string) error
	}{
		{"forward", forward},
		{"batch", batchRun},
		{"add", outboxAdds},
		{"open", outboxOpens},
		{"deliver", outboxDelivers},
		{"pull-load", pullLoad},
		{"pull-memory", pullMemory},
		{"pull-far", pullFar},
		{"pull-large", pullLarge},
		{"pull-unknown", pullUnknown},
		{"expire", expire},
		{"gateway-puts", gatewayPuts},
		{"gateway-fleet", gatewayFleet},
		{"gateway-scrapes", gatewayScrapes},
		{"gateway-batch", gatewayBatch},
	}
	for _, p := range parts {
		named := func(name string) bool { return name == p.name || strings.HasPrefix(p.name, name+"-") }
		if len(only) > 0 && !slices.ContainsFunc(only, named) {
			continue
		}
		if err := p.measure(ctx, promferry); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// forward measures what the agent costs.
func forward(ctx context.Context, promferry string) error {
	exporter, err := real.NodeExporter(ctx, "")
	if err != nil {
		return err
	}
	defer exporter.Kill()
	gateway, err := real.Pushgateway(ctx, "")
	if err != nil {
		return err
	}
	defer gateway.Kill()

	text, err := real.Get(ctx, exporter.URL+"/metrics")
	if err != nil {
		return err
	}
	fmt.Printf("The agent; %d rounds of %d forwards; the exposition has %d bytes as text\n\n", rounds, forwards, len(text))
	if err := cpu(ctx, promferry, exporter.URL+"/metrics", gateway.URL); err != nil {
		return fmt.Errorf("CPU: %w", err)
	}
	if err := latency(ctx, promferry, exporter.URL+"/metrics"); err != nil {
		return fmt.Errorf("latency: %w", err)
	}
	if err := memory(ctx, promferry, gateway.URL); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	fmt.Println()
	return nil
}

// agent starts an agent on the core for what is measured.
func agent(ctx context.Context, promferry, target, gateway, interval string) (*real.Server, func(), error) {
	dir, err := os.MkdirTemp("", "promferry-bench-")
	if err != nil {
		return nil, nil, err
	}
	server, err := real.Serve(ctx, "", real.Command{Path: "taskset", Args: []string{
		"-c", measuredCore, promferry, "agent", "--push.target=node=" + target, "--push.url=" + gateway,
		"--push.interval=" + interval, "--state.dir=" + dir, "--instance=bench", "--push.on-stop=keep",
	}})
	if err != nil {
		return nil, nil, err
	}
	return server, func() {
		server.Kill()
		_ = os.RemoveAll(dir)
	}, nil
}

// puts returns how many puts an agent has done.
func puts(ctx context.Context, agent *real.Server) (float64, error) {
	page, err := real.Get(ctx, agent.URL+"/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "promferry_forwarder_puts_total{") {
			fields := strings.Fields(line)
			return strconv.ParseFloat(fields[len(fields)-1], 64)
		}
	}
	return 0, fmt.Errorf("no promferry_forwarder_puts_total on %s", agent.URL)
}

// untilPuts waits until the agent has done n puts more than before.
func untilPuts(ctx context.Context, agent *real.Server, n float64) error {
	before, err := puts(ctx, agent)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		now, err := puts(ctx, agent)
		if err != nil || now-before >= n {
			return err
		}
	}
}

// cpu measures user and system time of a forward, by the agent and by curl.
func cpu(ctx context.Context, promferry, target, gateway string) error {
	a, end, err := agent(ctx, promferry, target, gateway, "100ms")
	if err != nil {
		return err
	}
	defer end()
	var ours, theirs, shells, ratios, bareRatios []float64
	for range rounds {
		putsBefore, err := puts(ctx, a)
		if err != nil {
			return err
		}
		before, err := cpuTime(a.PID())
		if err != nil {
			return err
		}
		if err := untilPuts(ctx, a, forwards); err != nil {
			return err
		}
		after, err := cpuTime(a.PID())
		if err != nil {
			return err
		}
		putsAfter, err := puts(ctx, a)
		if err != nil {
			return err
		}
		our := (after - before).Seconds() / (putsAfter - putsBefore)
		if err := a.Signal(syscall.SIGSTOP); err != nil { // Alone on its core.
			return err
		}
		// As from cron, through a shell. curl puts as well, which costs it no more than to add.
		command := fmt.Sprintf("curl -s %s | curl -s -X PUT --data-binary @- %s/metrics/job/node/instance/curl", target, gateway)
		their, err := shell(ctx, command)
		if err != nil {
			return err
		}
		empty, err := shell(ctx, ":")
		if err != nil {
			return err
		}
		if err := a.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		ours, theirs, shells = append(ours, our), append(theirs, their), append(shells, empty)
		ratios, bareRatios = append(ratios, our/their), append(bareRatios, our/(their-empty))
	}
	size, peak, err := resident(a.PID())
	if err != nil {
		return err
	}
	fmt.Printf("CPU of a forward (user+sys): agent %.2f ms, sh -c 'curl | curl' %.2f ms, of which sh %.2f ms\n",
		1000*median(ours), 1000*median(theirs), 1000*median(shells))
	fmt.Printf("  ratio %.2f (without sh %.2f); aim: at most 0.5\n\n", median(ratios), median(bareRatios))
	fmt.Printf("resident memory after %d forwards: %.1f MiB, peak %.1f MiB; aim: at most 25 MiB\n\n", rounds*forwards, mib(size), mib(peak))
	return nil
}

// shell runs a command as often as a round has forwards and returns the CPU time of one,
// its children's included, in seconds.
func shell(ctx context.Context, command string) (float64, error) {
	var total time.Duration
	for range forwards {
		cmd := exec.CommandContext(ctx, "taskset", "-c", measuredCore, "sh", "-c", command)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			return 0, fmt.Errorf("%s: %w: %s", command, err, out)
		}
		total += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return total.Seconds() / forwards, nil
}

// pin binds a process, with all its threads and what it starts, to a core.
func pin(ctx context.Context, pid int, core string) error {
	return exec.CommandContext(ctx, "taskset", "-a", "-p", "-c", core, strconv.Itoa(pid)).Run()
}

// cpuTime returns user and system time that a process has used: fields 14 and 15 of
// proc_pid_stat(5), in ticks of 10 ms (USER_HZ is 100 wherever Go runs on Linux).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the name, stands in parentheses and may hold blanks.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	if err != nil {
		return 0, err
	}
	system, err := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond, err
}

// resident returns a process's resident memory and its peak, in bytes.
func resident(pid int) (size, peak float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseFloat(fields[1], 64)
		switch fields[0] {
		case "VmRSS:":
			size = kib * 1024
		case "VmHWM:":
			peak = kib * 1024
		}
	}
	return size, peak, nil
}

func mib(bytes float64) float64 { return bytes / (1 << 20) }

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
