package gateway

import (
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// BenchmarkPut puts 500 series, gzipped, to one of many groups. What it costs does not depend on
// how many there are; heap-B/group is what a group takes in memory.
func BenchmarkPut(b *testing.B) {
	var text strings.Builder
	for i := range 250 {
		fmt.Fprintf(&text, "# HELP node_metric_%d What the kernel says of number %d.\n# TYPE node_metric_%d gauge\n", i, i, i)
		fmt.Fprintf(&text, "node_metric_%d{device=\"eth0\"} %d\nnode_metric_%d{device=\"eth1\"} %d.5e+06\n", i, i, i, i)
	}
	body := gzipText(b, text.String())
	for _, groups := range []int{100, 5000} {
		b.Run(fmt.Sprintf("groups=%d", groups), func(b *testing.B) {
			g := newTest(b, func(c *Config) { c.MaxGroups = groups })
			put := func(i int) {
				w := ask(g, http.MethodPut, fmt.Sprintf("/metrics/job/node/instance/web-%d", i%groups), body, "Content-Encoding", "gzip")
				if w.Code != http.StatusOK {
					b.Fatal(w.Body)
				}
			}
			for i := range groups {
				put(i)
			}
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			for i := 0; b.Loop(); i++ {
				put(i)
			}
			b.ReportMetric(float64(m.HeapAlloc)/float64(groups), "heap-B/group")
		})
	}
}
