//go:build bench

package main

import (
	"bufio"
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/e2e/real"
)

// A body is made of parts, each one of so many variants with other values. They are
// compressed once, so that a put costs the load no compression.
const bodyParts, partVariants = 8, 16

// expositions are those of many nodes: the same series, and at each put other values.
type expositions struct {
	series int
	parts  [bodyParts][partVariants]part
	// tail is what an agent adds.
	tail part
}

// part is a piece of a text, and that in blocks of a DEFLATE stream (RFC 1951).
type part struct{ text, deflated []byte }

// nodeText returns the exposition of a real node_exporter.
func nodeText(ctx context.Context) ([]byte, error) {
	exporter, err := real.NodeExporter(ctx, "")
	if err != nil {
		return nil, err
	}
	defer exporter.Kill()
	return exporter.Get(ctx, "/metrics")
}

// newExpositions makes expositions of a text, which are good for so many seconds, or with zero do
// not say that.
func newExpositions(text []byte, expiresAfter int) (*expositions, error) {
	e := &expositions{}
	families := familiesOf(text)
	for i := range e.parts {
		piece := bytes.Join(families[i*len(families)/bodyParts:(i+1)*len(families)/bodyParts], nil)
		for j := range e.parts[i] {
			random := rand.New(rand.NewPCG(uint64(i), uint64(j)))
			var err error
			if e.parts[i][j], err = newPart(withOtherValues(piece, random)); err != nil {
				return nil, err
			}
		}
	}
	tail := fmt.Appendf(nil, "# TYPE up gauge\nup 1\n# TYPE scrape_duration_seconds gauge\nscrape_duration_seconds 0.015625\n"+
		"# TYPE scrape_samples_scraped gauge\nscrape_samples_scraped %d\n# TYPE promferry_info gauge\n"+
		"promferry_info{mode=\"push\",version=\"1.0.0\"} 1\n", samples(text))
	if expiresAfter > 0 {
		tail = fmt.Appendf(tail, "# TYPE promferry_expires_after_seconds gauge\npromferry_expires_after_seconds %d\n", expiresAfter)
	}
	var err error
	e.tail, err = newPart(tail)
	e.series = samples(text) + samples(e.tail.text)
	return e, err
}

func newPart(text []byte) (part, error) {
	var b bytes.Buffer
	z, err := flate.NewWriter(&b, flate.DefaultCompression)
	if err != nil {
		return part{}, err
	}
	if _, err := z.Write(text); err != nil {
		return part{}, err
	}
	err = z.Flush() // At the bound of a byte, and not the end of the stream.
	return part{text, b.Bytes()}, err
}

// familiesOf cuts a text in front of each HELP.
func familiesOf(text []byte) [][]byte {
	var families [][]byte
	for line := range bytes.Lines(text) {
		if bytes.HasPrefix(line, []byte("# HELP ")) || len(families) == 0 {
			families = append(families, nil)
		}
		last := &families[len(families)-1]
		*last = append(*last, line...)
	}
	return families
}

// withOtherValues changes each number of three digits or more, but for the first digit and the
// exponent: so it takes as many bytes, and does not compress better than it did.
func withOtherValues(text []byte, random *rand.Rand) []byte {
	changed := bytes.Clone(text)
	begin := 0
	for line := range bytes.Lines(text) {
		space := bytes.LastIndexByte(line, ' ')
		if line[0] != '#' && len(line)-space > 3 {
			number := changed[begin+space+1 : begin+len(line)-1]
			mantissa, _, _ := bytes.Cut(number, []byte("e"))
			for i := 1; i < len(mantissa); i++ {
				if mantissa[i] >= '0' && mantissa[i] <= '9' && mantissa[0] != '+' {
					mantissa[i] = byte('1' + random.IntN(9))
				}
			}
		}
		begin += len(line)
	}
	return changed
}

// samples counts the samples of a text.
func samples(text []byte) int {
	n := 0
	for line := range bytes.Lines(text) {
		if line[0] != '#' {
			n++
		}
	}
	return n
}

// deviceLabel matches what names a CPU, disk, file system or network interface in a series.
var deviceLabel = regexp.MustCompile(`([{,](?:cpu|device)=")([^"]*?)([0-9]*)"`)

// enlarged returns an exposition as of a host with so many more CPUs, disks, file systems and
// network interfaces that there are at least so many series.
func enlarged(text []byte, series int) []byte {
	devices := 0
	for line := range bytes.Lines(text) {
		if line[0] != '#' && deviceLabel.Match(line) {
			devices++
		}
	}
	copies := (series - samples(text) + devices - 1) / devices
	var b bytes.Buffer
	for _, family := range familiesOf(text) {
		b.Write(family)
		for n := range copies {
			for line := range bytes.Lines(family) {
				if line[0] == '#' || !deviceLabel.Match(line) {
					continue
				}
				match := deviceLabel.FindSubmatchIndex(line)
				number, _ := strconv.Atoi(string(line[match[6]:match[7]])) // Without one: 0.
				b.Write(line[:match[6]])
				b.WriteString(strconv.Itoa(number + 100*(n+1)))
				b.Write(line[match[7]:])
			}
		}
	}
	return b.Bytes()
}

// gzipHead is the header of a gzip file (RFC 1952) without a name or a time, lastBlock the end
// of a DEFLATE stream: a block without content.
var gzipHead, lastBlock = []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}, []byte{1, 0, 0, 0xff, 0xff}

