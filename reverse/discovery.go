package reverse

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/common/model"
)

// targetGroup is an entry of http_sd and file_sd.
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// Discovery answers service discovery (http_sd_configs) with one entry for each target of
// each client, those that are away included. ?job=NAME has only targets of that job.
func (r *Registry) Discovery(w http.ResponseWriter, req *http.Request) {
	r.mu.RLock()
	settled := r.settled
	r.mu.RUnlock()
	if !settled {
		// Prometheus keeps the targets that it has.
		w.Header().Set("Retry-After", "1")
		http.Error(w, "waiting for clients that were known before the start", http.StatusServiceUnavailable)
		return
	}
	query := req.URL.Query()
	for name := range query {
		if name != "job" {
			http.Error(w, fmt.Sprintf("parameter %.40q: there is only job", name), http.StatusBadRequest)
			return
		}
	}
	groups := []targetGroup{}
	clients := r.all()
	slices.SortFunc(clients, func(a, b *client) int { return cmp.Compare(a.name, b.name) })
	for _, c := range clients {
		c.mu.Lock()
		a := c.announcement
		c.mu.Unlock()
		if a == nil {
			continue
		}
		for _, t := range a.Targets {
			if query.Has("job") && !slices.Contains(query["job"], t.Job) || r.duplicate(c, a.Instance, t) {
				continue
			}
			groups = append(groups, targetGroup{[]string{net.JoinHostPort(c.name, strconv.Itoa(int(t.Port)))}, labels(a, t)})
		}
	}
	writeJSON(w, groups)
}

// labels returns the labels of a target: those of a push, and what Prometheus makes the URL of.
func labels(a *Announcement, t Target) map[string]string {
	l := make(map[string]string, len(a.Labels)+4)
	maps.Copy(l, a.Labels)
	l[model.JobLabel], l[model.InstanceLabel], l[model.MetricsPathLabel] = t.Job, a.Instance, t.plainPath()
	params, _ := url.ParseQuery(t.Query) // It was validated.
	for name, values := range params {
		l[model.ParamLabelPrefix+name] = values[0]
	}
	if t.Scheme == "https" {
		l[model.ParamLabelPrefix+schemeParam] = t.Scheme
	}
	return l
}

// ListClients answers as PushProx's proxy does, with the names of all clients whose last line
// is there or ended less than timeout ago.
func (r *Registry) ListClients(timeout time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		groups := []targetGroup{}
		for _, c := range r.all() {
			c.mu.Lock()
			listed := len(c.sessions) > 0 || time.Since(c.since) < timeout
			c.mu.Unlock()
			if listed {
				groups = append(groups, targetGroup{Targets: []string{c.name}})
			}
		}
		slices.SortFunc(groups, func(a, b targetGroup) int { return cmp.Compare(a.Targets[0], b.Targets[0]) })
		writeJSON(w, groups)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// Summary says in a line how many clients there are.
func (r *Registry) Summary() string {
	connected, away := r.count()
	return fmt.Sprintf("%d clients connected, %d away", connected, away)
}

func (r *Registry) count() (connected, away int) {
	for _, c := range r.all() {
		c.mu.Lock()
		if c.connected() {
			connected++
		} else {
			away++
		}
		c.mu.Unlock()
	}
	return connected, away
}
