//go:build e2e

package natlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/real"
)

// patience bounds what is to work, dead is for how long nothing may come of what is not to.
const (
	patience = 30 * time.Second
	dead     = 500 * time.Millisecond
)

// connect opens a connection from the worker to a listener on the hub, and returns both ends.
func connect(t *testing.T, l *Lab, listener net.Listener) (worker, hub net.Conn) {
	t.Helper()
	worker, err := dial(l.Worker, listener.Addr().String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { worker.Close() })
	hub, err = listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hub.Close() })
	return worker, hub
}

func dial(n *Node, addr string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return n.Dial(ctx, "tcp", addr)
}

// say writes a line on one end of a connection, and returns what the other gets within timeout.
func say(from, to net.Conn, line string, timeout time.Duration) (string, error) {
	if _, err := fmt.Fprintln(from, line); err != nil {
		return "", err
	}
	return hear(to, timeout)
}

func hear(to net.Conn, timeout time.Duration) (string, error) {
	if err := to.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	return bufio.NewReader(to).ReadString('\n')
}

// isTimeout tells whether nothing came: no answer, no refusal, no end.
func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

func TestOnlyTheWorkerCanConnect(t *testing.T) {
	t.Parallel()
	l := New(t)
	worker, hub := connect(t, l, l.Hub.Listen(t, HubIP+":0"))
	if got, _, _ := net.SplitHostPort(hub.RemoteAddr().String()); got != NATIP {
		t.Errorf("the hub sees %s, want %s", got, NATIP)
	}
	if got, err := say(worker, hub, "up", patience); got != "up\n" {
		t.Errorf("worker to hub: %q, %v", got, err)
	}
	if got, err := say(hub, worker, "down", patience); got != "down\n" {
		t.Errorf("hub to worker: %q, %v", got, err)
	}

	// It listens, and the hub has a route. Without one, there would be an error at once.
	listener := l.Worker.Listen(t, "0.0.0.0:7777")
	if _, err := dial(l.Worker, WorkerIP+":7777", patience); err != nil {
		t.Error(err)
	}
	for _, addr := range []string{WorkerIP + ":7777", NATIP + ":7777"} {
		if conn, err := dial(l.Hub, addr, dead); err == nil {
			t.Errorf("the hub has connected to %s: %v", addr, conn.RemoteAddr())
		} else if !isTimeout(err) {
			t.Errorf("hub to %s: %v, want no answer", addr, err)
		}
	}
	listener.Close()
}

func TestLabsAreApart(t *testing.T) {
	t.Parallel()
	one, other := New(t), New(t)
	one.Hub.Listen(t, HubIP+":80")
	if _, err := dial(one.Worker, HubIP+":80", patience); err != nil {
		t.Error(err)
	}
	if _, err := dial(other.Worker, HubIP+":80", patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another lab's worker: %v, want refused", err)
	}
	other.Hub.Listen(t, HubIP+":80") // the same address
}

func TestCut(t *testing.T) {
	t.Parallel()
	l := New(t)
	listener, second := l.Hub.Listen(t, HubIP+":80"), l.Hub.Listen(t, HubIP2+":80")
	worker, hub := connect(t, l, listener)
	worker2, hub2 := connect(t, l, second)

	l.Cut(t, HubIP)
	for name, ends := range map[string][2]net.Conn{"worker to hub": {worker, hub}, "hub to worker": {hub, worker}} {
		if got, err := say(ends[0], ends[1], name, dead); !isTimeout(err) {
			t.Errorf("cut off, %s: %q, %v, want nothing", name, got, err)
		}
	}
	if _, err := dial(l.Worker, HubIP+":80", dead); !isTimeout(err) {
		t.Errorf("cut off, a new connection: %v, want no answer", err)
	}
	if got, err := say(worker2, hub2, "other address", patience); got != "other address\n" {
		t.Errorf("the other address: %q, %v", got, err)
	}

	l.Heal(t) // and what was sent meanwhile is sent again
	for name, to := range map[string]net.Conn{"worker to hub": hub, "hub to worker": worker} {
		if got, err := hear(to, patience); got != name+"\n" {
			t.Errorf("healed, %s: %q, %v", name, got, err)
		}
	}
	connect(t, l, listener)
}

func TestReset(t *testing.T) {
	t.Parallel()
	l := New(t)
	listener := l.Hub.Listen(t, HubIP+":80")
	worker, hub := connect(t, l, listener)
	l.Reset(t, HubIP)
	for name, end := range map[string]net.Conn{"worker": worker, "hub": hub} {
		if got, err := say(end, end, "x", patience); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %q, %v, want a reset", name, got, err)
		}
	}
	if _, err := dial(l.Worker, HubIP+":80", patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new connection: %v, want refused", err)
	}
	l.Heal(t)
	connect(t, l, listener)
}