// appendPut appends the request that puts the exposition of a node, with values that nobody had.
func (e *expositions) appendPut(b []byte, node int) []byte {
	var chosen [bodyParts + 1]*part
	packed, size, sum := len(gzipHead)+len(lastBlock)+8, 0, uint32(0)
	for i := range chosen {
		chosen[i] = &e.tail
		if i < bodyParts {
			chosen[i] = &e.parts[i][rand.IntN(partVariants)]
		}
		packed += len(chosen[i].deflated)
		size += len(chosen[i].text)
		sum = crc32.Update(sum, crc32.IEEETable, chosen[i].text)
	}
	b = fmt.Appendf(b, "PUT /metrics/job/node/instance/%s HTTP/1.1\r\nHost: gateway\r\nUser-Agent: promferry/1.0.0\r\n"+
		"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n", nodeName(node), packed)
	b = append(b, gzipHead...)
	for _, p := range chosen {
		b = append(b, p.deflated...)
	}
	b = append(b, lastBlock...)
	b = binary.LittleEndian.AppendUint32(b, sum)
	return binary.LittleEndian.AppendUint32(b, uint32(size))
}

// sizes returns how large an exposition is as text, and gzipped as it is put.
func (e *expositions) sizes() (text, packed int) {
	for i := range e.parts {
		text += len(e.parts[i][0].text)
		packed += len(e.parts[i][0].deflated)
	}
	return text + len(e.tail.text), packed + len(e.tail.deflated) + len(gzipHead) + len(lastBlock) + 8
}

func (e *expositions) String() string {
	text, packed := e.sizes()
	return fmt.Sprintf("%d series, %d bytes of text, %d gzipped", e.series, text, packed)
}

func nodeName(n int) string { return fmt.Sprintf("web-%04d.example.org", n) }

// caller sends requests over a connection that it keeps.
type caller struct {
	to      dial
	timeout time.Duration
	conn    net.Conn
	r       *bufio.Reader
	// told is the body of the last answer, where keep is set.
	keep bool
	told bytes.Buffer
}

// do sends a request and reads its answer. A connection that ended while nobody used it is
// replaced, as clients of HTTP do.
func (c *caller) do(ctx context.Context, request []byte) (answer, error) {
	reused := c.conn != nil
	a, err := c.once(ctx, request)
	if reused && (errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)) {
		return c.once(ctx, request)
	}
	return a, err
}

func (c *caller) once(ctx context.Context, request []byte) (a answer, err error) {
	if c.conn == nil {
		if c.conn, err = c.to(ctx); err != nil {
			c.conn = nil
			return a, err
		}
		if c.r == nil {
			c.r = bufio.NewReader(nil)
		}
		c.r.Reset(c.conn)
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.conn.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return a, err
	}
	conn := c.conn
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // A checked Pushgateway may take minutes.
	if _, err := c.conn.Write(request); err != nil {
		return a, err
	}
	if !c.keep {
		return readAnswer(c.r, nil)
	}
	c.told.Reset()
	return readAnswer(c.r, &c.told)
}

func (c *caller) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// pushing says what is pushed at once, and for how long.
type pushing struct {
	callers int
	// most is how many pushes there are at most, window how long new ones begin. Zero means
	// without end.
	most   int
	window time.Duration
	// first is the number of the first push. push appends the request of number n to b.
	first int
	push  func(b []byte, n int) []byte
	// taken is called with the number of each push that was taken, unless it is nil.
	taken func(n int)
}

// pushed is what pushes took.
type pushed struct {
	count     int
	wall      time.Duration
	cpu, load time.Duration // of the server, and of this process
	took      []time.Duration
}

func (p *pushed) add(more pushed) {
	p.count += more.count
	p.wall += more.wall
	p.cpu += more.cpu
	p.load += more.load
	p.took = append(p.took, more.took...)
}

func (p *pushed) rate() float64  { return float64(p.count) / p.wall.Seconds() }
func (p *pushed) cost() float64  { return p.cpu.Seconds() / float64(p.count) }
func (p *pushed) busy() float64  { return p.cpu.Seconds() / p.wall.Seconds() }
func (p *pushed) loads() float64 { return p.load.Seconds() / p.wall.Seconds() }

// do pushes to a server, and waits for all answers, each of which must be that it was taken.
func (p pushing) do(ctx context.Context, to server) (pushed, error) {
	before, err := usedBy(to.pid)
	if err != nil {
		return pushed{}, err
	}
	begin := time.Now()
	var next atomic.Int64
	var mu sync.Mutex
	var all pushed
	group, ctx := errgroup.WithContext(ctx)
	for range p.callers {
		group.Go(func() error {
			c := &caller{to: to.dial, timeout: 5 * time.Minute, keep: true}
			defer c.close()
			var took []time.Duration
			var request []byte
			for ctx.Err() == nil {
				n := int(next.Add(1)) - 1
				start := time.Now()
				if p.most > 0 && n >= p.most || p.window > 0 && start.Sub(begin) >= p.window {
					break
				}
				request = p.push(request[:0], p.first+n)
				start = time.Now()
				a, err := c.do(ctx, request)
				if err != nil {
					return err
				}
				if a.status/100 != 2 {
					return fmt.Errorf("a push was answered with %d: %s", a.status, strings.TrimSpace(c.told.String()))
				}
				took = append(took, time.Since(start))
				if p.taken != nil {
					p.taken(p.first + n)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all.took = append(all.took, took...)
			return context.Cause(ctx)
		})
	}
	if err := group.Wait(); err != nil {
		return pushed{}, err
	}
	all.count, all.wall = len(all.took), time.Since(begin)
	after, err := usedBy(to.pid)
	all.cpu, all.load = after.server-before.server, after.own-before.own
	return all, err
}
