package gateway

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// onDisk has groups of all sizes in a file, which has pages that are free. It returns the file,
// and what the groups serve, by path, after the last write and before it.
func onDisk(t *testing.T) (file []byte, after, before map[string]string) {
	t.Helper()
	g := newTest(t, func(c *Config) { c.File = filepath.Join(t.TempDir(), "groups.db") })
	random := rand.New(rand.NewChaCha8([32]byte{1}))
	for i := range 60 {
		var body strings.Builder
		body.WriteString("up 1\n")
		for n := range 1 << (i % 8) {
			fmt.Fprintf(&body, "a_%d{b=\"%x\"} %d\n", n, random.Uint64(), random.Uint64())
		}
		put(t, g, fmt.Sprintf("/metrics/job/j/instance/%d", i), body.String())
	}
	for i := 0; i < 60; i += 5 {
		before = served(g)
		want(t, ask(g, http.MethodDelete, fmt.Sprintf("/metrics/job/j/instance/%d", i), ""), http.StatusAccepted)
	}
	after = served(g)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(g.config.File)
	if err != nil {
		t.Fatal(err)
	}
	return file, after, before
}

// served returns what the target of each group serves, by path.
func served(g *Gateway) map[string]string {
	pages := make(map[string]string)
	for _, s := range g.store.states(time.Now()) {
		pages[s.group.path] = ask(g, http.MethodGet, "/groups"+s.group.path+"/metrics", "").Body.String()
	}
	return pages
}

// openDamaged opens a gateway on a file. Nothing but a message may come of what is wrong with
// it: groups are as they were in one of these states, and of each that is not there the log
// tells, unless the error tells that all of the file is damaged.
func openDamaged(t *testing.T, file string, states ...map[string]string) (refused bool, leftOut int) {
	t.Helper()
	var log bytes.Buffer
	registry := prometheus.NewRegistry()
	g, err := New(Config{
		StoreConfig:  StoreConfig{File: file, ForgetAfter: time.Hour, MaxGroups: 100, MaxSeries: 1000, MaxGroupBytes: 1 << 24, MaxBytes: 1 << 28},
		MaxBodyBytes: 1 << 20, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		if !strings.HasPrefix(err.Error(), file+" is damaged: ") || !strings.HasSuffix(err.Error(), "; move it away to begin without the groups in it") {
			t.Errorf("the error is %v", err)
		}
		return true, 0
	}
	defer func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}()
	got := served(g)
	leftOut = strings.Count(log.String(), `level=ERROR msg="A group on disk is damaged, and left out"`)
	if strings.Contains(log.String(), `level=ERROR msg="The file is damaged: groups are lost, or are what they were before"`) {
		return false, max(1, leftOut)
	}
	if !slices.ContainsFunc(states, func(state map[string]string) bool {
		for path, page := range got {
			if state[path] != page {
				return false
			}
		}
		return len(got)+leftOut == len(state)
	}) {
		t.Errorf("of %d groups %d are there, and the log tells of %d", len(states[0]), len(got), leftOut)
	}
	return false, leftOut
}

