package page

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/reverse"
)

var now = time.Date(2026, 3, 9, 14, 30, 5, 0, time.FixedZone("CET", 3600))

// node is an element of a page. The templates write HTML that is XML as well, so that the
// tests need no parser of their own: a tag or quote too many is an error.
type node struct {
	name     string
	attrs    map[string]string
	children []*node
	text     string // when it is no element
}

func parse(t *testing.T, page string) *node {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(page))
	d.Entity = xml.HTMLEntity
	root := &node{}
	open := []*node{root}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return root
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, page)
		}
		top := open[len(open)-1]
		switch token := token.(type) {
		case xml.StartElement:
			n := &node{name: token.Name.Local, attrs: map[string]string{}}
			for _, a := range token.Attr {
				n.attrs[a.Name.Local] = a.Value
			}
			top.children = append(top.children, n)
			open = append(open, n)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			top.children = append(top.children, &node{text: string(token)})
		case xml.Comment:
			t.Errorf("a comment: %s", token)
		}
	}
}

// all returns the elements below n for which good is true, in order.
func (n *node) all(good func(*node) bool) []*node {
	var found []*node
	for _, c := range n.children {
		if c.name != "" && good(c) {
			found = append(found, c)
		}
		found = append(found, c.all(good)...)
	}
	return found
}

func named(name string) func(*node) bool { return func(n *node) bool { return n.name == name } }

func class(name string) func(*node) bool {
	return func(n *node) bool { return slices.Contains(strings.Fields(n.attrs["class"]), name) }
}

// says returns the text of n, with single spaces.
func (n *node) says() string {
	var b strings.Builder
	var walk func(*node)
	walk = func(n *node) {
		b.WriteString(n.text)
		for _, c := range n.children {
			walk(c)
		}
		if slices.Contains([]string{"td", "th", "span", "strong", "em", "p"}, n.name) {
			b.WriteString(" ")
		}
	}
	walk(n)
	return strings.Join(strings.Fields(b.String()), " ")
}

func saying(nodes []*node) []string {
	var texts []string
	for _, n := range nodes {
		texts = append(texts, n.says())
	}
	return texts
}

func get(t *testing.T, h http.Handler, target string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
	return w
}

func show(t *testing.T, h http.Handler, target string) *node {
	t.Helper()
	w := get(t, h, target)
	if w.Code != http.StatusOK {
		t.Fatalf("%s: %d %s", target, w.Code, w.Body)
	}
	return parse(t, w.Body.String())
}

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
func shown(page *node) []string {
	return saying(page.all(func(n *node) bool { return n.name == "strong" && n.attrs["class"] == "name" }))
}

func TestHeaders(t *testing.T) {
	for name, h := range map[string]http.Handler{"proxy": fixed(), "agent": Agent(func() AgentStatus { return AgentStatus{Now: now} })} {
		t.Run(name, func(t *testing.T) {
			for _, target := range []string{"/", "/?refresh=never"} {
				header := get(t, h, target).Header()
				for key, want := range map[string]string{
					"X-Content-Type-Options": "nosniff",
					"Referrer-Policy":        "no-referrer",
					"Cache-Control":          "no-store",
				} {
					if got := header.Get(key); got != want {
						t.Errorf("%s: %s %q, want %q", target, key, got, want)
					}
				}
				for _, part := range []string{"default-src 'none'", "style-src 'sha256-", "form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
					if csp := header.Get("Content-Security-Policy"); !strings.Contains(csp, part) || strings.Contains(csp, "unsafe") || strings.Contains(csp, "script-src") {
						t.Errorf("%s: policy %q, want %s in it", target, csp, part)
					}
				}
			}
			if got := get(t, h, "/").Header().Get("Content-Type"); got != "text/html; charset=utf-8" {
				t.Errorf("type %q", got)
			}
			// Not a single attribute is left for the policy to refuse.
			page := show(t, h, "/")
			if n := page.all(func(n *node) bool { return n.attrs["style"] != "" || n.name == "script" }); len(n) > 0 {
				t.Errorf("inline: %v", n)
			}
			var links []string
			for _, a := range page.all(named("nav"))[0].all(named("a")) {
				links = append(links, a.attrs["href"])
			}
			for _, want := range []string{"metrics", "-/healthy", "-/ready"} {
				if !slices.Contains(links, want) {
					t.Errorf("links %q, want %s", links, want)
				}
			}
		})
	}
}

