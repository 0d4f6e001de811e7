package access_test

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/access"
)

// A proxy asks for each of some 17,000 scrapes a second.
func BenchmarkScraper(b *testing.B) {
	open, err := access.NewProxy("", slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	if err != nil {
		b.Fatal(err)
	}
	guarded := newGuard(b, example).Guard
	for _, bc := range []struct {
		what string
		g    *access.Guard
		caller
	}{
		{"open", open, caller{}},
		{"bearer", guarded, caller{bearer: "scrape-token"}},
		{"basic", guarded, caller{username: "prom", password: "scrape-token"}},
		{"certificate", guarded, caller{certificate: certificate("", "prometheus.example.org")}},
	} {
		b.Run(bc.what, func(b *testing.B) {
			r := bc.request("Proxy-Authorization")
			b.ReportAllocs()
			for b.Loop() {
				if _, err := bc.g.Scraper(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// many has a token and a name for each of n clients.
func many(n int) string {
	var b strings.Builder
	b.WriteString("clients:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {identity: node-%d, names: [node-%d.example.org], token_sha256: [%s]}\n", i, i, sum("token-"+strconv.Itoa(i)))
	}
	return b.String()
}

// Each long-poll asks. What it takes must not grow with the number of clients.
func BenchmarkClient(b *testing.B) {
	for _, n := range []int{10, 10000} {
		g := newGuard(b, many(n))
		for _, i := range []int{0, n - 1} {
			r := caller{bearer: "token-" + strconv.Itoa(i)}.request("Authorization")
			name := fmt.Sprintf("node-%d.example.org", i)
			b.Run(fmt.Sprintf("tokens=%d/the=%d", n, i), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := g.Client(r, name); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		grant, err := g.Client(caller{bearer: "token-0"}.request("Authorization"), "node-0.example.org")
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("tokens=%d/valid", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !g.Valid(grant, "node-0.example.org") {
					b.Fatal("not valid")
				}
			}
		})
		b.Run(fmt.Sprintf("tokens=%d/refused", n), func(b *testing.B) {
			r := caller{bearer: "x"}.request("Authorization")
			b.ReportAllocs()
			for b.Loop() {
				if _, err := g.Client(r, "node-0.example.org"); err == nil {
					b.Fatal("let in")
				}
			}
		})
	}
}

// Reading the file of 10,000 clients holds up nobody, but takes its time.
func BenchmarkReload(b *testing.B) {
	g := newGuard(b, many(10000))
	for b.Loop() {
		if err := g.Reload(); err != nil {
			b.Fatal(err)
		}
	}
}
