package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/promferry/promferry/internal/statedir"
)

// disk keeps records by number in a file of bbolt. It is safe for concurrent use.
type disk struct {
	path    string
	info    fs.FileInfo // of the file that is open
	db      *bolt.DB
	metrics *diskMetrics
	// step is called before and after each write. Tests end the process there.
	step func(string)

	mu   sync.Mutex
	next *batch // gathers changes while others are written

	writing sync.Mutex
	all     tally // of what is in the file; changed by who holds writing
}

// change is what a record is from now on; nil: it is gone.
type change struct {
	number uint64
	record []byte
}

// batch is a number of changes that are written, and synced, at once.
type batch struct {
	changes []change
	done    chan struct{} // closed when it is written, or err says why not
	err     error
}

// bucketName is where records are in the file.
var bucketName = []byte("groups")

// lockTime is how long to wait for who has the file open.
const lockTime = time.Second

// openDisk opens the file at path, and makes it where there is none.
func openDisk(path string, r prometheus.Registerer) (_ *disk, err error) {
	defer func() {
		if p := recover(); p != nil { // So bbolt tells of some damages.
			err = damaged(path, p)
		}
	}()
	dir, err := statedir.OpenExisting(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	name := filepath.Base(path)
	if !dir.Has(name) {
		if err := makeFile(dir, name); err != nil {
			return nil, fmt.Errorf("make %s: %w; mend that, or name another directory (--state.dir)", path, err)
		}
	}
	// The name has to outlive a power failure as well, also if who made it was killed here.
	if err := dir.Sync(); err != nil {
		return nil, err
	}
	file, err := dir.OpenRW(name)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil {
		err = checkFile(file)
	}
	if err != nil {
		_ = file.Close()
		if d, ok := errors.AsType[*damageError](err); ok {
			return nil, damaged(path, d)
		}
		return nil, err
	}
	db, err := openBolt(file)
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("open %s: another process has it open", path)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	d := &disk{path: path, info: info, db: db, metrics: newDiskMetrics(r), next: newBatch(), step: func(string) {}}
	err = db.View(func(tx *bolt.Tx) error {
		if bucket := tx.Bucket(bucketName); bucket != nil {
			d.all = tally(bucket.Sequence())
		}
		return nil
	})
	return d, err
}

// openBolt opens a file that is open, so that no other one can be in its place by now. It
// closes the file also on an error.
func openBolt(file *os.File) (*bolt.DB, error) {
	// What is free is found out when the file is opened: then a write needs not tell it.
	options := &bolt.Options{Timeout: lockTime, NoFreelistSync: true, FreelistType: bolt.FreelistMapType}
	options.OpenFile = func(string, int, os.FileMode) (*os.File, error) { return file, nil }
	return bolt.Open(file.Name(), 0, options)
}

// makeFile makes an empty file, which has its name only when it is whole.
func makeFile(dir *statedir.Dir, name string) error {
	unfinished := name + ".new"
	if err := dir.Remove(unfinished); err != nil {
		return err
	}
	file, err := dir.OpenRW(unfinished)
	if err != nil {
		return err
	}
	db, err := openBolt(file)
	if err != nil {
		return errors.Join(err, dir.Remove(unfinished))
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket(bucketName)
		return err
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return errors.Join(err, dir.Remove(unfinished))
	}
	return dir.Rename(unfinished, name)
}

func damaged(path string, why any) error {
	return fmt.Errorf("%s is damaged: %v; move it away to begin without the groups in it", path, why)
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

func (d *disk) close() error { return d.db.Close() }

// write writes changes, all or none of them, and returns when they would outlive a power
// failure. While one writes, others gather, and are then written together.
func (d *disk) write(changes ...change) error {
	d.mu.Lock()
	b := d.next
	first := len(b.changes) == 0
	b.changes = append(b.changes, changes...)
	d.mu.Unlock()
	if !first {
		<-b.done
		return b.err
	}
	d.writing.Lock()
	defer d.writing.Unlock()
	d.mu.Lock()
	d.next = newBatch()
	d.mu.Unlock()
	d.step("write")
	begin := time.Now()
	if err := d.commit(b.changes); err != nil {
		if p, ok := errors.AsType[*fs.PathError](err); ok {
			err = p.Err // The name comes once.
		}
		b.err = fmt.Errorf("write %s: %w", d.path, err)
		d.metrics.failures.Inc()
	}
	d.metrics.duration.Observe(time.Since(begin).Seconds())
	d.step("written")
	close(b.done)
	return b.err
}

// commit writes and syncs.
func (d *disk) commit(changes []change) (err error) {
	defer func() {
		if p := recover(); p != nil { // Others wait for what becomes of their changes.
			err = damaged(d.path, p)
		}
	}()
	// What is written to a file without this name is gone with the process.
	if info, err := os.Lstat(d.path); err != nil || !os.SameFile(info, d.info) {
		return errors.New("it was moved or deleted while the gateway had it open: restart the gateway")
	}
	all := d.all
	err = d.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketName)
		for _, c := range changes {
			key := binary.BigEndian.AppendUint64(nil, c.number)
			if old := bucket.Get(key); len(old) >= sumSize {
				all = all.without(binary.BigEndian.Uint32(old))
			}
			var err error
			if c.record == nil {
				err = bucket.Delete(key)
			} else {
				sum := checksum(key, c.record)
				all = all.with(sum)
				err = bucket.Put(key, append(binary.BigEndian.AppendUint32(nil, sum), c.record...))
			}
			if err != nil {
				return err
			}
		}
		return bucket.SetSequence(uint64(all))
	})
	if err == nil {
		d.all = all
	}
	return err
}

