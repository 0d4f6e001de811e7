package access_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/access"
)

// gatewayExample has an entry of each kind.
var gatewayExample = fmt.Sprintf(`
pushers:
  - identity: web
    groups: ['{job="node",instance=~"web-.*"}', 'job=~backup|restore']
    token_sha256: [%s, %s]
  - identity: db
    groups: ['{job="node",instance="db-1",shard=""}']
    token_sha256: [%s]
  - identity: operators
    groups: ['{}']
    token_sha256: [%s]
    san: ["*@ops.example.org"]
  - identity: nodes
    san: ["*.nodes.example.org", "10.1.*"]
  - identity: branches
    san: ["gw.example.org"]
    groups: ['{instance=~".+[.]branch[.]example[.]org"}']
readers:
  - identity: prometheus
    username: prom
    token_sha256: [%s]
    san: [prometheus.example.org]
`, sum("web-old"), sum("web-new"), sum("db-token"), sum("all-token"), sum("read-token"))

func newGatewayGuard(t testing.TB, content string) *guarded {
	t.Helper()
	return newGuarded(t, access.NewGateway, content)
}

func (g *guarded) pusher(c caller, group map[string]string) error {
	return g.Pusher(c.request("Authorization"), group)
}

func (g *guarded) reader(c caller) error { return g.Reader(c.request("Authorization")) }

// outcome is "in", or the status and the reason of a refusal.
func outcome(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return "in"
	}
	e, ok := errors.AsType[*access.Error](err)
	if !ok {
		t.Fatalf("%v is no *access.Error", err)
	}
	return fmt.Sprintf("%d %s", e.Status, e.Reason)
}

// labels makes a group of pairs.
func labels(pairs ...string) map[string]string {
	group := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		group[pairs[i]] = pairs[i+1]
	}
	return group
}

