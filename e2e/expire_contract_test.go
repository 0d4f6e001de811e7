//go:build e2e

package e2e

import (
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/pushgw"
)

// TestContractListing lists the groups of a real Pushgateway, with unusual names and values.
func TestContractListing(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	gateway := startPushgateway(t)
	client := newClient(t, gateway)
	if groups := list(t, client); len(groups) != 0 {
		t.Errorf("an empty one has %v", groups)
	}
	const text = "# HELP a Has \"quotes\", \\\\ and {braces}]}\n# TYPE a gauge\na{l=\"\\\"}],{[\\\\\"} 1\n" +
		"# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum NaN\nh_count 1\n# TYPE s summary\ns{quantile=\"0.5\"} NaN\ns_sum 1\ns_count 1\n"
	for _, v := range []string{"web-1.example:9100", "", "a b", "/var/tmp", "ü", `a"b'c`, `a\b`, "a\nb", "\x00", "<&>", "{}", "\u2028", strings.Repeat("ü/", 400)} {
		key := pushgw.GroupingKey{Job: "contract", Labels: map[string]string{"instance": "i", "v": v}}
		if status, answer := send(t, http.MethodPut, gateway.URL+key.Path(), "", []byte(text+"# TYPE promferry_expires_after_seconds gauge\npromferry_expires_after_seconds 40.5\n")); status != http.StatusOK {
			t.Fatalf("%q: status %d: %s", v, status, answer)
		}
		g, ok := list(t, client)[key.String()]
		if !ok || !maps.Equal(g.Key.Labels, key.Labels) {
			t.Fatalf("%q is not listed: %v", v, list(t, client))
		}
		if g.Families != 6 || g.ExpiresAfter != 40.5 || !g.SilentSince.IsZero() || g.Pushed.Before(begin) || g.Pushed.After(time.Now()) {
			t.Errorf("%q: %+v", v, g)
		}
		if err := client.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	waitGroups(t, gateway, 0)

	// A first push that is refused makes a group that was never pushed; one with a family
	// called labels has no key.
	send(t, http.MethodPut, gateway.URL+"/metrics/job/refused", "", []byte("a 1 1000\n"))
	if g := list(t, client)[`{job="refused"}`]; g.Families != 2 || !g.Pushed.IsZero() {
		t.Errorf("never pushed: %+v", g)
	}
	send(t, http.MethodPut, gateway.URL+"/metrics/job/hidden", "", []byte("labels 1\n"))
	if groups := list(t, client); len(groups) != 2 || groups[`{job=""}`].Pushed.IsZero() {
		t.Errorf("without a key: %v", groups)
	}
}

func list(t *testing.T, client *pushgw.Client) map[string]pushgw.Group {
	t.Helper()
	groups := make(map[string]pushgw.Group)
	for g, err := range client.Groups(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		groups[g.Key.String()] = g
	}
	return groups
}

// TestContractStatus asks a real Pushgateway for its time and its start.
func TestContractStatus(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	gateway := startPushgateway(t)
	client := newClient(t, gateway)
	before := time.Now()
	status, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if status.Started.Before(begin) || status.Started.After(before) {
		t.Errorf("started %v, but it was from %v to %v", status.Started, begin, before)
	}
	if status.Now.Before(before.Truncate(time.Second)) || status.Now.After(time.Now()) {
		t.Errorf("now %v, but it is %v", status.Now, before)
	}
	gateway.Kill()
	if err := gateway.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := client.Status(t.Context())
	if err != nil || !again.Started.After(before) {
		t.Errorf("after a restart: %+v, %v", again, err)
	}
}
