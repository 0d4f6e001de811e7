//go:build bench

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// batchPushers is how many jobs push their results at the same time.
const batchPushers = 64

// gatewayBatch measures pushes of batch results, which a gateway has on disk before it answers.
func gatewayBatch(ctx context.Context, promferry string) error {
	scale, err := newGatewayScale()
	if err != nil {
		return err
	}
	dir, remove, err := diskDir()
	if err != nil {
		return err
	}
	defer remove()
	ours := &batchServer{filled: filled{name: ourGateway}, pushed: make([]int, scale.batchGroups)}
	if ours.Server, err = startGateway(ctx, promferry, measuredCore, filepath.Join(dir, "state")); err != nil {
		return err
	}
	defer func() { ours.Kill() }()
	all := []*batchServer{ours}
	for _, other := range []struct {
		name string
		args []string
	}{{checkedGateway, nil}, {uncheckedGateway, []string{withoutConsistency}}} {
		b := &batchServer{filled: filled{name: other.name}, pushed: make([]int, scale.batchGroups)}
		if b.Server, err = startPushgateway(ctx, measuredCore, "", other.args...); err != nil {
			return err
		}
		defer b.Kill()
		all = append(all, b)
	}
	for _, b := range all {
		if _, err := b.push(ctx, scale.batchGroups, 0); err != nil { // So many groups there are from then on.
			return err
		}
		if err := b.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
	}
	var syncs []float64
	for range scale.rounds {
		for _, b := range all {
			if err := b.alone(func() error {
				took, err := b.push(ctx, 0, scale.batchWindow)
				b.took.add(took)
				return err
			}); err != nil {
				return err
			}
		}
		n, err := syncRate(dir, time.Second)
		if err != nil {
			return err
		}
		syncs = append(syncs, n)
	}
	kept, err := ours.keptAfterKill(ctx)
	if err != nil {
		return err
	}

	fmt.Printf("Puts of 8 gauges that do not expire, from %d pushers over connections that they keep, to %d groups; %d rounds of %v:\n",
		batchPushers, scale.batchGroups, scale.rounds, scale.batchWindow)
	t := table()
	_, _ = fmt.Fprintln(t, "\tkept after kill -9\tputs\tputs/s\tCPU ms\tcore\tload's\tp50 ms\tp99 ms\tputs/s to it\t")
	for _, b := range all {
		durable := "no"
		if b == ours && kept == scale.batchGroups {
			durable = "yes"
		}
		p50, p99 := quantiles(b.took.took)
		_, _ = fmt.Fprintf(t, "%s\t%s\t%d\t%.0f\t%.2f\t%.0f %%\t%.0f %%\t%.2f\t%.2f\t%.2f\t\n", b.name, durable, b.took.count, b.took.rate(), 1000*b.took.cost(),
			100*b.took.busy(), 100*b.took.loads(), 1000*p50, 1000*p99, ours.took.rate()/b.took.rate())
	}
	if err := endTable(t); err != nil {
		return err
	}
	fmt.Printf("The disk does %.0f writes of 4 KiB a second that are synced one by one (fdatasync), measured in the same directory between the rounds.\n", median(syncs))
	var asked verdicts
	asked.add(fmt.Sprintf("groups that have what was answered last, after kill -9 and a restart, of %d\t%d\tall", scale.batchGroups, kept), kept == scale.batchGroups)
	return asked.print()
}

// batchServer is a server that batch results are pushed to.
type batchServer struct {
	filled
	pushed []int // the number of the last push of each group that was answered
}

// push pushes to one group after the other. Two pushes to one group are never in flight, as there are
// more groups than pushers.
func (b *batchServer) push(ctx context.Context, most int, window time.Duration) (pushed, error) {
	took, err := pushing{
		callers: batchPushers, most: most, window: window, first: b.next,
		push:  func(request []byte, n int) []byte { return appendBatch(request, n, n%len(b.pushed)) },
		taken: func(n int) { b.pushed[n%len(b.pushed)] = n },
	}.do(ctx, server{b.PID(), dialTo(b.Addr)})
	b.next += took.count
	if err != nil {
		err = fmt.Errorf("%s: %w", b.name, err)
	}
	return took, err
}

// appendBatch appends the request that puts what a job tells of a run, with the number of the put.
func appendBatch(b []byte, n, group int) []byte {
	var body strings.Builder
	for _, name := range []string{
		"batch_job_last_start_timestamp_seconds", "batch_job_last_completion_timestamp_seconds", "batch_job_last_success_timestamp_seconds",
		"batch_job_last_duration_seconds", "batch_job_last_exit_code", "batch_job_last_success", "batch_job_running", numberOfPut,
	} {
		fmt.Fprintf(&body, "# TYPE %s gauge\n%s %d\n", name, name, n)
	}
	return fmt.Appendf(b, "PUT /metrics/job/%s HTTP/1.1\r\nHost: gateway\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\n\r\n%s",
		jobName(group), body.Len(), body.String())
}

const numberOfPut = "batch_job_number"

func jobName(n int) string { return fmt.Sprintf("backup-%04d", n) }

// keptAfterKill kills a server, starts it again, and returns how many groups have what was answered
// last. A put may also be there that was not answered.
func (b *batchServer) keptAfterKill(ctx context.Context) (int, error) {
	b.Kill() // With SIGKILL.
	if err := b.Restart(ctx); err != nil {
		return 0, err
	}
	err := real.Until(ctx, func(ctx context.Context) error {
		_, err := b.Get(ctx, "/-/ready")
		return err
	})
	if err != nil {
		return 0, err
	}
	page, err := b.Get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	has := make(map[string]string)
	for line := range strings.Lines(string(page)) {
		if rest, ok := strings.CutPrefix(line, numberOfPut+"{"); ok {
			labels, value, _ := strings.Cut(rest, "} ")
			_, job, _ := strings.Cut(labels, `job="`)
			job, _, _ = strings.Cut(job, `"`)
			has[job] = strings.TrimSpace(value)
		}
	}
	kept := 0
	for group, n := range b.pushed {
		value, err := strconv.ParseFloat(has[jobName(group)], 64)
		if err == nil && int(value) == n {
			kept++
		}
	}
	return kept, nil
}

// syncRate returns how many writes a second a disk does that are synced one by one.
func syncRate(dir string, window time.Duration) (rate float64, err error) {
	const page, pages = 4 << 10, 256
	f, err := os.CreateTemp(dir, "syncs-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := f.Write(make([]byte, page*pages)); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	content := make([]byte, page)
	begin := time.Now()
	n := 0
	for ; time.Since(begin) < window; n++ {
		content[0]++
		if _, err := f.WriteAt(content, int64(n%pages)*page); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
	}
	return float64(n) / time.Since(begin).Seconds(), nil
}