// A credential is good for the groups of its entry, and no other.
func TestPusherGroups(t *testing.T) {
	web1 := labels("job", "node", "instance", "web-1")
	db1 := labels("job", "node", "instance", "db-1")
	const node = "a.nodes.example.org"
	own := labels("job", "node", "instance", node)
	for _, tc := range []struct {
		what string
		caller
		group map[string]string
		want  string
	}{
		{"token", caller{bearer: "web-old"}, web1, "in"},
		{"second token", caller{bearer: "web-new"}, web1, "in"},
		{"Basic, as client libraries", caller{username: "whoever", password: "web-new"}, web1, "in"},
		{"more labels than the matchers name", caller{bearer: "web-new"}, labels("job", "node", "instance", "web-1", "shard", "a"), "in"},
		{"second matchers", caller{bearer: "web-new"}, labels("job", "restore"), "in"},
		{"another's instance", caller{bearer: "web-new"}, db1, "403 wrong_group"},
		{"another's job", caller{bearer: "web-new"}, labels("job", "app", "instance", "web-1"), "403 wrong_group"},
		{"a half of one and of the other", caller{bearer: "db-token"}, labels("job", "backup", "instance", "db-1"), "403 wrong_group"},
		{"job with more behind it", caller{bearer: "web-new"}, labels("job", "backup2"), "403 wrong_group"},
		{"job with more before it", caller{bearer: "web-new"}, labels("job", "a-restore"), "403 wrong_group"},
		{"no instance", caller{bearer: "web-new"}, labels("job", "node"), "403 wrong_group"},
		{"another label has the value", caller{bearer: "web-new"}, labels("job", "node", "x", "web-1"), "403 wrong_group"},
		{"no labels at all", caller{bearer: "web-new"}, nil, "403 wrong_group"},
		{"a label that must not be there", caller{bearer: "db-token"}, labels("job", "node", "instance", "db-1", "shard", "a"), "403 wrong_group"},
		{"without it", caller{bearer: "db-token"}, db1, "in"},
		{"every group", caller{bearer: "all-token"}, db1, "in"},
		{"unknown token", caller{bearer: "web"}, web1, "401 unknown_token"},
		{"digest for a token", caller{bearer: sum("web-new")}, web1, "401 unknown_token"},
		{"username for a token", caller{username: "web-new", password: "x"}, web1, "401 unknown_token"},
		{"neither Bearer nor Basic", caller{raw: []string{"web-new"}}, web1, "401 malformed"},
		{"nothing", caller{}, web1, "401 missing"},
		{"reader's token", caller{username: "prom", password: "read-token"}, web1, "401 unknown_token"},
		{"reader's certificate", caller{certificate: certificate("", "prometheus.example.org")}, web1, "401 unknown_certificate"},

		{"certificate", caller{certificate: certificate("", node)}, own, "in"},
		{"certificate, any job", caller{certificate: certificate("", node)}, labels("job", "backup", "instance", node), "in"},
		{"certificate, another node", caller{certificate: certificate("", node)}, labels("job", "node", "instance", "b.nodes.example.org"), "403 wrong_group"},
		{"certificate, no instance", caller{certificate: certificate("", node)}, labels("job", "node"), "403 wrong_group"},
		{"certificate, its name as the job", caller{certificate: certificate("", node)}, labels("job", node), "403 wrong_group"},
		{"certificate, its name in capitals", caller{certificate: certificate("", node)}, labels("job", "node", "instance", strings.ToUpper(node)), "403 wrong_group"},
		{"one of two names", caller{certificate: certificate("", "x.net", node)}, own, "in"},
		{"its other name, which the glob does not take", caller{certificate: certificate("", "x.net", node)}, labels("job", "node", "instance", "x.net"), "403 wrong_group"},
		{"wildcard certificate", caller{certificate: certificate("", "*.nodes.example.org")}, own, "403 wrong_group"},
		{"IP address", caller{certificate: certificate("", "10.1.2.3")}, labels("job", "node", "instance", "10.1.2.3"), "in"},
		{"common name", caller{certificate: certificate(node)}, own, "in"},
		{"groups of the entry", caller{certificate: certificate("", "gw.example.org")}, labels("job", "node", "instance", "a.branch.example.org"), "in"},
		{"own name, but groups of the entry", caller{certificate: certificate("", "gw.example.org")}, labels("job", "node", "instance", "gw.example.org"), "403 wrong_group"},
		{"every group, by a certificate", caller{certificate: certificate("", "joe@ops.example.org")}, db1, "in"},
		{"nobody's certificate", caller{certificate: certificate("", "x.net")}, labels("job", "node", "instance", "x.net"), "401 unknown_certificate"},

		{"certificate, beside a token for something else", caller{bearer: "x", certificate: certificate("", node)}, own, "in"},
		{"certificate, beside a token for other groups", caller{bearer: "db-token", certificate: certificate("", node)}, own, "in"},
		{"token, beside another's certificate", caller{bearer: "db-token", certificate: certificate("", node)}, db1, "in"},
		{"neither", caller{bearer: "db-token", certificate: certificate("", node)}, web1, "403 wrong_group"},
	} {
		g := newGatewayGuard(t, gatewayExample)
		if got := outcome(t, g.pusher(tc.caller, tc.group)); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
		// The same for who asks to which groups, where the credential is good for any.
		may, err := g.PusherToSome(tc.request("Authorization"))
		if (err == nil) == strings.HasPrefix(tc.want, "401") {
			t.Errorf("%s: to some groups: %v", tc.what, err)
		} else if err == nil && may(tc.group) != (tc.want == "in") {
			t.Errorf("%s: to this one of some groups: %v", tc.what, may(tc.group))
		}
	}
}

// No name of a certificate is that of a group without an instance.
func TestPusherEmptyName(t *testing.T) {
	g := newGatewayGuard(t, "pushers: [{identity: all, san: ['*']}]")
	if got := outcome(t, g.pusher(caller{certificate: certificate("", "", "a")}, labels("job", "node"))); got != "403 wrong_group" {
		t.Error(got)
	}
}