func TestMethods(t *testing.T) {
	server := httptest.NewServer(fixed(client("web-1", good)))
	defer server.Close()
	do := func(method string) (status int, allow string, length int64) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, server.URL+"/?q=web", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode, resp.Header.Get("Allow"), resp.ContentLength
	}
	_, _, whole := do(http.MethodGet)
	if status, _, length := do(http.MethodHead); status != http.StatusOK || length < 1000 || length != whole {
		t.Errorf("HEAD: %d, %d bytes; GET: %d bytes", status, length, whole)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, http.MethodConnect} {
		if status, allow, _ := do(method); status != http.StatusMethodNotAllowed || allow != "GET, HEAD" {
			t.Errorf("%s: %d, Allow %q", method, status, allow)
		}
	}
}

func TestQueryLimits(t *testing.T) {
	h := fixed(client("web-1", good))
	for query, want := range map[string]int{
		"q=" + strings.Repeat("%C3%A4", 200):  http.StatusOK,
		"q=" + strings.Repeat("a", 201):       http.StatusBadRequest,
		"other=" + strings.Repeat("a", 4<<10): http.StatusBadRequest,
		"q=%ff":                               http.StatusBadRequest,
		"q=%zz":                               http.StatusBadRequest,
		"q=a;b":                               http.StatusBadRequest,
		"other=1":                             http.StatusOK,
		"state=":                              http.StatusOK,
		"state=away":                          http.StatusOK,
		"state=asleep":                        http.StatusBadRequest,
		"refresh=":                            http.StatusOK,
		"refresh=5":                           http.StatusOK,
		"refresh=3600":                        http.StatusOK,
		"refresh=4":                           http.StatusBadRequest,
		"refresh=3601":                        http.StatusBadRequest,
		"refresh=-15":                         http.StatusBadRequest,
		"refresh=15;url=//evil.example":       http.StatusBadRequest,
		"refresh=15%3Burl%3D%2F%2Fevil":       http.StatusBadRequest,
	} {
		w := get(t, h, "/?"+query)
		if w.Code != want {
			t.Errorf("%.40s: %d, want %d", query, w.Code, want)
		}
		if w.Code != http.StatusOK && w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%.40s: refused as %s", query, w.Header().Get("Content-Type"))
		}
	}
}

func TestRefresh(t *testing.T) {
	refresh := func(page *node) (content string) {
		for _, m := range page.all(named("meta")) {
			if m.attrs["http-equiv"] == "refresh" {
				content = m.attrs["content"]
			}
		}
		return content
	}
	link := func(page *node, text string) string {
		t.Helper()
		for _, a := range page.all(named("a")) {
			if strings.Contains(a.says(), text) {
				return a.attrs["href"]
			}
		}
		t.Fatalf("no link %q", text)
		return ""
	}
	h := fixed(client("web-1", good))
	page := show(t, h, "/?q=a%26b&state=away")
	if got := refresh(page); got != "" {
		t.Errorf("comes again after %q, want never", got)
	}
	on := link(page, "Refresh every 15 s")
	if on != "?q=a%26b&refresh=15&state=away" {
		t.Errorf("link %q", on)
	}
	page = show(t, h, "/"+on)
	if got := refresh(page); got != "15" {
		t.Errorf("comes again after %q, want 15", got)
	}
	if got := link(page, "stop that"); got != "?q=a%26b&state=away" {
		t.Errorf("link %q", got)
	}
	// A search goes on refreshing.
	hidden := page.all(func(n *node) bool { return n.name == "input" && n.attrs["type"] == "hidden" })
	if len(hidden) != 1 || hidden[0].attrs["name"] != "refresh" || hidden[0].attrs["value"] != "15" {
		t.Errorf("hidden fields %v", hidden)
	}
	agent := show(t, Agent(func() AgentStatus { return AgentStatus{Now: now} }), "/?refresh=30")
	if got := refresh(agent); got != "30" {
		t.Errorf("the agent's comes again after %q, want 30", got)
	}
}

