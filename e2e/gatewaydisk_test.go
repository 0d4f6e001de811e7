//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
	"github.com/promferry/promferry/gateway"
)

// A call is a system call of a process that strace has recorded. Begin and end tell its order
// among the begins and ends of all.
type call struct {
	name, args, result string
	begin, end         int
}

var (
	callBegins  = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	callResumes = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>(.*)$`)
	callEnds    = regexp.MustCompile(`^(.*)\) += (-?\d+)[^"]*$`)
)

const callGoesOn = " <unfinished ...>"

// readCalls reads what strace has written, by the begins of the calls. One that never ended has
// no result.
func readCalls(t *testing.T, file string) []*call {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var calls []*call
	unfinished := make(map[string]*call) // by thread
	r := bufio.NewReader(f)
	for n := 0; ; n++ {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return calls
		} else if err != nil {
			t.Fatal(err)
		}
		line = strings.TrimSuffix(line, "\n")
		var c *call
		if m := callResumes.FindStringSubmatch(line); m != nil {
			c = unfinished[m[1]]
			delete(unfinished, m[1])
			if c == nil || c.name != m[2] {
				t.Fatalf("%.200q goes on and did not begin", line)
			}
			c.args += m[3]
		} else if m := callBegins.FindStringSubmatch(line); m != nil {
			c = &call{name: m[2], args: m[3], begin: n}
			calls = append(calls, c)
			if args, ok := strings.CutSuffix(c.args, callGoesOn); ok {
				c.args = args
				unfinished[m[1]] = c
				continue
			}
		} else {
			continue // The end of a thread, or a signal.
		}
		m := callEnds.FindStringSubmatch(c.args)
		if m == nil {
			if !strings.HasSuffix(c.args, "= ?") { // The process ended.
				t.Fatalf("%s has no result: %.200q", c.name, tail(c.args, 200))
			}
			continue
		}
		c.args, c.result, c.end = m[1], m[2], n
	}
}

// arguments returns the arguments that are no strings, and the string decoded.
func (c *call) arguments(t *testing.T) (others []string, text []byte) {
	t.Helper()
	args := c.args
	if before, rest, ok := strings.Cut(args, `"`); ok {
		quoted, after, ok := strings.Cut(rest, `"`)
		if !ok || strings.HasPrefix(after, "...") {
			t.Fatalf("%s is cut off", c.name)
		}
		for hex := range strings.SplitSeq(strings.TrimPrefix(quoted, `\x`), `\x`) {
			if b, err := strconv.ParseUint(hex, 16, 8); err == nil {
				text = append(text, byte(b))
			}
		}
		args = before + `"` + after
	}
	return strings.Split(args, ", "), text
}

// A diskChange is one of a file: data written at an offset, or without data its new size.
type diskChange struct {
	offset     int64
	data       []byte
	begin, end int
}

// A trace is what a gateway has done to its file, and when.
type trace struct {
	changes []diskChange
	syncs   []call // of the file
	renamed *call  // to its name
	// named is the end of the sync of the directory after that.
	named int
	// answers are the begins of the answers on each connection, by its port.
	answers map[int][]int
	end     int
}

var acceptedPort = regexp.MustCompile(`sin6?_port=htons\((\d+)\)`)