// Every group is more than all that there are: only {} is that.
func TestPusherToAll(t *testing.T) {
	g := newGatewayGuard(t, gatewayExample)
	wide := newGatewayGuard(t, "pushers: [{identity: wide, groups: ['{job=~\".*\"}'], token_sha256: ["+sum("wide")+"]}]")
	for _, tc := range []struct {
		what string
		g    *guarded
		caller
		want string
	}{
		{"token", g, caller{bearer: "all-token"}, "in"},
		{"certificate", g, caller{certificate: certificate("", "joe@ops.example.org")}, "in"},
		{"some groups", g, caller{bearer: "web-new"}, "403 wrong_group"},
		{"matchers that match all", wide, caller{bearer: "wide"}, "403 wrong_group"},
		{"certificate without groups", g, caller{certificate: certificate("", "a.nodes.example.org")}, "403 wrong_group"},
		{"reader", g, caller{username: "prom", password: "read-token"}, "401 unknown_token"},
		{"nothing", g, caller{}, "401 missing"},
	} {
		if got := outcome(t, tc.g.PusherToAll(tc.request("Authorization"))); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

// Who reads cannot push, and who pushes cannot read.
func TestGatewayFacesAreSeparate(t *testing.T) {
	for _, tc := range []struct {
		what string
		caller
		want string
	}{
		{"reader's token", caller{bearer: "read-token"}, "in"},
		{"reader's token and username", caller{username: "prom", password: "read-token"}, "in"},
		{"another username", caller{username: "x", password: "read-token"}, "401 wrong_username"},
		{"reader's certificate", caller{certificate: certificate("", "prometheus.example.org")}, "in"},
		{"pusher's token", caller{bearer: "web-new"}, "401 unknown_token"},
		{"token of who may push to every group", caller{bearer: "all-token"}, "401 unknown_token"},
		{"pusher's certificate", caller{certificate: certificate("", "a.nodes.example.org")}, "401 unknown_certificate"},
		{"nothing", caller{}, "401 missing"},
	} {
		g := newGatewayGuard(t, gatewayExample)
		if got := outcome(t, g.reader(tc.caller)); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
	// Prometheus scrapes the gateway itself: there is no proxy to show something to.
	g := newGatewayGuard(t, gatewayExample)
	if got := outcome(t, g.Reader(caller{bearer: "read-token"}.request("Proxy-Authorization"))); got != "401 missing" {
		t.Errorf("the header for proxies: %s", got)
	}
}

// What the file does not name is closed, and what nobody's file says is open.
func TestGatewayDefaultDeny(t *testing.T) {
	everything := caller{bearer: "web-new", certificate: certificate("", "a.nodes.example.org")}
	group := labels("job", "node", "instance", "a.nodes.example.org")
	for _, tc := range []struct{ what, content, pusher, reader string }{
		{"pushers", "pushers: anyone", "in", "403 closed"},
		{"readers", "readers: anyone", "403 closed", "in"},
		{"readers, and no pushers", "pushers: []\nreaders: anyone", "403 closed", "in"},
		{"both", "pushers: anyone\nreaders: anyone", "in", "in"},
	} {
		g := newGatewayGuard(t, tc.content)
		if got := outcome(t, g.pusher(everything, group)); got != tc.pusher {
			t.Errorf("%s: pusher: %s", tc.what, got)
		}
		if got := outcome(t, g.PusherToAll(everything.request("Authorization"))); got != tc.pusher {
			t.Errorf("%s: pusher to all: %s", tc.what, got)
		}
		may, err := g.PusherToSome(everything.request("Authorization"))
		if got := outcome(t, err); got != tc.pusher || err == nil && !may(nil) {
			t.Errorf("%s: pusher to some: %s", tc.what, got)
		}
		if got := outcome(t, g.reader(everything)); got != tc.reader {
			t.Errorf("%s: reader: %s", tc.what, got)
		}
		for face, outcome := range map[access.Face]string{access.FacePusher: tc.pusher, access.FaceReader: tc.reader} {
			value := "0"
			if outcome == "in" {
				value = "1"
			}
			if g.Open(face) != (outcome == "in") {
				t.Errorf("%s: Open(%s) is %v", tc.what, face, g.Open(face))
			}
			g.wantMetric(t, `promferry_gateway_auth_open{face="`+string(face)+`"} `+value)
		}
	}

	open, err := access.NewGateway("", slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if faces := open.Faces(); !slices.Equal(faces, []access.Face{access.FacePusher, access.FaceReader}) {
		t.Errorf("faces %v", faces)
	}
	r := httptest.NewRequest(http.MethodPut, "/", nil)
	for what, err := range map[string]error{"pusher": open.Pusher(r, group), "pusher to all": open.PusherToAll(r), "reader": open.Reader(r)} {
		if err != nil {
			t.Errorf("without a file, %s: %v", what, err)
		}
	}
}

// Every series is there from the start, and there are no others after all kinds of failure.
func TestGatewayMetricsAreBounded(t *testing.T) {
	g := newGatewayGuard(t, gatewayExample)
	series := func() int { return strings.Count(g.metrics(t), "promferry_gateway_auth_failures_total{") }
	if n := series(); n != 2*8 {
		t.Errorf("%d series at the start", n)
	}
	if strings.Contains(g.metrics(t), "promferry_proxy_") {
		t.Error("a gateway has metrics of a proxy")
	}
	for _, c := range []caller{{}, {bearer: "canary"}, {raw: []string{"canary"}}, {username: "canary", password: "read-token"}, {certificate: certificate("canary")}, {bearer: "web-new"}} {
		_ = g.pusher(c, labels("job", "canary"))
		_ = g.reader(c)
	}
	if n := series(); n != 2*8 {
		t.Errorf("%d series", n)
	}
	for _, series := range []string{
		`face="pusher",reason="missing"`, `face="pusher",reason="wrong_group"`, `face="reader",reason="wrong_username"`, `face="reader",reason="missing"`,
	} {
		g.wantMetric(t, "promferry_gateway_auth_failures_total{"+series+"} 1")
	}
	g.wantMetric(t, "promferry_gateway_auth_last_reload_successful 1")
}

// Who pushes where it must not is refused like others, and slowed down like others.
func TestPusherFailuresAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGatewayGuard(t, gatewayExample)
		c := caller{bearer: "web-new", address: "192.0.2.1:99"}
		for i := range 11 {
			want := "403 wrong_group"
			if i == 10 {
				want = "429 wrong_group"
			}
			if got := outcome(t, g.pusher(c, labels("job", "db"))); got != want {
				t.Errorf("failure %d: %s", i, got)
			}
		}
		if got := outcome(t, g.pusher(c, labels("job", "backup"))); got != "in" {
			t.Errorf("to its own group: %s", got)
		}
		// To ask which groups these are is no failure.
		may, err := g.PusherToSome(c.request("Authorization"))
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			_ = may(labels("job", "db"))
		}
		g.wantMetric(t, `promferry_gateway_auth_failures_total{face="pusher",reason="wrong_group"} 11`)
	})
}

