package page

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/internal/page/pagetest"
	"github.com/promferry/promferry/reverse"
)

var now = time.Date(2026, 3, 9, 14, 30, 5, 0, time.FixedZone("CET", 3600))

// fixed returns the page of a proxy that knows these clients.
func fixed(clients ...reverse.ClientStatus) http.Handler {
	return Proxy(func() reverse.ProxyStatus {
		return reverse.ProxyStatus{Clients: clients, Version: "1.2.3", Now: now}
	})
}

var (
	good = reverse.ScrapeStatus{At: now.Add(-12 * time.Second), Duration: 34 * time.Millisecond, Status: 200, Result: "success"}
	down = reverse.ScrapeStatus{At: now.Add(-2 * time.Minute), Duration: 1230 * time.Millisecond, Status: 502, Result: "target_down"}
)

// client returns one that is well, with a target for each of the scrapes.
func client(name string, last ...reverse.ScrapeStatus) reverse.ClientStatus {
	c := reverse.ClientStatus{Name: name, Kind: "ptth", Version: "1.2.3", Remote: "192.0.2.7", Connected: true, Since: now.Add(-3 * time.Hour), Lines: 2, Busy: 1, Sessions: 1, Instance: name}
	for i, l := range last {
		c.Targets = append(c.Targets, reverse.TargetStatus{
			Target: reverse.Target{Job: fmt.Sprintf("job%d", i), Port: uint16(9100 + i), Path: "/metrics"}, Last: l,
		})
	}
	return c
}

// shown returns the names of the clients on a page.
func shown(page *pagetest.Node) []string {
	return pagetest.Saying(page.All(func(n *pagetest.Node) bool { return n.Name == "strong" && n.Attrs["class"] == "name" }))
}

func TestHeaders(t *testing.T) {
	for name, h := range map[string]http.Handler{"proxy": fixed(), "agent": Agent(func() AgentStatus { return AgentStatus{Now: now} })} {
		t.Run(name, func(t *testing.T) {
			page := pagetest.Guarded(t, h)
			var links []string
			for _, a := range page.All(pagetest.Named("nav"))[0].All(pagetest.Named("a")) {
				links = append(links, a.Attrs["href"])
			}
			for _, want := range []string{"metrics", "-/healthy", "-/ready"} {
				if !slices.Contains(links, want) {
					t.Errorf("links %q, want %s", links, want)
				}
			}
		})
	}
}

func TestRefresh(t *testing.T) {
	refresh := func(page *pagetest.Node) (content string) {
		for _, m := range page.All(pagetest.Named("meta")) {
			if m.Attrs["http-equiv"] == "refresh" {
				content = m.Attrs["content"]
			}
		}
		return content
	}
	link := func(page *pagetest.Node, text string) string {
		t.Helper()
		for _, a := range page.All(pagetest.Named("a")) {
			if strings.Contains(a.Says(), text) {
				return a.Attrs["href"]
			}
		}
		t.Fatalf("no link %q", text)
		return ""
	}
	h := fixed(client("web-1", good))
	page := pagetest.Show(t, h, "/?q=a%26b&state=away")
	if got := refresh(page); got != "" {
		t.Errorf("comes again after %q, want never", got)
	}
	on := link(page, "Refresh every 15 s")
	if on != "?q=a%26b&refresh=15&state=away" {
		t.Errorf("link %q", on)
	}
	page = pagetest.Show(t, h, "/"+on)
	if got := refresh(page); got != "15" {
		t.Errorf("comes again after %q, want 15", got)
	}
	if got := link(page, "stop that"); got != "?q=a%26b&state=away" {
		t.Errorf("link %q", got)
	}
	// A search goes on refreshing.
	hidden := page.All(func(n *pagetest.Node) bool { return n.Name == "input" && n.Attrs["type"] == "hidden" })
	if len(hidden) != 1 || hidden[0].Attrs["name"] != "refresh" || hidden[0].Attrs["value"] != "15" {
		t.Errorf("hidden fields %v", hidden)
	}
	agent := pagetest.Show(t, Agent(func() AgentStatus { return AgentStatus{Now: now} }), "/?refresh=30")
	if got := refresh(agent); got != "30" {
		t.Errorf("the agent's comes again after %q, want 30", got)
	}
}

