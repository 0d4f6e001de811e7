//go:build bench

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// sweepCost is what one reading of all groups takes: seconds, seconds, seconds of the
// Pushgateway and bytes.
type sweepCost struct{ wall, cpu, gateway, peak float64 }

// expire measures a sweep over real node groups on a real Pushgateway, beside curl, which reads
// the same and does nothing with it.
func expire(ctx context.Context, promferry string) error {
	exporter, err := real.NodeExporter(ctx, "")
	if err != nil {
		return err
	}
	defer exporter.Kill()
	text, err := real.Get(ctx, exporter.URL+"/metrics")
	if err != nil {
		return err
	}
	// As the agent puts it; good for a day, so that nothing expires meanwhile.
	text = append(text, "# TYPE up gauge\nup 1\n# TYPE promferry_expires_after_seconds gauge\npromferry_expires_after_seconds 86400\n"...)
	// Unchecked, for else filling it would take most of the time; reading does not change by that.
	gateway, err := real.Pushgateway(ctx, "", "--push.disable-consistency-check")
	if err != nil {
		return err
	}
	defer gateway.Kill()
	if err := pin(ctx, gateway.PID(), serverCore); err != nil {
		return err
	}

	fmt.Printf("A sweep over node groups of %d bytes as text on a Pushgateway, beside curl, which reads the same; %d rounds:\n", len(text), rounds)
	t := table()
	_, _ = fmt.Fprintln(t, "groups\tMB read\t\twall s\tCPU s\tpeak MiB\tPushgateway's CPU s\tratio of wall\tof CPU\tof Pushgateway's\t")
	filled := 0
	for _, groups := range []int{100, 1000} {
		for ; filled < groups; filled++ {
			if err := putNode(ctx, gateway.URL, filled, text); err != nil {
				return err
			}
		}
		listing, err := gateway.Get(ctx, "/api/v1/metrics") // Which also waits until all are there.
		if err != nil {
			return err
		}
		ours, theirs, err := sweeps(ctx, promferry, gateway)
		if err != nil {
			return err
		}
		for _, who := range []struct {
			name  string
			costs []sweepCost
		}{{"curl", theirs}, {"promferry expire --once", ours}} {
			wall := func(c sweepCost) float64 { return c.wall }
			cpu := func(c sweepCost) float64 { return c.cpu }
			of := func(c sweepCost) float64 { return c.gateway }
			peak := func(c sweepCost) float64 { return c.peak }
			_, _ = fmt.Fprintf(t, "%d\t%.1f\t%s\t%.2f\t%.2f\t%.1f\t%.2f\t%.2f\t%.2f\t%.2f\t\n", groups, float64(len(listing))/1e6, who.name,
				medianOf(who.costs, wall), medianOf(who.costs, cpu), mib(medianOf(who.costs, peak)), medianOf(who.costs, of),
				ratioOf(who.costs, theirs, wall), ratioOf(who.costs, theirs, cpu), ratioOf(who.costs, theirs, of))
		}
	}
	return endTable(t)
}

// putNode puts an exposition to the group of a node.
func putNode(ctx context.Context, gateway string, node int, text []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("%s/metrics/job/node/instance/node-%d", gateway, node), bytes.NewReader(text))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	if err := resp.Body.Close(); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("put to %s: unexpected status %d", req.URL, resp.StatusCode)
	}
	return nil
}

// sweeps measures promferry and curl in turns.
func sweeps(ctx context.Context, promferry string, gateway *real.Gateway) (ours, theirs []sweepCost, err error) {
	sweep := []string{promferry, "expire", "--once", "--push.url=" + gateway.URL, "--log.level=warn"}
	read := []string{"curl", "-sSf", "-o", "/dev/null", gateway.URL + "/api/v1/metrics"}
	err = onMeasuredCore(ctx, func() error {
		for range rounds {
			their, err := sweepOf(ctx, read, gateway.PID())
			if err != nil {
				return err
			}
			our, err := sweepOf(ctx, sweep, gateway.PID())
			if err != nil {
				return err
			}
			ours, theirs = append(ours, our), append(theirs, their)
		}
		return nil
	})
	return ours, theirs, err
}

func sweepOf(ctx context.Context, args []string, gateway int) (sweepCost, error) {
	before, err := cpuTime(gateway)
	if err != nil {
		return sweepCost{}, err
	}
	cmd := clean(ctx, args)
	begin := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		return sweepCost{}, fmt.Errorf("%s: %w: %s", args[0], err, out)
	}
	c := sweepCost{wall: time.Since(begin).Seconds(), cpu: (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()}
	after, err := cpuTime(gateway)
	if err != nil {
		return sweepCost{}, err
	}
	c.gateway = (after - before).Seconds()
	c.peak, err = peakOf(ctx, args)
	return c, err
}
