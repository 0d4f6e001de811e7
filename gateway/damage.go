package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// The format of bbolt's files, version 2, in the byte order of the machine: pages of a header
// (number, kind, count of elements, count of pages that follow and belong to it) and elements,
// whose keys and values come behind the last of them, one after the other.
const (
	pageHeader  = 16
	branchPage  = 1
	leafPage    = 2
	pageElement = 16
	// bucketElement is the flag of an element whose value is a bucket: the number of its first
	// page and 8 bytes more, and with the number 0 the page itself.
	bucketElement = 1
	bucketHeader  = 16

	metaMagic   = 0xED0CDAED
	metaVersion = 2
	metaSize    = 64
	noFreelist  = 1<<64 - 1
	// maxPageShift is for the largest page that bbolt looks for: 16 MiB.
	maxPageShift = 24
)

var order = binary.NativeEndian

// checkFile tells whether bbolt can walk through a file. bbolt believes what it reads, and
// from pages that are damaged it takes addresses: that ends the process, in ways that nobody
// can recover from.
func checkFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := readMeta(f)
	if err != nil {
		return err
	}
	c := &fileCheck{file: f, pageSize: m.pageSize, seen: make(map[uint64]bool)}
	c.pages = min(m.end, uint64(info.Size())/m.pageSize) //nolint:gosec // No size is negative.
	return c.tree(m.root, true, nil, nil)
}

// A damageError says what of a file is damaged.
type damageError struct{ what string }

func (e *damageError) Error() string { return e.what }

func damage(format string, args ...any) error { return &damageError{fmt.Sprintf(format, args...)} }

// meta says where a tree begins. There are two, of the last transactions.
type meta struct {
	pageSize, root, end, transaction uint64 // end is the first page that is not used
}

// readMeta returns the meta that bbolt takes: the younger one, unless it is torn.
func readMeta(f *os.File) (meta, error) {
	var m meta
	for shift := 9; shift <= maxPageShift; shift++ {
		at := uint64(1) << shift
		if shift == 9 {
			at = 0 // Where the first one is. The second one begins the second page.
		}
		b := make([]byte, metaSize)
		if _, err := f.ReadAt(b, int64(at)+pageHeader); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return meta{}, err
		}
		sum := fnv.New64a()
		_, _ = sum.Write(b[:56])
		one := meta{pageSize: uint64(order.Uint32(b[8:])), root: order.Uint64(b[16:]), end: order.Uint64(b[40:]), transaction: order.Uint64(b[48:])}
		if order.Uint32(b) != metaMagic || order.Uint32(b[4:]) != metaVersion || order.Uint64(b[56:]) != sum.Sum64() || at > 0 && one.pageSize != at || one.pageSize == 0 {
			continue
		}
		if order.Uint64(b[32:]) != noFreelist {
			continue // Of an empty file that was just made.
		}
		if m.pageSize == 0 || one.transaction > m.transaction {
			m = one
		}
	}
	if m.pageSize == 0 {
		return meta{}, damage("there is no begin in it")
	}
	return m, nil
}

type fileCheck struct {
	file     *os.File
	pageSize uint64
	pages    uint64 // how many there are, in use or not
	seen     map[uint64]bool
}

// tree checks the pages of a tree from the one with this number on, whose keys are from low on
// and below high; nil means that there is no such limit. Values of the top one are buckets.
func (c *fileCheck) tree(number uint64, top bool, low, high []byte) error {
	page, err := c.page(number)
	if err != nil {
		return err
	}
	err = elements(page, low, high, func(e element, next []byte) error {
		switch {
		case e.branch:
			return c.tree(e.child, top, e.key, next)
		case top && e.flags == bucketElement:
			return c.bucket(e.value)
		case top || e.flags != 0:
			return damage("a value has flags %#x", e.flags)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("page %d: %w", number, err)
	}
	return nil
}

// page reads a page, and what belongs to it.
func (c *fileCheck) page(number uint64) ([]byte, error) {
	if number >= c.pages {
		return nil, damage("it has no page %d", number)
	}
	header := make([]byte, pageHeader)
	at := int64(number * c.pageSize) //nolint:gosec // It is within the file.
	if _, err := c.file.ReadAt(header, at); err != nil {
		return nil, err
	}
	end := number + uint64(order.Uint32(header[12:])) + 1
	if order.Uint64(header) != number || end > c.pages {
		return nil, damage("page %d is no such page", number)
	}
	for n := number; n < end; n++ {
		if c.seen[n] {
			return nil, damage("page %d is in it twice", n)
		}
		c.seen[n] = true
	}
	page := make([]byte, (end-number)*c.pageSize)
	_, err := c.file.ReadAt(page, at)
	return page, err
}

// bucket checks the value that is a bucket.
func (c *fileCheck) bucket(value []byte) error {
	if len(value) < bucketHeader {
		return damage("a bucket of %d bytes", len(value))
	}
	if root := order.Uint64(value); root != 0 {
		return c.tree(root, false, nil, nil)
	}
	return elements(value[bucketHeader:], nil, nil, func(e element, _ []byte) error {
		if e.branch || e.flags != 0 {
			return damage("a small bucket has more than values")
		}
		return nil
	})
}

// element is one of a page: a child in a branch, else a value.
type element struct {
	branch     bool
	child      uint64
	flags      uint32
	key, value []byte
}

// elements calls f with each element of a page and the key below which all in it has to be.
func elements(page, low, high []byte, f func(e element, next []byte) error) error {
	if len(page) < pageHeader {
		return damage("a page of %d bytes", len(page))
	}
	kind, count := order.Uint16(page[8:]), int(order.Uint16(page[10:]))
	// Only a small bucket is ever empty, and then ends with the header.
	if kind != leafPage && kind != branchPage || count == 0 && len(page) > pageHeader {
		return damage("it is of kind %#x, with %d elements", kind, count)
	}
	var all []element
	data := uint64(pageHeader + count*pageElement)
	for i := range count {
		at := uint64(pageHeader + i*pageElement)
		if data > uint64(len(page)) {
			return damage("it has no room for %d elements", count)
		}
		b := page[at : at+pageElement]
		e := element{branch: kind == branchPage}
		var position, keySize, valueSize uint64
		if e.branch {
			position, keySize, e.child = uint64(order.Uint32(b)), uint64(order.Uint32(b[4:])), order.Uint64(b[8:])
		} else {
			e.flags, position, keySize, valueSize = order.Uint32(b), uint64(order.Uint32(b[4:])), uint64(order.Uint32(b[8:])), uint64(order.Uint32(b[12:]))
		}
		if at+position != data || data+keySize+valueSize > uint64(len(page)) {
			return damage("element %d is not where it has to be", i)
		}
		e.key, e.value = page[data:data+keySize], page[data+keySize:data+keySize+valueSize]
		data += keySize + valueSize
		if bytes.Compare(e.key, low) < 0 || i > 0 && bytes.Equal(e.key, low) || high != nil && bytes.Compare(e.key, high) >= 0 {
			return damage("the key of element %d is not in order", i)
		}
		low = e.key
		all = append(all, e)
	}
	for i, e := range all {
		next := high
		if i+1 < len(all) {
			next = all[i+1].key
		}
		if err := f(e, next); err != nil {
			return err
		}
	}
	return nil
}