func TestProxyPage(t *testing.T) {
	away, gone, crowded, duplicate, unscraped, legacy := client("away", good), client("gone", good), client("crowded", good), client("duplicate", good), client("unscraped", reverse.ScrapeStatus{}), client("legacy")
	away.Connected, away.Lines, away.Busy, away.Since = false, 0, 0, now.Add(-5*time.Minute)
	gone.Connected, gone.Lines, gone.Busy, gone.Goodbye, gone.Since = false, 0, 0, true, now.Add(-50*time.Hour)
	crowded.Sessions = 2
	duplicate.Targets[0].Duplicate, duplicate.Targets[0].Holder = true, "fine"
	gone.Targets[0].Holder = "fine" // It has another name now.
	legacy.Kind, legacy.Last, legacy.Version, legacy.Instance = "pushprox", down, "", ""
	failing := client("failing", good, down)
	failing.Instance, failing.Labels = "front", map[string]string{"env": "prod", "dc": "x"}
	failing.Last = good
	broken := client("broken", reverse.ScrapeStatus{At: now, Status: 500, Result: "success"})
	odd := client("odd", good)
	odd.Last = down // somebody's attempt: the targets are well

	clients := []reverse.ClientStatus{away, broken, crowded, duplicate, failing, client("fine", good), gone, legacy, odd, unscraped}
	h := fixed(clients...)
	page := pagetest.Show(t, h, "/")

	for id, want := range map[string]string{
		"failing":  "broken failing legacy",
		"doubtful": "crowded duplicate",
		"away":     "away gone",
		"fine":     "fine odd unscraped",
	} {
		sections := page.All(func(n *pagetest.Node) bool { return n.Name == "section" && n.Attrs["aria-labelledby"] == id })
		if len(sections) != 1 {
			t.Fatalf("%d sections %s", len(sections), id)
		}
		if got := strings.Join(shown(sections[0]), " "); got != want {
			t.Errorf("%s: %s, want %s", id, got, want)
		}
	}
	if got := strings.Join(shown(page), " "); !strings.HasPrefix(got, "broken failing legacy crowded") {
		t.Errorf("order %s: want what fails first", got)
	}
	tiles := pagetest.Saying(page.All(pagetest.Class("tiles"))[0].All(pagetest.Named("li")))
	want := []string{"3 failing in 3 clients", "2 away 1 stopped on purpose", "8 connected of 10 clients", "10 targets 8 of them connected"}
	if !slices.Equal(tiles, want) {
		t.Errorf("counts %q, want %q", tiles, want)
	}

	rows := map[string][]string{}
	for _, body := range page.All(pagetest.Named("tbody")) {
		rows[shown(body)[0]] = pagetest.Saying(body.All(pagetest.Named("tr")))
	}
	for name, want := range map[string][]string{
		"fine": {"fine 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://fine:9100/metrics 12 s ago 34 ms 200 ok"},
		"failing": { // what fails comes first here, too
			"failing 192.0.2.7 · 1.2.3 · dc=x env=prod instance front PTTH, 2 lines, 1 busy for 3 h job1 http://failing:9101/metrics 2 min ago 1.23 s 502 target_down",
			"job0 http://failing:9100/metrics 12 s ago 34 ms 200 ok",
			"something else 12 s ago 34 ms 200 ok",
		},
		"broken":    {"broken 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://broken:9100/metrics now 0.0 ms 500 from target"},
		"legacy":    {"legacy 192.0.2.7 PushProx, 2 lines, 1 busy for 3 h announced nothing 2 min ago 1.23 s 502 target_down"},
		"away":      {"away 192.0.2.7 · 1.2.3 away 5 min ago was PTTH job0 http://away:9100/metrics 12 s ago 34 ms 200 ok"},
		"gone":      {"gone 192.0.2.7 · 1.2.3 stopped 2 d ago was PTTH job0 http://gone:9100/metrics now fine 12 s ago 34 ms 200 ok"},
		"crowded":   {"crowded 2 processes 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://crowded:9100/metrics 12 s ago 34 ms 200 ok"},
		"duplicate": {"duplicate 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://duplicate:9100/metrics duplicate of fine 12 s ago 34 ms 200 ok"},
		"unscraped": {"unscraped 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://unscraped:9100/metrics not scraped yet"},
	} {
		if !slices.Equal(rows[name], want) {
			t.Errorf("rows %q\nwant %q", rows[name], want)
		}
	}

	banners := pagetest.Saying(page.All(pagetest.Class("banner")))
	if len(banners) != 2 || !strings.Contains(banners[0], "name of crowded.") || !strings.Contains(banners[1], "1 target has") {
		t.Errorf("banners %q", banners)
	}
	for _, th := range page.All(pagetest.Named("th")) {
		if th.Attrs["scope"] == "" {
			t.Errorf("a heading without scope: %s", th.Says())
		}
	}
	moment := page.All(pagetest.Class("failing"))[0].All(pagetest.Named("time"))[0]
	if moment.Attrs["datetime"] != "2026-03-09T10:30:05Z" || moment.Attrs["title"] != "since 2026-03-09 10:30:05 UTC" || moment.Says() != "3 h" {
		t.Errorf("broken's line is since %v %q", moment.Attrs, moment.Says())
	}

	for state, want := range map[string]string{
		"connected": "broken failing legacy crowded duplicate fine odd unscraped",
		"away":      "away gone",
		"failing":   "broken failing legacy",
		"":          "broken failing legacy crowded duplicate away gone fine odd unscraped",
	} {
		if got := strings.Join(shown(pagetest.Show(t, h, "/?state="+state)), " "); got != want {
			t.Errorf("state %q: %s, want %s", state, got, want)
		}
	}
}

