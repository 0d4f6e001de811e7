package page

import (
	"cmp"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/gateway"
	"github.com/promferry/promferry/internal/page/pagetest"
	"github.com/promferry/promferry/pushgw"
)

var now = time.Date(2026, 3, 9, 14, 30, 5, 0, time.FixedZone("CET", 3600))

// fixed returns the page of a gateway that holds these groups.
func fixed(groups ...gateway.GroupStatus) http.Handler {
	return Gateway(func() gateway.Status { return gateway.Status{Version: "1.2.3", Now: now, Groups: groups} })
}

// group returns one in a state, which was pushed to 12 seconds ago.
func group(job, state string) gateway.GroupStatus {
	g := gateway.GroupStatus{State: state, Pushed: now.Add(-12 * time.Second), Series: 3, Bytes: 200, ExpiresAfter: 45 * time.Second}
	return with(g, job, map[string]string{"instance": "web-1"})
}

func with(g gateway.GroupStatus, job string, labels map[string]string) gateway.GroupStatus {
	g.Key = pushgw.GroupingKey{Job: job, Labels: labels}
	g.Target = "/groups" + strings.TrimPrefix(g.Key.Path(), "/metrics") + "/metrics"
	return g
}

// every returns a group of each kind, not in the order of the page.
func every() []gateway.GroupStatus {
	live, awaited, down, silent := group("live", gateway.StateLive), group("awaited", gateway.StateAwaited), group("down", gateway.StateDown), group("silent", gateway.StateSilent)
	awaited.Pushed = time.Time{}
	down.Since, down.Series, down.Bytes = now.Add(-3*time.Hour), 1, 40
	silent.Since, silent.Pushed, silent.ExpiresAfter = now.Add(-5*time.Minute), now.Add(-95*time.Minute), 90*time.Minute
	batch := with(gateway.GroupStatus{State: gateway.StateLive, Pushed: now.Add(-50 * time.Hour), Series: 8, Bytes: 1500, OnDisk: true}, "batch", nil)
	never := with(gateway.GroupStatus{State: gateway.StateRefused, Failed: now.Add(-time.Minute), Failure: "line 3: expected a value"}, "never", nil)
	broken := group("broken", gateway.StateLive)
	broken.Failed, broken.Failure = now.Add(-2*time.Second), "a series comes twice"
	dead := group("dead", gateway.StateSilent)
	dead.Since, dead.Failed, dead.Failure = now.Add(-time.Second), now.Add(-4*time.Second), "too many series"
	mended := group("mended", gateway.StateLive)
	mended.Failed, mended.Failure, mended.ExpiresAfter = now.Add(-26*time.Hour), "no such label", 0
	unseen := group("unseen", gateway.StateSilent)
	unseen.Since, unseen.Pushed = now.Add(-time.Minute), time.Time{} // Not since the gateway restarted.
	return []gateway.GroupStatus{unseen, live, mended, batch, dead, awaited, silent, broken, down, never}
}

// jobs returns those of the groups on a page, by section.
func jobs(page *pagetest.Node) string {
	var sections []string
	for _, s := range page.All(pagetest.Named("section")) {
		names := pagetest.Saying(s.All(func(n *pagetest.Node) bool { return n.Name == "strong" && n.Attrs["class"] == "name" }))
		sections = append(sections, s.All(pagetest.Named("h2"))[0].Attrs["id"]+": "+strings.Join(names, " "))
	}
	return strings.Join(sections, ", ")
}

func TestHeaders(t *testing.T) {
	page := pagetest.Guarded(t, fixed(every()...))
	var links []string
	for _, a := range page.All(pagetest.Named("nav"))[0].All(pagetest.Named("a")) {
		links = append(links, a.Attrs["href"])
	}
	if want := []string{"sd", "metrics", "-/healthy", "-/ready"}; !slices.Equal(links, want) {
		t.Errorf("links %q, want %q", links, want)
	}
}

