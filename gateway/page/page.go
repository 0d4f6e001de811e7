// Package page writes the web page of the gateway.
package page

import (
	"cmp"
	"embed"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/gateway"
	"github.com/promferry/promferry/internal/page"
)

//go:embed gateway.html style.css
var files embed.FS

var pages = page.New(files)

// condition is how well a group is: a state of the gateway's, but that a group is refused as
// well when an earlier push succeeded and the last one did not.
type condition struct{ State, Title, Note string }

// conditions are all, the worst first.
var conditions = []condition{
	{gateway.StateRefused, "Last push refused", "The groups keep what earlier pushes brought."},
	{gateway.StateSilent, "Silent", "No push for as long as the last one was good."},
	{gateway.StateDown, "Down", "The last push says up 0."},
	{gateway.StateAwaited, "Awaited", "The gateway has restarted since the last push."},
	{gateway.StateLive, "Live", "Served as pushed."},
}

// order is a way to sort groups other than by their condition.
type order struct {
	Name, Title string
	compare     func(a, b *gateway.GroupStatus) int
}

var orders = []order{
	{"size", "Largest first", func(a, b *gateway.GroupStatus) int { return cmp.Compare(b.Bytes, a.Bytes) }},
	{"series", "Most series first", func(a, b *gateway.GroupStatus) int { return cmp.Compare(b.Series, a.Series) }},
	{"age", "Oldest push first", func(a, b *gateway.GroupStatus) int { return a.Pushed.Compare(b.Pushed) }},
}

// Gateway returns the page of a gateway. Status is called once for each request, and what it
// returns is only read.
//
// The page takes the parameters q, words that have to stand all in the labels of a group or in
// why a push to it was refused; state, one of [gateway.States], of which refused is that of
// all groups whose last push was; sort, which is "size", "series" or "age"; and refresh, after
// how many seconds the browser asks again. Others are ignored. GET and HEAD of any path are
// answered with the page.
func Gateway(status func() gateway.Status) http.Handler {
	parameters := page.Parameters{States: gateway.States}
	for _, o := range orders {
		parameters.Sorts = append(parameters.Sorts, o.Name)
	}
	return pages.Handler("gateway.html", parameters, func(q page.Query) any { return newGatewayPage(status(), q) })
}

// gatewayPage is what the template shows.
type gatewayPage struct {
	page.Head
	// The numbers are those of all groups, whatever is searched for.
	Groups, Series int
	Size           string
	Tiles          []tile
	AllLink        string
	Orders         []order
	Sections       []section
	Matching       int
}

// tile counts the groups in one condition.
type tile struct {
	condition
	Count int
	// Never is how many of them had no push that succeeded.
	Never int
	Link  string
}

// section is a list of groups.
type section struct {
	ID, Title, Note string
	Count           int
	Groups          []groupRows
	// Hidden is how many groups are too many, Link where more of them are shown.
	Hidden int
	Link   string
}

// groupRows is a group, and why a push to it was refused.
type groupRows struct {
	Job, Labels page.Text
	// Target is where it is served; "" is too long for a link.
	Target        string
	State         string
	Condition     string
	Since, Pushed page.Moment
	GoodFor       string
	// Expires tells that GoodFor is a time.
	Expires bool
	Series  int
	Size    string
	Failed  page.Moment
	Failure page.Text
}

// refused tells that the last push to a group did not succeed.
func refused(g *gateway.GroupStatus) bool {
	return g.State == gateway.StateRefused || g.Failed.After(g.Pushed)
}

// conditionOf returns the state under which a group is listed.
func conditionOf(g *gateway.GroupStatus) string {
	if refused(g) {
		return gateway.StateRefused
	}
	return g.State
}

// is tells that a group is in a state that was asked for.
func is(g *gateway.GroupStatus, state string) bool {
	return state == "" || state == g.State || state == conditionOf(g)
}

