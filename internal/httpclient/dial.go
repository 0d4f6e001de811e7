package httpclient

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dialer returns a dialer whose connections break when the other end has not been heard of
// for about dead: when nothing comes back to what was sent, or to TCP's own keep-alive.
func Dialer(dead time.Duration) *net.Dialer {
	return &net.Dialer{Timeout: 30 * time.Second, KeepAliveConfig: keepAlive(dead), Control: userTimeout(dead)}
}

// ListenConfig returns what makes listeners whose connections do the same.
func ListenConfig(dead time.Duration) *net.ListenConfig {
	return &net.ListenConfig{KeepAliveConfig: keepAlive(dead), Control: userTimeout(dead)}
}

func keepAlive(dead time.Duration) net.KeepAliveConfig {
	// The kernel counts in seconds.
	return net.KeepAliveConfig{
		Enable: true, Idle: max(dead/2, time.Second).Truncate(time.Second), Interval: max(dead/8, time.Second).Truncate(time.Second), Count: 4,
	}
}

// userTimeout bounds how long what was sent may stay without an answer. Without it, and with
// data on its way, the kernel tries for a quarter of an hour, whatever keep-alive says
// (tcp(7), TCP_USER_TIMEOUT and tcp_retries2). Accepted connections have it of their listener.
func userTimeout(dead time.Duration) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var optErr error
		err := c.Control(func(fd uintptr) {
			optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(dead.Milliseconds()))
		})
		return errors.Join(err, optErr)
	}
}

// DialContext returns the dialer's function.
func DialContext(dead time.Duration) Dial {
	d := Dialer(dead)
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return d.DialContext(ctx, network, address)
	}
}
