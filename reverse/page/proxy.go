package page

import (
	"net/http"
	"slices"
	"time"

	"github.com/promferry/promferry/internal/page"
	"github.com/promferry/promferry/reverse"
)

// The values of the parameter state.
const (
	stateConnected = "connected"
	stateAway      = "away"
	stateFailing   = "failing"
)

// maxNames is how many clients a warning names.
const maxNames = 10

// Proxy returns the page of a proxy. Status is called once for each request, and what it
// returns is only read.
//
// The page takes the parameters q, words that have to stand all in what is known of a
// client or a target; state, which is "connected", "away" or "failing"; and refresh, after
// how many seconds the browser asks again. Others are ignored. GET and HEAD of any path are
// answered with the page.
func Proxy(status func() reverse.ProxyStatus) http.Handler {
	states := []string{stateConnected, stateAway, stateFailing}
	return pages.Handler("proxy.html", page.Parameters{States: states}, func(q page.Query) any { return newProxyPage(status(), q) })
}

// proxyPage is what the template shows.
type proxyPage struct {
	page.Head
	Settling bool
	// The numbers are those of all clients, whatever is searched for.
	Clients, Connected, Away, Goodbye int
	Targets, Reachable                int
	FailingTargets, FailingClients    int
	Duplicates                        int
	Crowded                           []crowded
	MoreCrowded                       int
	Sections                          []section
	Matching                          int
	// MoreClients is how many of the matching ones are not shown.
	MoreClients int
	// The links from the numbers lead to all that was counted.
	AllLink, ConnectedLink, AwayLink, FailingLink string
}

// crowded is a client whose name several processes use.
type crowded struct {
	Name page.Text
	Link string
}

// section is the clients in one condition.
type section struct {
	ID, Title, Note string
	Count           int
	Clients         []clientRows
}

// clientRows is a client with a row for each target.
type clientRows struct {
	Name, Kind, Remote, Version, Instance, Labels page.Text
	Connected, Goodbye                            bool
	Since                                         page.Moment
	Lines                                         string
	// Sessions is zero unless there are too many.
	Sessions int
	Rows     []row
	// Hidden is how many targets do not match, or are too many.
	Hidden int
}

// row is a target, or what else was scraped of a client.
type row struct {
	// Job and URL are empty unless this is a target.
	Job, URL page.Text
	// Other says what this is when it is no target.
	Other string
	// Holder is the client that is listed instead, if any.
	Holder    page.Text
	Duplicate bool
	Last      scrape
}

// condition is how well a client is, the worst first.
type condition int

const (
	isFailing condition = iota
	isDoubtful
	isLost
	isGone // on purpose
	isFine
	conditions
)

// examine returns how well a client is, and how many of its scrapes failed.
func examine(c *reverse.ClientStatus) (condition, int) {
	failed, doubtful := 0, c.Sessions > 1
	for i := range c.Targets {
		if failing(c.Targets[i].Last) {
			failed++
		}
		doubtful = doubtful || c.Targets[i].Duplicate
	}
	if len(c.Targets) == 0 && failing(c.Last) {
		failed++ // Beside targets, something else was asked for once, perhaps by hand.
	}
	switch {
	case !c.Connected && c.Goodbye:
		return isGone, 0
	case !c.Connected:
		return isLost, 0
	case failed > 0:
		return isFailing, failed
	case doubtful:
		return isDoubtful, 0
	}
	return isFine, 0
}

// is tells that a client in this condition is in a state that was asked for.
func (c condition) is(state string) bool {
	switch state {
	case stateConnected:
		return c != isLost && c != isGone
	case stateAway:
		return c == isLost || c == isGone
	case stateFailing:
		return c == isFailing
	}
	return true
}

// hit is a client that is to be shown.
type hit struct {
	client *reverse.ClientStatus
	// targets are the indices of those that are to be shown, nil for all.
	targets []int
}

func newProxyPage(status reverse.ProxyStatus, q page.Query) *proxyPage {
	p := &proxyPage{
		Head:     page.NewHead("promferry proxy", status.Version, status.Now, q, page.Link{Address: "clients", Text: "Clients for service discovery"}),
		Settling: status.Settling,
		Clients:  len(status.Clients),
	}
	everything := q.All()
	p.AllLink, p.ConnectedLink = everything.Link(), everything.With(stateConnected).Link()
	p.AwayLink, p.FailingLink = everything.With(stateAway).Link(), everything.With(stateFailing).Link()

	var hits [conditions][]hit
	wanted := newSearch(q.Search)
	for i := range status.Clients {
		c := &status.Clients[i]
		condition, failed := examine(c)
		p.add(c, condition, failed)
		if !condition.is(q.State) {
			continue
		}
		if targets, ok := wanted.find(c); ok {
			hits[condition] = append(hits[condition], hit{c, targets})
			p.Matching++
		}
	}
	p.MoreCrowded = max(0, len(p.Crowded)-maxNames)
	p.Crowded = p.Crowded[:len(p.Crowded)-p.MoreCrowded]

	rows := page.MaxRows
	for _, s := range []section{
		p.section(&rows, status.Now, hits[isFailing], "failing", "Failing", "Connected, but the last scrape of a target failed."),
		p.section(&rows, status.Now, hits[isDoubtful], "doubtful", "Doubtful", "Scraped, but the name or a target is used twice."),
		p.section(&rows, status.Now, slices.Concat(hits[isLost], hits[isGone]), "away", "Away", "Not connected; stopped ones said goodbye."),
		p.section(&rows, status.Now, hits[isFine], "fine", "In order", "Connected, and no scrape failed last time."),
	} {
		if s.Count > 0 {
			p.Sections = append(p.Sections, s)
		}
	}
	return p
}

