//go:build e2e

package browser

import (
	"fmt"
	"strings"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/page"
)

// now is when the snapshots were taken.
var now = time.Date(2026, 3, 9, 14, 30, 5, 0, time.UTC)

// hostile is what a client might send to run a script in an operator's browser. The page's
// title would change, which the tests look at.
var hostile = []string{
	`<script>document.title='owned'</script>`,
	`"><img src=x onerror="document.title='owned'">`,
	`' onmouseover='document.title="owned"' x='`,
	`</style></table></title><svg onload="document.title='owned'">`,
	`{{.}} <!-- javascript:document.title='owned' -->`,
	"job \u202egpj.exe\u2066 \x00\x1b[31m\u200b",
}

// fleet is what a proxy with 300 clients knows: most are well, some failing, some away.
func fleet() reverse.ProxyStatus {
	status := reverse.ProxyStatus{Version: "1.4.0", Now: now, Settling: true}
	kinds := []string{"ptth", "ptth", "ptth", "longpoll", "pushprox"}
	for i := range 300 {
		c := reverse.ClientStatus{
			Name: fmt.Sprintf("%s-%03d.fra1.example.org", []string{"web", "db", "cache", "edge"}[i/75], i%75+1),
			Kind: kinds[i%len(kinds)], Version: "1.4.0", Remote: fmt.Sprintf("10.20.%d.%d", i/75, i%75+10),
			Connected: true, Since: now.Add(-time.Duration(i*i+40) * time.Minute), Lines: 3, Sessions: 1,
			Labels: map[string]string{"env": "prod", "dc": "fra1"},
		}
		c.Instance = c.Name
		scraped := reverse.ScrapeStatus{At: now.Add(-time.Duration(i%15) * time.Second), Duration: time.Duration(8+i*7%400) * time.Millisecond, Status: 200, Result: "success"}
		c.Targets = []reverse.TargetStatus{{Target: reverse.Target{Job: "node", Port: 9100, Path: "/metrics"}, Last: scraped}}
		if i%3 == 0 {
			c.Targets = append(c.Targets, reverse.TargetStatus{
				Target: reverse.Target{Job: "app", Scheme: "https", Port: 8443, Path: "/internal/metrics", Query: "collect=all&module=app"}, Last: scraped,
			})
		}
		if c.Kind == "pushprox" {
			c.Version, c.Instance, c.Labels, c.Targets, c.Last, c.Lines = "", "", nil, nil, scraped, 1
		}
		switch {
		case i%31 == 7 && len(c.Targets) > 0:
			c.Targets[len(c.Targets)-1].Last = reverse.ScrapeStatus{At: scraped.At, Duration: 3 * time.Millisecond, Status: 502, Result: "target_down"}
		case i == 75:
			c.Targets[0].Last.Duration, c.Targets[0].Last.Status, c.Targets[0].Last.Result = 10*time.Second, 504, "timeout"
		case i == 78:
			c.Targets[0].Last.Status = 500
		case i%29 == 3:
			c.Connected, c.Lines, c.Since = false, 0, now.Add(-time.Duration(i)*time.Minute)
			c.Goodbye = i%2 == 0
			for t := range c.Targets {
				c.Targets[t].Last.At = c.Since
				if i%3 == 0 {
					c.Targets[t].Last = reverse.ScrapeStatus{At: scraped.At, Duration: 200 * time.Microsecond, Status: 503, Result: "client_away"}
				}
			}
		case i == 150:
			c.Sessions, c.Lines = 2, 6
		case i == 151 || i == 152:
			c.Targets[0].Duplicate = true
		case i == 156:
			c.Busy = 1
			c.Targets[0].Last = reverse.ScrapeStatus{}
		}
		status.Clients = append(status.Clients, c)
	}
	for i, value := range hostile {
		c := &status.Clients[220+i]
		c.Instance, c.Version, c.Labels = value, value, map[string]string{"note": value, "team": value}
		c.Targets = []reverse.TargetStatus{{Target: reverse.Target{Job: value, Port: 9100, Path: "/metrics"}, Last: reverse.ScrapeStatus{At: now, Status: 502, Result: value}}}
	}
	c := &status.Clients[230]
	c.Name = strings.Repeat("a-very-long-name-", 14) + "end"
	c.Labels = map[string]string{"description": strings.Repeat("x", 5000)}
	c.Targets = []reverse.TargetStatus{{Target: reverse.Target{Job: strings.Repeat("j", 3000), Port: 9100, Path: "/" + strings.Repeat("p", 3000)}}}
	return status
}

// agentOf is what an agent with two proxies knows.
func agentOf() page.AgentStatus {
	status := page.AgentStatus{
		Name: "web-001.fra1.example.org", Version: "1.4.0", Now: now,
		Forwarding: "Puts what 2 targets expose to 1 Pushgateway every 15 s.",
		Lines: []reverse.LineStatus{
			{Proxy: "https://hub-a.example.org/ferry", Kind: "ptth", Lines: 3, Busy: 1, Since: now.Add(-26 * time.Hour)},
			{Proxy: "https://hub-b.example.org/ferry", Since: now.Add(-4 * time.Minute), Err: "open a line to https://hub-b.example.org/ferry: dial tcp 203.0.113.9:443: connect: connection refused"},
		},
		Targets: []reverse.TargetStatus{
			{Target: reverse.Target{Job: "node", Port: 9100, Path: "/metrics"}, Last: reverse.ScrapeStatus{At: now.Add(-3 * time.Second), Duration: 21 * time.Millisecond, Status: 200, Result: "success"}},
			{Target: reverse.Target{Job: "app", Scheme: "https", Port: 8443, Path: "/m", Query: "module=a"}, Last: reverse.ScrapeStatus{At: now.Add(-5 * time.Second), Duration: 900 * time.Microsecond, Status: 502, Result: "target_down"}},
			{Target: reverse.Target{Job: "batch", Port: 9500, Path: "/metrics"}},
		},
	}
	for _, value := range hostile {
		status.Targets = append(status.Targets, reverse.TargetStatus{Target: reverse.Target{Job: value, Port: 1, Path: "/"}, Last: reverse.ScrapeStatus{At: now, Status: 502, Result: value}})
	}
	return status
}