// readTrace finds out what the calls do with the file groups.db in dir.
func readTrace(t *testing.T, calls []*call, dir string) *trace {
	t.Helper()
	tr := &trace{answers: make(map[int][]int)}
	paths, ports := make(map[string]string), make(map[string]int) // by file descriptor
	isFile := func(fd string) bool {
		path := paths[fd]
		return path == filepath.Join(dir, "groups.db") || path == filepath.Join(dir, "groups.db.new")
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, c := range calls {
		tr.end = max(tr.end, c.begin+1, c.end+1)
		args, text := c.arguments(t)
		failed := strings.HasPrefix(c.result, "-")
		ours := c.name != "openat" && isFile(args[0])
		if ours && failed && c.name != "close" {
			t.Fatalf("%s failed: %s", c.name, c.result)
		}
		switch c.name {
		case "openat":
			if !failed {
				path := string(text)
				if !filepath.IsAbs(path) { // In the directory that is open as args[0].
					path = filepath.Join(paths[args[0]], path)
				}
				paths[c.result] = path
				delete(ports, c.result)
			}
		case "accept4":
			if m := acceptedPort.FindStringSubmatch(c.args); m != nil && !failed {
				port, _ := strconv.Atoi(m[1])
				ports[c.result] = port
				delete(paths, c.result)
			}
		case "close":
			delete(paths, args[0])
			delete(ports, args[0])
		case "renameat", "renameat2", "rename":
			if strings.Contains(c.args, `"`) {
				tr.renamed = c
			}
		case "pwrite64":
			if ours {
				if number(c.result) != int64(len(text)) {
					t.Fatalf("wrote %s of %d bytes", c.result, len(text))
				}
				tr.changes = append(tr.changes, diskChange{offset: number(args[len(args)-1]), data: text, begin: c.begin, end: c.end})
			}
		case "ftruncate":
			if ours {
				tr.changes = append(tr.changes, diskChange{offset: number(args[1]), begin: c.begin, end: c.end})
			}
		case "fsync", "fdatasync":
			if ours {
				tr.syncs = append(tr.syncs, *c)
			}
			if paths[args[0]] == dir && tr.renamed != nil && c.begin > tr.renamed.end && tr.named == 0 && !failed {
				tr.named = c.end
			}
		case "write", "writev", "sendto":
			if ours {
				t.Fatalf("the file is written by %s", c.name)
			}
			if port, ok := ports[args[0]]; ok && bytes.HasPrefix(text, []byte("HTTP/1.1 20")) {
				tr.answers[port] = append(tr.answers[port], c.begin)
			}
		}
	}
	return tr
}

// apply changes a file.
func (c diskChange) apply(file []byte) []byte {
	end := c.offset + int64(len(c.data))
	if c.data == nil || end > int64(len(file)) {
		if end < int64(len(file)) {
			return file[:end]
		}
		file = append(file, make([]byte, end-int64(len(file)))...)
	}
	copy(file[c.offset:], c.data)
	return file
}

// sector is what a disk writes as a whole.
const sector = 512

// torn returns those parts of a change that a disk has written when the power fails.
func (c diskChange) torn(random *rand.Rand) []diskChange {
	var parts []diskChange
	for at := 0; at < len(c.data); at += sector {
		if random.IntN(2) == 0 {
			parts = append(parts, diskChange{offset: c.offset + int64(at), data: c.data[at:min(at+sector, len(c.data))]})
		}
	}
	return parts
}

// A crashState is what a disk holds after a power failure.
type crashState struct {
	moment int
	what   string
	// There is a file of that name, or none.
	name string
	file []byte
}

// crashStates calls f with what can be on the disk when the power fails before each sync has
// ended, and after the last one: all that was synced before, and of what was not nothing, all, all
// up to some time, or any of it, in parts.
func (tr *trace) crashStates(random *rand.Rand, f func(crashState)) {
	for i := range len(tr.syncs) + 1 {
		moment := tr.end
		if i < len(tr.syncs) {
			moment = tr.syncs[i].end
		}
		covered := -1 // What ended before this is on the disk.
		for _, s := range tr.syncs {
			if s.end < moment {
				covered = max(covered, s.begin)
			}
		}
		var file []byte
		var waiting []diskChange
		for _, c := range tr.changes {
			switch {
			case c.end < covered:
				file = c.apply(file)
			case c.begin < moment:
				waiting = append(waiting, c)
			}
		}
		names := []string{"groups.db"}
		if tr.renamed == nil || moment < tr.renamed.begin {
			names = []string{"", "groups.db.new"}
		} else if tr.named == 0 || moment < tr.named {
			names = []string{"", "groups.db.new", "groups.db"}
		}
		for _, name := range names {
			state := func(what string, some []diskChange) {
				after := bytes.Clone(file)
				for _, c := range some {
					after = c.apply(after)
				}
				f(crashState{moment, what, name, after})
			}
			state("nothing", nil)
			for n := range waiting {
				state(fmt.Sprintf("the first %d", n+1), waiting[:n+1])
			}
			for range 2 * min(len(waiting), 3) {
				var some []diskChange
				for _, c := range waiting {
					switch {
					case random.IntN(3) == 0:
					case c.data != nil && random.IntN(2) == 0:
						some = append(some, c.torn(random)...)
					default:
						some = append(some, c)
					}
				}
				state("some", some)
			}
		}
	}
}

// TestGatewayPowerLoss records what a gateway writes and syncs while many push to it, and what
// it answers. Then it takes the power away at each moment: what was answered by then is there,
// whatever else of what was written has come to the disk.
func TestGatewayPowerLoss(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal("install Debian's package strace: ", err)
	}
	recorded := filepath.Join(t.TempDir(), "calls")
	server, err := real.Serve(t.Context(), "", real.Command{Path: strace, Args: []string{
		"-D", "-f", "-xx", "-s", "4194304", "-o", recorded, "--seccomp-bpf",
		"-e", "trace=openat,close,accept4,rename,renameat,renameat2,pwrite64,write,writev,sendto,ftruncate,fallocate,fsync,fdatasync",
		promferry(t), "gateway", "--state.dir=" + dir,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Kill() })
	pushers := newPushers(8, 2)
	answered := make([][]*crashGroup, len(pushers)) // for each answer whose it was
	var pushing sync.WaitGroup
	for i, p := range pushers {
		pushing.Go(func() {
			for range 20 {
				g, err := p.push(t, server.URL)
				if err != nil {
					t.Error(err)
					return
				}
				answered[i] = append(answered[i], g)
			}
		})
	}
	pushing.Wait()
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	if t.Failed() {
		return
	}
	tr := readTrace(t, readCalls(t, recorded), dir)
	if tr.named == 0 {
		t.Error("the file's name was never synced")
	}
	// When each of the pushes was answered.
	answers := make(map[*crashGroup][]int)
	for i, p := range pushers {
		port := p.local.(*net.TCPAddr).Port
		if len(tr.answers[port]) != len(answered[i]) {
			t.Fatalf("%d pushes were answered, and %d answers recorded", len(answered[i]), len(tr.answers[port]))
		}
		for n, g := range answered[i] {
			answers[g] = append(answers[g], tr.answers[port][n])
		}
	}

	disk := filepath.Join(t.TempDir(), "disk") // Thousands of syncs of what is thrown away.
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=256m"); err != nil {
		t.Fatal("mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	states, without := 0, 0
	tr.crashStates(rand.New(rand.NewPCG(4, 5)), func(s crashState) {
		if t.Failed() {
			return
		}
		states++
		if s.name != "groups.db" {
			without++
		}
		at := filepath.Join(disk, strconv.Itoa(states))
		if err := os.Mkdir(at, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(at)
		if s.name != "" {
			if err := os.WriteFile(filepath.Join(at, s.name), s.file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := openAfter(t, at)
		if err != nil {
			t.Errorf("at %d of %d, with %s: %v", s.moment, tr.end, s.what, err)
			return
		}
		for g, when := range answers {
			n := len(when)
			for n > 0 && when[n-1] >= s.moment {
				n--
			}
			// That, or what came later.
			var errs []error
			for _, state := range g.states[n:] {
				err := state.check(got[g.instance])
				if errs = append(errs, err); err == nil {
					errs = nil
					break
				}
			}
			if errs != nil {
				t.Errorf("at %d of %d, with %s: group %s after %d answers: %v", s.moment, tr.end, s.what, g.instance, n, errs[0])
			}
		}
	})
	t.Logf("%d states of %d changes and %d syncs, %d of them without the file", states, len(tr.changes), len(tr.syncs), without)
	if states < 300 || without < 10 {
		t.Error("there is not enough to see")
	}
}

// openAfter opens a gateway on a directory and returns the groups that it has.
func openAfter(t *testing.T, dir string) (map[string]*servedGroup, error) {
	t.Helper()
	var log bytes.Buffer
	registry := prometheus.NewRegistry()
	g, err := gateway.New(gateway.Config{
		StoreConfig:  gateway.StoreConfig{File: filepath.Join(dir, "groups.db"), ForgetAfter: time.Hour, MaxGroups: 1000, MaxSeries: 10000, MaxGroupBytes: 1 << 24, MaxBytes: 1 << 28},
		MaxBodyBytes: 1 << 20, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		return nil, err
	}
	defer g.Close()
	ask := func(method, path, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		g.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w
	}
	groups, err := servedGroups(ask(http.MethodGet, "/sd", "").Body.Bytes(), ask(http.MethodGet, "/metrics", "").Body.Bytes())
	if err != nil {
		return nil, err
	}
	// It goes on from there.
	if w := ask(http.MethodPut, "/metrics/job/crash/instance/after", "a 1\n"); w.Code != http.StatusOK {
		return nil, fmt.Errorf("a push: status %d: %s", w.Code, w.Body)
	}
	if log.Len() > 0 {
		return nil, errors.New(log.String())
	}
	return groups, nil
}

// newDisk mounts an empty disk of 16 MB.
func newDisk(t *testing.T) (image, dir string) {
	t.Helper()
	image, dir = filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "disk")
	makeDisk(t, image)
	mount(t, image, dir)
	return image, dir
}

// startGatewayAt starts a gateway with its state in a directory.
func startGatewayAt(t *testing.T, dir string) *real.Gateway {
	t.Helper()
	s, err := real.Serve(t.Context(), "", real.Command{Path: promferry(t), Args: []string{"gateway", "--state.dir=" + dir}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	return &real.Gateway{Server: s}
}

// fillDisk takes all the room that there is, with a file that it returns.
func fillDisk(t *testing.T, dir string) string {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "fill"), os.O_CREATE|os.O_WRONLY|os.O_SYNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 1 << 16, 4096} { // What is written late may free something.
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("filled the disk: %v", err)
		}
	}
	return f.Name()
}

// incompressible is a text that takes as many bytes on a disk, about.
func incompressible(random *rand.Rand, bytes int) string {
	var text strings.Builder
	for i := 0; text.Len() < bytes; i++ {
		fmt.Fprintf(&text, "a{i=\"%d\",x=\"%x%x%x%x\"} 1\n", i, random.Uint64(), random.Uint64(), random.Uint64(), random.Uint64())
	}
	return text.String()
}

// TestGatewayFullDisk fills the disk: what has to be on it is refused, what is on it stays, and
// what expires goes on. With room again all goes on, without a restart. A gateway that starts on a full disk
// either says what to do, or serves what is there.
func TestGatewayFullDisk(t *testing.T) {
	_, dir := newDisk(t)
	server := startGatewayAt(t, dir)
	random := rand.New(rand.NewPCG(6, 7))
	put(t, server, "/metrics/job/batch", "a 1\n")
	put(t, server, "/metrics/job/deleted", "a 1\n")
	fill := fillDisk(t, dir)
	refused := func(method, path, body string, parts ...string) {
		t.Helper()
		status, answer := send(t, method, server.URL+path, "", []byte(body))
		wantStatus(t, status, http.StatusServiceUnavailable)
		for _, part := range append(parts, filepath.Join(dir, "groups.db"), "no space left on device") {
			if strings.Count(answer, part) != 1 {
				t.Errorf("there is no %q, once, in %s", part, answer)
			}
		}
	}
	large := incompressible(random, 1<<20)
	for range 3 {
		refused(http.MethodPut, "/metrics/job/batch", large, "push it again")
		refused(http.MethodPost, "/metrics/job/new", large, "it is as if it had not been")
	}
	for i := range 20 { // Their keys find no room.
		put(t, server, fmt.Sprintf("/metrics/job/node/instance/%d", i), "a 1\npromferry_expires_after_seconds 3600\n")
	}
	check := func(want string, groups ...string) {
		t.Helper()
		page, err := server.Get(t.Context(), "/groups/job/batch/metrics")
		if err != nil || !strings.Contains(string(page), want) {
			t.Errorf("%v, there is no %q in %.1000s", err, want, page)
		}
		sd, err := server.Get(t.Context(), "/sd")
		for _, group := range groups {
			path, not := strings.CutPrefix(group, "!")
			if err != nil || strings.Contains(string(sd), `"/groups`+path+`/metrics"`) == not {
				t.Errorf("%v, not as it has to be: %s in %s", err, group, sd)
			}
		}
	}
	const batchHas = "\na{instance=\"\",job=\"batch\"} 1\n"
	check(batchHas, "/job/deleted", "!/job/new", "/job/node/instance/0", "/job/node/instance/19")
	metrics, err := server.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	if failures, err := sum(metrics, "promferry_gateway_disk_write_failures_total"); err != nil || failures < 6 {
		t.Errorf("%v failures, %v", failures, err)
	}
	// It starts on the full disk with what is there.
	server.Kill()
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(batchHas, "/job/deleted", "!/job/new")
	refused(http.MethodPut, "/metrics/job/batch", large)
	put(t, server, "/metrics/job/node/instance/0", "a 1\npromferry_expires_after_seconds 3600\n")

	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	put(t, server, "/metrics/job/node/instance/1", "a 1\npromferry_expires_after_seconds 3600\n")
	put(t, server, "/metrics/job/batch", strings.Replace(large, "a{i=\"0\"", "b 2\na{i=\"0\"", 1))
	if status, answer := send(t, http.MethodDelete, server.URL+"/metrics/job/deleted", "", nil); status != http.StatusAccepted {
		t.Errorf("status %d: %s", status, answer)
	}
	server.Kill()
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("\nb{instance=\"\",job=\"batch\"} 2\n", "!/job/deleted", "!/job/new", "/job/node/instance/1")
}

// shutDownDisk is EXT4_IOC_SHUTDOWN, and noFlush EXT4_GOING_FLAGS_NOLOGFLUSH: from then on the
// disk answers with errors, and of what was not synced nothing reaches it.
const shutDownDisk, noFlush = 0x8004587d, 2

// TestGatewayDiskFails has the disk fail while many push: what has to be on it is refused, and
// what expires goes on. With the disk back, as after a power failure, all that was answered is there.
func TestGatewayDiskFails(t *testing.T) {
	image, dir := newDisk(t)
	pushers := newPushers(8, 2)
	for _, p := range pushers {
		p.durable = true // Of what expires not even the key is kept by a disk that fails.
	}
	server := startGatewayAt(t, dir)
	answered, inFlight := 0, 0
	const failures = 8
	for n := range failures {
		var pushing sync.WaitGroup
		for _, p := range pushers {
			pushing.Go(func() {
				for {
					if _, err := p.push(t, server.URL); err != nil {
						if !strings.Contains(err.Error(), "status 503") {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		<-time.After(time.Duration(50+37*n) * time.Millisecond)
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.IoctlSetPointerInt(int(f.Fd()), shutDownDisk, noFlush); err != nil {
			t.Fatal(err)
		}
		f.Close()
		pushing.Wait()
		failed := time.Now()
		status, answer := send(t, http.MethodPut, server.URL+"/metrics/job/batch", "", []byte("a 1\n"))
		wantStatus(t, status, http.StatusServiceUnavailable)
		if !strings.Contains(answer, filepath.Join(dir, "groups.db")+": ") || !strings.Contains(answer, "push it again") {
			t.Error(answer)
		}
		put(t, server, "/metrics/job/node", "a 1\npromferry_expires_after_seconds 3600\n")
		server.Kill()
		if out, err := exec.CommandContext(t.Context(), "umount", dir).CombinedOutput(); err != nil {
			t.Fatalf("umount: %v: %s", err, out)
		}
		mount(t, image, dir)
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		a, b, _ := checkGroups(t, server, pushers, failed)
		answered, inFlight = answered+a, inFlight+b
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d failures: %d pushes answered, %d refused", failures, answered, inFlight)
	if answered < 20*failures || inFlight != len(pushers)*failures {
		t.Error("there is not enough to see")
	}
}

// TestGatewayStartsOnFullDisk starts a gateway that has no file yet where there is no room for one.
func TestGatewayStartsOnFullDisk(t *testing.T) {
	_, dir := newDisk(t)
	// So that there is room for the number of the process.
	if err := os.WriteFile(filepath.Join(dir, "gateway.pid"), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fill := fillDisk(t, dir)
	p, err := real.Start(real.Command{Path: promferry(t), Args: []string{"gateway", "--state.dir=" + dir, "--web.listen-address=127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	status, err := p.Wait(ctx)
	if err != nil || status != 1 || !strings.Contains(p.Stderr(), "no space left on device") || !strings.Contains(p.Stderr(), "--state.dir") {
		t.Errorf("status %d, %v: %s", status, err, p.Stderr())
	}
	t.Log(p.Stderr())
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	put(t, startGatewayAt(t, dir), "/metrics/job/batch", "a 1\n")
}