func newGatewayPage(status gateway.Status, q page.Query) *gatewayPage {
	p := &gatewayPage{
		Head:    page.NewHead("promferry gateway", status.Version, status.Now, q, page.Link{Address: "sd", Text: "Service discovery"}),
		Groups:  len(status.Groups),
		AllLink: q.All().Link(),
		Orders:  orders,
	}
	for _, c := range conditions {
		p.Tiles = append(p.Tiles, tile{condition: c, Link: q.All().With(c.State).Link()})
	}
	var hits []*gateway.GroupStatus
	bytes, wanted := 0, page.NewSearch(q.Search)
	for i := range status.Groups {
		g := &status.Groups[i]
		p.Series += g.Series
		bytes += g.Bytes
		for t := range p.Tiles {
			if tile := &p.Tiles[t]; is(g, tile.State) {
				tile.Count++
				if g.State == gateway.StateRefused {
					tile.Never++
				}
			}
		}
		if is(g, q.State) && matches(g, wanted) {
			hits = append(hits, g)
		}
	}
	p.Size, p.Matching = page.Size(bytes), len(hits)
	p.Sections = sections(hits, status.Now, q)
	return p
}

// matches tells whether each word stands in what is known of the group.
func matches(g *gateway.GroupStatus, wanted *page.Search) bool {
	if len(wanted.Words) == 0 {
		return true
	}
	wanted.Clear()
	wanted.Put(model.JobLabel+"="+g.Key.Job, g.Failure)
	for name, value := range g.Key.Labels {
		wanted.Put(name + "=" + value)
	}
	return wanted.HasAll()
}

// sections lists groups in one section for each condition, or in one when they are sorted in
// another way, as many as a page shows.
func sections(groups []*gateway.GroupStatus, now time.Time, q page.Query) []section {
	var all []section
	rows := page.MaxRows
	add := func(s section, groups []*gateway.GroupStatus) {
		if s.Count = len(groups); s.Count == 0 {
			return
		}
		for _, g := range groups[:min(rows, s.Count)] {
			s.Groups = append(s.Groups, rowsOf(g, now))
		}
		rows -= len(s.Groups)
		if s.Hidden = s.Count - len(s.Groups); len(s.Groups) < page.MaxRows && q.State == "" {
			s.Link = q.With(s.ID).Link()
		}
		all = append(all, s)
	}
	compare := func(a, b *gateway.GroupStatus) int { return cmp.Compare(a.Target, b.Target) }
	for _, o := range orders {
		if o.Name == q.Sort {
			slices.SortFunc(groups, func(a, b *gateway.GroupStatus) int { return cmp.Or(o.compare(a, b), compare(a, b)) })
			add(section{ID: "sorted", Title: o.Title}, groups)
			return all
		}
	}
	slices.SortFunc(groups, compare)
	by := make(map[string][]*gateway.GroupStatus)
	for _, g := range groups {
		by[conditionOf(g)] = append(by[conditionOf(g)], g)
	}
	for _, c := range conditions {
		add(section{ID: c.State, Title: c.Title, Note: c.Note}, by[c.State])
	}
	return all
}

// maxLink is how long a link may be, in bytes: a label can be longer than the rest of the page.
const maxLink = 1000

func rowsOf(g *gateway.GroupStatus, now time.Time) groupRows {
	target := strings.TrimPrefix(g.Target, "/")
	if len(target) > maxLink {
		target = ""
	}
	return groupRows{
		Job: page.Short(g.Key.Job), Labels: page.Sentence(page.Labels(g.Key.Labels)), Target: target,
		State: g.State, Condition: conditionOf(g), Since: page.MomentOf(g.Since, now), Pushed: page.MomentOf(g.Pushed, now),
		GoodFor: goodFor(g), Expires: g.ExpiresAfter > 0, Series: g.Series, Size: page.Size(g.Bytes),
		Failed: page.MomentOf(g.Failed, now), Failure: page.Sentence(g.Failure),
	}
}

// goodFor says for how long a push to a group is good.
func goodFor(g *gateway.GroupStatus) string {
	switch {
	case g.ExpiresAfter > 0:
		return model.Duration(g.ExpiresAfter).String()
	case g.OnDisk:
		return "on disk, does not expire"
	case !g.Pushed.IsZero():
		return "does not expire"
	}
	return ""
}
