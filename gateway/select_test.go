package gateway

import (
	"net/http"
	"net/url"
	"testing"
)

// TestSelectedPage asks for a page with some of the groups, and for one with none: the gateway's
// own metrics are on both. What these leave out is not what the page with all groups does.
func TestSelectedPage(t *testing.T) {
	g := newTest(t, nil)
	put(t, g, "/metrics/job/node/instance/web-1", "a 1\n")
	put(t, g, "/metrics/job/node/instance/web-2", "# TYPE a counter\na 2\n")
	put(t, g, "/metrics/job/backup", "b 3\n")
	page := func(match string) string { return "/metrics?" + url.Values{matchParameter: {match}}.Encode() }
	const own, node1, node2, backup = "promferry_gateway_series 3\n", `a{instance="web-1",job="node"} 1`, `a{instance="web-2",job="node"} 2`, `b{instance="",job="backup"} 3`
	want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, own, node1, "!"+node2, backup)
	want(t, ask(g, http.MethodGet, page(`{instance="web-2"}`), ""), http.StatusOK, own, "!"+node1, node2, "!"+backup)
	none := ask(g, http.MethodGet, page(`{job=""}`), "")
	want(t, none, http.StatusOK, own, "promferry_gateway_left_out_families 1\n", `promferry_gateway_groups{state="live"} 3`, "!job=")
	want(t, ask(g, http.MethodGet, page("job"), ""), http.StatusBadRequest, matchParameter)
}