// The log tells who wanted to push where; the answer tells nothing. Neither shows a secret.
func TestPusherErrors(t *testing.T) {
	g := newGatewayGuard(t, gatewayExample)
	for _, tc := range []struct {
		err         error
		says, tells string
	}{
		{
			g.pusher(caller{bearer: "web-new"}, labels("job", "db", "instance", "a\nb")),
			`admit pusher to {instance="a\nb", job="db"}: the credential is for other groups, it is of identity "web"`, "These credentials are for other groups.",
		},
		{
			g.pusher(caller{bearer: "web-new"}, labels("job", strings.Repeat("x", 1000))),
			`admit pusher to {job="` + strings.Repeat("x", 194) + `: the credential is for other groups, it is of identity "web"`, "These credentials are for other groups.",
		},
		{
			g.PusherToAll(caller{bearer: "db-token"}.request("Authorization")),
			`admit pusher to every group: the credential is for other groups, it is of identity "db"`, "These credentials are for other groups.",
		},
		{g.pusher(caller{bearer: "canary"}, labels("job", "db")), `admit pusher to {job="db"}: unknown token`, "Credentials are missing or wrong."},
		{g.reader(caller{}), `admit reader: no credentials`, "Credentials are missing or wrong."},
	} {
		if tc.err == nil {
			t.Errorf("let in: %s", tc.says)
			continue
		}
		e := tc.err.(*access.Error) //nolint:errorlint // Nothing wraps it.
		if e.Error() != tc.says || e.Text() != tc.tells {
			t.Errorf("says %s, tells %s, want %s and %s", e, e.Text(), tc.says, tc.tells)
		}
		all := fmt.Sprintf("%+v %s", *e, g.metrics(t))
		for _, secret := range []string{"canary", "web-new", "db-token", sum("web-new")[:8]} {
			if strings.Contains(all, secret) {
				t.Errorf("%q is in %s", secret, all)
			}
		}
	}
}

