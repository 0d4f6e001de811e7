package ptth

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// await waits until something is there to be read, and returns a source that begins with it. There
// is no buffer while it waits. When busy, an answer is expected that may have been read
// already with the one before.
func await(conn net.Conn, busy bool) (*source, error) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		return awaitTCP(tcp)
	}
	if !busy {
		awaitTLS(conn)
	}
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		return nil, err
	}
	return newSource(io.MultiReader(bytes.NewReader(first[:]), conn)), nil
}

// awaitTCP takes a buffer only for a read that finds something.
func awaitTCP(conn *net.TCPConn) (src *source, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		src = newSource(descriptor(fd))
		if _, failed = src.Peek(1); failed == nil {
			src.from = conn
			return true
		}
		src.release()
		return failed != unix.EAGAIN //nolint:errorlint // It comes from descriptor, as it is.
	})
	if err = cmp.Or(err, failed); err != nil {
		return nil, err
	}
	return src, nil
}

// descriptor is read from without waiting.
type descriptor uintptr

func (d descriptor) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(d), b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// awaitTLS waits, where conn is a TLS connection, until something is there to be read, and
// reads nothing: a goroutine within a TLS connection's Read needs twice the stack.
func awaitTLS(conn net.Conn) {
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
