package gateway

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/promferry/promferry/pushgw"
)

// jobs are rights to the groups with these jobs; "*" is every group.
type jobs []string

func (j jobs) has(job string) bool {
	return slices.Contains(j, job) || slices.Contains(j, "*")
}

func (j jobs) Push(w http.ResponseWriter, _ *http.Request, key pushgw.GroupingKey) bool {
	return told(w, j.has(key.Job))
}

func (j jobs) PushToAll(w http.ResponseWriter, _ *http.Request) bool { return told(w, j.has("*")) }

func (j jobs) PushToSome(w http.ResponseWriter, _ *http.Request) func(pushgw.GroupingKey) bool {
	if !told(w, len(j) > 0) {
		return nil
	}
	return func(key pushgw.GroupingKey) bool { return j.has(key.Job) }
}

func told(w http.ResponseWriter, ok bool) bool {
	if !ok {
		http.Error(w, "not yours", http.StatusForbidden)
	}
	return ok
}

// untouched is a body that must not be read.
type untouched struct{ t *testing.T }

func (u untouched) Read([]byte) (int, error) {
	u.t.Error("the body is read")
	return 0, errors.New("read")
}

// TestRights has pushes and deletions of who may not: they are answered before the body is read,
// and leave no trace but a count.
func TestRights(t *testing.T) {
	const mine, other, all = `"job":"mine"`, `"job":"other"`, "/api/v1/metrics?match[]=job=~%22.%2B%22"
	for _, test := range []struct {
		name         string
		rights       jobs
		method, path string
		status       int
		left         []string // what /api/v1/metrics has then
	}{
		{"put", jobs{"mine"}, http.MethodPut, "/metrics/job/yours", http.StatusForbidden, []string{mine, "!yours"}},
		{"add", jobs{"mine"}, http.MethodPost, "/metrics/job/yours/instance/a", http.StatusForbidden, []string{mine, "!yours"}},
		{"put in base64", jobs{"mine"}, http.MethodPut, "/metrics/job@base64/eW91cnM", http.StatusForbidden, []string{mine, "!yours"}},
		{"put with mine as another label", jobs{"mine"}, http.MethodPut, "/metrics/job/yours/job/mine", http.StatusForbidden, []string{mine, "!yours"}},
		{"delete", jobs{"yours"}, http.MethodDelete, "/metrics/job/mine", http.StatusForbidden, []string{mine}},
		{"delete mine", jobs{"mine"}, http.MethodDelete, "/metrics/job/mine", http.StatusAccepted, []string{"!mine", other}},
		{"delete by match", jobs{"yours"}, http.MethodDelete, all, http.StatusOK, []string{mine, other}},
		{"delete by match, mine among them", jobs{"mine"}, http.MethodDelete, all, http.StatusOK, []string{"!mine", other}},
		{"delete by match, as nobody", jobs{}, http.MethodDelete, all, http.StatusForbidden, []string{mine, other}},
		// Who has no rights makes the gateway compile nothing, and does not learn what was wrong.
		{"delete by match, as nobody, a wrong one", jobs{}, http.MethodDelete, matching("job=~("), http.StatusForbidden, []string{mine, other}},
		{"delete by match, as nobody, a query that cannot be read", jobs{}, http.MethodDelete, "/api/v1/metrics?;", http.StatusForbidden, []string{mine, other}},
		{"delete by match, as nobody, too many", jobs{}, http.MethodDelete, matching(slices.Repeat([]string{"a=b"}, maxMatchers+1)...), http.StatusForbidden, []string{mine, other}},
		{"wipe", jobs{"mine", "other"}, http.MethodPut, "/api/v1/admin/wipe", http.StatusForbidden, []string{mine, other}},
		{"wipe by who may", jobs{"*"}, http.MethodPut, "/api/v1/admin/wipe", http.StatusAccepted, []string{"!mine", "!other"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newTest(t, func(c *Config) { c.AdminAPI = true })
			put(t, g, "/metrics/job/mine", "a 1\n")
			put(t, g, "/metrics/job/other", "a 1\n")
			g.config.Rights = test.rights
			r := httptest.NewRequest(test.method, test.path, io.NopCloser(untouched{t}))
			w := httptest.NewRecorder()
			g.ServeHTTP(w, r)
			want(t, w, test.status)
			want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK, test.left...)
			refused := "0"
			if strings.HasPrefix(test.path, "/metrics/") && test.method != http.MethodDelete {
				refused = "1"
			}
			want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK,
				`promferry_gateway_pushes_total{result="not_allowed"} `+refused, `promferry_gateway_pushes_total{result="success"} 2`)
		})
	}
}

// TestRightsToPush has a push of who may.
func TestRightsToPush(t *testing.T) {
	g := newTest(t, func(c *Config) { c.Rights = jobs{"mine"} })
	put(t, g, "/metrics/job/mine/instance/a", "a 1\n")
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="a",job="mine"} 1`)
}
