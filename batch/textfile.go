package batch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/pushgw"
)

// writeTextfile does with a file for the textfile collector of a node_exporter what an add
// does with a group: the families replace those of the same names, and the others stay.
// The series have the grouping labels but instance, which is the node's.
func writeTextfile(ctx context.Context, dir string, key pushgw.GroupingKey, families []*dto.MetricFamily) error {
	// A signal ends the pushing, but not this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), textfilePatience)
	defer cancel()
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if err := lockDir(ctx, d); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	path := filepath.Join(dir, "promferry-"+fileName(key)+".prom")
	have, err := readTextfile(ctx, path)
	if err != nil {
		return err
	}
	for _, family := range families {
		have = slices.DeleteFunc(have, func(f *dto.MetricFamily) bool { return f.GetName() == family.GetName() })
		have = append(have, withLabels(family, key))
	}
	slices.SortFunc(have, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	// The collector reads what ends in .prom.
	temp, err := os.CreateTemp(dir, ".promferry-*.tmp")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }() // Renamed where all went well.
	err = errors.Join(exposition.Write(temp, have, exposition.Text), temp.Chmod(0o644), temp.Sync(), temp.Close())
	if err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}

// textfilePatience is how long it may take to write a textfile.
const textfilePatience = 5 * time.Second

// lockDir waits for the lock of the textfile directory: two runs at the same time must not
// lose what the other one writes.
func lockDir(ctx context.Context, d *os.File) error {
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return errors.New("held by another process")
		}
	}
}

// readTextfile returns the families of a textfile, none where there is no file. One that
// is damaged is written anew.
func readTextfile(ctx context.Context, path string) ([]*dto.MetricFamily, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxMetricsFile))
	if err != nil {
		return nil, err
	}
	families, _, err := exposition.Read(ctx, b, "")
	if ctx.Err() != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return families, nil
}

// withLabels returns a copy of family whose series have the labels of a group.
func withLabels(family *dto.MetricFamily, key pushgw.GroupingKey) *dto.MetricFamily {
	labels := key.AllLabels()
	delete(labels, model.InstanceLabel)
	f := &dto.MetricFamily{Name: family.Name, Help: family.Help, Type: family.Type}
	for _, m := range family.GetMetric() {
		series := &dto.Metric{Gauge: m.Gauge, Counter: m.Counter, Untyped: m.Untyped, Summary: m.Summary, Histogram: m.Histogram}
		for _, name := range slices.Sorted(maps.Keys(labels)) {
			series.Label = append(series.Label, &dto.LabelPair{Name: &name, Value: new(labels[name])})
		}
		series.Label = append(series.Label, m.GetLabel()...)
		f.Metric = append(f.Metric, series)
	}
	return f
}