// A change of the file is in use within two looks, or at once on Reload; a bad one is not.
func TestGatewayReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := func(groups string) string {
			return "pushers: [{identity: web, groups: ['" + groups + "'], token_sha256: [" + sum("web") + "]}]\n"
		}
		w := watch(t, newGatewayGuard(t, file(`{job="node"}`)))
		takes := func(yes, no string) {
			t.Helper()
			if got := outcome(t, w.pusher(caller{bearer: "web"}, labels("job", yes))); got != "in" {
				t.Errorf("%s: %s", yes, got)
			}
			if got := outcome(t, w.pusher(caller{bearer: "web"}, labels("job", no))); got != "403 wrong_group" {
				t.Errorf("%s: %s", no, got)
			}
		}
		takes("node", "app")
		write(t, w.path, file(`{job="app"}`))
		after(within)
		takes("app", "node")
		write(t, w.path, file(`{job=~"("}`))
		after(within)
		takes("app", "node")
		w.wantMetric(t, "promferry_gateway_auth_last_reload_successful 0")
		write(t, w.path, "readers: anyone")
		if err := w.Reload(); err != nil {
			t.Fatal(err)
		}
		if got := outcome(t, w.pusher(caller{bearer: "web"}, labels("job", "app"))); got != "403 closed" {
			t.Errorf("with the pushers taken away: %s", got)
		}
		w.wantMetric(t, `promferry_gateway_auth_open{face="reader"} 1`)
		if log := w.log.String(); !strings.Contains(log, "pushers=0 readers=-1") || strings.Contains(log, sum("web")[:8]) {
			t.Errorf("log:\n%s", log)
		}
	})
}

