package page

import (
	"net/http"
	"time"

	"github.com/promferry/promferry/internal/page"
	"github.com/promferry/promferry/reverse"
)

// AgentStatus is what an agent knows of itself, for its page.
type AgentStatus struct {
	// Name is the client's name; "" when the agent has no proxy.
	Name string
	// Forwarding says in a sentence what is put to Pushgateways; "" when nothing is.
	Forwarding string
	// Lines are its ways to its proxies, nil when it has none.
	Lines []reverse.LineStatus
	// Targets are what can be scraped through them.
	Targets []reverse.TargetStatus
	// Version is this program's.
	Version string
	// Now is when this was so.
	Now time.Time
}

// Agent returns the page of an agent. Status is called once for each request, and what it
// returns is only read. The page takes the parameter refresh of [Proxy].
func Agent(status func() AgentStatus) http.Handler {
	return pages.Handler("agent.html", page.Parameters{}, func(q page.Query) any { return newAgentPage(status(), q) })
}

// agentPage is what the template shows.
type agentPage struct {
	page.Head
	Forwarding page.Text
	Lines      []lineRow
	Down       int
	Targets    []row
	Failing    int
}

// lineRow is the way to a proxy.
type lineRow struct {
	Proxy, Kind, Err page.Text
	Connected        bool
	Since            page.Moment
	Lines            string
}

func newAgentPage(status AgentStatus, q page.Query) *agentPage {
	p := &agentPage{
		Head:       page.NewHead("promferry agent", status.Version, status.Now, q),
		Forwarding: page.Sentence(status.Forwarding),
	}
	if status.Name != "" {
		name := page.Short(status.Name)
		p.Name, p.Title = name, name.Short+" – promferry agent"
	}
	for _, l := range status.Lines {
		v := lineRow{
			Proxy: page.Short(l.Proxy), Kind: kind(l.Kind), Err: page.Sentence(l.Err),
			Connected: l.Lines > 0, Since: page.MomentOf(l.Since, status.Now), Lines: lines(l.Lines, l.Busy),
		}
		if !v.Connected {
			p.Down++
		}
		p.Lines = append(p.Lines, v)
	}
	for i := range status.Targets {
		t := &status.Targets[i]
		v := row{Job: page.Short(t.Job), URL: page.Short(t.URL(status.Name)), Last: scrapeOf(t.Last, status.Now)}
		if v.Last.Failing {
			p.Failing++
		}
		p.Targets = append(p.Targets, v)
	}
	return p
}
