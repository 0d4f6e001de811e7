package reverse

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync"
)

// headSize is how much of a body is read before any of it is passed on, in bytes: most
// expositions as a whole, so that they go out at once and with their length, and one that breaks
// off gets a status that says so.
const headSize = 64 << 10

var heads = sync.Pool{New: func() any { return new([headSize]byte) }}

var errTooLarge = errors.New("too large")

// passOn passes on the status and the body of an answer to r, at most limit bytes of it. The
// headers are set already. It returns how much of the body that was, and with an error whether
// the status is out; errTooLarge means that there is more.
func passOn(w http.ResponseWriter, r *http.Request, resp *http.Response, limit int64) (n int64, sent bool, err error) {
	length := resp.ContentLength
	switch {
	case length > limit:
		return 0, false, errTooLarge
	case length >= 0:
		w.Header()["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	default:
		delete(w.Header(), "Content-Length")
	}
	if r.Method == http.MethodHead {
		w.WriteHeader(resp.StatusCode)
		return 0, true, nil
	}
	if body, ok := resp.Body.(interface{ Take(n int64) ([]byte, bool) }); ok && 0 <= length && length <= headSize {
		if whole, ok := body.Take(length); ok {
			w.WriteHeader(resp.StatusCode)
			m, err := w.Write(whole) //nolint:gosec // What a target exposes, with the type it gives, and nosniff.
			return int64(m), true, err
		}
	}
	head := heads.Get().(*[headSize]byte)
	defer heads.Put(head)
	filled := 0
	for filled < len(head) && err == nil {
		m := 0
		m, err = resp.Body.Read(head[filled:])
		filled += m
	}
	switch {
	case int64(filled) > limit:
		return 0, false, errTooLarge
	case err == io.EOF: //nolint:errorlint // Wrapped, it would not be the end.
		if length < 0 && filled > 0 {
			w.Header()["Content-Length"] = []string{strconv.Itoa(filled)}
		}
		w.WriteHeader(resp.StatusCode)
		m, err := w.Write(head[:filled])
		return int64(m), true, err
	case err != nil:
		return 0, false, err
	}
	w.WriteHeader(resp.StatusCode)
	if m, err := w.Write(head[:filled]); err != nil {
		return int64(m), true, err
	}
	n = int64(filled)
	if length >= 0 {
		m, err := io.Copy(w, resp.Body) // Which may go from socket to socket.
		return n + m, true, err
	}
	m, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{io.LimitReader(resp.Body, limit-n)}, head[:])
	for n += m; err == nil && n == limit; {
		more := 0
		switch more, err = resp.Body.Read(head[:1]); {
		case more > 0:
			return n, true, errTooLarge
		case err == io.EOF: //nolint:errorlint // As above.
			return n, true, nil
		}
	}
	return n, true, err
}
