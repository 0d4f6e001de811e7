package reverse

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"iter"
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
	jobs := make(map[string]bool)
	for _, job := range query["job"] {
		jobs[job] = true
	}
	writeGroups(w, func(yield func(targetGroup) bool) {
		for _, c := range r.sorted() {
			c.mu.Lock()
			a := c.announcement
			c.mu.Unlock()
			if a == nil {
				continue
			}
			for _, t := range a.Targets {
				if query.Has("job") && !jobs[t.Job] {
					continue
				}
				if holder, _ := r.holder(c, claim{t.Job, a.Instance}); holder != nil {
					continue
				}
				if !yield(targetGroup{[]string{net.JoinHostPort(c.name, strconv.Itoa(int(t.Port)))}, labels(a, t)}) {
					return
				}
			}
		}
	})
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
		writeGroups(w, func(yield func(targetGroup) bool) {
			for _, c := range r.sorted() {
				c.mu.Lock()
				listed := len(c.sessions) > 0 || time.Since(c.since) < timeout
				c.mu.Unlock()
				if listed && !yield(targetGroup{Targets: []string{c.name}}) {
					return
				}
			}
		})
	}
}

// writeGroups writes a list of groups one by one: all of them together may be many times
// what clients announced. It stops when the answer can no longer be sent.
func writeGroups(w http.ResponseWriter, groups iter.Seq[targetGroup]) {
	w.Header().Set("Content-Type", "application/json")
	var entry bytes.Buffer
	encoder := json.NewEncoder(&entry)
	encoder.SetEscapeHTML(false)
	before := byte('[')
	for g := range groups {
		entry.Reset()
		entry.WriteByte(before)
		_ = encoder.Encode(g) // Strings.
		if _, err := w.Write(bytes.TrimSuffix(entry.Bytes(), []byte("\n"))); err != nil {
			return
		}
		before = ','
	}
	end := "]\n"
	if before == '[' {
		end = "[]\n"
	}
	_, _ = io.WriteString(w, end)
}

// sorted returns all clients, by name.
func (r *Registry) sorted() []*client {
	return slices.SortedFunc(slices.Values(r.all()), func(a, b *client) int { return cmp.Compare(a.name, b.name) })
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