func TestFlushConntrack(t *testing.T) {
	t.Parallel()
	l := New(t)
	listener := l.Hub.Listen(t, HubIP+":80")
	for _, first := range []string{"worker", "hub"} { // who speaks first after the restart
		worker, hub := connect(t, l, listener)
		l.FlushConntrack(t)
		from, to := worker, hub
		if first == "hub" {
			from, to = hub, worker
		}
		for range 2 {
			if got, err := say(from, to, "x", dead); !isTimeout(err) {
				t.Errorf("%s speaks first: %q, %v, want nothing", first, got, err)
			}
			from, to = to, from
		}
		worker, hub = connect(t, l, listener)
		if got, err := say(hub, worker, "new", patience); got != "new\n" {
			t.Errorf("a new connection: %q, %v", got, err)
		}
	}
}

func TestLink(t *testing.T) {
	t.Parallel()
	l := New(t)
	listener := l.Hub.Listen(t, HubIP+":80")
	worker, hub := connect(t, l, listener)
	l.LinkDown(t)
	if _, err := dial(l.Worker, HubIP+":80", patience); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("a new connection: %v, want unreachable", err)
	}
	l.LinkUp(t)
	connect(t, l, listener)
	if got, err := say(worker, hub, "old", patience); got != "old\n" {
		t.Errorf("the old connection: %q, %v", got, err)
	}
}

func TestRelay(t *testing.T) {
	t.Parallel()
	l := New(t)
	const delay = 200 * time.Millisecond
	listener := l.Hub.Listen(t, HubIP+":80")
	addr := l.Hub.Relay(t, HubIP+":0", listener.Addr().String(), delay)
	worker, err := dial(l.Worker, addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer worker.Close()
	hub, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()

	for _, ends := range [][2]net.Conn{{worker, hub}, {hub, worker}} {
		start := time.Now()
		if got, err := say(ends[0], ends[1], "hello", patience); got != "hello\n" {
			t.Errorf("%q, %v", got, err)
		}
		if took := time.Since(start); took < delay {
			t.Errorf("arrived after %v, want %v", took, delay)
		}
	}

	// Much of it is on its way at a time, and nothing is lost before the end.
	const size = 8 << 20
	go func() {
		_, _ = worker.Write(make([]byte, size)) // the other end counts
		worker.Close()
	}()
	if err := hub.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, hub); n != size || err != nil {
		t.Errorf("%d bytes, %v, want %d", n, err, size)
	}
}

// TestServe runs a real program on the worker's loopback interface, and shows that nothing
// of the lab is there after its end.
func TestServe(t *testing.T) {
	t.Parallel()
	path, err := real.Find("node_exporter")
	if err != nil {
		t.Fatal(err)
	}
	const addr = "127.0.0.1:9100"
	var inode string
	t.Run("lab", func(t *testing.T) {
		l := New(t)
		if inode, err = os.Readlink(l.Worker.path()); err != nil {
			t.Fatal(err)
		}
		exporter := l.Worker.Serve(t, addr, real.Command{Path: path})
		metrics := func() {
			t.Helper()
			body, err := exporter.Get(t.Context(), "/metrics")
			if err != nil || !strings.Contains(string(body), `node_network_up{device="eth0"}`) {
				t.Errorf("%v: %.200s", err, body)
			}
		}
		metrics()
		if resp, err := l.Worker.Client().Get("http://" + addr + "/metrics"); err != nil {
			t.Error(err)
		} else {
			resp.Body.Close()
		}
		if _, err := dial(l.Hub, addr, patience); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the hub's own loopback: %v, want refused", err)
		}
		if there := processesIn(t, inode); !slices.Equal(there, []int{exporter.PID()}) {
			t.Errorf("processes %v are there, want %d", there, exporter.PID())
		}
		url := exporter.URL
		exporter.Kill()
		if err := exporter.Restart(t.Context()); err != nil || exporter.URL != url || exporter.Addr != addr {
			t.Fatal(err, exporter.URL, exporter.Addr)
		}
		metrics()
	})
	if there := processesIn(t, inode); len(there) != 0 {
		t.Errorf("processes %v are left", there)
	}
	open, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range open {
		if to, _ := os.Readlink(fd); to == inode {
			t.Errorf("%s is left", fd)
		}
	}
}

// processesIn returns the processes in a network namespace.
func processesIn(t *testing.T, inode string) []int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var there []int
	for _, link := range all {
		if to, _ := os.Readlink(link); to == inode {
			var pid int
			_, _ = fmt.Sscanf(link, "/proc/%d/", &pid)
			there = append(there, pid)
		}
	}
	return there
}
