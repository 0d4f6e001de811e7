package pushgw

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// scanner reads JSON of any size, in memory that does not grow with it: what is not kept is
// stepped over without being looked at more closely than its end needs. It takes all that is
// JSON and some that is not. Of a listing (80 KB for each node) nearly all is stepped over;
// encoding/json needs five times the CPU time for it, group by group, and 20 times token by token.
type scanner struct {
	r        io.Reader
	buf      []byte
	pos, end int    // what of buf is not yet taken
	kept     []byte // the value that was kept last
	tooLong  bool   // whether it was longer than maxKept, and is not whole
}

// maxKept is up to which size a value is kept, in bytes.
const maxKept = 16 << 10

func newScanner(r io.Reader) *scanner { return &scanner{r: r, buf: make([]byte, 64<<10)} }

// errCut is the error at an end where there should be more.
var errCut = errors.New("it ends in the middle")

// fill reads more, when all is taken.
func (s *scanner) fill() error {
	s.pos, s.end = 0, 0
	for range 100 { // As bufio.Reader does.
		n, err := s.r.Read(s.buf)
		if n > 0 {
			s.end = n
			return nil // A reader returns its error again.
		}
		if err == io.EOF {
			return errCut
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// peek returns the next byte that is no white space, which it does not take.
func (s *scanner) peek() (byte, error) {
	for {
		for ; s.pos < s.end; s.pos++ {
			switch c := s.buf[s.pos]; c {
			case ' ', '\n', '\t', '\r':
			default:
				return c, nil
			}
		}
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
}

// take takes the next byte, which must be want.
func (s *scanner) take(want byte) error {
	c, err := s.peek()
	if err == nil && c != want {
		err = fmt.Errorf("want %q, got %q", want, c)
	}
	s.pos++
	return err
}

// atEnd checks that nothing follows.
func (s *scanner) atEnd() error {
	c, err := s.peek()
	switch {
	case err == nil:
		return fmt.Errorf("want its end, got %q", c)
	case errors.Is(err, errCut):
		return nil
	default:
		return err
	}
}

// object takes an object. It calls each with the name of each member, nil for one too long
// to keep, to take the value.
func (s *scanner) object(each func(name []byte) error) error {
	return s.members('{', '}', func() error {
		c, err := s.peek()
		if err == nil && c != '"' {
			err = fmt.Errorf("want a name, got %q", c)
		}
		if err != nil {
			return err
		}
		if err := s.keep(); err != nil {
			return err
		}
		name := s.kept[1:max(1, len(s.kept)-1)]
		if s.tooLong {
			name = nil
		} else if bytes.IndexByte(name, '\\') >= 0 {
			var unescaped string
			if err := json.Unmarshal(s.kept, &unescaped); err != nil {
				return err
			}
			name = []byte(unescaped)
		}
		if err := s.take(':'); err != nil {
			return err
		}
		return each(name)
	})
}

// array takes an array. It calls each to take each value.
func (s *scanner) array(each func() error) error { return s.members('[', ']', each) }

func (s *scanner) members(begin, end byte, each func() error) error {
	if err := s.take(begin); err != nil {
		return err
	}
	for first := true; ; first = false {
		c, err := s.peek()
		if err != nil {
			return err
		}
		if c == end && first {
			s.pos++
			return nil
		}
		if err := each(); err != nil {
			return err
		}
		if c, err = s.peek(); err != nil {
			return err
		}
		s.pos++
		if c == end {
			return nil
		}
		if c != ',' {
			return fmt.Errorf("want %q or %q, got %q", ',', end, c)
		}
	}
}

// skip takes the next value.
func (s *scanner) skip() error { return s.value(false) }

// keep takes the next value and keeps it.
func (s *scanner) keep() error {
	s.kept, s.tooLong = s.kept[:0], false
	return s.value(true)
}

// The kinds of bytes, to where values end.
const (
	plain = iota
	opening
	closing
	comma
	space
	quote
	backslash
)

var kinds = [256]byte{
	'{': opening, '[': opening, '}': closing, ']': closing, ',': comma, '"': quote, '\\': backslash,
	' ': space, '\n': space, '\t': space, '\r': space,
}

func (s *scanner) value(keep bool) error {
	c, err := s.peek()
	if err == nil && (kinds[c] == closing || kinds[c] == comma || c == ':') {
		err = fmt.Errorf("want a value, got %q", c)
	}
	if err != nil {
		return err
	}
	depth, inString, escaped := 0, false, false
	i := s.pos
	for {
		// Most of a listing ends nothing, and is stepped over here.
		if inString && !escaped {
			for i < s.end && s.buf[i] != '"' && s.buf[i] != '\\' {
				i++
			}
		} else if !escaped {
			for i < s.end && kinds[s.buf[i]] == plain {
				i++
			}
		}
		if i == s.end {
			s.note(keep, i)
			if err := s.fill(); err != nil {
				return err
			}
			i = 0
			continue
		}
		done := false
		switch kind := kinds[s.buf[i]]; {
		case escaped:
			escaped = false
		case inString:
			escaped = kind == backslash
			inString = kind != quote
			done = !inString && depth == 0
		case kind == quote:
			inString = true
		case kind == opening:
			depth++
		case depth == 0: // The byte behind a number or a word is not part of it.
			s.note(keep, i)
			s.pos = i
			return nil
		case kind == closing:
			depth--
			done = depth == 0
		}
		i++
		if done {
			s.note(keep, i)
			s.pos = i
			return nil
		}
	}
}

// note keeps what lies before end.
func (s *scanner) note(keep bool, end int) {
	if !keep || s.tooLong {
		return
	}
	if len(s.kept)+end-s.pos > maxKept {
		s.tooLong = true
		return
	}
	s.kept = append(s.kept, s.buf[s.pos:end]...)
}
