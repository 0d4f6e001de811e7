package batch

import (
	"context"
	"crypto/rand"
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
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if err := lockDir(ctx, d); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	name := "promferry-" + fileName(key) + ".prom"
	have, err := readTextfile(ctx, root, name)
	if err != nil && !errors.Is(err, errNotOurs) {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if err := replaceTextfile(root, name, withFamilies(have, families, key)); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w; it was written anew, without what was in it", filepath.Join(dir, name), err)
	}
	return nil
}

// withFamilies returns have with families in the place of those of the same names.
func withFamilies(have, families []*dto.MetricFamily, key pushgw.GroupingKey) []*dto.MetricFamily {
	for _, family := range families {
		have = slices.DeleteFunc(have, func(f *dto.MetricFamily) bool { return f.GetName() == family.GetName() })
		have = append(have, withLabels(family, key))
	}
	slices.SortFunc(have, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return have
}

// textfileMode is that of a textfile, which the collector reads as another user.
const textfileMode = 0o644

// replaceTextfile writes a textfile, which is there as it was or as it is to be.
func replaceTextfile(root *os.Root, name string, families []*dto.MetricFamily) error {
	unfinished := ".promferry-" + rand.Text() + ".tmp" // The collector reads what ends in .prom.
	temp, err := root.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_EXCL, textfileMode)
	if err != nil {
		return err
	}
	err = errors.Join(exposition.Write(temp, families, exposition.Text), temp.Chmod(textfileMode), temp.Sync(), temp.Close())
	if err == nil {
		err = root.Rename(unfinished, name)
	}
	if err != nil {
		return errors.Join(err, root.Remove(unfinished))
	}
	return nil
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

// errNotOurs is the error for a textfile that this process's user did not write. It may be a
// link to a file that only root can read.
var errNotOurs = errors.New("not a file that this user wrote")

// ours reports whether a file is as replaceTextfile makes it.
func ours(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode() == textfileMode && stat.Nlink == 1 && int(stat.Uid) == os.Geteuid()
}

// readTextfile returns the families of a textfile, none where there is no file. One that
// is damaged is written anew.
func readTextfile(ctx context.Context, root *os.Root, name string) ([]*dto.MetricFamily, error) {
	info, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !ours(info) {
		return nil, errNotOurs
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	// Whoever owns the directory may have put another one there.
	if info, err = f.Stat(); err != nil || !ours(info) {
		return nil, errNotOurs
	}
	b, err := io.ReadAll(io.LimitReader(f, maxMetricsFile))
	if err != nil {
		return nil, err
	}
	families, _, err := exposition.Read(ctx, b, "")
	if ctx.Err() != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
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