// tally tells whether all records are there, and none of an earlier time: in its lower half how
// many there are, in its upper half their checksums, XORed. The file has it as the sequence of the
// bucket. Pages of bbolt have no checksums, so that one which is damaged can lead to another one.
type tally uint64

func (t tally) with(sum uint32) tally    { return (t ^ tally(sum)<<32) + 1 }
func (t tally) without(sum uint32) tally { return (t - 1) ^ tally(sum)<<32 }

func (t tally) records() int { return int(uint32(t)) } //nolint:gosec // The lower half.

// sumSize is the length of what is before each record in the file: its checksum.
const sumSize = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(key, record []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, record)
}

// each calls f with each record, in the order of their numbers; with an error, the record is
// not what was written. It is good until f returns. Lost tells how many records are missing, and
// changed that what is there is not all of what was written last.
func (d *disk) each(f func(number uint64, record []byte, err error)) (lost int, changed bool, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = damaged(d.path, p)
		}
	}()
	var written tally
	d.all = 0
	err = d.db.View(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketName)
		if bucket == nil {
			return damaged(d.path, "there is no list of groups in it")
		}
		written = tally(bucket.Sequence())
		return bucket.ForEach(func(key, b []byte) error {
			if len(key) != 8 {
				return damaged(d.path, fmt.Sprintf("a key of %d bytes", len(key)))
			}
			var err error
			if len(b) >= sumSize {
				d.all = d.all.with(binary.BigEndian.Uint32(b))
			}
			record := b[min(sumSize, len(b)):]
			if len(b) < sumSize || binary.BigEndian.Uint32(b) != checksum(key, record) {
				err = errors.New("its checksum is wrong")
			}
			f(binary.BigEndian.Uint64(key), record, err)
			return nil
		})
	})
	return written.records() - d.all.records(), written != d.all, err
}

type diskMetrics struct {
	duration prometheus.Histogram
	failures prometheus.Counter
}

func newDiskMetrics(r prometheus.Registerer) *diskMetrics {
	m := &diskMetrics{
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "promferry_gateway_disk_write_duration_seconds", Help: "How long it took to write changed groups to disk, several at a time, and to sync them.",
			Buckets: []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5},
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "promferry_gateway_disk_write_failures_total", Help: "Writes of groups to disk that failed. Pushes that had to be on disk were answered with 503.",
		}),
	}
	r.MustRegister(m.duration, m.failures)
	return m
}