// add counts a client.
func (p *proxyPage) add(c *reverse.ClientStatus, condition condition, failed int) {
	p.Targets += len(c.Targets)
	if c.Connected {
		p.Connected++
		p.Reachable += len(c.Targets)
	} else {
		p.Away++
	}
	if condition == isGone {
		p.Goodbye++
	}
	if failed > 0 {
		p.FailingClients++
		p.FailingTargets += failed
	}
	for i := range c.Targets {
		if c.Targets[i].Duplicate {
			p.Duplicates++
		}
	}
	if c.Sessions > 1 {
		p.Crowded = append(p.Crowded, crowded{page.Short(c.Name), page.Query{Search: c.Name}.Link()})
	}
}

// section makes the rows of the clients in one condition, as long as there is room for
// them: rows is how many are left.
func (p *proxyPage) section(rows *int, now time.Time, hits []hit, id, title, note string) section {
	s := section{ID: id, Title: title, Note: note, Count: len(hits)}
	for i, h := range hits {
		if *rows == 0 {
			p.MoreClients += len(hits) - i
			break
		}
		c := clientRowsOf(h, now, *rows)
		*rows -= len(c.Rows)
		s.Clients = append(s.Clients, c)
	}
	return s
}

// clientRowsOf makes at most limit rows of a client, and at least one.
func clientRowsOf(h hit, now time.Time, limit int) clientRows {
	c := h.client
	v := clientRows{
		Name: page.Short(c.Name), Kind: kind(c.Kind), Remote: page.Short(c.Remote), Version: page.Short(c.Version), Labels: page.Short(page.Labels(c.Labels)),
		Connected: c.Connected, Goodbye: c.Goodbye,
		Since: page.MomentOf(c.Since, now), Lines: lines(c.Lines, c.Busy),
	}
	if c.Instance != c.Name {
		v.Instance = page.Short(c.Instance)
	}
	if c.Sessions > 1 {
		v.Sessions = c.Sessions
	}
	targets := h.targets
	if targets == nil {
		targets = make([]int, len(c.Targets))
		for i := range targets {
			targets[i] = i
		}
	}
	v.Hidden = len(c.Targets) - min(len(targets), limit)
	slices.SortStableFunc(targets, func(a, b int) int {
		return rank(failing(c.Targets[a].Last)) - rank(failing(c.Targets[b].Last))
	})
	for _, i := range targets[:min(len(targets), limit)] {
		t := &c.Targets[i]
		v.Rows = append(v.Rows, row{Job: page.Short(t.Job), URL: page.Short(t.URL(c.Name)), Holder: page.Short(t.Holder), Duplicate: t.Duplicate, Last: scrapeOf(t.Last, now)})
	}
	switch other := (row{Other: "something else", Last: scrapeOf(c.Last, now)}); {
	case len(c.Targets) == 0:
		other.Other = "announced nothing"
		v.Rows = append(v.Rows, other)
	case !c.Last.At.IsZero() && len(v.Rows) < limit:
		v.Rows = append(v.Rows, other)
	}
	return v
}

// rank puts what is bad first.
func rank(bad bool) int {
	if bad {
		return 0
	}
	return 1
}

// search finds clients and targets by words. It is for one request.
type search struct {
	*page.Search
	missing [][]byte
}

func newSearch(q string) *search { return &search{Search: page.NewSearch(q)} }

// find tells whether each word stands in what is known of the client and, unless the
// client's own has them all, of one of its targets. Then it returns which targets; nil
// means all.
func (s *search) find(c *reverse.ClientStatus) (targets []int, ok bool) {
	if len(s.Words) == 0 {
		return nil, true
	}
	s.Clear()
	s.Put(c.Name, c.Instance, c.Remote, c.Version, c.Kind)
	for name, value := range c.Labels {
		s.Put(name + "=" + value)
	}
	s.missing = s.missing[:0]
	for _, word := range s.Words {
		if !s.Has(word) {
			s.missing = append(s.missing, word)
		}
	}
	if len(s.missing) == 0 {
		return nil, true
	}
	for i := range c.Targets {
		t := &c.Targets[i]
		s.Clear()
		s.Put(t.Job, t.URL(c.Name), t.Last.Result)
		if !slices.ContainsFunc(s.missing, func(word []byte) bool { return !s.Has(word) }) {
			targets = append(targets, i)
		}
	}
	return targets, len(targets) > 0
}