// Whatever is wrong is told, with its place, and without what stands there.
func TestGatewayFileFaults(t *testing.T) {
	const entry = "\n  - identity: web\n    "
	token := "token_sha256: [" + sum("canary") + "]"
	const matchers = `want matchers in quotes, as '{job="node",instance=~"web-.*"}', or '{}' for every group`
	for _, tc := range []struct {
		what, content string
		faults        []string
	}{
		{"empty", "", []string{"lets nobody do anything: want pushers or readers"}},
		{"all sections empty", "pushers: []\nreaders:\n", []string{"lets nobody do anything: want pushers or readers"}},
		{"no mapping", "canary", []string{"line 1: want pushers and readers"}},
		{"a proxy's file", "clients: anyone\nlisters: anyone", []string{
			"line 1: unknown field: want pushers and readers", "line 2: unknown field: want pushers and readers",
		}},
		{"other word", "pushers: canary", []string{"pushers: want a list of entries, or the word anyone"}},
		{"no list", "readers: {canary: canary}", []string{"line 1: want a list of entries, or the word anyone"}},
		{"no entry", "pushers:\n  -\n", []string{"pushers[0]: want an entry, there is nothing"}},
		{"unknown field", "pushers:" + entry + "token: canary", []string{"pushers[0] (web): line 3: unknown field: an entry has identity, groups, san, username and token_sha256"}},
		{"text for a list", "pushers:" + entry + `groups: '{job="canary"}'`, []string{"pushers[0] (web): line 3: want a list of texts"}},
		{"nothing that lets in", "pushers:" + entry + `groups: ['{job="canary"}']`, []string{"pushers[0] (web): want token_sha256, san or both"}},
		{"no identity", "pushers:\n  - san: [canary]", []string{"pushers[0]: identity: is missing"}},
		{"identity twice", "readers: [{identity: a, san: [a]}, {identity: a, san: [b]}]", []string{"readers[1] (a): identity: another entry of readers has it"}},
		{"token without groups", "pushers:" + entry + token, []string{"pushers[0] (web): groups: a token needs them, as it has no name of its own; '{}' is every group"}},
		{"token without groups, with a certificate", "pushers:" + entry + "groups: []\n    san: [a]\n    " + token, []string{"pushers[0] (web): groups: a token needs them, as it has no name of its own; '{}' is every group"}},
		{
			"no matchers", "pushers:" + entry + token + "\n    groups: [canary, '', ~, '{job=canary\"}', '{job=~\"(canary\"}', '{job=\"canary\"', '{canary-1=\"a\"}']",
			[]string{
				"pushers[0] (web): groups[0]: " + matchers,
				"pushers[0] (web): groups[1]: " + matchers,
				"pushers[0] (web): groups[2]: " + matchers,
				"pushers[0] (web): groups[3]: " + matchers,
				"pushers[0] (web): groups[4]: " + matchers,
				"pushers[0] (web): groups[5]: " + matchers,
				"pushers[0] (web): groups[6]: " + matchers,
			},
		},
		{
			"every group, not meant", "pushers:" + entry + token + "\n    groups: ['{', '}', ' ', '{ }', {}, [], '{}']",
			[]string{
				"pushers[0] (web): groups[0]: " + matchers,
				"pushers[0] (web): groups[1]: " + matchers,
				"pushers[0] (web): groups[2]: " + matchers,
				"pushers[0] (web): groups[3]: " + matchers,
				"pushers[0] (web): groups[4]: " + matchers,
				"pushers[0] (web): groups[5]: " + matchers,
			},
		},
		{"matchers without quotes", "pushers:" + entry + token + "\n    groups: [{job=\"canary\"}]", []string{"pushers[0] (web): groups[0]: " + matchers}},
		{"names of a pusher", "pushers:" + entry + "san: [a]\n    names: [canary]", []string{"pushers[0] (web): names: only for clients"}},
		{"groups of a reader", "readers:" + entry + "san: [a]\n    groups: ['{}']", []string{"readers[0] (web): groups: only for pushers"}},
		{"username of a pusher", "pushers:" + entry + "san: [a]\n    username: canary", []string{"pushers[0] (web): username: not for pushers"}},
		{"username without token", "readers:" + entry + "san: [a]\n    username: canary", []string{"readers[0] (web): username: goes with token_sha256, which is missing"}},
		{"no digest", "readers:" + entry + "token_sha256: [canary]", []string{"readers[0] (web): token_sha256[0]: want the SHA-256 of a token, 64 hexadecimal digits"}},
		{"token of two", "readers: [{identity: a, " + token + "}, {identity: b, " + token + "}]", []string{`readers[1] (b): token_sha256[0]: stands there before, for identity "a"`}},
		{
			"token of a pusher for a reader", "readers: [{identity: a, " + token + "}]\npushers: [{identity: web, groups: ['{}'], " + token + "}]",
			[]string{`readers[0] (a): token_sha256[0]: is that of the pushers' identity "web": a pusher must not read`},
		},
	} {
		path := filepath.Join(t.TempDir(), "auth.yml")
		write(t, path, tc.content)
		_, err := access.NewGateway(path, slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
		if err == nil {
			t.Errorf("%s: taken", tc.what)
			continue
		}
		_, text, _ := strings.Cut(err.Error(), "auth.yml: ")
		if want := strings.Join(tc.faults, "\n"); text != want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.what, text, want)
		}
		if strings.Contains(text, "canary") || strings.Contains(text, sum("canary")[:8]) {
			t.Errorf("%s: the error shows what stands there: %v", tc.what, err)
		}
	}
}

