package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	dto "github.com/prometheus/client_model/go"
)

// A textReader reads families of a text that was rendered, one after the other, and has no more of
// it in memory than a piece and the name of a family. It is at the begin of a family.
type textReader struct {
	packed *packedText // nil: all of the text is in rest
	piece  int         // number of the next one
	at     int         // where in the text rest begins
	rest   []byte      // what of the last piece was not taken yet
	space  []byte      // that rest is in
}

// spaces are used again. They have room for a piece and the begin of a header.
var spaces = sync.Pool{New: func() any { return new([pieceSize + 1<<10]byte) }}

// readPacked and readPlain return readers that are at a place in a text, the begin of a family.
func readPacked(text *packedText, at int) textReader {
	return textReader{packed: text, piece: at / pieceSize, at: at}
}

func readPlain(text []byte, at int) textReader { return textReader{rest: text[at:], at: at} }

// release gives back what the reader has borrowed.
func (r *textReader) release() {
	if len(r.space) == pieceSize+1<<10 {
		spaces.Put((*[pieceSize + 1<<10]byte)(r.space))
	}
	r.space, r.rest = nil, nil
}

// more reads one more piece behind the rest. At the end of the text the error is io.EOF.
func (r *textReader) more() error {
	if r.packed == nil {
		return io.EOF
	}
	skip := 0
	if r.space == nil { // Only the first piece that is read can begin elsewhere.
		r.space = spaces.Get().(*[pieceSize + 1<<10]byte)[:]
		skip = r.at - r.piece*pieceSize
	}
	n := len(r.rest)
	if n+pieceSize > len(r.space) {
		space := make([]byte, 2*n+pieceSize)
		copy(space, r.rest)
		r.release()
		r.space = space
	} else {
		copy(r.space, r.rest)
	}
	size, err := r.packed.piece(r.piece, r.space[n:])
	r.rest = r.space[:n]
	switch {
	case err != nil:
		return err
	case size <= skip:
		return io.EOF
	}
	r.piece++
	r.rest = r.space[skip : n+size]
	return nil
}

// take writes what is in front of the rest. A nil writer takes nothing.
func (r *textReader) take(w io.Writer, n int) error {
	var err error
	if w != nil && n > 0 {
		_, err = w.Write(r.rest[:n])
	}
	r.rest, r.at = r.rest[n:], r.at+n
	return err
}

var errNoHeader = errors.New("the text of a group is not as it was written: a family has no header")

// name returns the name of the family at which the reader is. It is valid until the reader goes
// on. At the end of the text the error is io.EOF.
func (r *textReader) name() ([]byte, error) {
	for {
		if name, ok := nameIn(r.rest); ok {
			return name, nil
		}
		if len(r.rest) >= len(helpPrefix) && !isHeader(r.rest) {
			return nil, errNoHeader
		}
		err := r.more()
		if errors.Is(err, io.EOF) && len(r.rest) > 0 {
			return nil, errNoHeader
		}
		if err != nil {
			return nil, err
		}
	}
}

const (
	helpPrefix = "# HELP "
	typePrefix = "# TYPE "
)

func isHeader(b []byte) bool {
	return bytes.HasPrefix(b, []byte(helpPrefix)) || bytes.HasPrefix(b, []byte(typePrefix))
}

// nameIn returns the name that a header line at the begin of b has, if all of it is there.
func nameIn(b []byte) ([]byte, bool) {
	if !isHeader(b) || len(b) == len(helpPrefix) {
		return nil, false
	}
	b = b[len(helpPrefix):]
	if b[0] != '"' {
		end := bytes.IndexByte(b, ' ')
		return b[:max(0, end)], end >= 0
	}
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			name := b[1:i]
			if bytes.IndexByte(name, '\\') >= 0 {
				name = []byte(unescapeValue.Replace(string(name)))
			}
			return name, true
		}
	}
	return nil, false
}

// header writes the header of the family, and returns its type. The reader is at its series then.
func (r *textReader) header(w io.Writer) (dto.MetricType, error) {
	if bytes.HasPrefix(r.rest, []byte(helpPrefix)) { // Which name has seen.
		for {
			if i := bytes.IndexByte(r.rest, '\n'); i >= 0 {
				if err := r.take(w, i+1); err != nil {
					return 0, err
				}
				break
			}
			if err := r.take(w, len(r.rest)); err != nil {
				return 0, err
			}
			if err := r.must(); err != nil {
				return 0, err
			}
		}
	}
	for {
		if i := bytes.IndexByte(r.rest, '\n'); i >= 0 {
			typ, err := typeIn(r.rest[:i])
			if err != nil {
				return 0, err
			}
			return typ, r.take(w, i+1)
		}
		if err := r.must(); err != nil {
			return 0, err
		}
	}
}

// must reads one more piece, which has to be there.
func (r *textReader) must() error {
	err := r.more()
	if errors.Is(err, io.EOF) {
		return errNoHeader
	}
	return err
}

// typeIn returns the type that a TYPE line tells.
func typeIn(line []byte) (dto.MetricType, error) {
	if !bytes.HasPrefix(line, []byte(typePrefix)) {
		return 0, errNoHeader
	}
	switch word := line[bytes.LastIndexByte(line, ' ')+1:]; string(word) {
	case "gauge":
		return dto.MetricType_GAUGE, nil
	case "counter":
		return dto.MetricType_COUNTER, nil
	case "untyped":
		return dto.MetricType_UNTYPED, nil
	default:
		typ, ok := dto.MetricType_value[strings.ToUpper(string(word))]
		if !ok {
			return 0, fmt.Errorf("%.200q has no type that there is", line)
		}
		return dto.MetricType(typ), nil
	}
}

// series writes the series of the family. The reader is at the next family then.
func (r *textReader) series(w io.Writer) error {
	for first := true; ; first = false {
		if first && len(r.rest) > 0 && r.rest[0] == '#' {
			return nil
		}
		// No other # is at the begin of a line.
		if i := bytes.Index(r.rest, []byte("\n#")); i >= 0 {
			return r.take(w, i+1)
		}
		// The last byte may be a newline before one.
		if n := len(r.rest) - 1; n > 0 {
			if err := r.take(w, n); err != nil {
				return err
			}
		}
		if err := r.more(); errors.Is(err, io.EOF) {
			return r.take(w, len(r.rest))
		} else if err != nil {
			return err
		}
	}
}
