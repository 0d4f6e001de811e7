//go:build bench

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/outbox"
)

const (
	waitingGroups = 100
	// waiting is how many pushes wait where pushes are added and delivered, waitingMany
	// where the outbox is opened.
	waiting, waitingMany = 10_000, 100_000
	// addsInRound is how many pushes a round adds.
	addsInRound = 400
	// writers is how many write at the same time, where it is more than one.
	writers = 4
	// deliveryRounds is how often everything that waits is delivered.
	deliveryRounds = 2
)

// outboxAdds, outboxDelivers and outboxOpens measure the outbox of batch jobs.
func outboxAdds(ctx context.Context, promferry string) error {
	return withPush(ctx, promferry, func(dir string, push *outbox.Entry) error { return adds(ctx, dir, push) })
}

func outboxDelivers(ctx context.Context, promferry string) error {
	return withPush(ctx, promferry, func(dir string, push *outbox.Entry) error {
		return errors.Join(deliveries(ctx, promferry, dir, push), deliveries(ctx, promferry, dir, push, "--push.disable-consistency-check"))
	})
}

func outboxOpens(ctx context.Context, promferry string) error {
	return withPush(ctx, promferry, func(dir string, push *outbox.Entry) error { return opening(ctx, promferry, dir, push) })
}

// withPush calls f with a directory on disk and a push for an outbox.
func withPush(ctx context.Context, promferry string, f func(dir string, push *outbox.Entry) error) error {
	dir, remove, err := diskDir()
	if err != nil {
		return err
	}
	defer remove()
	push, err := exitPush(ctx, promferry, filepath.Join(dir, "one"))
	if err != nil {
		return err
	}
	fmt.Printf("The outbox, with pushes of how a run ended, %d bytes each as gzip, of %d groups.\n", len(push.Body), waitingGroups)
	return f(filepath.Join(dir, "state"), push)
}

// exitPush returns the push that promferry run leaves when it reaches no Pushgateway.
func exitPush(ctx context.Context, promferry, state string) (*outbox.Entry, error) {
	cmd := clean(ctx, []string{promferry, "run", "--job=bench", "--push.url=http://127.0.0.1:1", "--state.dir=" + state, "--", "true"})
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	names, err := entries(state)
	if err != nil {
		return nil, err
	}
	if len(names) != 1 {
		return nil, fmt.Errorf("%d pushes wait after a run, not 1", len(names))
	}
	b, err := os.ReadFile(filepath.Join(state, "outbox", names[0]))
	if err != nil {
		return nil, err
	}
	line, body, _ := bytes.Cut(b, []byte{'\n'})
	var header struct {
		ContentType string `json:"content_type"`
	}
	if err := json.Unmarshal(line, &header); err != nil {
		return nil, err
	}
	return &outbox.Entry{Op: outbox.Add, Job: "bench", At: time.Now(), ContentType: header.ContentType, Body: body}, nil
}

// to returns the push to one of the groups of a Pushgateway.
func to(push *outbox.Entry, gateway string, group int) *outbox.Entry {
	e := *push
	e.Gateway, e.Labels = gateway, map[string]string{"instance": strconv.Itoa(group)}
	return &e
}