// Whatever is shown, and whatever the group: in gets who shows the right token, to the groups
// for which it is; and the two ways to ask say the same.
func FuzzPusher(f *testing.F) {
	for _, header := range []string{"Bearer web-new", "Bearer db-token", "Bearer all-token", "Bearer read-token", basic("x:web-old"), "Bearer x", ""} {
		f.Add(header, "node", "web-1", "")
		f.Add(header, "node", "db-1", "a")
		f.Add(header, "backup", "", "")
		f.Add(header, "restore2", "web-1\n", "web-1")
	}
	guard := newGatewayGuard(f, gatewayExample)
	f.Fuzz(func(t *testing.T, header, job, instance, shard string) {
		group := make(map[string]string)
		for name, value := range map[string]string{"job": job, "instance": instance, "shard": shard} {
			if value != "" {
				group[name] = value
			}
		}
		r := httptest.NewRequest(http.MethodPut, "/", nil)
		r.Header["Authorization"] = []string{header}
		token := ""
		if scheme, rest, _ := strings.Cut(header, " "); strings.EqualFold(scheme, "bearer") {
			token = strings.Trim(rest, " ")
		} else if _, password, ok := r.BasicAuth(); ok {
			token = password
		} else {
			return // FuzzHeader has those.
		}
		right := false
		switch token {
		case "web-old", "web-new":
			rest, ok := strings.CutPrefix(instance, "web-")
			right = job == "backup" || job == "restore" || job == "node" && ok && !strings.Contains(rest, "\n")
		case "db-token":
			right = job == "node" && instance == "db-1" && shard == ""
		case "all-token":
			right = true
		}
		err := guard.Pusher(r, group)
		if (err == nil) != right && len(header) <= 8<<10 {
			t.Errorf("%q to %q: %v", header, group, err)
		}
		may, someErr := guard.PusherToSome(r)
		if someErr == nil && may(group) != (err == nil) || someErr != nil && err == nil {
			t.Errorf("%q to %q: %v, but of some groups otherwise", header, group, err)
		}
		if guard.PusherToAll(r) == nil && err != nil {
			t.Errorf("%q may push to every group, but not to %q", header, group)
		}
	})
}

// Whatever stands in the file, a face is open only when the file says so, and nobody
// without a credential gets through one that is not.
func FuzzGatewayFile(f *testing.F) {
	f.Add([]byte(gatewayExample))
	f.Add([]byte("pushers: anyone\nreaders: &a [{identity: a, san: ['*', '[a-'], <<: {username: x}}]"))
	f.Add([]byte("pushers: [~, {}, [], 1, anyone, {token_sha256: [~, [], 0x1], groups: [{}, '{', ~]}]"))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(t.TempDir(), "auth.yml")
		write(t, path, string(content))
		g, err := access.NewGateway(path, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			return
		}
		r := caller{}.request("Authorization")
		for face, err := range map[access.Face]error{access.FacePusher: g.Pusher(r, nil), access.FaceReader: g.Reader(r)} {
			if g.Open(face) && !strings.Contains(string(content), "anyone") && !strings.Contains(string(content), "!!binary") && !strings.Contains(string(content), `\`) {
				t.Errorf("%s is open", face)
			}
			if err == nil && !g.Open(face) {
				t.Errorf("%s without credential got in", face)
			}
		}
	})
}

// What the documentation shows is taken, and what it says of it is so.
func TestGatewayFileOfDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/authentication.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```yaml\npushers:")
	content, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("no example")
	}
	g := newGatewayGuard(t, "pushers:"+content)
	const node = "a.nodes.example.org"
	c := caller{certificate: certificate("", node)}
	if got := outcome(t, g.pusher(c, labels("job", "node", "instance", node))); got != "in" {
		t.Errorf("node: %s", got)
	}
	if got := outcome(t, g.pusher(c, labels("job", "node", "instance", "b.nodes.example.org"))); got != "403 wrong_group" {
		t.Errorf("another node: %s", got)
	}
	if got := outcome(t, g.PusherToAll(caller{certificate: certificate("", "joe@ops.example.org")}.request("Authorization"))); got != "in" {
		t.Errorf("operator: %s", got)
	}
	if got := outcome(t, g.reader(caller{bearer: "test"})); got != "401 unknown_token" {
		t.Errorf("a token that everybody would try: %s", got)
	}
}

// The file may change while a request is answered, which goes on by what was true when it came.
func TestPusherToSomeIsOfItsTime(t *testing.T) {
	g := newGatewayGuard(t, gatewayExample)
	may, err := g.PusherToSome(caller{bearer: "db-token"}.request("Authorization"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, g.path, "readers: anyone")
	if err := g.Reload(); err != nil {
		t.Fatal(err)
	}
	if !may(labels("job", "node", "instance", "db-1")) || may(labels("job", "node", "instance", "web-1")) {
		t.Error("not as when it was asked")
	}
}
