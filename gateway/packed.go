package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
)

// packedText is a text as a group keeps it: some five times smaller, and all but ready for
// scrapes that take gzip, as Prometheus's do. What is served is longer by a tail that changes
// more often, so the stream has no end yet.
type packedText struct {
	// Stream is a deflate stream (RFC 1951) that ends with a block that is not the last. It
	// consists of pieces, each with pieceSize bytes of the text, the last one with the rest. No
	// piece refers to another one, so that each can be read by itself.
	Stream []byte `json:"deflate"`
	// Ends are where the pieces end in Stream, without the last one.
	Ends []int `json:"piece_ends,omitempty"`
	// Sum is the CRC-32 of the text as gzip has it, Size its length in bytes.
	Sum  uint32 `json:"crc32"`
	Size int    `json:"size"`
}

// pieceSize is how much text is in a piece, in bytes. It is how much of each group is in memory
// while all groups are read side by side. A window of deflate has 32 KiB; with half of it, a group
// of a node_exporter takes 4 % more memory.
const pieceSize = 15 << 10

// packer packs one text.
type packer struct {
	text packedText
	out  *bytes.Buffer
	z    *flate.Writer
	room int // in the piece
}

// deflaters are used again: a new one allocates some hundred KiB.
var deflaters = sync.Pool{New: func() any {
	// An error would mean that BestSpeed is no level.
	z, _ := flate.NewWriter(nil, flate.BestSpeed)
	return z
}}

func newPacker() *packer {
	p := &packer{out: getBuffer(), z: deflaters.Get().(*flate.Writer), room: pieceSize}
	p.z.Reset(p.out)
	return p
}

func (p *packer) write(b []byte) {
	p.text.Sum = crc32.Update(p.text.Sum, crc32.IEEETable, b)
	p.text.Size += len(b)
	for len(b) > 0 {
		if p.room == 0 {
			_ = p.z.Flush() // A bytes.Buffer takes everything.
			p.text.Ends = append(p.text.Ends, p.out.Len())
			p.z.Reset(p.out)
			p.room = pieceSize
		}
		n := min(len(b), p.room)
		_, _ = p.z.Write(b[:n])
		b, p.room = b[n:], p.room-n
	}
}

// packed returns what was written. The packer is not to be used again.
func (p *packer) packed() packedText {
	_ = p.z.Flush()
	p.text.Stream = bytes.Clone(p.out.Bytes())
	p.release()
	return p.text
}

// release gives back what the packer has borrowed.
func (p *packer) release() {
	deflaters.Put(p.z)
	putBuffer(p.out)
}

const (
	// gzipHeader is that of RFC 1952: deflate, no name, no time, fastest, system unknown.
	gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
	// maxStored is how much a block can hold that is not compressed (RFC 1951, 3.2.4).
	maxStored = 1<<16 - 1
	// lastBlock is an empty one that ends a stream.
	lastBlock = "\x01\x00\x00\xff\xff"
)

// gzip returns what stands before and behind the stream where the text is gzipped with a tail
// behind it.
func (p *packedText) gzip(tail []byte) (before, behind []byte) {
	behind = make([]byte, 0, len(tail)+len(tail)/maxStored*5+32)
	for rest := tail; len(rest) > 0; {
		n := min(len(rest), maxStored)
		behind = append(behind, 0) // A block that is stored, and not the last.
		behind = binary.LittleEndian.AppendUint16(behind, uint16(n))
		behind = binary.LittleEndian.AppendUint16(behind, ^uint16(n))
		behind = append(behind, rest[:n]...)
		rest = rest[n:]
	}
	behind = append(behind, lastBlock...)
	behind = binary.LittleEndian.AppendUint32(behind, crc32.Update(p.Sum, crc32.IEEETable, tail))
	behind = binary.LittleEndian.AppendUint32(behind, uint32(p.Size+len(tail))) //nolint:gosec // Modulo 2^32 in RFC 1952.
	return []byte(gzipHeader), behind
}

var inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}

// unpack returns the text. An error means that it is not what was packed: a disk has changed it.
func (p *packedText) unpack() ([]byte, error) {
	if p.Size < 0 || p.Size > len(p.Stream)*maxRatio {
		return nil, errors.New("unpack the text of a group: its size cannot be")
	}
	text := make([]byte, p.Size)
	if err := inflate(text, p.Stream); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(text) != p.Sum {
		return nil, errors.New("unpack the text of a group: its checksum is wrong")
	}
	return text, nil
}

// inflate unpacks all of text from a stream.
func inflate(text, stream []byte) error {
	z := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(z)
	// An error would mean that there is a dictionary.
	_ = z.(flate.Resetter).Reset(bytes.NewReader(stream), nil)
	if _, err := io.ReadFull(z, text); err != nil {
		return fmt.Errorf("unpack the text of a group: %w", err)
	}
	return nil
}

// inPieces tells whether the text can be read in pieces. Earlier versions wrote one stream.
func (p *packedText) inPieces() bool {
	last := 0
	for _, end := range p.Ends {
		if end <= last || end > len(p.Stream) {
			return false
		}
		last = end
	}
	return len(p.Ends) == max(0, p.Size-1)/pieceSize
}

// piece unpacks the piece of this number into the begin of b, which has room for pieceSize bytes,
// and returns its length, 0 behind the last one.
func (p *packedText) piece(n int, b []byte) (int, error) {
	size := min(pieceSize, p.Size-n*pieceSize)
	if size <= 0 {
		return 0, nil
	}
	begin, end := 0, len(p.Stream)
	if n > 0 {
		begin = p.Ends[n-1]
	}
	if n < len(p.Ends) {
		end = p.Ends[n]
	}
	return size, inflate(b[:size], p.Stream[begin:end])
}

// maxRatio is more than deflate packs (zlib's technical notes: 1032).
const maxRatio = 1100