func TestPage(t *testing.T) {
	page := pagetest.Show(t, fixed(every()...), "/")
	if got, want := jobs(page), "s-refused: broken dead never, s-silent: silent unseen, s-down: down, s-awaited: awaited, s-live: batch live mended"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	tiles := page.All(pagetest.Class("tiles"))[0].All(pagetest.Named("li"))
	if got, want := pagetest.Saying(tiles), []string{
		"3 refused 1 of them never taken", "3 silent no push in time", "1 down pushed as up 0", "1 awaited after a restart", "4 live served as pushed",
		"10 groups 30 series, 2.9 KiB",
	}; !slices.Equal(got, want) {
		t.Errorf("counts %q\nwant %q", got, want)
	}
	rows := map[string][]string{}
	for _, body := range page.All(pagetest.Named("tbody")) {
		rows[body.All(pagetest.Class("name"))[0].Says()] = pagetest.Saying(body.All(pagetest.Named("tr")))
	}
	for job, want := range map[string][]string{
		"live":    {"live instance=web-1 live 12 s ago 45s 3 200 B"},
		"batch":   {"batch live 2 d ago on disk, does not expire 8 1.5 KiB"},
		"awaited": {"awaited instance=web-1 awaited before the restart 45s 3 200 B"},
		"down":    {"down instance=web-1 down for 3 h 12 s ago 45s 1 40 B"},
		"silent":  {"silent instance=web-1 silent for 5 min 1 h ago 1h30m 3 200 B"},
		"unseen":  {"unseen instance=web-1 silent for 1 min before the restart 45s 3 200 B"},
		"never":   {"never refused never 0 0 B", "Last push refused 1 min ago: line 3: expected a value"},
		"broken":  {"broken instance=web-1 live 12 s ago 45s 3 200 B", "Last push refused 2 s ago: a series comes twice"},
		"dead":    {"dead instance=web-1 silent for 1 s 12 s ago 45s 3 200 B", "Last push refused 4 s ago: too many series"},
		"mended":  {"mended instance=web-1 live 12 s ago does not expire 3 200 B", "A push was refused 26 h ago: no such label"},
	} {
		if !slices.Equal(rows[job], want) {
			t.Errorf("rows %q\nwant %q", rows[job], want)
		}
	}
	for _, body := range page.All(pagetest.Named("tbody")) {
		if th, rows := body.All(pagetest.Class("group"))[0], len(body.All(pagetest.Named("tr"))); cmp.Or(th.Attrs["rowspan"], "1") != strconv.Itoa(rows) {
			t.Errorf("%s spans %s of %d rows", th.Says(), th.Attrs["rowspan"], rows)
		}
	}
	for _, th := range page.All(pagetest.Named("th")) {
		if th.Attrs["scope"] == "" {
			t.Errorf("a heading without scope: %s", th.Says())
		}
	}
	silent := page.All(pagetest.Class("silent"))
	since := silent[slices.IndexFunc(silent, pagetest.Named("section"))].All(pagetest.Named("time"))[0]
	if since.Attrs["datetime"] != "2026-03-09T13:25:05Z" || since.Attrs["title"] != "since 2026-03-09 13:25:05 UTC" {
		t.Errorf("silent %v", since.Attrs)
	}
}

// TestLinks shows that the page works below any address, and that each group leads to its target.
func TestLinks(t *testing.T) {
	odd := group("a/b c", gateway.StateLive)
	odd = with(odd, "a/b c", map[string]string{"instance": "web-1:9100", "path": "/var/tmp"})
	page := pagetest.Show(t, fixed(odd), "/?refresh=15&sort=age&q=web")
	if got := page.All(pagetest.Class("group"))[0].All(pagetest.Named("a"))[0].Attrs["href"]; got != "groups/job@base64/YS9iIGM/instance/web-1:9100/path@base64/L3Zhci90bXA/metrics" {
		t.Errorf("the group leads to %s", got)
	}
	var links []string
	for _, a := range page.All(pagetest.Class("tiles"))[0].All(pagetest.Named("a")) {
		links = append(links, a.Attrs["href"])
	}
	if want := []string{
		"?refresh=15&sort=age&state=refused", "?refresh=15&sort=age&state=silent", "?refresh=15&sort=age&state=down",
		"?refresh=15&sort=age&state=awaited", "?refresh=15&sort=age&state=live", "?refresh=15&sort=age",
	}; !slices.Equal(links, want) {
		t.Errorf("links %q\nwant %q", links, want)
	}
}

