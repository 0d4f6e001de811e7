package page

import (
	"net/http"
	"time"

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
	return handler("agent.html", nil, func(q query) any { return newAgentPage(status(), q) })
}

// agentPage is what the template shows.
type agentPage struct {
	head
	Forwarding text
	Lines      []lineRow
	Down       int
	Targets    []row
	Failing    int
}

// lineRow is the way to a proxy.
type lineRow struct {
	Proxy, Kind, Err text
	Connected        bool
	Since            moment
	Lines            string
}

func newAgentPage(status AgentStatus, q query) *agentPage {
	p := &agentPage{
		head:       newHead("promferry agent", status.Version, status.Now, q),
		Forwarding: limited(status.Forwarding, maxSentence),
	}
	if status.Name != "" {
		name := short(status.Name)
		p.Name, p.Title = name, name.Short+" – promferry agent"
	}
	for _, l := range status.Lines {
		v := lineRow{
			Proxy: short(l.Proxy), Kind: kind(l.Kind), Err: limited(l.Err, maxSentence),
			Connected: l.Lines > 0, Since: momentOf(l.Since, status.Now), Lines: lines(l.Lines, l.Busy),
		}
		if !v.Connected {
			p.Down++
		}
		p.Lines = append(p.Lines, v)
	}
	for i := range status.Targets {
		t := &status.Targets[i]
		v := row{Job: short(t.Job), URL: short(t.URL(status.Name)), Last: scrapeOf(t.Last, status.Now)}
		if v.Last.Failing {
			p.Failing++
		}
		p.Targets = append(p.Targets, v)
	}
	return p
}
