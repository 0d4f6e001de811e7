package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/snappy"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/pushgw"
)

const (
	// bodyTime is how long the body of a push may take to come, parseTime how long it may take
	// to be understood.
	bodyTime  = time.Minute
	parseTime = 30 * time.Second
)

// smallBody is up to which size, in bytes, a body waits for no larger one. Of those, largeBodies
// are held at a time, so that many of them take no more memory than some.
const (
	smallBody   = 1 << 20
	largeBodies = 8
)

// read reads a push and makes it ready to be applied. Errors are *Refusal.
func (g *Gateway) read(w http.ResponseWriter, r *http.Request, key pushgw.GroupingKey) (*pushed, error) {
	packed, text := getBuffer(), getBuffer()
	defer putBuffer(packed)
	defer putBuffer(text)
	done, err := g.receive(w, r, packed)
	defer func() { done() }()
	if err != nil {
		return nil, err
	}
	// Only now: what is unpacked takes memory that its sender did not have to send.
	turn, large := g.parsing, packed.Len() > smallBody
	if large {
		turn = g.parsingLarge
	}
	leave, err := take(r.Context(), turn)
	defer func() { leave() }()
	if err != nil {
		return nil, err
	}
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	body, err := unpacker(encoding, packed)
	if err != nil {
		return nil, err
	}
	most := g.config.MaxBodyBytes
	becomeLarge := func() error {
		if large {
			return nil
		}
		large = true
		leave()
		leave = func() {}
		var err error
		if done, err = g.largeTurn(r.Context()); err != nil {
			return err
		}
		leave, err = take(r.Context(), g.parsingLarge)
		return err
	}
	n, err := text.ReadFrom(io.LimitReader(body, min(smallBody, most)+1))
	if err == nil && n > smallBody {
		if err := becomeLarge(); err != nil { // Unpacked it is.
			return nil, err
		}
		_, err = text.ReadFrom(io.LimitReader(body, most+1-n))
	}
	if err != nil {
		return nil, badEncoding(encoding, err)
	}
	if int64(text.Len()) > most {
		return nil, g.tooLarge()
	}
	families, err := readFamilies(r.Context(), text.Bytes(), r.Header.Get("Content-Type"), g.config.MaxSeries)
	if err != nil {
		return nil, err
	}
	size := textSize(families, key)
	if size > g.config.MaxGroupBytes {
		return nil, tooLargeGroup(g.config.MaxGroupBytes)
	}
	if size > smallBody && !large { // A series of a protobuf can be many lines. What was read takes no memory while others are.
		if err := becomeLarge(); err != nil {
			return nil, err
		}
		if families, err = readFamilies(r.Context(), text.Bytes(), r.Header.Get("Content-Type"), g.config.MaxSeries); err != nil {
			return nil, err
		}
	}
	p := g.store.prepare(key, families, r.Method == http.MethodPost)
	p.done, done = done, p.done // What was made of a large body takes memory until it is applied.
	return p, nil
}

// take waits for a turn. Leave gives it back.
func take(ctx context.Context, turn chan struct{}) (leave func(), err error) {
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return func() {}, ended(context.Cause(ctx))
	}
}

// receive reads the body of a push into b, as it came. Done is to be called when the push is
// read.
func (g *Gateway) receive(w http.ResponseWriter, r *http.Request, b *bytes.Buffer) (done func(), err error) {
	done = func() {}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTime))
	body := http.MaxBytesReader(w, r.Body, g.config.MaxBodyBytes)
	n, err := b.ReadFrom(io.LimitReader(body, smallBody+1))
	if err == nil && n > smallBody {
		if done, err = g.largeTurn(r.Context()); err != nil {
			return done, err
		}
		_ = control.SetReadDeadline(time.Now().Add(bodyTime))
		_, err = b.ReadFrom(body)
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return done, g.tooLarge()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return done, &Refusal{Status: http.StatusRequestTimeout, Reason: reasonTimeout, Text: fmt.Sprintf("the body did not come within %v", bodyTime)}
	}
	if err != nil {
		return done, badBody(err)
	}
	// All of it came. At a deadline in the time that follows, net/http would end the request.
	_ = control.SetReadDeadline(time.Now().Add(2*bodyTime + parseTime + writeTime))
	return done, nil
}

// unpacker reads what is packed in an encoding. Others than these are read as they are, as a
// Pushgateway does.
func unpacker(encoding string, packed io.Reader) (io.Reader, error) {
	switch encoding {
	case "gzip":
		z, err := gzip.NewReader(packed)
		if err != nil {
			return nil, badEncoding(encoding, err)
		}
		return z, nil
	case "snappy":
		return snappy.NewReader(packed), nil
	}
	return packed, nil
}

func badEncoding(encoding string, err error) error {
	return badBody(fmt.Errorf("the body is not in the encoding that its Content-Encoding says, %.200s: %w", encoding, err))
}

