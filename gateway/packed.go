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

// packedText is a text as a group keeps it: some six times smaller, and all but ready for
// scrapes that take gzip, as Prometheus's do. What is served is longer by a tail that changes
// more often, so the stream has no end yet.
type packedText struct {
	// Stream is a deflate stream (RFC 1951) that ends with a block that is not the last.
	Stream []byte `json:"deflate"`
	// Sum is the CRC-32 of the text as gzip has it, Size its length in bytes.
	Sum  uint32 `json:"crc32"`
	Size int    `json:"size"`
}

// packer packs one text.
type packer struct {
	text packedText
	out  *bytes.Buffer
	z    *flate.Writer
}

// deflaters are used again: a new one allocates some hundred KiB.
var deflaters = sync.Pool{New: func() any {
	// An error would mean that BestSpeed is no level.
	z, _ := flate.NewWriter(nil, flate.BestSpeed)
	return z
}}

func newPacker() *packer {
	p := &packer{out: getBuffer(), z: deflaters.Get().(*flate.Writer)}
	p.z.Reset(p.out)
	return p
}

func (p *packer) write(b []byte) {
	_, _ = p.z.Write(b) // A bytes.Buffer takes everything.
	p.text.Sum = crc32.Update(p.text.Sum, crc32.IEEETable, b)
	p.text.Size += len(b)
}

// packed returns what was written. The packer is not to be used again.
func (p *packer) packed() packedText {
	_ = p.z.Flush()
	deflaters.Put(p.z)
	p.text.Stream = bytes.Clone(p.out.Bytes())
	putBuffer(p.out)
	return p.text
}

const (
	// gzipHeader is that of RFC 1952: deflate, no name, no time, fastest, system unknown.
	gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
	// maxStored is how much a block can hold that is not compressed (RFC 1951, 3.2.4).
	maxStored = 1<<16 - 1
	// lastBlock is an empty one that ends a stream.
	lastBlock = "\x01\x00\x00\xff\xff"
)

// gzip returns the text with a tail behind it, gzipped.
func (p packedText) gzip(tail []byte) []byte {
	b := make([]byte, 0, len(gzipHeader)+len(p.Stream)+len(tail)+len(tail)/maxStored*5+32)
	b = append(append(b, gzipHeader...), p.Stream...)
	for rest := tail; len(rest) > 0; {
		n := min(len(rest), maxStored)
		b = append(b, 0) // A block that is stored, and not the last.
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
		b = binary.LittleEndian.AppendUint16(b, ^uint16(n))
		b = append(b, rest[:n]...)
		rest = rest[n:]
	}
	b = append(b, lastBlock...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Update(p.Sum, crc32.IEEETable, tail))
	return binary.LittleEndian.AppendUint32(b, uint32(p.Size+len(tail))) //nolint:gosec // Modulo 2^32 in RFC 1952.
}

var inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}

// unpack returns the text. An error means that it is not what was packed: a disk has changed it.
func (p packedText) unpack() ([]byte, error) {
	if p.Size < 0 || p.Size > len(p.Stream)*maxRatio {
		return nil, errors.New("unpack the text of a group: its size cannot be")
	}
	z := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(z)
	// An error would mean that there is a dictionary.
	_ = z.(flate.Resetter).Reset(bytes.NewReader(p.Stream), nil)
	text := make([]byte, p.Size)
	if _, err := io.ReadFull(z, text); err != nil {
		return nil, fmt.Errorf("unpack the text of a group: %w", err)
	}
	if crc32.ChecksumIEEE(text) != p.Sum {
		return nil, errors.New("unpack the text of a group: its checksum is wrong")
	}
	return text, nil
}

// maxRatio is more than deflate packs (zlib's technical notes: 1032).
const maxRatio = 1100