func TestProxyPage(t *testing.T) {
	away, gone, crowded, duplicate, unscraped, legacy := client("away", good), client("gone", good), client("crowded", good), client("duplicate", good), client("unscraped", reverse.ScrapeStatus{}), client("legacy")
	away.Connected, away.Lines, away.Busy, away.Since = false, 0, 0, now.Add(-5*time.Minute)
	gone.Connected, gone.Lines, gone.Busy, gone.Goodbye, gone.Since = false, 0, 0, true, now.Add(-50*time.Hour)
	crowded.Sessions = 2
	duplicate.Targets[0].Duplicate = true
	legacy.Kind, legacy.Last, legacy.Version, legacy.Instance = "pushprox", down, "", ""
	failing := client("failing", good, down)
	failing.Instance, failing.Labels = "front", map[string]string{"env": "prod", "dc": "x"}
	failing.Last = good
	broken := client("broken", reverse.ScrapeStatus{At: now, Status: 500, Result: "success"})
	odd := client("odd", good)
	odd.Last = down // somebody's attempt: the targets are well

	clients := []reverse.ClientStatus{away, broken, crowded, duplicate, failing, client("fine", good), gone, legacy, odd, unscraped}
	h := fixed(clients...)
	page := show(t, h, "/")

	for id, want := range map[string]string{
		"failing":  "broken failing legacy",
		"doubtful": "crowded duplicate",
		"away":     "away gone",
		"fine":     "fine odd unscraped",
	} {
		sections := page.all(func(n *node) bool { return n.name == "section" && n.attrs["aria-labelledby"] == id })
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
	tiles := saying(page.all(class("tiles"))[0].all(named("li")))
	want := []string{"3 failing in 3 clients", "2 away 1 stopped on purpose", "8 connected of 10 clients", "10 targets 8 of them connected"}
	if !slices.Equal(tiles, want) {
		t.Errorf("counts %q, want %q", tiles, want)
	}

	rows := map[string][]string{}
	for _, body := range page.all(named("tbody")) {
		rows[shown(body)[0]] = saying(body.all(named("tr")))
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
		"gone":      {"gone 192.0.2.7 · 1.2.3 stopped 2 d ago was PTTH job0 http://gone:9100/metrics 12 s ago 34 ms 200 ok"},
		"crowded":   {"crowded 2 processes 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://crowded:9100/metrics 12 s ago 34 ms 200 ok"},
		"duplicate": {"duplicate 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://duplicate:9100/metrics duplicate 12 s ago 34 ms 200 ok"},
		"unscraped": {"unscraped 192.0.2.7 · 1.2.3 PTTH, 2 lines, 1 busy for 3 h job0 http://unscraped:9100/metrics not scraped yet"},
	} {
		if !slices.Equal(rows[name], want) {
			t.Errorf("rows %q\nwant %q", rows[name], want)
		}
	}

	banners := saying(page.all(class("banner")))
	if len(banners) != 2 || !strings.Contains(banners[0], "name of crowded.") || !strings.Contains(banners[1], "1 target has") {
		t.Errorf("banners %q", banners)
	}
	for _, th := range page.all(named("th")) {
		if th.attrs["scope"] == "" {
			t.Errorf("a heading without scope: %s", th.says())
		}
	}
	moment := page.all(class("failing"))[0].all(named("time"))[0]
	if moment.attrs["datetime"] != "2026-03-09T10:30:05Z" || moment.attrs["title"] != "since 2026-03-09 10:30:05 UTC" || moment.says() != "3 h" {
		t.Errorf("broken's line is since %v %q", moment.attrs, moment.says())
	}

	for state, want := range map[string]string{
		"connected": "broken failing legacy crowded duplicate fine odd unscraped",
		"away":      "away gone",
		"failing":   "broken failing legacy",
		"":          "broken failing legacy crowded duplicate away gone fine odd unscraped",
	} {
		if got := strings.Join(shown(show(t, h, "/?state="+state)), " "); got != want {
			t.Errorf("state %q: %s, want %s", state, got, want)
		}
	}
}

func TestSettling(t *testing.T) {
	for settling, want := range map[bool]int{true: 1, false: 0} {
		page := show(t, Proxy(func() reverse.ProxyStatus { return reverse.ProxyStatus{Now: now, Settling: settling} }), "/")
		banners := page.all(func(n *node) bool { return n.attrs["role"] == "status" && strings.Contains(n.says(), "Settling") })
		if len(banners) != want {
			t.Errorf("settling %t: %d banners", settling, len(banners))
		}
		if !strings.Contains(page.says(), "No client has connected yet.") {
			t.Errorf("an empty proxy says %q", page.says())
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
		page := show(t, h, "/?q="+url.QueryEscape(q))
		var got []string
		for _, body := range page.all(named("tbody")) {
			got = append(got, fmt.Sprintf("%s %d", shown(body)[0], len(body.all(named("tr")))))
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%q: %s, want %s", q, strings.Join(got, ", "), want)
		}
		field := page.all(func(n *node) bool { return n.attrs["name"] == "q" })[0]
		if field.attrs["value"] != strings.TrimSpace(q) {
			t.Errorf("%q: the field says %q", q, field.attrs["value"])
		}
		// The numbers stay those of everything.
		if tile := page.all(class("tiles"))[0].all(named("li"))[2].says(); tile != "2 connected of 2 clients" {
			t.Errorf("%q: %s", q, tile)
		}
		if q == "app" && !strings.Contains(page.says(), "1 more target not shown") {
			t.Error("a target that does not match is not mentioned")
		}
		if q == "nobody" && !strings.Contains(page.says(), "No client matches.") {
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
	page := show(t, fixed(clients...), "/")
	rows := 0
	for _, body := range page.all(named("tbody")) {
		rows += len(body.all(named("tr")))
	}
	if rows != 500 || len(shown(page)) != 250 || shown(page)[0] != "web-399" {
		t.Errorf("%d rows of %d clients from %s on, want 500 of 250 from web-399 on", rows, len(shown(page)), shown(page)[0])
	}
	if !strings.Contains(page.says(), "150 more clients: narrow the search to see them.") {
		t.Error("nothing says that there are more")
	}
	if !strings.Contains(page.all(class("tiles"))[0].says(), "400 connected") {
		t.Error("only those shown were counted")
	}

	many := client("many", slices.Repeat([]reverse.ScrapeStatus{good}, 700)...)
	many.Targets[650].Last = down
	many.Last = good
	page = show(t, fixed(many, client("other", good)), "/")
	rowsOf := page.all(named("tbody"))[0].all(named("tr"))
	if len(rowsOf) != 500 || !strings.Contains(rowsOf[0].says(), "job650") || !strings.Contains(rowsOf[0].says(), "200 more targets not shown") {
		t.Errorf("%d rows, the first one %q", len(rowsOf), rowsOf[0].says())
	}
	if !strings.Contains(page.says(), "1 more client: narrow") {
		t.Error("nothing says that there is another client")
	}

	for i := range clients[:12] {
		clients[i].Sessions = 2
	}
	page = show(t, fixed(clients...), "/")
	if banner := page.all(class("banner"))[0]; len(banner.all(named("a"))) != 10 || !strings.Contains(banner.says(), "web-009 and 2 more.") {
		t.Errorf("banner %q", banner.says())
	}
}

// TestHostile shows that whatever a client says is text on the page, and nothing else: the
// elements and attributes are those of a page with a harmless value.
func TestHostile(t *testing.T) {
	skeleton := func(page *node) string {
		var b strings.Builder
		for _, n := range page.all(func(*node) bool { return true }) {
			var attrs []string
			for name, value := range n.attrs {
				switch {
				case name == "title":
					continue // where a value is cut
				case name == "value" || name == "href" || n.name == "time":
					value = "" // holds the client's
				}
				attrs = append(attrs, name+"="+value)
			}
			slices.Sort(attrs)
			fmt.Fprintln(&b, n.name, attrs)
		}
		return b.String()
	}
	with := func(value string) (*node, *node) {
		c := client(value, down)
		c.Kind, c.Version, c.Remote, c.Instance, c.Sessions = value, value, value, value+"i", 2
		c.Labels = map[string]string{value: value}
		c.Targets[0].Target = reverse.Target{Job: value, Scheme: value, Port: 1, Path: value, Query: value}
		c.Targets[0].Last.Result = value
		l := reverse.LineStatus{Proxy: value, Kind: value, Err: value}
		a := Agent(func() AgentStatus {
			return AgentStatus{Name: value, Forwarding: value, Version: value, Now: now, Lines: []reverse.LineStatus{l}, Targets: c.Targets}
		})
		return show(t, fixed(c), "/?q="+url.QueryEscape(value)), show(t, a, "/")
	}
	proxy, agent := with("harmless")
	wantProxy, wantAgent := skeleton(proxy), skeleton(agent)
	for _, value := range []string{
		`<script>alert(1)</script>`,
		`"><img src=x onerror=alert(1)>`,
		`' onmouseover='alert(1)' x='`,
		"` onload=alert(1)",
		`</td></table></style></title></textarea><svg onload=alert(1)>`,
		`<!-- -->`,
		`]]>`,
		`&lt;script&gt;&#x3c;`,
		`javascript:alert(1)`,
		`{{.}}{{template "head"}}`,
		`?q=&state=away#x`,
		"\u00e4\u4e16",
	} {
		proxy, agent := with(value)
		if got := skeleton(proxy); got != wantProxy {
			t.Errorf("%q changes the proxy's page:\n%s", value, got)
		}
		if got := skeleton(agent); got != wantAgent {
			t.Errorf("%q changes the agent's page:\n%s", value, got)
		}
		// It is there, whole, as text.
		for where, texts := range map[string][]string{
			"name": shown(proxy), "job": saying(proxy.all(class("job"))), "agent's job": saying(agent.all(class("job"))),
		} {
			if len(texts) != 1 || texts[0] != strings.Join(strings.Fields(value), " ") {
				t.Errorf("%s: %q, want %q", where, texts, value)
			}
		}
		for _, a := range slices.Concat(proxy.all(named("a")), agent.all(named("a"))) {
			if u, err := url.Parse(a.attrs["href"]); err != nil || u.Scheme != "" || u.Host != "" {
				t.Errorf("%q: a link to %q", value, a.attrs["href"])
			}
		}
	}
}

func TestText(t *testing.T) {
	long := strings.Repeat("x", 81)
	endless := strings.Repeat("\u4e16", 1001)
	for value, want := range map[string]text{
		"":                                 {},
		"web-1":                            {Short: "web-1"},
		strings.Repeat("x", 80):            {Short: strings.Repeat("x", 80)},
		long:                               {Short: long[:80] + "…", Full: long},
		endless:                            {Short: endless[:3*80] + "…", Full: endless[:3*1000] + "…"},
		"a\u202eb\u2066\u200b":             {Short: `a\u202eb\u2066\u200b`},
		"a\x00\n\x1b[31m\x7f":              {Short: `a\u0000\u000a\u001b[31m\u007f`},
		"\U000e0041":                       {Short: `\U000e0041`},
		"gr\u00fc\u00df \u4e16 \U0001f600": {Short: "gr\u00fc\u00df \u4e16 \U0001f600"},
		"a\xffb":                           {Short: "a\ufffdb"},
	} {
		if got := short(value); got != want {
			t.Errorf("%.40q: %+v, want %+v", value, got, want)
		}
	}
	c := client("web-1", good)
	c.Labels = map[string]string{"b": long, "a": "1"}
	c.Targets[0].Job = long
	page := show(t, fixed(c), "/")
	job := page.all(class("job"))[0].all(named("bdi"))[0]
	if job.says() != long[:80]+"…" || job.attrs["title"] != long {
		t.Errorf("job %q, title %q", job.says(), job.attrs["title"])
	}
	if title := page.all(class("more"))[0].all(named("bdi"))[2].attrs["title"]; title != "a=1 b="+long {
		t.Errorf("labels %q", title)
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour:                   "now",
		999 * time.Millisecond:       "now",
		time.Second:                  "1 s ago",
		59*time.Second + 999e6:       "59 s ago",
		time.Minute:                  "1 min ago",
		time.Hour - 1:                "59 min ago",
		time.Hour:                    "1 h ago",
		48*time.Hour - 1:             "47 h ago",
		48 * time.Hour:               "2 d ago",
		400*24*time.Hour + time.Hour: "400 d ago",
	} {
		if got := ago(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if got := age(-time.Second); got != "0 s" {
		t.Errorf("an age ahead: %q, want 0 s", got)
	}
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
	page := show(t, Agent(func() AgentStatus { return status }), "/?q=ignored&state=ignored")
	if got := page.all(named("title"))[0].says(); got != "web-1 – promferry agent" {
		t.Errorf("title %q", got)
	}
	var rows []string
	for _, body := range page.all(named("tbody")) {
		rows = append(rows, saying(body.all(named("tr")))...)
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
	if got := saying(page.all(named("h2"))); !slices.Equal(got, []string{"Proxies 3 2 not connected", "Pull targets 3 1 failing"}) {
		t.Errorf("headings %q", got)
	}
	if !strings.Contains(page.all(named("main"))[0].says(), "Puts 2 targets.") {
		t.Error("nothing about forwarding")
	}

	// An agent without a proxy has no word about them.
	page = show(t, Agent(func() AgentStatus { return AgentStatus{Version: "1.2.3", Now: now, Forwarding: "Puts 2 targets."} }), "/")
	if got := page.all(named("table")); len(got) != 0 {
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
