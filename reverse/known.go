package reverse

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"time"
)

// saveEvery is how often the clients are saved at most: a fleet that comes back all at once
// is some megabytes, each time.
const saveEvery = 10 * time.Second

// knownClient is a client as it is saved.
type knownClient struct {
	Name         string        `json:"name"`
	Kind         string        `json:"kind,omitempty"`
	Version      string        `json:"version,omitempty"`
	Remote       string        `json:"remote,omitempty"`
	Since        time.Time     `json:"since"`
	Goodbye      bool          `json:"goodbye,omitempty"`
	Identity     string        `json:"identity,omitempty"`
	Announcement *Announcement `json:"announcement,omitempty"`
	// Waits are the jobs with which another client is listed.
	Waits []string `json:"waits,omitempty"`

	order  uint64
	client *client
}

type knownClients struct {
	Clients []knownClient `json:"clients"`
}

// load reads the clients that were known before the start.
func (r *Registry) load() error {
	if r.cfg.Store == nil {
		return nil
	}
	b, err := r.cfg.Store.Load()
	if err != nil {
		return err
	}
	var known knownClients
	if b != nil {
		if err := json.Unmarshal(b, &known); err != nil {
			return fmt.Errorf("%w; move the file away to start without the clients that were known", err)
		}
	}
	now := time.Now()
	for i := range known.Clients {
		k := &known.Clients[i]
		if ValidateName(k.Name) != nil || k.Announcement != nil && k.Announcement.Validate() != nil {
			r.cfg.Logger.Warn("Client known before is not understood, and forgotten", "client", fmt.Sprintf("%.60q", k.Name))
			continue
		}
		if now.Sub(k.Since) >= r.cfg.ForgetAfter || len(r.clients) >= r.cfg.MaxClients {
			continue
		}
		c := &client{
			name: k.Name, kind: k.Kind, version: k.Version, remote: k.Remote, since: k.Since, goodbye: k.Goodbye,
			owner: owner{identity: k.Identity}, announcement: k.Announcement,
		}
		if a := k.Announcement; a != nil {
			r.announcements++
			c.order, c.owner.host = r.announcements, a.HostID
			c.announced, c.last = maphash.String(r.seed, a.String()), make([]ScrapeStatus, len(a.Targets))
		}
		r.clients[k.Name], k.client = c, c
		if !k.Goodbye {
			r.expected[k.Name] = true
		}
	}
	r.loadClaims(known.Clients)
	return nil
}

// loadClaims gives the places to those that were listed, and then lets the others wait.
func (r *Registry) loadClaims(known []knownClient) {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	for _, waiting := range []bool{false, true} {
		for _, k := range known {
			if k.client == nil || waiting && k.Waits == nil {
				continue
			}
			waits := make(map[string]bool, len(k.Waits))
			for _, job := range k.Waits {
				waits[job] = true
			}
			for place := range k.Announcement.claims() {
				if waits[place.job] == waiting {
					r.claim(k.client, place)
				}
			}
		}
	}
	for _, k := range known {
		if k.client != nil {
			r.report(k.client)
		}
	}
}

// waits returns the jobs with which another client is listed. The client's lock is held.
func (r *Registry) waits(c *client) []string {
	r.claimsMu.Lock()
	defer r.claimsMu.Unlock()
	var jobs []string
	for k := range c.announcement.claims() {
		if r.claims[k].listed != c {
			jobs = append(jobs, k.job)
		}
	}
	return jobs
}

// save writes the clients down.
func (r *Registry) save() {
	if r.cfg.Store == nil || !r.dirty.Swap(false) {
		return
	}
	known := knownClients{Clients: []knownClient{}}
	now := time.Now()
	for _, c := range r.all() {
		c.mu.Lock()
		if c.gone { // It was forgotten this moment.
			c.mu.Unlock()
			continue
		}
		k := knownClient{
			Name: c.name, Kind: c.kind, Version: c.version, Remote: c.remote, Since: c.since, Goodbye: c.goodbye,
			Identity: c.owner.identity, Announcement: c.announcement, Waits: r.waits(c), order: c.order,
		}
		if len(c.sessions) > 0 {
			k.Since = now
		}
		c.mu.Unlock()
		known.Clients = append(known.Clients, k)
	}
	// Who announced a target first is so after a start, too.
	slices.SortFunc(known.Clients, func(a, b knownClient) int { return cmp.Compare(a.order, b.order) })
	b, err := json.Marshal(known)
	if err == nil {
		err = r.cfg.Store.Save(b)
	}
	if err != nil {
		r.dirty.Store(true)
		r.metrics.saveFailures.Inc()
		r.saves.Failed(context.Background(), "Known clients not saved, a restart would not know them", err)
		return
	}
	r.saves.Succeeded(context.Background(), "Known clients saved again")
}

// Run forgets clients that have been away for long, and saves what is known, until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	sweep := time.NewTicker(time.Second)
	defer sweep.Stop()
	save := time.NewTicker(saveEvery)
	defer save.Stop()
	settle := time.After(r.cfg.Settle)
	for {
		select {
		case <-sweep.C:
			r.sweep()
		case <-save.C:
			r.save()
		case <-settle:
			r.settle()
		case <-ctx.Done():
			// Whoever is connected now was so until the end.
			r.dirty.Store(true)
			r.save()
			return nil
		}
	}
}

func (r *Registry) settle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.settled {
		names := slices.Sorted(maps.Keys(r.expected))
		r.cfg.Logger.Warn("Some clients that were known are not back, they are listed as away", "missing", len(names),
			"clients", strings.Join(names[:min(len(names), 10)], ","))
		r.settled, r.expected = true, nil
	}
}

// sweep ends sessions that have had no line for a while, and forgets clients that have been
// away for long.
func (r *Registry) sweep() {
	for _, c := range r.all() {
		c.mu.Lock()
		for i := len(c.sessions); i > 0; i-- { // end takes it out.
			if s := c.sessions[i-1]; s.lines == 0 && time.Since(s.empty) >= linger {
				s.end()
			}
		}
		old := len(c.sessions) == 0 && time.Since(c.since) >= r.cfg.ForgetAfter
		c.mu.Unlock()
		if old {
			r.forget(c)
		}
	}
}

func (r *Registry) forget(c *client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sessions) > 0 {
		return
	}
	r.unclaim(c)
	c.gone = true
	delete(r.clients, c.name)
	delete(r.expected, c.name)
	r.dirty.Store(true)
	r.metrics.forgotten.Inc()
	r.cfg.Logger.Info("Client forgotten, it is listed no more", "client", c.name)
}

// Stopping makes the registry take no further lines.
func (r *Registry) Stopping() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopping = true
}