func TestSettling(t *testing.T) {
	for settling, want := range map[bool]int{true: 1, false: 0} {
		page := pagetest.Show(t, Proxy(func() reverse.ProxyStatus { return reverse.ProxyStatus{Now: now, Settling: settling} }), "/")
		banners := page.All(func(n *pagetest.Node) bool {
			return n.Attrs["role"] == "status" && strings.Contains(n.Says(), "Settling")
		})
		if len(banners) != want {
			t.Errorf("settling %t: %d banners", settling, len(banners))
		}
		if !strings.Contains(page.Says(), "No client has connected yet.") {
			t.Errorf("an empty proxy says %q", page.Says())
		}
	}
}

func TestSearch(t *testing.T) {
	a, b := client("web-1.example.org", good, good), client("db-1.example.org", good)
	a.Instance, a.Remote, a.Version, a.Labels = "front", "192.0.2.10", "1.2.3", map[string]string{"env": "Prod"}
	a.Targets[1].Target = reverse.Target{Job: "App <1>", Scheme: "https", Port: 8443, Path: "/m", Query: "x=1"}
	b.Instance, b.Remote, b.Version, b.Labels = "back", "192.0.2.20", "0.9.0", map[string]string{"env": "test"}
	h := fixed(b, a)
	for q, want := range map[string]string{
		"":                           "db-1.example.org 1, web-1.example.org 2",
		"example.org":                "db-1.example.org 1, web-1.example.org 2",
		"WEB-1":                      "web-1.example.org 2",
		"  front ":                   "web-1.example.org 2",
		"192.0.2.2":                  "db-1.example.org 1",
		"0.9":                        "db-1.example.org 1",
		"env=prod":                   "web-1.example.org 2",
		"app":                        "web-1.example.org 1",
		"<1>":                        "web-1.example.org 1",
		"https://web-1.example.org:": "web-1.example.org 1",
		"/m?x=1":                     "web-1.example.org 1",
		"prod job0":                  "web-1.example.org 1",
		"test app":                   "",
		"job0 app":                   "", // never the same target
		"front192":                   "", // never across values
		"nobody":                     "",
	} {
		page := pagetest.Show(t, h, "/?q="+url.QueryEscape(q))
		var got []string
		for _, body := range page.All(pagetest.Named("tbody")) {
			got = append(got, fmt.Sprintf("%s %d", shown(body)[0], len(body.All(pagetest.Named("tr")))))
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%q: %s, want %s", q, strings.Join(got, ", "), want)
		}
		field := page.All(func(n *pagetest.Node) bool { return n.Attrs["name"] == "q" })[0]
		if field.Attrs["value"] != strings.TrimSpace(q) {
			t.Errorf("%q: the field says %q", q, field.Attrs["value"])
		}
		// The numbers stay those of everything.
		if tile := page.All(pagetest.Class("tiles"))[0].All(pagetest.Named("li"))[2].Says(); tile != "2 connected of 2 clients" {
			t.Errorf("%q: %s", q, tile)
		}
		if q == "app" && !strings.Contains(page.Says(), "1 more target not shown") {
			t.Error("a target that does not match is not mentioned")
		}
		if q == "nobody" && !strings.Contains(page.Says(), "No client matches.") {
			t.Error("nothing says that nothing was found")
		}
	}
}

