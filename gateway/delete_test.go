package gateway

import (
	"encoding/json"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// matching returns the path that selects groups.
func matching(matchers ...string) string {
	return "/api/v1/metrics?" + url.Values{matchParameter: matchers}.Encode()
}

// TestDeleteMatching deletes by matchers, after the same matchers have shown what goes.
func TestDeleteMatching(t *testing.T) {
	for _, test := range []struct {
		matchers []string
		deleted  []string
	}{
		{[]string{`{job="backup"}`}, []string{"web-1", "web-2", "db-1"}},
		{[]string{`{job="backup",instance=~"web-.*"}`}, []string{"web-1", "web-2"}},
		{[]string{`{instance=~"web"}`}, nil},
		{[]string{`{instance="web-1"}`, `job=restore`}, []string{"web-1", "web-9"}},
		{[]string{`{job="backup",instance!~"web-.*"}`}, []string{"db-1"}},
		{[]string{`{shard=""}`, `{job="x"}`}, []string{"web-1", "web-2", "db-1", "web-9"}},
		{[]string{`{job="nobody"}`}, nil},
	} {
		g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
		for _, path := range []string{"/job/backup/instance/web-1", "/job/backup/instance/web-2", "/job/backup/instance/db-1", "/job/restore/instance/web-9", "/job/x/shard/1/instance/s"} {
			put(t, g, "/metrics"+path, "a 1\n")
		}
		gone := append([]string{}, test.deleted...)
		if len(test.matchers) == 2 && test.matchers[1] == `{job="x"}` {
			gone = append(gone, "s")
		}
		listed := listedInstances(t, g, matching(test.matchers...))
		w := ask(g, http.MethodDelete, matching(test.matchers...), "")
		want(t, w, http.StatusOK)
		var answer struct {
			Data struct{ Deleted []map[string]string }
		}
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		got := make(map[string]bool)
		for _, labels := range answer.Data.Deleted {
			got[labels["instance"]] = true
		}
		for pass := range 2 {
			left := listedInstances(t, g, "/api/v1/metrics")
			for _, instance := range []string{"web-1", "web-2", "db-1", "web-9", "s"} {
				want := false
				for _, one := range gone {
					want = want || one == instance
				}
				if got[instance] != want || listed[instance] != want || left[instance] == want {
					t.Errorf("%q, pass %d: %s is deleted %v, was listed %v, is left %v, want deleted %v", test.matchers, pass, instance, got[instance], listed[instance], left[instance], want)
				}
			}
			g = restart(t, g, nil)
		}
	}
}

func listedInstances(t *testing.T, g *Gateway, path string) map[string]bool {
	t.Helper()
	var answer struct {
		Data []struct{ Labels map[string]string }
	}
	w := ask(g, http.MethodGet, path, "")
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		t.Fatal(err, w.Body)
	}
	all := make(map[string]bool)
	for _, group := range answer.Data {
		all[group.Labels["instance"]] = true
	}
	return all
}

// TestDeleteFaults shows that a slip deletes nothing.
func TestDeleteFaults(t *testing.T) {
	g := newTest(t, nil)
	put(t, g, "/metrics/job/j", "a 1\n")
	for _, test := range []struct{ path, part string }{
		{"/api/v1/metrics", `match[]={job="backup"`},
		{"/api/v1/metrics?match=" + url.QueryEscape(`{job="j"}`), "which groups"},
		{matching(""), "no matchers"},
		{matching("{}"), "/api/v1/admin/wipe"},
		{matching(`{job="j"}`, "{}"), "/api/v1/admin/wipe"},
		{matching(`{job="j"}`, "{job"), "{job"},
		{matching(`{job=~"("}`), "missing closing )"},
	} {
		want(t, ask(g, http.MethodDelete, test.path, ""), http.StatusBadRequest, test.part)
	}
	for _, test := range []struct {
		matchers []string
		part     string
	}{
		{slices.Repeat([]string{`{job="j"}`}, maxMatchers+1), "match[] 101 times, the maximum is 100"},
		{[]string{`{job=~"(jj){1000}"}`}, "regular expressions of size 5003, the maximum is 2000"},
		{slices.Repeat([]string{`{job=~"j{300}"}`}, 4), "all regular expressions together have size"},
		{[]string{`{job="` + strings.Repeat("j", 5000) + `"}`}, "5008 bytes, the maximum is 4096"},
	} {
		for method, path := range map[string]string{http.MethodDelete: "/api/v1/metrics", http.MethodGet: "/metrics"} {
			want(t, ask(g, method, path+"?"+url.Values{matchParameter: test.matchers}.Encode(), ""), http.StatusBadRequest, test.part)
		}
	}
	many := slices.Repeat([]string{`{job=~"j.*",instance=~"web-[0-9]+"}`}, maxMatchers/2)
	want(t, ask(g, http.MethodGet, matching(many...), ""), http.StatusOK)
	for _, path := range []string{"/metrics", "/api/v1/metrics"} { // What cannot be read selects nothing, and not everything.
		want(t, ask(g, http.MethodGet, path+`?match[]={job=~"j;k"}`, ""), http.StatusBadRequest, "percent-encoded")
	}
	want(t, ask(g, http.MethodGet, matching("job"), ""), http.StatusBadRequest, `"job"`)
	want(t, ask(g, http.MethodPut, "/api/v1/metrics", ""), http.StatusMethodNotAllowed)
	want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
}

// TestStatus shows why the last push of a group was refused, whatever it was.
func TestStatus(t *testing.T) {
	g := newTest(t, inFile(filepath.Join(t.TempDir(), "groups.db")))
	put(t, g, "/metrics/job/batch", "a 1\nb{x=\"1\"} 2\nb 3\n")
	put(t, g, "/metrics/job/node", expiring)
	want(t, ask(g, http.MethodPut, "/metrics/job/batch", "a 1"), http.StatusBadRequest)
	want(t, ask(g, http.MethodPut, "/metrics/job/node", "a 1 1\n"), http.StatusBadRequest)
	want(t, ask(g, http.MethodPut, "/metrics/job/nobody", "a 1"), http.StatusBadRequest) // Makes no group, as with a Pushgateway.
	status := g.Status()
	if len(status.Groups) != 2 {
		t.Fatalf("%+v", status.Groups)
	}
	batch, node := status.Groups[0], status.Groups[1]
	if batch.State != StateLive || batch.Series != 3 || !batch.OnDisk || batch.ExpiresAfter != 0 || batch.Failed.IsZero() || batch.Failure == "" || batch.Target != "/groups/job/batch/metrics" {
		t.Errorf("%+v", batch)
	}
	if node.State != StateLive || node.Series != 3 || node.OnDisk || node.ExpiresAfter.Seconds() != 30 || node.Failure == "" {
		t.Errorf("%+v", node)
	}
	page := ask(g, http.MethodGet, "/groups/job/batch/metrics", "")
	want(t, page, http.StatusOK, `push_failure_time_seconds{instance="",job="batch"} 0`) // As a Pushgateway.
	if got := page.Body.Len(); batch.Bytes <= 0 || batch.Bytes >= got {
		t.Errorf("%d bytes, and the page has %d", batch.Bytes, got)
	}
	put(t, g, "/metrics/job/batch", "a 1\n")
	if batch := g.Status().Groups[0]; !batch.Failed.IsZero() || batch.Failure != "" {
		t.Errorf("after a push that was taken: %+v", batch)
	}
}
