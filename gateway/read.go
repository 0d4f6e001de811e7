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
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/snappy"
	dto "github.com/prometheus/client_model/go"

	"github.com/promferry/promferry/exposition"
)

const (
	// bodyTime is how long the body of a push may take to come, parseTime how long it may take
	// to be understood.
	bodyTime  = time.Minute
	parseTime = 30 * time.Second
)

// gunzippers are used again: a new one allocates some 40 KiB.
var gunzippers = sync.Pool{New: func() any { return new(gzip.Reader) }}

// readBody reads the body of a push into b, unpacked. Done is to be called when b is not needed
// any more.
func (g *Gateway) readBody(w http.ResponseWriter, r *http.Request, b *bytes.Buffer) (done func(), err error) {
	done = func() {}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTime))
	most := g.config.MaxBodyBytes
	var body io.Reader = http.MaxBytesReader(w, r.Body, most)
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	switch encoding {
	case "gzip":
		z := gunzippers.Get().(*gzip.Reader)
		defer gunzippers.Put(z)
		if err := z.Reset(body); err != nil {
			return done, g.bodyFault(encoding, err)
		}
		body = z
	case "snappy":
		body = snappy.NewReader(body)
	default: // As a Pushgateway does: it is read as it is.
		encoding = ""
	}
	n, err := b.ReadFrom(io.LimitReader(body, min(smallBody, most)+1))
	if err == nil && n > smallBody && n <= most {
		if done, err = g.largeTurn(r.Context()); err != nil {
			return done, err
		}
		_ = control.SetReadDeadline(time.Now().Add(bodyTime))
		var more int64
		more, err = b.ReadFrom(io.LimitReader(body, most+1-n))
		n += more
	}
	if err != nil {
		return done, g.bodyFault(encoding, err)
	}
	if n > most {
		return done, g.tooLarge()
	}
	// All of it came. At a deadline in the time that follows, net/http would end the request.
	_ = control.SetReadDeadline(time.Now().Add(parseTime + writeTime))
	return done, nil
}

// smallBody is up to which size, in bytes, unpacked, a body waits for nobody. Of larger ones,
// largeBodies are read at a time, so that many of them take no more memory than some.
const (
	smallBody   = 1 << 20
	largeBodies = 8
)

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
			Text: fmt.Sprintf("%d bodies of more than %d bytes are being read, and none came to its end within %v", largeBodies, smallBody, bodyTime),
		}
	}
}

func (g *Gateway) bodyFault(encoding string, err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return g.tooLarge()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &Refusal{Status: http.StatusRequestTimeout, Reason: reasonTimeout, Text: fmt.Sprintf("the body did not come within %v", bodyTime)}
	}
	if encoding != "" {
		err = fmt.Errorf("the body is not in the encoding that its Content-Encoding says, %s: %w", encoding, err)
	}
	return badBody(err)
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
			return nil, fmt.Errorf("family %q: unknown metric type gaugehistogram: Prometheus does not read it", family.GetName())
		}
	}
	return families, nil
}
