package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/outbox"
)

const gateway = "http://127.0.0.1:9091"

func open(t testing.TB, dir string) *outbox.Outbox {
	t.Helper()
	o, err := outbox.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o
}

func entry(op outbox.Op, job, body string) *outbox.Entry {
	return &outbox.Entry{
		Op: op, Gateway: gateway, Job: job, Labels: map[string]string{"instance": "web-1"},
		At: time.Unix(1790000000, 0).UTC(), ContentType: "text/plain", Body: []byte(body),
	}
}

func add(t testing.TB, o *outbox.Outbox, entries ...*outbox.Entry) {
	t.Helper()
	for _, e := range entries {
		if err := o.Add(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
}

// deliver delivers all that waits, and returns what was sent, "job op body". Those bodies
// for which fail has an error fail.
func deliver(t testing.TB, o *outbox.Outbox, fail map[string]error) (sent []string, rejected int) {
	t.Helper()
	waiting, err := o.Waiting(t.Context(), gateway)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range waiting {
		d, _ := o.Deliver(t.Context(), w, time.Second, func(_ context.Context, e *outbox.Entry) error {
			sent = append(sent, fmt.Sprintf("%s %s %s", e.Job, e.Op, e.Body))
			return fail[string(e.Body)]
		})
		rejected += len(d.Rejected)
	}
	return sent, rejected
}

func TestEntriesComeBackAsTheyWere(t *testing.T) {
	o := open(t, t.TempDir())
	want := &outbox.Entry{
		Op: outbox.Add, Gateway: "https://pgw:9091/prefix", Job: "a b/ü", Labels: map[string]string{"e": "", "p": "/var\n"},
		At: time.Unix(1790000000, 123456789).UTC(), ContentType: "text/plain; version=0.0.4", Body: []byte("\x1f\x8b\n\n{"),
	}
	add(t, o, want)
	waiting, err := o.Waiting(t.Context(), want.Gateway)
	if err != nil || len(waiting) != 1 {
		t.Fatalf("waiting: %v, %v", waiting, err)
	}
	var got *outbox.Entry
	if _, err := o.Deliver(t.Context(), waiting[0], time.Second, func(_ context.Context, e *outbox.Entry) error {
		got = e
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if waiting, err := o.Waiting(t.Context(), want.Gateway); err != nil || len(waiting) != 0 {
		t.Errorf("after the delivery: %v, %v", waiting, err)
	}
}

func TestOrder(t *testing.T) {
	for _, test := range []struct {
		name     string
		entries  []*outbox.Entry
		fail     map[string]error
		sent     []string
		rejected int
		left     []string
	}{
		{
			name:    "adds keep their order",
			entries: []*outbox.Entry{entry(outbox.Add, "a", "1"), entry(outbox.Add, "b", "2"), entry(outbox.Add, "a", "3"), entry(outbox.Add, "a", "4")},
			sent:    []string{"a add 1", "a add 3", "a add 4", "b add 2"},
		},
		{
			name:    "a put supersedes older puts and needs no older adds",
			entries: []*outbox.Entry{entry(outbox.Put, "a", "1"), entry(outbox.Add, "a", "2"), entry(outbox.Put, "a", "3"), entry(outbox.Add, "a", "4")},
			sent:    []string{"a put 3", "a add 4"},
		},
		{
			name:    "so does a delete",
			entries: []*outbox.Entry{entry(outbox.Put, "a", "1"), entry(outbox.Delete, "a", ""), entry(outbox.Add, "a", "4")},
			sent:    []string{"a delete ", "a add 4"},
		},
		{
			name:    "not those of another group",
			entries: []*outbox.Entry{entry(outbox.Put, "a", "1"), entry(outbox.Put, "b", "2")},
			sent:    []string{"a put 1", "b put 2"},
		},
		{
			name:    "a failure keeps what follows in its group, and no other",
			entries: []*outbox.Entry{entry(outbox.Add, "a", "1"), entry(outbox.Add, "a", "2"), entry(outbox.Add, "b", "3")},
			fail:    map[string]error{"1": errors.New("away")},
			sent:    []string{"a add 1", "b add 3"},
			left:    []string{"a add 1", "a add 2"},
		},
		{
			name:     "a rejection does not",
			entries:  []*outbox.Entry{entry(outbox.Add, "a", "1"), entry(outbox.Add, "a", "2")},
			fail:     map[string]error{"1": &outbox.RejectedError{Err: errors.New("bad")}},
			sent:     []string{"a add 1", "a add 2"},
			rejected: 1,
		},
		{
			name:     "adds before a put that is rejected are not lost",
			entries:  []*outbox.Entry{entry(outbox.Add, "a", "1"), entry(outbox.Put, "a", "2"), entry(outbox.Add, "a", "3")},
			fail:     map[string]error{"2": &outbox.RejectedError{Err: errors.New("bad")}},
			sent:     []string{"a put 2", "a add 1", "a add 3"},
			rejected: 1,
		},
		{
			name:    "nor before one that fails",
			entries: []*outbox.Entry{entry(outbox.Add, "a", "1"), entry(outbox.Put, "a", "2")},
			fail:    map[string]error{"2": errors.New("away")},
			sent:    []string{"a put 2"},
			left:    []string{"a put 2"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := open(t, t.TempDir())
			add(t, o, test.entries...)
			sent, rejected := deliver(t, o, test.fail)
			if !slices.Equal(sent, test.sent) || rejected != test.rejected {
				t.Errorf("sent %q with %d rejected, want %q with %d", sent, rejected, test.sent, test.rejected)
			}
			if left, _ := deliver(t, o, nil); !slices.Equal(left, test.left) {
				t.Errorf("then %q, want %q", left, test.left)
			}
			if left, _ := deliver(t, o, nil); len(left) != 0 {
				t.Errorf("at the end %q", left)
			}
		})
	}
}

func TestPutsDoNotPileUp(t *testing.T) {
	o := open(t, t.TempDir())
	for i := range 10 {
		add(t, o, entry(outbox.Put, "a", strconv.Itoa(i)), entry(outbox.Add, "a", "added"))
	}
	stats, err := o.Stats(gateway, "http://elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	if stats.Waiting[gateway] != 11 || stats.Waiting["http://elsewhere"] != 0 || stats.Other != 0 {
		t.Errorf("%+v, want the last put and ten adds", stats)
	}
}

// TestNumbers checks that the order survives what can happen to the file with the last
// number.
func TestNumbers(t *testing.T) {
	for name, content := range map[string]string{
		"gone":         "",
		"damaged":      "\x00\x00\x00",
		"another boot": "00000000-0000-0000-0000-000000000000 00000000000000000001\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := open(t, dir)
			add(t, o, entry(outbox.Add, "a", "1"), entry(outbox.Add, "a", "2"))
			lock := filepath.Join(dir, "outbox", "lock")
			if err := os.Truncate(lock, 0); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(lock, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			add(t, o, entry(outbox.Add, "a", "3"))
			if sent, _ := deliver(t, o, nil); !slices.Equal(sent, []string{"a add 1", "a add 2", "a add 3"}) {
				t.Errorf("sent %q", sent)
			}
		})
	}
}

// TestRejectedStay has numbers begin anew after another boot: what was rejected before is not
// replaced.
func TestRejectedStay(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	refused := map[string]error{"1": &outbox.RejectedError{Err: errors.New("bad")}}
	for range 3 {
		add(t, o, entry(outbox.Add, "a", "1"))
		if _, rejected := deliver(t, o, refused); rejected != 1 {
			t.Fatalf("%d rejected", rejected)
		}
		if err := os.Truncate(filepath.Join(dir, "outbox", "lock"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := o.List(); err != nil || len(list) != 3 {
		t.Errorf("%+v, %v; want three", list, err)
	}
}

// TestDamage has files that are not as they were written, as a disk may leave them: each is
// set aside, and costs the others nothing.
func TestDamage(t *testing.T) {
	for name, damage := range map[string]func(b []byte) []byte{
		"empty":        func([]byte) []byte { return nil },
		"cut":          func(b []byte) []byte { return b[:len(b)-1] },
		"cut header":   func(b []byte) []byte { return b[:20] },
		"zeros":        func(b []byte) []byte { return make([]byte, len(b)) },
		"one bit":      func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"another body": func(b []byte) []byte { return append(b, "more"...) },
		"another job":  func(b []byte) []byte { return []byte(strings.Replace(string(b), `"a"`, `"b"`, 1)) },
		"newer":        func(b []byte) []byte { return []byte(strings.Replace(string(b), `"version":1`, `"version":2`, 1)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := open(t, dir)
			add(t, o, entry(outbox.Add, "a", "1"))
			file := only(t, filepath.Join(dir, "outbox", "0*"))
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			add(t, o, entry(outbox.Add, "a", "2"))
			sent, rejected := deliver(t, o, nil)
			if !slices.Equal(sent, []string{"a add 2"}) || rejected != 1 {
				t.Errorf("sent %q, %d rejected", sent, rejected)
			}
			list, err := o.List()
			if err != nil || len(list) != 1 || !strings.Contains(list[0].Rejected, filepath.Base(file)) {
				t.Errorf("list: %+v, %v", list, err)
			}
		})
	}
}

func only(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: %q, %v", pattern, files, err)
	}
	return files[0]
}

// TestUnreadable has something else in the place of an entry: it is set aside, and what
// follows is delivered.
func TestUnreadable(t *testing.T) {
	for name, replace := range map[string]func(string) error{
		"folder": func(path string) error { return os.Mkdir(path, 0o700) },
		"pipe":   func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"link":   func(path string) error { return os.Symlink("/etc/hostname", path) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := open(t, dir)
			add(t, o, entry(outbox.Add, "a", "1"))
			file := only(t, filepath.Join(dir, "outbox", "0*"))
			if err := errors.Join(os.Remove(file), replace(file)); err != nil {
				t.Fatal(err)
			}
			add(t, o, entry(outbox.Add, "a", "2"))
			if sent, rejected := deliver(t, o, nil); !slices.Equal(sent, []string{"a add 2"}) || rejected != 1 {
				t.Errorf("sent %q, %d rejected", sent, rejected)
			}
		})
	}
}

// TestNumberIsTaken has a lock file that somebody set back: no entry is replaced.
func TestNumberIsTaken(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	add(t, o, entry(outbox.Add, "a", "1"), entry(outbox.Add, "a", "2"))
	lock := filepath.Join(dir, "outbox", "lock")
	b, err := os.ReadFile(lock)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(lock, []byte(strings.Replace(string(b), "2\n", "0\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	add(t, o, entry(outbox.Add, "a", "3"))
	if sent, _ := deliver(t, o, nil); !slices.Equal(sent, []string{"a add 1", "a add 2", "a add 3"}) {
		t.Errorf("sent %q", sent)
	}
}

// TestHostileDirectory has what a user could put into their own outbox, with which root
// works: nothing outside is touched, nothing hangs.
func TestHostileDirectory(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := open(t, dir)
	add(t, o, entry(outbox.Add, "a", "1"))
	box := filepath.Join(dir, "outbox")
	file := only(t, filepath.Join(box, "0*"))
	later := strings.Replace(file, "00001-", "00002-", 1)
	pipe := strings.Replace(file, "00001-", "00003-", 1)
	if err := os.Symlink(outside, later); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(box, "README"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if sent, _ := deliver(t, o, nil); !slices.Equal(sent, []string{"a add 1"}) {
		t.Errorf("sent %q", sent)
	}
	if err := os.Remove(filepath.Join(box, "lock")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(box, "lock")); err != nil {
		t.Fatal(err)
	}
	if err := o.Add(t.Context(), entry(outbox.Add, "a", "2")); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("added behind a link: %v", err)
	}
	if b, err := os.ReadFile(outside); err != nil || string(b) != "precious" {
		t.Errorf("outside is %q, %v", b, err)
	}

	// A whole folder that leads elsewhere.
	other := t.TempDir()
	if err := os.Symlink(filepath.Dir(outside), filepath.Join(other, "outbox")); err != nil {
		t.Fatal(err)
	}
	if _, err := outbox.Open(other); err == nil {
		t.Error("opened an outbox that is a link")
	}
}

func TestCleanRemovesWhatWasLeftBehind(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	var names []string
	for _, age := range []time.Duration{2 * time.Hour, time.Minute} {
		name := filepath.Join(dir, "outbox", ".new-"+age.String())
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if err := o.Clean(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(names[0]); !os.IsNotExist(err) {
		t.Errorf("the old one: %v", err)
	}
	if _, err := os.Stat(names[1]); err != nil {
		t.Errorf("the new one, which somebody may be writing: %v", err)
	}
}

// TestOneProcessAtATimeDeliversAGroup has a second one that comes while the first sends.
func TestOneProcessAtATimeDeliversAGroup(t *testing.T) {
	dir := t.TempDir()
	first, second := open(t, dir), open(t, dir)
	add(t, first, entry(outbox.Add, "a", "1"), entry(outbox.Add, "b", "2"))
	waiting, err := second.Waiting(t.Context(), gateway)
	if err != nil || len(waiting) != 2 {
		t.Fatalf("%v, %v", waiting, err)
	}
	_, err = first.Deliver(t.Context(), waiting[0], time.Second, func(ctx context.Context, _ *outbox.Entry) error {
		if _, err := second.Deliver(ctx, waiting[0], time.Millisecond, nil); !errors.Is(err, outbox.ErrBusy) {
			t.Errorf("the second: %v, want ErrBusy", err)
		}
		d, err := second.Deliver(ctx, waiting[1], time.Millisecond, func(context.Context, *outbox.Entry) error { return nil })
		if err != nil || d.Delivered != 1 {
			t.Errorf("another group: %+v, %v", d, err)
		}
		// Adding goes on beside a delivery.
		return second.Add(ctx, entry(outbox.Add, "a", "3"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if sent, _ := deliver(t, second, nil); !slices.Equal(sent, []string{"a add 3"}) {
		t.Errorf("then %q", sent)
	}
}

// TestConcurrent has several users of one directory, each with handles of its own as
// processes have, that add and deliver at the same time: all arrive, each group in order.
func TestConcurrent(t *testing.T) {
	const adders, deliverers, each = 4, 3, 50
	dir := t.TempDir()
	var mu sync.Mutex
	got := make(map[string][]int)
	var adding, delivering sync.WaitGroup
	done := make(chan struct{})
	for i := range adders {
		o := open(t, dir)
		adding.Go(func() {
			for n := range each {
				if err := o.Add(t.Context(), entry(outbox.Add, fmt.Sprint("job", i), strconv.Itoa(n))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	round := func(o *outbox.Outbox) {
		waiting, err := o.Waiting(t.Context(), gateway)
		if err != nil {
			t.Error(err)
		}
		for _, w := range waiting {
			_, err := o.Deliver(t.Context(), w, time.Millisecond, func(_ context.Context, e *outbox.Entry) error {
				n, err := strconv.Atoi(string(e.Body))
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				got[e.Job] = append(got[e.Job], n)
				return nil
			})
			if err != nil && !errors.Is(err, outbox.ErrBusy) {
				t.Error(err)
			}
		}
	}
	for range deliverers {
		o := open(t, dir)
		delivering.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					round(o)
				}
			}
		})
	}
	adding.Wait()
	close(done)
	delivering.Wait()
	round(open(t, dir))
	for i := range adders {
		numbers := got[fmt.Sprint("job", i)]
		if len(numbers) != each || !slices.IsSorted(numbers) {
			t.Errorf("job%d: %v", i, numbers)
		}
	}
}

func TestOpenFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := outbox.Open(filepath.Join(file, "state")); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("got %v, want an error that names %s", err, file)
	}
}
