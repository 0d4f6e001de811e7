//go:build bench

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/promferry/promferry/exposition"
)

// largeSize is the size in text of the exposition whose memory is measured.
const largeSize = 10 << 20

// large returns a text of about largeSize bytes, in lines such as node_exporter has.
func large() []byte {
	var b bytes.Buffer
	for family := 0; b.Len() < largeSize; family++ {
		fmt.Fprintf(&b, "# HELP node_bench_%d_total Seconds the CPUs spent in each mode.\n# TYPE node_bench_%d_total counter\n", family, family)
		for cpu := range 100 {
			fmt.Fprintf(&b, "node_bench_%d_total{cpu=\"%d\",mode=\"system\",host=\"web-1.example.com\"} %d.25\n", family, cpu, family*cpu)
		}
	}
	return b.Bytes()
}

// memory measures the agent's peak with a large exposition, in both formats.
func memory(ctx context.Context, promferry, gateway string) error {
	text := large()
	families, _, err := exposition.Read(ctx, text, exposition.Text.ContentType())
	if err != nil {
		return err
	}
	var protobuf bytes.Buffer
	if err := exposition.Write(&protobuf, families, exposition.Protobuf); err != nil {
		return err
	}
	samples := exposition.Samples(families)
	for _, served := range []struct {
		format exposition.Format
		body   []byte
	}{{exposition.Text, text}, {exposition.Protobuf, protobuf.Bytes()}} {
		if err := memoryOf(ctx, promferry, gateway, served.format, served.body, samples); err != nil {
			return err
		}
	}
	return nil
}

func memoryOf(ctx context.Context, promferry, gateway string, format exposition.Format, body []byte, samples int) error {
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", format.ContentType())
		_, _ = w.Write(body)
	}))
	defer exporter.Close()
	a, end, err := agent(ctx, promferry, exporter.URL, gateway, "2s")
	if err != nil {
		return err
	}
	defer end()
	var peaks []float64
	for range 3 {
		if err := untilPuts(ctx, a, 8); err != nil {
			return err
		}
		_, peak, err := resident(a.PID())
		if err != nil {
			return err
		}
		peaks = append(peaks, peak)
	}
	fmt.Printf("peak resident memory, %.1f MiB of %s with %d samples: after 8, 16, 24 forwards %.0f, %.0f, %.0f MiB: %.1f × the exposition\n",
		mib(float64(len(body))), format, samples, mib(peaks[0]), mib(peaks[1]), mib(peaks[2]), peaks[2]/float64(len(body)))
	return nil
}
