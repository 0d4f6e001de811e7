package ptth

import (
	"crypto/tls"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// awaitBytes waits, where conn is a TLS connection, until something is there to be read, and
// reads nothing: a goroutine within a TLS connection's Read needs twice the stack. It must not be
// called while an answer is expected that may have been read already with the one before.
func awaitBytes(conn net.Conn) {
	t, ok := conn.(*tls.Conn)
	if !ok {
		return
	}
	s, ok := t.NetConn().(syscall.Conn)
	if !ok {
		return
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return // Read says why.
	}
	_ = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN && err != unix.EINTR
	})
}
