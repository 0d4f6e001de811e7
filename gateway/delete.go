package gateway

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/promferry/promferry/internal/labelmatch"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/pushgw"
)

// matchParameter holds matchers of grouping keys. Where it comes twice, either will do.
const matchParameter = "match[]"

// maxMatchers is the maximum number of texts with matchers in a query: each is tried on each group.
const maxMatchers = 100

// matchersOf returns what the query of a request selects: nil where it says nothing of it. It is
// for a sender with rights: the query decides how long it takes. Errors are *Refusal.
func matchersOf(r *http.Request) ([]labelmatch.Matchers, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil { // Part of it would be left out, and more be selected than was meant.
		return nil, badPath("query %.200q: %v: want it percent-encoded, as curl -G --data-urlencode does", r.URL.RawQuery, err)
	}
	var all []labelmatch.Matchers
	if n := len(query[matchParameter]); n > maxMatchers {
		return nil, badPath("%s %d times, the maximum is %d; use several requests", matchParameter, n, maxMatchers)
	}
	size := 0
	for _, text := range query[matchParameter] {
		m, err := labelmatch.Parse(text)
		if err != nil {
			return nil, badPath("%s: %v", matchParameter, err)
		}
		if size += m.RegexpSize(); size > labelmatch.MaxRegexpSize {
			return nil, badPath("%s: all regular expressions together have size %d, the maximum is %d; use several requests", matchParameter, size, labelmatch.MaxRegexpSize)
		}
		all = append(all, m)
	}
	return all, nil
}

func selected(all []labelmatch.Matchers, key pushgw.GroupingKey) bool {
	labels := key.AllLabels()
	for _, m := range all {
		if m.Match(labels) {
			return true
		}
	}
	return false
}

// deleteMatching deletes all groups that the query selects and the sender may push to, and
// answers which these were.
func (g *Gateway) deleteMatching(w http.ResponseWriter, r *http.Request) {
	may := g.config.Rights.PushToSome(w, r)
	if may == nil {
		return
	}
	all, err := matchersOf(r)
	if err == nil && len(all) == 0 {
		err = badPath(`which groups? Want %s={job="backup",instance=~"web-.*"}, percent-encoded; GET lists what it selects`, matchParameter)
	}
	for _, m := range all {
		if m.All() {
			err = badPath("%s={} is every group: a PUT to /api/v1/admin/wipe deletes these, with --web.enable-admin-api", matchParameter)
		}
	}
	if err != nil {
		refuse(w, asRefusal(err))
		return
	}
	keys, err := g.store.DeleteAll(func(key pushgw.GroupingKey) bool { return selected(all, key) && may(key) })
	if err != nil {
		refuse(w, asRefusal(err))
		return
	}
	deleted := make([]map[string]string, 0, len(keys))
	for _, key := range keys {
		deleted = append(deleted, key.AllLabels())
	}
	g.config.Logger.Info("Groups deleted", "groups", len(keys), "match", safeurl.Cut(strings.Join(r.URL.Query()[matchParameter], " or ")), "remote", r.RemoteAddr)
	writeJSON(w, map[string]any{"status": "success", "data": map[string]any{"deleted": deleted}})
}

// wipe deletes all groups.
func (g *Gateway) wipe(w http.ResponseWriter, r *http.Request) {
	if _, err := g.store.DeleteAll(func(pushgw.GroupingKey) bool { return true }); err != nil {
		refuse(w, asRefusal(err))
		return
	}
	g.config.Logger.Info("All groups deleted", "remote", r.RemoteAddr)
	w.WriteHeader(http.StatusAccepted)
}
