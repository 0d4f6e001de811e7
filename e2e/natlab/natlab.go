//go:build e2e

// Package natlab puts a test's programs behind a NAT, in network namespaces of their own:
//
//	worker 192.168.77.10 -- NAT -- 203.0.113.2, 203.0.113.3 hub
//
// The worker may open connections to the hub, which sees them come from 203.0.113.1. The
// hub has a route to the worker, and the NAT lets nothing through that the worker did not
// begin. It takes root, nft and conntrack, and some 50 ms.
//
// The namespaces have no names. They live by the files that the test holds open and by the
// processes in them, so any number of labs may stand side by side, all with these
// addresses, and nothing is left even of a test that was killed.
package natlab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// The addresses. Those of documentation, RFC 5737, stand for the internet.
const (
	WorkerIP = "192.168.77.10"
	// NATIP is the address that the hub sees the worker's connections come from.
	NATIP = "203.0.113.1"
	HubIP = "203.0.113.2"
	// HubIP2 is another address of the hub, for a second server that can be cut off alone.
	HubIP2 = "203.0.113.3"
)

// wiring is for `ip -batch` in the NAT's namespace, with the files of the two others'.
const wiring = `
link set lo up
link add lan type veth peer name eth0 netns %s
link add wan type veth peer name eth0 netns %s
addr add 192.168.77.1/24 dev lan
addr add 203.0.113.1/24 dev wan
link set lan up
link set wan up
`

const worker = `
link set lo up
addr add 192.168.77.10/24 dev eth0
link set eth0 up
route replace default via 192.168.77.1
`

const hub = `
link set lo up
addr add 203.0.113.2/24 dev eth0
addr add 203.0.113.3/24 dev eth0
link set eth0 up
route add 192.168.77.0/24 via 203.0.113.1
`

// rules are the NAT's. It answers nobody itself: a packet that it knows no connection for
// is lost without a sign, as with most that people have.
const rules = `
table ip lab {
	set cut { type ipv4_addr; }
	set refused { type ipv4_addr; }
	chain input { type filter hook input priority 0; policy drop; }
	chain forward {
		type filter hook forward priority 0; policy drop;
		ip saddr @cut drop
		ip daddr @cut drop
		ip saddr @refused meta l4proto tcp reject with tcp reset
		ip daddr @refused meta l4proto tcp reject with tcp reset
		ct state established,related accept
		iifname "lan" oifname "wan" ct state new accept
	}
	chain postrouting { type nat hook postrouting priority 100; oifname "wan" masquerade; }
}
`

// A Lab is a worker behind a NAT, and a hub outside. Its methods may be called concurrently.
type Lab struct {
	Worker, Hub *Node

	nat *Node
}

// New builds a lab. All of it ends with the test.
func New(t *testing.T) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("natlab: needs root, for network namespaces")
	}
	for _, program := range []string{"nft", "conntrack"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("natlab: %v; apt-get install nftables conntrack", err)
		}
	}
	l := &Lab{Worker: newNode(t), Hub: newNode(t), nat: newNode(t)}
	l.nat.run(t, fmt.Sprintf(wiring, l.Worker.path(), l.Hub.path()), "ip", "-batch", "-")
	l.nat.run(t, rules, "nft", "-f", "-")
	l.nat.write(t, "/proc/sys/net/ipv4/ip_forward", "1")
	// Else the NAT would take a packet from the middle of a connection for the begin of
	// one, and a connection would survive FlushConntrack.
	l.nat.write(t, "/proc/sys/net/netfilter/nf_conntrack_tcp_loose", "0")
	l.Worker.run(t, worker, "ip", "-batch", "-")
	l.Hub.run(t, hub, "ip", "-batch", "-")
	return l
}

// Cut loses all packets from and to an address of the hub, without a sign to anybody:
// connections become half-open.
func (l *Lab) Cut(t *testing.T, ip string) {
	t.Helper()
	l.nat.run(t, "", "nft", "add element ip lab cut { "+ip+" }")
}

// Reset answers each TCP packet from and to an address of the hub with a reset: a
// connection ends when either side sends something, and none can be opened.
func (l *Lab) Reset(t *testing.T, ip string) {
	t.Helper()
	l.nat.run(t, "", "nft", "add element ip lab refused { "+ip+" }")
}

// Heal undoes Cut and Reset, of all addresses.
func (l *Lab) Heal(t *testing.T) {
	t.Helper()
	l.nat.run(t, "", "nft", "flush set ip lab cut; flush set ip lab refused")
}

