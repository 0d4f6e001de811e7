package ptth

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
)

// maxHeader is how large the header of an answer may be, in bytes.
const maxHeader = 64 << 10

var errHeaderTooLarge = errors.New("the header of the answer is too large")

// sourceSize is that of a source's buffer, in bytes: most answers fit into it, header and all,
// so that one read has them.
const sourceSize = 72 << 10

// source reads answers from a line. Sources are many, lines are more: they are shared.
type source struct {
	bufio.Reader
	from  io.Reader
	limit int // of what may still be read, while above zero
	big   error
}

var sources = sync.Pool{New: func() any {
	s := &source{}
	s.Reader = *bufio.NewReaderSize(nil, sourceSize)
	return s
}}

// newSource returns a source of what comes from a line.
func newSource(from io.Reader) *source {
	s := sources.Get().(*source)
	s.from, s.limit, s.big = from, maxHeader, nil
	s.Reset(unbuffered{s})
	return s
}

// release gives the source back. It must not be used any more.
func (s *source) release() {
	s.from = nil
	s.Reset(nil)
	sources.Put(s)
}

// unbuffered is what a source's buffer is filled from.
type unbuffered struct{ s *source }

func (u unbuffered) Read(b []byte) (int, error) {
	s := u.s
	if s.limit == 0 {
		return s.from.Read(b)
	}
	if s.limit < 0 {
		s.big = errHeaderTooLarge
		return 0, errHeaderTooLarge
	}
	n, err := s.from.Read(b)
	if s.limit -= n; s.limit == 0 {
		s.limit = -1
	}
	return n, err
}

// beaten reads the answer to a heartbeat, which has a status 2xx and no body, and tells whether it
// is the last one on the line. It allocates nothing: there are hundreds each second.
func (s *source) beaten() (last, ok bool) {
	line, err := s.ReadSlice('\n')
	if err != nil || len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' || line[9] != '2' {
		return false, false
	}
	empty := string(line[9:12]) == "204"
	for {
		if line, err = s.ReadSlice('\n'); err != nil {
			return false, false
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			return last, empty
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if empty = string(value) == "0"; !empty {
				return false, false
			}
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			return false, false
		case bytes.EqualFold(name, []byte("Connection")):
			last = last || bytes.EqualFold(value, []byte("close"))
		}
	}
}

// response reads the header of an answer. Those with status 1xx are skipped.
func (s *source) response(req *http.Request) (*http.Response, error) {
	for {
		resp, err := http.ReadResponse(&s.Reader, req)
		switch {
		case s.big != nil:
			return nil, s.big
		case err != nil:
			return nil, err
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, errors.New("the answer switches protocols")
		case resp.StatusCode >= http.StatusOK:
			s.limit = 0
			return resp, nil
		}
	}
}

var buffers = sync.Pool{New: func() any { return &bytes.Buffer{} }}

// send writes a request that has no body, in one write.
func send(w io.Writer, req *http.Request) error {
	buf := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buf)
	buf.Reset()
	buf.WriteString(req.Method)
	buf.WriteByte(' ')
	// What Prometheus wrote, byte for byte: it holds no space and no control character, or
	// it would not have been parsed.
	buf.WriteString(req.RequestURI)
	buf.WriteString(" HTTP/1.1\r\nHost: ")
	buf.WriteString(req.Host)
	buf.WriteString("\r\n")
	for name, values := range req.Header { // Header.Write sorts them first.
		for _, value := range values {
			if strings.ContainsAny(value, "\r\n") {
				continue // net/http's server lets none through.
			}
			buf.WriteString(name)
			buf.WriteString(": ")
			buf.WriteString(value)
			buf.WriteString("\r\n")
		}
	}
	buf.WriteString("\r\n")
	_, err := w.Write(buf.Bytes())
	return err
}