func TestStates(t *testing.T) {
	h := fixed(every()...)
	for state, want := range map[string]string{
		"live":    "s-refused: broken, s-live: batch live mended",
		"awaited": "s-awaited: awaited",
		"down":    "s-down: down",
		"silent":  "s-refused: dead, s-silent: silent unseen",
		"refused": "s-refused: broken dead never",
	} {
		page := pagetest.Show(t, h, "/?state="+state)
		if got := jobs(page); got != want {
			t.Errorf("%s: %s\nwant %s", state, got, want)
		}
		current := page.All(func(n *pagetest.Node) bool { return n.Attrs["aria-current"] != "" })
		if len(current) != 1 || !strings.Contains(current[0].Says(), state) {
			t.Errorf("%s: current %q", state, pagetest.Saying(current))
		}
		// The numbers stay those of everything.
		if got := page.All(pagetest.Class("tiles"))[0].Says(); !strings.Contains(got, "4 live") || !strings.Contains(got, "10 groups") {
			t.Errorf("%s: counts %s", state, got)
		}
	}
	if w := pagetest.Get(t, h, "/?state=asleep"); w.Code != http.StatusBadRequest || w.Body.String() != "state: want one of live, awaited, down, silent, refused\n" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestSearch(t *testing.T) {
	a := with(group("", gateway.StateLive), "node", map[string]string{"instance": "Web-1", "env": "prod"})
	b := with(group("", gateway.StateRefused), "backup", map[string]string{"instance": "db-1"})
	b.Failure, b.Failed = "a series <comes> twice", now
	h := fixed(a, b)
	for q, want := range map[string]string{
		"":               "s-refused: backup, s-live: node",
		"node":           "s-live: node",
		"JOB=node":       "s-live: node",
		" instance=web-": "s-live: node",
		"prod web":       "s-live: node",
		"prod db":        "",
		"<COMES> db":     "s-refused: backup",
		"1env":           "", // never across values
	} {
		page := pagetest.Show(t, h, "/?q="+url.QueryEscape(q))
		if got := jobs(page); got != want {
			t.Errorf("%q: %s, want %s", q, got, want)
		}
		if want == "" && !strings.Contains(page.Says(), "No group matches.") {
			t.Errorf("%q: nothing says that nothing was found", q)
		}
	}
	if page := pagetest.Show(t, fixed(), "/"); !strings.Contains(page.Says(), "No group: nothing was pushed yet") {
		t.Errorf("an empty gateway says %s", page.Says())
	}
}

func TestSort(t *testing.T) {
	sized := func(job string, series, bytes int, age time.Duration) gateway.GroupStatus {
		g := group(job, gateway.StateLive)
		g.Series, g.Bytes, g.Pushed = series, bytes, now.Add(-age)
		return g
	}
	never := group("never", gateway.StateRefused)
	never.Pushed, never.Failed, never.Series, never.Bytes = time.Time{}, now, 0, 0
	h := fixed(sized("b", 5, 100, 2*time.Second), sized("a", 5, 300, 3*time.Second), never, sized("c", 9, 200, time.Second))
	for sort, want := range map[string]string{
		"size":   "s-sorted: a c b never",
		"series": "s-sorted: c a b never",
		"age":    "s-sorted: never a b c",
		"":       "s-refused: never, s-live: a b c",
	} {
		page := pagetest.Show(t, h, "/?sort="+sort)
		if got := jobs(page); got != want {
			t.Errorf("%q: %s, want %s", sort, got, want)
		}
		selected := page.All(func(n *pagetest.Node) bool { return n.Attrs["selected"] != "" })
		if sort != "" && (len(selected) != 1 || selected[0].Attrs["value"] != sort) {
			t.Errorf("%q: selected %q", sort, pagetest.Saying(selected))
		}
	}
	if w := pagetest.Get(t, h, "/?sort=name"); w.Code != http.StatusBadRequest || w.Body.String() != "sort: want one of size, series, age\n" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// many returns 20,000 groups, each with a label note.
func many(note string) []gateway.GroupStatus {
	var groups []gateway.GroupStatus
	for i := range 20_000 {
		g := group("node", gateway.StateLive)
		groups = append(groups, with(g, "node", map[string]string{"instance": fmt.Sprintf("web-%05d", i), "note": note}))
	}
	return groups
}

func TestLimits(t *testing.T) {
	all := many("short")
	for name, test := range map[string]struct {
		failed int
		query  string
		want   []string // of each section: how many are shown, and what is said of the others
	}{
		"all refused":             {20_000, "", []string{"500 19500 more groups: narrow the search to see them."}},
		"some refused":            {499, "", []string{"499", "1 19500 more groups: narrow the search to see them, or show this section alone."}},
		"no room":                 {500, "", []string{"500", "0 19500 more groups: narrow the search to see them, or show this section alone."}},
		"one too many":            {501, "state=refused", []string{"500 1 more group: narrow the search to see them."}},
		"one state":               {0, "state=live", []string{"500 19500 more groups: narrow the search to see them."}},
		"two sections of a state": {499, "state=live", []string{"499", "1 19500 more groups: narrow the search to see them."}},
		"sorted":                  {0, "sort=size", []string{"500 19500 more groups: narrow the search to see them."}},
		"narrowed enough":         {0, "q=web-000", []string{"100"}},
	} {
		t.Run(name, func(t *testing.T) {
			groups := slices.Clone(all)
			for i := range groups[:test.failed] {
				groups[i].Failed, groups[i].Failure = now, "why"
			}
			w := pagetest.Get(t, fixed(groups...), "/?"+test.query)
			if size := w.Body.Len(); size > 400<<10 {
				t.Errorf("the page has %d bytes", size)
			}
			var got []string
			for _, s := range pagetest.Parse(t, w.Body.String()).All(pagetest.Named("section")) {
				text := fmt.Sprint(len(s.All(pagetest.Named("tbody"))))
				for _, banner := range s.All(pagetest.Class("banner")) {
					text += " " + banner.Says()
				}
				got = append(got, text)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%q\nwant %q", got, test.want)
			}
		})
	}
}

func TestLongValues(t *testing.T) {
	long := strings.Repeat("<n>", 400)
	groups := many(long)
	for i := range groups {
		groups[i].Failed, groups[i].Failure = now, long
	}
	w := pagetest.Get(t, fixed(groups...), "/")
	// For each of 500 groups, label and failure are written twice: the text, and what the pointer
	// shows, some 1,400 characters, of which two thirds are entities.
	if size := w.Body.Len(); size > 5<<20 {
		t.Errorf("the page has %d bytes", size)
	}
	if rows := strings.Count(w.Body.String(), `class="why"`); rows != 500 {
		t.Errorf("%d groups, want 500", rows)
	}
	if strings.Contains(w.Body.String(), `href="groups/`) {
		t.Error("a label is in a link as well")
	}
}

// TestHostile shows that whatever stands in a group is text on the page, and nothing else: the
// elements and attributes are those of a page with a harmless value.
func TestHostile(t *testing.T) {
	show := func(value string) *pagetest.Node {
		g := group(value, gateway.StateLive)
		g = with(g, value, map[string]string{"instance": value})
		g.Failed, g.Failure = now, value
		return pagetest.Show(t, Gateway(func() gateway.Status {
			return gateway.Status{Version: value, Now: now, Groups: []gateway.GroupStatus{g}}
		}), "/?q="+url.QueryEscape(value))
	}
	want := show("harmless").Skeleton()
	for _, value := range pagetest.Hostile {
		page := show(value)
		if got := page.Skeleton(); got != want {
			t.Errorf("%q changes the page:\n%s", value, got)
		}
		// It is there, whole, as text.
		text := strings.Join(strings.Fields(value), " ")
		if got := page.All(pagetest.Class("name"))[0].Says(); got != text {
			t.Errorf("job %q, want %q", got, text)
		}
		if got := page.All(pagetest.Class("group"))[0].Says(); got != text+" instance="+text {
			t.Errorf("labels %q, want %q", got, text)
		}
		if got := page.All(pagetest.Class("why"))[0].Says(); got != "Last push refused now: "+text {
			t.Errorf("failure %q, want %q", got, text)
		}
		for _, a := range page.All(pagetest.Named("a")) {
			if u, err := url.Parse(a.Attrs["href"]); err != nil || u.Scheme != "" || u.Host != "" {
				t.Errorf("%q: a link to %q", value, a.Attrs["href"])
			}
		}
	}
	g := group("", gateway.StateLive)
	value := "a\u202eb\x00" + strings.Repeat("x", 500)
	g.Key.Job, g.Failed, g.Failure = value, now, value
	page := pagetest.Show(t, fixed(g), "/")
	if got := page.All(pagetest.Class("name"))[0].Says(); got != `a\u202eb\u0000`+strings.Repeat("x", 76)+"…" {
		t.Errorf("job %q", got)
	}
	if got := page.All(pagetest.Class("why"))[0].Says(); got != `Last push refused now: a\u202eb\u0000`+strings.Repeat("x", 396)+"…" {
		t.Errorf("failure %q", got)
	}
}

func BenchmarkGateway(b *testing.B) {
	h := fixed(many("short")...)
	for _, query := range []string{"", "sort=size", "q=web-09999"} {
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