// FlushConntrack makes the NAT forget all connections, as when it restarts: packets of the
// old ones are lost without a sign, new ones can be opened.
func (l *Lab) FlushConntrack(t *testing.T) {
	t.Helper()
	l.nat.run(t, "", "conntrack", "--flush")
}

// LinkDown takes the worker's network away: it has no route to the hub any more.
func (l *Lab) LinkDown(t *testing.T) {
	t.Helper()
	l.Worker.run(t, "", "ip", "link", "set", "eth0", "down")
}

// LinkUp gives the worker's network back.
func (l *Lab) LinkUp(t *testing.T) {
	t.Helper()
	l.Worker.run(t, "link set eth0 up\nroute replace default via 192.168.77.1\n", "ip", "-batch", "-")
}

// A Node is a network namespace. Its methods may be called concurrently.
type Node struct {
	ns     *os.File
	client *http.Client
}

// newNode makes a namespace that ends with the test, and the last process in it.
func newNode(t *testing.T) *Node {
	t.Helper()
	n := &Node{}
	err := onThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		t.Fatalf("natlab: make a network namespace: %v", err)
	}
	t.Cleanup(func() { n.ns.Close() })
	transport := &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}
	n.client = &http.Client{Timeout: time.Minute, Transport: transport}
	return n
}

// path names the namespace for other processes, as long as this one lives.
func (n *Node) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns.Fd()) }

// inside runs f in the namespace. Sockets that f makes in its own goroutine, and processes
// that it starts, are there and stay there.
func (n *Node) inside(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own. It stays locked, and so ends with the goroutine:
// nothing else ever runs in its namespace.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// run runs a program in the namespace. It has to succeed.
func (n *Node) run(t *testing.T, stdin, program string, args ...string) {
	t.Helper()
	err := n.inside(func() error {
		cmd := exec.CommandContext(t.Context(), program, args...)
		cmd.Stdin = strings.NewReader(stdin)
		output, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(output))
		}
		return nil
	})
	if err != nil {
		t.Fatal("natlab: ", err)
	}
}

// write writes a file below /proc/sys/net, which is another in each namespace.
func (n *Node) write(t *testing.T, file, content string) {
	t.Helper()
	if err := n.inside(func() error { return os.WriteFile(file, []byte(content), 0) }); err != nil {
		t.Fatal("natlab: ", err)
	}
}

// Command returns the command that runs command in the namespace, under the process ID
// that it is started with.
func (n *Node) Command(command real.Command) real.Command {
	command.Args = append([]string{"--net=" + n.path(), "--", command.Path}, command.Args...)
	command.Path = "nsenter"
	return command
}

// Dial connects from within the namespace. addr must have an IP address: then the dialer
// makes the socket here, and not in a goroutine, which would run outside.
func (n *Node) Dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = n.inside(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Client returns an HTTP client within the namespace, for URLs with an IP address. Each
// request has a connection of its own, and a minute.
func (n *Node) Client() *http.Client { return n.client }

// Listen listens in the namespace until the test ends. addr must have an IP address.
func (n *Node) Listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	var listener net.Listener
	err := n.inside(func() (err error) {
		listener, err = new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal("natlab: ", err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// A Server is a real program that serves HTTP in a namespace. Addr is its address there;
// with URL, the test reaches it from outside.
type Server struct {
	*real.Server

	url string
}

// Serve starts a program that serves HTTP in the namespace, as real.Serve does. It is
// killed at the end of the test.
func (n *Node) Serve(t *testing.T, addr string, command real.Command) *Server {
	t.Helper()
	server, err := real.Serve(t.Context(), addr, n.Command(command))
	if err != nil {
		t.Fatal("natlab: ", err)
	}
	s := &Server{Server: server}
	t.Cleanup(func() { s.Kill() }) // not s.Kill: Restart makes another process
	outside, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal("natlab: ", err)
	}
	listening := server.Addr // Restart writes the field, though not another value
	relay(t, outside, func(ctx context.Context) (net.Conn, error) { return n.Dial(ctx, "tcp", listening) }, 0)
	s.url = "http://" + outside.Addr().String()
	s.URL = s.url
	return s
}

// Restart starts the program again, at the same address and with the same URL.
func (s *Server) Restart(ctx context.Context) error {
	err := s.Server.Restart(ctx)
	s.URL = s.url
	return err
}
