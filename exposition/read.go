// Package exposition reads metric families, checks them against the rules of a
// Pushgateway, and writes them.
package exposition

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/promferry/promferry/internal/safeurl"
)

// Accept is what a scrape sends as its Accept header: protobuf first, for it costs a
// third of the time to read and can carry native histograms, and text otherwise. Names
// are asked for in the character set that every Pushgateway takes.
const Accept = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;escaping=underscores;q=0.9," +
	"text/plain;version=0.0.4;escaping=underscores;q=0.5"

// ErrEmpty says that an exposition holds no sample at all.
var ErrEmpty = errors.New("exposition without any sample")

// ErrTooLarge says that an exposition would take too much memory once it is read.
var ErrTooLarge = errors.New("exposition too large")

// Read decodes a whole exposition, as contentType, a Content-Type header, says; a missing
// one means text. The families are in the exposition's order (text: by name), exactly as
// they came: Rules.Check is still to follow. A fault costs the whole exposition, for a
// part of one must not pass for all of it.
//
// A long exposition takes time: when ctx ends, its error is returned.
//
// There is one fault in a text that Read mends: a family whose HELP or TYPE stands more
// than once, as when two exporters' answers are written one after the other. The first of
// them counts; samples under another TYPE are left out, and told.
func Read(ctx context.Context, b []byte, contentType string) ([]*dto.MetricFamily, []LeftOut, error) {
	format := expfmt.FmtText
	if contentType != "" {
		format = expfmt.ResponseFormat(http.Header{"Content-Type": {contentType}})
	}
	var families []*dto.MetricFamily
	var left []LeftOut
	var err error
	switch format.FormatType() {
	case expfmt.TypeProtoDelim:
		families, err = ParseProtobuf(ctx, b)
	case expfmt.TypeTextPlain:
		families, left, err = readText(ctx, b)
	default:
		return nil, nil, fmt.Errorf("unexpected content type %.200q", contentType)
	}
	if err != nil {
		return nil, nil, err
	}
	if Samples(families) == 0 {
		return nil, nil, ErrEmpty
	}
	return families, left, nil
}