// TestDamage damages a file in a thousand ways.
func TestDamage(t *testing.T) {
	whole, after, before := onDisk(t)
	random := rand.New(rand.NewChaCha8([32]byte{2}))
	const page = 4096
	used := len(whole) / page
	for i := used - 1; bytes.Count(whole[i*page:(i+1)*page], []byte{0}) == page; i-- {
		used-- // It is longer than what is in it.
	}
	file := filepath.Join(t.TempDir(), "groups.db")
	write := func(b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(whole)
	if refused, leftOut := openDamaged(t, file, after); refused || leftOut > 0 {
		t.Fatal("nothing is damaged, and it is refused")
	}
	anyPage := func() []byte { i := random.IntN(used); return whole[i*page : (i+1)*page] }
	for _, test := range []struct {
		name  string
		spoil func(b []byte) []byte
	}{
		{"bits of a page", func(b []byte) []byte {
			at := random.IntN(used) * page
			for range 1 + random.IntN(3) {
				b[at+random.IntN(page)] ^= 1 << random.IntN(8)
			}
			return b
		}},
		{"bits of a header", func(b []byte) []byte {
			b[random.IntN(used)*page+random.IntN(pageHeader)] ^= 1 << random.IntN(8)
			return b
		}},
		{"bits of elements", func(b []byte) []byte {
			b[random.IntN(used)*page+pageHeader+random.IntN(16*pageElement)] ^= 1 << random.IntN(8)
			return b
		}},
		{"numbers", func(b []byte) []byte {
			at := random.IntN(used)*page + 4*random.IntN(64)
			binary.NativeEndian.PutUint32(b[at:], []uint32{0, 1, 1<<31 - 1, 1 << 31, 1<<32 - 1, random.Uint32()}[random.IntN(6)])
			return b
		}},
		{"numbers of pages", func(b []byte) []byte {
			at := random.IntN(used)*page + 8*random.IntN(32)
			binary.NativeEndian.PutUint64(b[at:], []uint64{0, 1, 2, 3, uint64(random.IntN(used)), 1 << 63, random.Uint64()}[random.IntN(7)])
			return b
		}},
		{"noise", func(b []byte) []byte {
			at := random.IntN(used*page/512) * 512
			for i := range 512 {
				b[at+i] = byte(random.Uint32())
			}
			return b
		}},
		{"zeros", func(b []byte) []byte {
			clear(b[random.IntN(used)*page:][:page])
			return b
		}},
		{"another page", func(b []byte) []byte { copy(b[random.IntN(used)*page:], anyPage()); return b }},
		{"half of another", func(b []byte) []byte { copy(b[random.IntN(used)*page:], anyPage()[:page/2]); return b }},
		{"cut off", func(b []byte) []byte { return b[:random.IntN(used*page)] }},
		{"cut off and longer", func(b []byte) []byte { clear(b[random.IntN(used*page):]); return b }},
	} {
		t.Run(test.name, func(t *testing.T) {
			refusals, leftOut, tries := 0, 0, 100
			for range tries {
				write(test.spoil(bytes.Clone(whole)))
				// Where the last of the two beginnings is damaged the one before it holds.
				refused, n := openDamaged(t, file, after, before)
				if leftOut += n; refused {
					refusals++
				}
			}
			t.Logf("%d of %d refused, %d groups left out", refusals, tries, leftOut)
			if refusals+leftOut == 0 {
				t.Error("none of it was noticed")
			}
		})
	}
}

// TestNewFile opens files that are not there, and those that only look like one.
func TestNewFile(t *testing.T) {
	for _, test := range []struct {
		name  string
		files map[string]string
		err   string
	}{
		{"none", nil, ""},
		{"one that was not finished", map[string]string{"groups.db.new": "half"}, ""},
		{"empty", map[string]string{"groups.db": ""}, "groups.db is damaged: there is no begin in it; move it away"},
		{"another one's", map[string]string{"groups.db": strings.Repeat("backup\n", 2000)}, "groups.db is damaged: there is no begin in it; move it away"},
		{"no place for it", map[string]string{"groups.db.new/x": ""}, "groups.db.new: directory not empty; mend that, or name another directory (--state.dir)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range test.files {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			d, err := openDisk(filepath.Join(dir, "groups.db"), discard{})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("the error is %v, want %s", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := d.close(); err != nil {
				t.Error(err)
			}
			left, err := os.ReadDir(dir)
			if err != nil || len(left) != 1 || left[0].Name() != "groups.db" {
				t.Errorf("there is %v, %v", left, err)
			}
		})
	}
}

// TestOtherFiles has what another user may have put in the place of the file. Nothing outside the
// directory changes, and nothing waits.
func TestOtherFiles(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	for name, place := range map[string]func(path string) error{
		"symbolic link": func(path string) error { return os.Symlink(victim, path) },
		"hard link":     func(path string) error { return os.Link(victim, path) },
		"dangling link": func(path string) error { return os.Symlink(victim+".new", path) },
		"named pipe":    func(path string) error { return syscall.Mkfifo(path, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "groups.db")
			if err := place(path); err != nil {
				t.Fatal(err)
			}
			_, err := openDisk(path, discard{})
			if want := path + ": not a regular file with one name"; err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			// What is left of a file that was not finished is removed, and not what it leads to.
			if err := place(path + ".new"); err != nil {
				t.Fatal(err)
			}
			d, err := openDisk(path, discard{})
			if err != nil {
				t.Fatal(err)
			}
			if err := d.close(); err != nil {
				t.Error(err)
			}
			if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
				t.Errorf("the victim is %q, %v", b, err)
			}
			if _, err := os.Stat(victim + ".new"); err == nil {
				t.Error("a file was made behind the link")
			}
		})
	}
}

// TestSound writes and deletes records of all sizes, few and very many, so that pages split, merge
// and are used again: no file that bbolt has written is ever taken for damaged.
func TestSound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "groups.db")
	d, err := openDisk(path, discard{})
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	random := rand.New(rand.NewPCG(1, 2)) // The same each time.
	there := make(map[uint64]int)
	for round := range 400 {
		var changes []change
		n, most := 1+random.IntN(300), 1<<random.IntN(17)
		for range n {
			number := random.Uint64N(2000)
			if del := random.IntN(100) < []int{10, 50, 100}[round/20%3]; del {
				changes = append(changes, change{number: number})
				delete(there, number)
			} else {
				size := 1 + random.IntN(most)
				changes = append(changes, change{number, make([]byte, size)})
				there[number] = size
			}
		}
		if round%61 == 60 { // Nothing is left.
			for number := range there {
				changes = append(changes, change{number: number})
			}
			clear(there)
		}
		if err := d.commit(changes); err != nil {
			t.Fatal(err)
		}
		if err := checkFile(file); err != nil {
			t.Fatalf("round %d, %d records: %v", round, len(there), err)
		}
	}
	lost, changed, err := d.each(func(number uint64, record []byte, err error) {
		if err != nil || len(record) != there[number] {
			t.Errorf("record %d has %d bytes, want %d; %v", number, len(record), there[number], err)
		}
		delete(there, number)
	})
	if lost != 0 || changed || err != nil || len(there) > 0 {
		t.Errorf("%d are lost, changed %v, %v; %d are not there", lost, changed, err, len(there))
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
}