// entries returns the names of the files of what waits in an outbox, in order.
func entries(state string) ([]string, error) {
	dir, err := os.ReadDir(filepath.Join(state, "outbox"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range dir { // Sorted.
		if strings.Count(e.Name(), "-") == 3 {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// fill makes an outbox in which n pushes wait, of each group in turn. The first of each
// group is added; the others are copies of its file that nobody waits for.
func fill(ctx context.Context, state string, push *outbox.Entry, gateway string, n int) error {
	box, err := outbox.Open(state)
	if err != nil {
		return err
	}
	defer func() { _ = box.Close() }()
	for group := range waitingGroups {
		if err := box.Add(ctx, to(push, gateway, group)); err != nil {
			return err
		}
	}
	names, err := entries(state)
	if err != nil {
		return err
	}
	contents := make([][]byte, len(names))
	for i, name := range names {
		if contents[i], err = os.ReadFile(filepath.Join(state, "outbox", name)); err != nil {
			return err
		}
	}
	for i := len(names); i < n; i++ {
		group := i % len(names)
		_, rest, _ := strings.Cut(names[group], "-")
		name := fmt.Sprintf("%020d-%s", i+1, rest)
		if err := os.WriteFile(filepath.Join(state, "outbox", name), contents[group], 0o600); err != nil {
			return err
		}
	}
	// It holds the last number; without it the next push looks for that.
	if err := os.Remove(filepath.Join(state, "outbox", "lock")); err != nil {
		return err
	}
	stats, err := box.Stats(gateway)
	if err == nil && stats.Waiting[gateway] != n {
		err = fmt.Errorf("%d pushes wait, not %d", stats.Waiting[gateway], n)
	}
	return errors.Join(err, settle(state))
}

// settle waits until all that was written is on the disk, so that what follows does not.
func settle(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return unix.Syncfs(int(f.Fd()))
}

// adds measures how many pushes an outbox takes each second, beside what it costs to write
// their files so that they survive a loss of power.
func adds(ctx context.Context, dir string, push *outbox.Entry) error {
	state, bare := filepath.Join(dir, "state"), filepath.Join(dir, "bare")
	const gateway = "http://pgw:9091"
	if err := fill(ctx, state, push, gateway, waiting); err != nil {
		return err
	}
	if err := os.Mkdir(bare, 0o700); err != nil {
		return err
	}
	names, err := entries(state)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(filepath.Join(state, "outbox", names[0]))
	if err != nil {
		return err
	}

	// Each writer opens the outbox for itself, as processes do: they share the lock on disk
	// and nothing else.
	var boxes []*outbox.Outbox
	for range writers {
		box, err := outbox.Open(state)
		if err != nil {
			return err
		}
		defer func() { _ = box.Close() }()
		boxes = append(boxes, box)
	}
	if err := boxes[0].Add(ctx, to(push, gateway, 0)); err != nil { // It makes the lock file anew.
		return err
	}
	add := func(writer, i int) error { return boxes[writer].Add(ctx, to(push, gateway, i%waitingGroups)) }
	write := func(writer, i int) error { return durable(bare, fmt.Sprintf("%d-%d", writer, i), content) }
	measured := []struct {
		do      func(writer, i int) error
		writers int
		rates   []float64
	}{{do: add, writers: 1}, {do: add, writers: writers}, {do: write, writers: 1}, {do: write, writers: writers}}
	err = onMeasuredCore(ctx, func() error {
		for range rounds {
			for i := range measured {
				m := &measured[i]
				rate, err := perSecond(m.writers, m.do)
				if err != nil {
					return err
				}
				m.rates = append(m.rates, rate)
				if err := empty(state, bare); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}

	same := func(v float64) float64 { return v }
	fmt.Printf("Pushes accepted each second where %d wait; %d rounds of %d pushes:\n", waiting, rounds, addsInRound)
	t := table()
	_, _ = fmt.Fprintf(t, "\tone writer\t%d writers\t\n", writers)
	_, _ = fmt.Fprintf(t, "outbox\t%.0f\t%.0f\t\n", median(measured[0].rates), median(measured[1].rates))
	_, _ = fmt.Fprintf(t, "create, write, fsync, rename, fsync the directory\t%.0f\t%.0f\t\n", median(measured[2].rates), median(measured[3].rates))
	_, _ = fmt.Fprintf(t, "ratio\t%.2f\t%.2f\t\n", ratioOf(measured[0].rates, measured[2].rates, same), ratioOf(measured[1].rates, measured[3].rates, same))
	return endTable(t)
}

// perSecond has a number of writers do something as often as a round does, together, and
// returns how often that was each second.
func perSecond(writers int, do func(writer, i int) error) (float64, error) {
	var group errgroup.Group
	begin := time.Now()
	for writer := range writers {
		group.Go(func() error {
			for i := range addsInRound / writers {
				if err := do(writer, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := group.Wait()
	return addsInRound / time.Since(begin).Seconds(), err
}

// durable writes a file so that it survives a loss of power, with no more than that takes.
func durable(dir, name string, content []byte) error {
	temp := filepath.Join(dir, "new-"+name)
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close(), os.Rename(temp, filepath.Join(dir, name))); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// empty removes what a round has added.
func empty(state, bare string) error {
	names, err := entries(state)
	if err != nil {
		return err
	}
	for _, name := range names[waiting:] {
		if err := os.Remove(filepath.Join(state, "outbox", name)); err != nil {
			return err
		}
	}
	written, err := os.ReadDir(bare)
	if err != nil {
		return err
	}
	for _, e := range written {
		if err := os.Remove(filepath.Join(bare, e.Name())); err != nil {
			return err
		}
	}
	return settle(state)
}

// deliveries measures how many waiting pushes promferry flush brings to a Pushgateway each
// second, beside one curl that posts the same ones in the same order over one connection.
func deliveries(ctx context.Context, promferry, dir string, push *outbox.Entry, args ...string) error {
	gateway, err := real.Pushgateway(ctx, "", args...)
	if err != nil {
		return err
	}
	defer gateway.Kill()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	body, config := filepath.Join(dir, "body.gz"), filepath.Join(dir, "curl.conf")
	if err := os.WriteFile(body, push.Body, 0o600); err != nil {
		return err
	}
	curl := func(pushes int) error {
		if err := os.WriteFile(config, curlConfig(gateway.URL, push.ContentType, body, pushes), 0o600); err != nil {
			return err
		}
		cmd := clean(ctx, []string{"curl", "-K", config})
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			return fmt.Errorf("curl: %w: %s", err, out)
		}
		return nil
	}
	if err := curl(waitingGroups); err != nil { // From the first round on, all groups are there.
		return err
	}
	var ours, theirs []float64
	for range deliveryRounds {
		state := filepath.Join(dir, "deliver")
		if err := fill(ctx, state, push, gateway.URL, waiting); err != nil {
			return err
		}
		if err := onMeasuredCore(ctx, func() error {
			begin := time.Now()
			cmd := clean(ctx, []string{promferry, "flush", "--push.url=" + gateway.URL, "--state.dir=" + state})
			if out, err := cmd.CombinedOutput(); err != nil || string(out) != fmt.Sprintf("%d delivered\n", waiting) {
				return fmt.Errorf("flush: %w: %s", err, out)
			}
			ours = append(ours, waiting/time.Since(begin).Seconds())
			begin = time.Now()
			if err := curl(waiting); err != nil {
				return err
			}
			theirs = append(theirs, waiting/time.Since(begin).Seconds())
			return nil
		}); err != nil {
			return err
		}
		if err := os.RemoveAll(state); err != nil {
			return err
		}
	}
	name := "a Pushgateway"
	if len(args) > 0 {
		name += " with " + strings.Join(args, " ")
	}
	fmt.Printf("Pushes delivered each second to %s; %d rounds of %d pushes:\n", name, deliveryRounds, waiting)
	t := table()
	_, _ = fmt.Fprintf(t, "promferry flush\t%.0f\t\n", median(ours))
	_, _ = fmt.Fprintf(t, "curl -K, a POST each over one connection\t%.0f\t\n", median(theirs))
	_, _ = fmt.Fprintf(t, "ratio\t%.2f\t\n", ratioOf(ours, theirs, func(v float64) float64 { return v }))
	return endTable(t)
}

// curlConfig returns the configuration of a curl that does pushes, group after group.
func curlConfig(gateway, contentType, body string, pushes int) []byte {
	var b bytes.Buffer
	for i := range pushes {
		if i > 0 {
			b.WriteString("next\n")
		}
		fmt.Fprintf(&b, "url = \"%s/metrics/job/bench/instance/%d\"\nsilent\nshow-error\nfail\n", gateway, i*waitingGroups/pushes)
		fmt.Fprintf(&b, "header = \"Content-Type: %s\"\nheader = \"Content-Encoding: gzip\"\ndata-binary = \"@%s\"\n", contentType, body)
	}
	return b.Bytes()
}

// opening measures how long it takes to find out what waits, when that is much.
func opening(ctx context.Context, promferry, state string, push *outbox.Entry) error {
	const gateway = "http://127.0.0.1:1"
	if err := fill(ctx, state, push, gateway, waitingMany); err != nil {
		return err
	}
	var open, stats, list, peaks []float64
	if err := onMeasuredCore(ctx, func() error {
		for range rounds {
			begin := time.Now()
			box, err := outbox.Open(state)
			if err != nil {
				return err
			}
			groups, err := box.Waiting(ctx, gateway)
			if err != nil {
				return err
			}
			open = append(open, time.Since(begin).Seconds())
			begin = time.Now()
			s, err := box.Stats(gateway)
			if err != nil {
				return err
			}
			stats = append(stats, time.Since(begin).Seconds())
			if err := box.Close(); err != nil {
				return err
			}
			if len(groups) != waitingGroups || s.Waiting[gateway] != waitingMany {
				return fmt.Errorf("%d pushes of %d groups wait", s.Waiting[gateway], len(groups))
			}
			args := []string{promferry, "flush", "--list", "--push.url=" + gateway, "--state.dir=" + state}
			begin = time.Now()
			out, err := clean(ctx, args).Output()
			if err != nil {
				return err
			}
			list = append(list, time.Since(begin).Seconds())
			if lines := bytes.Count(out, []byte{'\n'}); lines != waitingMany+1 {
				return fmt.Errorf("flush --list has %d lines", lines)
			}
			peak, err := peakOf(ctx, args)
			if err != nil {
				return err
			}
			peaks = append(peaks, peak)
		}
		return nil
	}); err != nil {
		return err
	}
	fmt.Printf("Where %d pushes wait; %d rounds; the directory is in the page cache:\n", waitingMany, rounds)
	t := table()
	_, _ = fmt.Fprintln(t, "\tmedian ms\tslowest ms\tpeak MiB\t")
	_, _ = fmt.Fprintf(t, "open the outbox and group what waits\t%.0f\t%.0f\t\t\n", 1000*median(open), 1000*slices.Max(open))
	_, _ = fmt.Fprintf(t, "count it, for the metrics\t%.0f\t%.0f\t\t\n", 1000*median(stats), 1000*slices.Max(stats))
	_, _ = fmt.Fprintf(t, "promferry flush --list, which reads every file\t%.0f\t%.0f\t%.0f\t\n", 1000*median(list), 1000*slices.Max(list), mib(median(peaks)))
	return endTable(t)
}