func TestLimits(t *testing.T) {
	var clients []reverse.ClientStatus
	for i := range 400 {
		clients = append(clients, client(fmt.Sprintf("web-%03d", i), good, good))
	}
	clients[399].Targets[1].Last = down
	page := pagetest.Show(t, fixed(clients...), "/")
	rows := 0
	for _, body := range page.All(pagetest.Named("tbody")) {
		rows += len(body.All(pagetest.Named("tr")))
	}
	if rows != 500 || len(shown(page)) != 250 || shown(page)[0] != "web-399" {
		t.Errorf("%d rows of %d clients from %s on, want 500 of 250 from web-399 on", rows, len(shown(page)), shown(page)[0])
	}
	if !strings.Contains(page.Says(), "150 more clients: narrow the search to see them.") {
		t.Error("nothing says that there are more")
	}
	if !strings.Contains(page.All(pagetest.Class("tiles"))[0].Says(), "400 connected") {
		t.Error("only those shown were counted")
	}

	many := client("many", slices.Repeat([]reverse.ScrapeStatus{good}, 700)...)
	many.Targets[650].Last = down
	many.Last = good
	page = pagetest.Show(t, fixed(many, client("other", good)), "/")
	rowsOf := page.All(pagetest.Named("tbody"))[0].All(pagetest.Named("tr"))
	if len(rowsOf) != 500 || !strings.Contains(rowsOf[0].Says(), "job650") || !strings.Contains(rowsOf[0].Says(), "200 more targets not shown") {
		t.Errorf("%d rows, the first one %q", len(rowsOf), rowsOf[0].Says())
	}
	if !strings.Contains(page.Says(), "1 more client: narrow") {
		t.Error("nothing says that there is another client")
	}

	for i := range clients[:12] {
		clients[i].Sessions = 2
	}
	page = pagetest.Show(t, fixed(clients...), "/")
	if banner := page.All(pagetest.Class("banner"))[0]; len(banner.All(pagetest.Named("a"))) != 10 || !strings.Contains(banner.Says(), "web-009 and 2 more.") {
		t.Errorf("banner %q", banner.Says())
	}
}

// TestHostile shows that whatever a client says is text on the page, and nothing else: the
// elements and attributes are those of a page with a harmless value.
func TestHostile(t *testing.T) {
	with := func(value string) (*pagetest.Node, *pagetest.Node) {
		c := client(value, down)
		c.Kind, c.Version, c.Remote, c.Instance, c.Sessions = value, value, value, value+"i", 2
		c.Labels = map[string]string{value: value}
		c.Targets[0].Target = reverse.Target{Job: value, Scheme: value, Port: 1, Path: value, Query: value}
		c.Targets[0].Last.Result = value
		l := reverse.LineStatus{Proxy: value, Kind: value, Err: value}
		a := Agent(func() AgentStatus {
			return AgentStatus{Name: value, Forwarding: value, Version: value, Now: now, Lines: []reverse.LineStatus{l}, Targets: c.Targets}
		})
		return pagetest.Show(t, fixed(c), "/?q="+url.QueryEscape(value)), pagetest.Show(t, a, "/")
	}
	proxy, agent := with("harmless")
	wantProxy, wantAgent := proxy.Skeleton(), agent.Skeleton()
	for _, value := range pagetest.Hostile {
		proxy, agent := with(value)
		if got := proxy.Skeleton(); got != wantProxy {
			t.Errorf("%q changes the proxy's page:\n%s", value, got)
		}
		if got := agent.Skeleton(); got != wantAgent {
			t.Errorf("%q changes the agent's page:\n%s", value, got)
		}
		// It is there, whole, as text.
		for where, texts := range map[string][]string{
			"name": shown(proxy), "job": pagetest.Saying(proxy.All(pagetest.Class("job"))), "agent's job": pagetest.Saying(agent.All(pagetest.Class("job"))),
		} {
			if len(texts) != 1 || texts[0] != strings.Join(strings.Fields(value), " ") {
				t.Errorf("%s: %q, want %q", where, texts, value)
			}
		}
		for _, a := range slices.Concat(proxy.All(pagetest.Named("a")), agent.All(pagetest.Named("a"))) {
			if u, err := url.Parse(a.Attrs["href"]); err != nil || u.Scheme != "" || u.Host != "" {
				t.Errorf("%q: a link to %q", value, a.Attrs["href"])
			}
		}
	}
}