// ParseProtobuf reads families that each have their length in front, as they are. The lengths
// are checked against b before anything is allocated for them.
func ParseProtobuf(ctx context.Context, b []byte) ([]*dto.MetricFamily, error) {
	if len(b) > uncounted {
		elements := 0
		for read := 0; read < len(b); {
			message, n := protowire.ConsumeBytes(b[read:])
			if n < 0 {
				break // Which is told below.
			}
			if elements += 1 + count(message, familyType); elements > maxElements {
				return nil, fmt.Errorf("%w: more than %d families, labels, values and strings", ErrTooLarge, maxElements)
			}
			read += n
		}
	}
	var families []*dto.MetricFamily
	for read := 0; read < len(b); {
		message, n := protowire.ConsumeBytes(b[read:])
		if n < 0 {
			return nil, fmt.Errorf("read protobuf at byte %d: %w", read, io.ErrUnexpectedEOF)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		family := &dto.MetricFamily{}
		if err := proto.Unmarshal(message, family); err != nil {
			return nil, fmt.Errorf("read protobuf at byte %d: %w", read, err)
		}
		families = append(families, family)
		read += n
	}
	return families, nil
}

const (
	// maxElements bounds the memory that a protobuf exposition takes: an empty series is
	// two bytes there, and more than a hundred once it is read. A series with two labels
	// has 8 elements, in some 70 bytes: 64 MiB of them pass.
	maxElements = 8_000_000
	// uncounted is the size up to which an exposition can do no harm.
	uncounted = 1 << 20
)

var familyType = (&dto.MetricFamily{}).ProtoReflect().Descriptor()

// count counts the messages and strings in a message of the type. What cannot be read
// counts up to there: reading it will fail.
func count(b []byte, message protoreflect.MessageDescriptor) int {
	n := 0
	for len(b) > 0 {
		number, wire, size := protowire.ConsumeTag(b)
		if size < 0 {
			return n
		}
		b = b[size:]
		if size = protowire.ConsumeFieldValue(number, wire, b); size < 0 {
			return n
		}
		if wire == protowire.BytesType {
			n++
			if field := message.Fields().ByNumber(number); field != nil && field.Message() != nil {
				value, _ := protowire.ConsumeBytes(b)
				n += count(value, field.Message())
			}
		}
		b = b[size:]
	}
	return n
}

func readText(ctx context.Context, b []byte) ([]*dto.MetricFamily, []LeftOut, error) {
	if bytes.Count(b, []byte("\n")) > maxLines {
		return nil, nil, fmt.Errorf("%w: more than %d lines", ErrTooLarge, maxLines)
	}
	families, err := ParseText(ctx, b)
	if err == nil || ctx.Err() != nil {
		return families, nil, err
	}
	mended, left, ok := mendHeaders(b)
	if !ok {
		return nil, nil, err
	}
	families, err = ParseText(ctx, mended)
	return families, left, err
}

// maxLines bounds the memory that a text takes: a line of four bytes makes a series of
// some hundred. A node exposes a thousand of them, the largest exporters some 100,000.
const maxLines = 2_000_000

// ParseText reads a text as it is, in the order of the families' names: unlike Read it mends and
// bounds nothing but its time. Errors are ctx's or the parser's, an
// expfmt.ParseError whose text is cut.
func ParseText(ctx context.Context, b []byte) ([]*dto.MetricFamily, error) {
	// UTF-8 names are read so that Rules.Check can leave out just the families that have
	// them.
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(&reader{ctx: ctx, r: bytes.NewReader(b)})
	if pe, ok := errors.AsType[expfmt.ParseError](err); ok {
		pe.Msg = safeurl.Cut(pe.Msg) // It quotes the text: a number may be all of it.
		err = pe
	}
	if err != nil {
		return nil, cmp.Or(ctx.Err(), err)
	}
	families := make([]*dto.MetricFamily, 0, len(byName))
	for _, family := range byName {
		families = append(families, family)
	}
	slices.SortFunc(families, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return families, nil
}

// reader ends with ctx. The parser takes time that grows with the square of the number of
// labels of a series, and has no other way to be stopped.
type reader struct {
	ctx context.Context //nolint:containedctx // It stands for a parameter that io.Reader has not.
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// mendHeaders empties each HELP and TYPE line of a family that has had one. Samples that
// follow a TYPE other than the family's first are left out as well, and told. Lines keep
// their numbers. It tells whether there was any such line.
func mendHeaders(b []byte) (mended []byte, told []LeftOut, changed bool) {
	helped := make(map[string]bool)
	types := make(map[string]string)
	clashing := "" // the family whose samples are being left out
	var left leftOut
	mended = make([]byte, 0, len(b))
	for line := range bytes.Lines(b) {
		keyword, name, value := header(line)
		if keyword != "" && name != clashing {
			clashing = ""
		}
		keep := true
		switch keyword {
		case "HELP":
			keep = !helped[name]
			helped[name] = true
		case "TYPE":
			if first, ok := types[name]; !ok {
				types[name] = value
			} else {
				keep = false
				if first != value {
					clashing = name
				}
			}
		default:
			name := sampleName(line)
			if name == "" {
				break
			}
			if clashing != "" && isSeriesOf(name, clashing) {
				keep = false
				left.series(clashing, ReasonClash)
			} else if types[name] == "" {
				types[name] = "untyped"
			}
		}
		if keep {
			mended = append(mended, line...)
		} else {
			mended = append(mended, '\n')
			changed = true
		}
	}
	return mended, left.all, changed
}

// isSeriesOf tells whether a sample of this name may belong to the family.
func isSeriesOf(name, family string) bool {
	suffix, ok := strings.CutPrefix(name, family)
	return ok && slices.Contains([]string{"", "_sum", "_count", "_bucket"}, suffix)
}

// header returns the keyword, HELP or TYPE, the family's name and the first word after it
// of such a line, and an empty keyword for another line.
func header(line []byte) (keyword, name, value string) {
	rest, ok := bytes.CutPrefix(bytes.TrimLeft(line, " \t"), []byte("#"))
	if !ok {
		return "", "", ""
	}
	fields := bytes.Fields(rest)
	if len(fields) < 2 || string(fields[0]) != "HELP" && string(fields[0]) != "TYPE" {
		return "", "", ""
	}
	if len(fields) > 2 {
		value = string(fields[2])
	}
	return string(fields[0]), string(fields[1]), value
}

// sampleName returns the metric name at the begin of a line, or nothing.
func sampleName(line []byte) string {
	line = bytes.TrimLeft(line, " \t")
	if i := bytes.IndexAny(line, "{ \t\r\n#"); i >= 0 {
		line = line[:i]
	}
	return string(line)
}

// Samples counts the samples in families as Prometheus counts those of a scrape: a
// summary has one for each quantile and two for sum and count, a histogram one for each
// bucket, +Inf included, and two; a native histogram without classic buckets is one.
func Samples(families []*dto.MetricFamily) int {
	n := 0
	for _, family := range families {
		for _, m := range family.GetMetric() {
			switch {
			case m.GetSummary() != nil:
				n += len(m.GetSummary().GetQuantile()) + 2
			case m.GetHistogram() != nil:
				n += histogramSamples(m.GetHistogram())
			default:
				n++
			}
		}
	}
	return n
}

func histogramSamples(h *dto.Histogram) int {
	buckets := h.GetBucket()
	if len(buckets) == 0 && h.Schema != nil {
		return 1
	}
	n := len(buckets) + 2
	if len(buckets) == 0 || !isInf(buckets[len(buckets)-1].GetUpperBound()) {
		n++
	}
	return n
}
