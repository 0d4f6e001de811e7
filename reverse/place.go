package reverse

import (
	"iter"
	"slices"
)

// claim is what only one client is listed with.
type claim struct{ job, instance string }

// claims returns what the announcement claims, target by target. Nil claims nothing.
func (a *Announcement) claims() iter.Seq[claim] {
	return func(yield func(claim) bool) {
		if a == nil {
			return
		}
		for _, t := range a.Targets {
			if !yield(claim{t.Job, a.Instance}) {
				return
			}
		}
	}
}

// owner is who a client belongs to, apart from its name.
type owner struct {
	// identity is that of its credential, "" where none is asked for.
	identity string
	// host is its host ID, "" when it announced none.
	host string
}

// same tells whether two clients of different names are one node. Nodes that share an
// identity are told apart by their host IDs, where both are known. Without either, a client
// is only the same as one of its own name.
func (o owner) same(other owner) bool {
	switch {
	case o.identity != other.identity:
		return false
	case o.host == "" || other.host == "":
		return o.identity != ""
	}
	return o.host == other.host
}

// place is a claim with those that make it. All of it is under claimsMu.
type place struct {
	// claimants are never none. The first one holds the place, until it is forgotten or
	// announces it no more. Behind it come those of the same owner, the newest first, and then
	// the others, the oldest first: whoever is second is next.
	claimants []*client
	// listed is the first, or, while that is away, one of the same owner.
	listed *client
}

// maxOwnNames is how many names of an owner are looked at for one that is connected: a host
// has few, and a hostile client may make as many as there are clients.
const maxOwnNames = 64

// elect works out who is listed. Of those of the owner that is the first one if it is
// there; else who is listed already, if that is there; else the newest that is there; else
// who was there last.
func (p *place) elect() {
	first := p.claimants[0]
	if first.here || !p.listed.owner.same(first.owner) {
		p.listed = first
	}
	if p.listed.here {
		return
	}
	for _, c := range p.claimants[1:min(len(p.claimants), maxOwnNames)] {
		if !c.owner.same(first.owner) {
			return
		}
		if c.here {
			p.listed = c
			return
		}
	}
}

// conflict tells whether a client should be listed and is not. The former name of a node
// that is connected under another one should not be.
func (p *place) conflict(c *client) bool {
	return p.listed != c && (c.here || !c.owner.same(p.listed.owner))
}

// claim adds a client to those that claim a place. claimsMu is held.
func (r *Registry) claim(c *client, k claim) {
	p := r.claims[k]
	switch {
	case p == nil:
		p = &place{claimants: []*client{c}, listed: c}
		r.claims[k] = p
	case c.owner.same(p.claimants[0].owner):
		p.claimants = slices.Insert(p.claimants, 1, c)
	default:
		p.claimants = append(p.claimants, c)
	}
	p.elect()
}

// release takes a client out of those that claim a place. claimsMu is held.
func (r *Registry) release(c *client, k claim) {
	p := r.claims[k]
	p.claimants = slices.DeleteFunc(p.claimants, func(other *client) bool { return other == c })
	if len(p.claimants) == 0 {
		delete(r.claims, k)
		return
	}
	if p.listed == c {
		p.listed = p.claimants[0]
	}
	p.elect()
}

// announce takes what a client says that it offers, and whose it is. It keeps the places
// that it had and still claims. The client's lock is held.
func (r *Registry) announce(c *client, identity string, hash uint64, a *Announcement) {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	r.dirty.Store(true)
	o := owner{identity: identity}
	if a != nil {
		o.host = a.HostID
		if c.order == 0 {
			r.announcements++
			c.order = r.announcements
		}
	}
	keep := make(map[claim]bool)
	for k := range a.claims() {
		keep[k] = false
	}
	for k := range c.announcement.claims() {
		// Of another owner it has another place among those that wait.
		if _, ok := keep[k]; ok && (o == c.owner || r.claims[k].claimants[0] == c) {
			keep[k] = true
		} else {
			r.release(c, k)
		}
	}
	if a != c.announcement {
		c.last = nil
		if a != nil {
			c.last = make([]ScrapeStatus, len(a.Targets))
		}
	}
	c.owner, c.announced, c.announcement = o, hash, a
	for k := range a.claims() {
		if !keep[k] {
			r.claim(c, k)
		}
	}
	r.report(c)
}

// report logs and counts the places of others that a client claims. claimsMu is held.
func (r *Registry) report(c *client) {
	var conflicts, replaced int
	var job string
	var holder, former *client
	for k := range c.announcement.claims() {
		switch p := r.claims[k]; {
		case p.conflict(c):
			if conflicts++; conflicts == 1 {
				job, holder = k.job, p.listed
			}
		case p.listed == c && p.claimants[0] != c:
			if replaced++; replaced == 1 {
				former = p.claimants[0]
			}
		}
	}
	if conflicts > 0 {
		r.metrics.duplicateTargets.Add(float64(conflicts))
		r.cfg.Logger.Warn("Targets not listed, another client holds their job and instance", "client", c.name, "identity", c.owner.identity,
			"targets", conflicts, "job", short(job), "instance", short(c.announcement.Instance), "holder", holder.name, "holder_identity", holder.owner.identity)
	}
	if replaced > 0 {
		r.logRenamed(c, former, replaced)
	}
}

func (r *Registry) logRenamed(c, former *client, targets int) {
	r.cfg.Logger.Info("Targets listed under another name of the same node", "client", c.name, "former", former.name, "targets", targets)
}

// short cuts what a client said for the log, where it may stand often.
func short(s string) string { return s[:min(len(s), 100)] }

// present takes note that a client has come, or gone away. The client's lock is held.
func (r *Registry) present(c *client, here bool) {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	c.here = here
	var changed int
	var now, former *client
	for k := range c.announcement.claims() {
		p := r.claims[k]
		before := p.listed
		if p.elect(); p.listed != before {
			changed++
			now, former = p.listed, before
		}
	}
	if changed > 0 {
		r.logRenamed(now, former, changed)
	}
}

// unclaim gives up what a client announced. Its lock is held.
func (r *Registry) unclaim(c *client) {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	for k := range c.announcement.claims() {
		r.release(c, k)
	}
}

// holder returns who is listed with a client's job and instance, nil when it is the client
// itself; conflict tells whether the client should be.
func (r *Registry) holder(c *client, k claim) (holder *client, conflict bool) {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	p := r.claims[k]
	if p == nil || p.listed == c { // It was forgotten this moment, or it is the one.
		return nil, false
	}
	return p.listed, p.conflict(c)
}
