package exposition

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/promferry/promferry/internal/safeurl"
)

// A Format is what an exposition is written in.
type Format string

const (
	// Protobuf is length-delimited io.prometheus.client.MetricFamily messages. It carries
	// native histograms, and costs a Pushgateway a third less than text.
	Protobuf Format = "protobuf"
	// Text is the Prometheus text format 0.0.4, for receivers that read nothing else.
	// Native histograms are not part of it.
	Text Format = "text"
)

// ContentType returns the Content-Type header of what Write writes.
func (f Format) ContentType() string {
	if f == Text {
		return string(expfmt.FmtText)
	}
	return string(expfmt.FmtProtoDelim)
}

// Write writes families in a format.
func Write(w io.Writer, families []*dto.MetricFamily, format Format) error {
	for _, family := range families {
		var err error
		if format == Text {
			_, err = expfmt.MetricFamilyToText(w, family)
		} else {
			_, err = protodelim.MarshalTo(w, family)
		}
		if err != nil {
			return fmt.Errorf("write family %.200s: %w", family.GetName(), safeurl.CutError(err))
		}
	}
	return nil
}

// gzipWriters are used again: a new one allocates some hundred KiB.
var gzipWriters = sync.Pool{New: func() any {
	// An error would mean that BestSpeed is no level.
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return w
}}

// Encode returns families in a format, gzipped.
func Encode(families []*dto.MetricFamily, format Format) ([]byte, error) {
	var b bytes.Buffer
	w := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(w)
	w.Reset(&b)
	if err := Write(w, families, format); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