func TestLongValues(t *testing.T) {
	long := strings.Repeat("x", 81)
	c := client("web-1", good)
	c.Labels = map[string]string{"b": long, "a": "1"}
	c.Targets[0].Job = long
	page := pagetest.Show(t, fixed(c), "/")
	job := page.All(pagetest.Class("job"))[0].All(pagetest.Named("bdi"))[0]
	if job.Says() != long[:80]+"…" || job.Attrs["title"] != long {
		t.Errorf("job %q, title %q", job.Says(), job.Attrs["title"])
	}
	if title := page.All(pagetest.Class("more"))[0].All(pagetest.Named("bdi"))[2].Attrs["title"]; title != "a=1 b="+long {
		t.Errorf("labels %q", title)
	}
}

func TestTook(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                       "0.0 ms",
		1260 * time.Microsecond: "1.3 ms",
		10 * time.Millisecond:   "10 ms",
		time.Second - 1:         "999 ms",
		10 * time.Second:        "10.00 s",
	} {
		if got := took(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestAgentPage(t *testing.T) {
	status := AgentStatus{
		Name: "web-1", Version: "1.2.3", Now: now, Forwarding: "Puts 2 targets.",
		Lines: []reverse.LineStatus{
			{Proxy: "https://a.example.org", Kind: "longpoll", Lines: 1, Since: now.Add(-time.Minute)},
			{Proxy: "https://b.example.org", Err: "connection refused", Since: now.Add(-time.Hour)},
			{Proxy: "https://c.example.org"},
		},
		Targets: client("web-1", good, down, reverse.ScrapeStatus{}).Targets,
	}
	page := pagetest.Show(t, Agent(func() AgentStatus { return status }), "/?q=ignored&state=ignored")
	if got := page.All(pagetest.Named("title"))[0].Says(); got != "web-1 – promferry agent" {
		t.Errorf("title %q", got)
	}
	var rows []string
	for _, body := range page.All(pagetest.Named("tbody")) {
		rows = append(rows, pagetest.Saying(body.All(pagetest.Named("tr")))...)
	}
	want := []string{
		"https://a.example.org long-poll, 1 line for 1 min",
		"https://b.example.org not connected for 1 h connection refused",
		"https://c.example.org not connected",
		"job0 http://web-1:9100/metrics 12 s ago 34 ms 200 ok",
		"job1 http://web-1:9101/metrics 2 min ago 1.23 s 502 target_down",
		"job2 http://web-1:9102/metrics not scraped yet",
	}
	if !slices.Equal(rows, want) {
		t.Errorf("rows %q\nwant %q", rows, want)
	}
	if got := pagetest.Saying(page.All(pagetest.Named("h2"))); !slices.Equal(got, []string{"Proxies 3 2 not connected", "Pull targets 3 1 failing"}) {
		t.Errorf("headings %q", got)
	}
	if !strings.Contains(page.All(pagetest.Named("main"))[0].Says(), "Puts 2 targets.") {
		t.Error("nothing about forwarding")
	}

	// An agent without a proxy has no word about them.
	page = pagetest.Show(t, Agent(func() AgentStatus { return AgentStatus{Version: "1.2.3", Now: now, Forwarding: "Puts 2 targets."} }), "/")
	if got := page.All(pagetest.Named("table")); len(got) != 0 {
		t.Errorf("%d tables", len(got))
	}
}

func BenchmarkProxy(b *testing.B) {
	var clients []reverse.ClientStatus
	for i := range 10_000 {
		c := client(fmt.Sprintf("web-%05d.example.org", i), good, good)
		c.Labels = map[string]string{"env": "prod", "dc": "fra1"}
		if i%20 == 0 {
			c.Targets[1].Last = down
		}
		clients = append(clients, c)
	}
	h := fixed(clients...)
	for _, query := range []string{"", "q=web-09999", "q=nobody", "q=job1+prod+9101"} {
		b.Run("query="+query, func(b *testing.B) {
			b.ReportAllocs()
			size := 0
			for b.Loop() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/?"+query, nil))
				size = w.Body.Len()
			}
			b.ReportMetric(float64(size), "bytes")
		})
	}
}
