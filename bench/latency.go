//go:build bench

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	"github.com/promferry/promferry/exposition"
)

// latency measures how long a cycle takes, from the scrape's arrival at the exporter to
// the end of the put at the gateway, against a scrape and a put of the same bytes alone.
// Exporter and gateway are in this process, with a real exposition.
func latency(ctx context.Context, promferry, target string) error {
	body, header, err := capture(ctx, target)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var scraped time.Time
	var cycles []float64
	var put []byte
	var putHeader http.Header
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		scraped = time.Now()
		mu.Unlock()
		w.Header().Set("Content-Type", header.Get("Content-Type"))
		w.Header().Set("Content-Encoding", header.Get("Content-Encoding"))
		_, _ = w.Write(body)
	}))
	defer exporter.Close()
	gateway := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		cycles = append(cycles, time.Since(scraped).Seconds())
		put, putHeader = b, r.Header.Clone()
	}))
	defer gateway.Close()
	a, end, err := agent(ctx, promferry, exporter.URL, gateway.URL, "100ms")
	if err != nil {
		return err
	}
	defer end()
	if err := untilPuts(ctx, a, 2*forwards); err != nil {
		return err
	}
	end()
	mu.Lock()
	cycle := median(cycles)
	sent, sentHeader := put, putHeader
	mu.Unlock()

	// The scrape and the put alone, from this process on the core that the agent had.
	if err := pin(ctx, os.Getpid(), serverCore+","+measuredCore); err != nil {
		return err
	}
	var alone []float64
	for range 2 * forwards {
		begin := time.Now()
		if _, _, err := request(ctx, http.MethodGet, exporter.URL, nil, nil); err != nil {
			return err
		}
		if _, _, err := request(ctx, http.MethodPut, gateway.URL, sent, sentHeader); err != nil {
			return err
		}
		alone = append(alone, time.Since(begin).Seconds())
	}
	fmt.Printf("a cycle takes %.2f ms, its scrape and its put alone %.2f ms: %.2f ms more, ratio %.1f\n\n",
		1000*cycle, 1000*median(alone), 1000*(cycle-median(alone)), cycle/median(alone))
	return pin(ctx, os.Getpid(), serverCore)
}

// capture returns what a target answers to a scrape of ours.
func capture(ctx context.Context, target string) ([]byte, http.Header, error) {
	return request(ctx, http.MethodGet, target, nil, http.Header{"Accept": {exposition.Accept}, "Accept-Encoding": {"gzip"}})
}

func request(ctx context.Context, method, url string, body []byte, header http.Header) ([]byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	if header != nil {
		req.Header = header.Clone()
	}
	client := &http.Client{Timeout: time.Minute, Transport: transport}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return b, resp.Header, err
}

// transport does not decompress: the bytes count.
var transport = &http.Transport{DisableCompression: true}