// largeTurn waits until another large body may be read.
func (g *Gateway) largeTurn(ctx context.Context) (done func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, bodyTime)
	defer cancel()
	select {
	case g.large <- struct{}{}:
		return func() { <-g.large }, nil
	case <-ctx.Done():
		return func() {}, &Refusal{
			Status: http.StatusTooManyRequests, Reason: reasonBusy,
			Text: fmt.Sprintf("%d bodies of more than %d bytes are being read, and none was done within %v", largeBodies, smallBody, bodyTime),
		}
	}
}

func (g *Gateway) tooLarge() error {
	return &Refusal{
		Status: http.StatusRequestEntityTooLarge, Reason: reasonSize,
		Text: fmt.Sprintf("the body is larger than %d bytes, packed or unpacked (--limit.body-bytes)", g.config.MaxBodyBytes),
	}
}

// readFamilies reads the families of a push. Where they cannot be read, or there are more series
// than maxSeries, the error is a *Refusal. A push without any series is none.
func readFamilies(ctx context.Context, b []byte, contentType string, maxSeries int) ([]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeout(ctx, parseTime)
	defer cancel()
	var families []*dto.MetricFamily
	var err error
	if isProtobuf(contentType) {
		families, err = exposition.ParseProtobuf(ctx, b)
	} else {
		if err := checkLines(b, maxSeries); err != nil {
			return nil, err
		}
		families, err = readText(ctx, b)
	}
	switch {
	case errors.Is(err, exposition.ErrTooLarge):
		return nil, &Refusal{Status: http.StatusRequestEntityTooLarge, Reason: reasonSize, Text: err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		return nil, &Refusal{Status: http.StatusRequestEntityTooLarge, Reason: reasonTimeout, Text: fmt.Sprintf("the body takes longer than %v to read", parseTime)}
	case errors.Is(err, context.Canceled):
		return nil, ended(err)
	case err != nil:
		return nil, badBody(err)
	}
	if n := exposition.Samples(families); n > maxSeries {
		return nil, tooManySeries(n, maxSeries)
	}
	if n := len(families); n > maxSeries {
		return nil, tooManyFamilies(n, maxSeries)
	}
	return families, nil
}

// ended is for a push whose request ended before its body was understood: its sender has gone, or
// it waited for too long for others. Nothing is known to be wrong with it.
func ended(err error) error {
	return &Refusal{
		Status: http.StatusTooManyRequests, Reason: reasonBusy,
		Text: fmt.Sprintf("the request ended before the push was read (%v): push it again", err),
	}
}

func badBody(err error) error {
	return &Refusal{Status: http.StatusBadRequest, Reason: reasonBody, Text: err.Error()}
}

// isProtobuf tells whether a push has a Content-Type that is exactly that of protobuf. All
// else is text to a Pushgateway.
func isProtobuf(contentType string) bool {
	typ, params, err := mime.ParseMediaType(contentType)
	return err == nil && typ == "application/vnd.google.protobuf" &&
		params["proto"] == "io.prometheus.client.MetricFamily" && params["encoding"] == "delimited"
}

// checkLines refuses a text that has too many samples, or one with too many labels, before
// that costs anything.
func checkLines(b []byte, maxSeries int) error {
	samples, types := 0, 0
	for line := range bytes.Lines(b) {
		line = bytes.TrimLeft(line, " \t")
		if len(line) == 0 || line[0] == '#' || line[0] == '\n' {
			if bytes.HasPrefix(bytes.TrimLeft(bytes.TrimPrefix(line, []byte{'#'}), " \t"), []byte("TYPE")) {
				types++
			}
			continue
		}
		samples++
		if n := labelsIn(line); n > maxLabels {
			return tooManyLabels(n)
		}
	}
	if samples > maxSeries {
		return tooManySeries(samples, maxSeries)
	}
	if types > maxSeries {
		return tooManyFamilies(types, maxSeries)
	}
	return nil
}

func tooManyFamilies(n, most int) error {
	return &Refusal{
		Status: http.StatusUnprocessableEntity, Reason: reasonSeries,
		Text: fmt.Sprintf("the push has %d families, and a group may have %d series (--limit.group-series)", n, most),
	}
}

// labelsIn counts the labels in a line with a sample: the strings that follow a =.
func labelsIn(line []byte) int {
	if len(line) < maxLabels*len(`l=""`) {
		return 0 // Not too many.
	}
	n, quoted, before := 0, false, byte(0)
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '"':
			if !quoted && before == '=' {
				n++
			}
			quoted = !quoted
		case quoted && c == '\\':
			i++
		case !quoted && c != ' ' && c != '\t':
			before = c
		}
	}
	return n
}

// readText reads a text. Unlike exposition.Read it mends nothing.
func readText(ctx context.Context, b []byte) ([]*dto.MetricFamily, error) {
	families, err := exposition.ParseText(ctx, b)
	if err != nil {
		return nil, err
	}
	for _, family := range families {
		if family.GetType() == dto.MetricType_GAUGE_HISTOGRAM {
			return nil, fmt.Errorf("family %.200q: unknown metric type gaugehistogram: Prometheus does not read it", family.GetName())
		}
	}
	return families, nil
}
