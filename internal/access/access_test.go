package access_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/access"
)

// A credential is good for the names of its entry, and no other.
func TestS2NameBinding(t *testing.T) {
	for _, tc := range []struct {
		what string
		caller
		name, outcome string
	}{
		{"token", caller{bearer: "web-old"}, "web-1.example.org", "identity web"},
		{"second token", caller{bearer: "web-new"}, "web-1.example.org", "identity web"},
		{"second glob", caller{bearer: "web-new"}, "gate.example.org", "identity web"},
		{"Basic, as PushProx", caller{username: "whoever", password: "web-new"}, "web-2.example.org", "identity web"},
		{"Basic, no username", caller{password: "web-new"}, "web-2.example.org", "identity web"},
		{"another's name", caller{bearer: "web-new"}, "db-1.example.org", "403 wrong_name"},
		{"nobody's name", caller{bearer: "web-new"}, "mail.example.org", "403 wrong_name"},
		{"name with more behind it", caller{bearer: "web-new"}, "web-1.example.org.evil.net", "403 wrong_name"},
		{"name with more before it", caller{bearer: "db-token"}, "x.db-1.example.org", "403 wrong_name"},
		{"other case", caller{bearer: "db-token"}, "DB-1.example.org", "403 wrong_name"},
		{"no name", caller{bearer: "db-token"}, "", "403 wrong_name"},
		{"unknown token", caller{bearer: "web"}, "web-1.example.org", "401 unknown_token"},
		{"digest for a token", caller{bearer: sum("web-new")}, "web-1.example.org", "401 unknown_token"},
		{"username for a token", caller{username: "web-new", password: "x"}, "web-1.example.org", "401 unknown_token"},
		{"nothing", caller{}, "web-1.example.org", "401 missing"},

		{"DNS name", caller{certificate: certificate("", "a.nodes.example.org")}, "a.nodes.example.org", "identity nodes"},
		{"one of two", caller{certificate: certificate("", "x.net", "a.nodes.example.org")}, "a.nodes.example.org", "identity nodes"},
		{"its other name, which the glob does not take", caller{certificate: certificate("", "x.net", "a.nodes.example.org")}, "x.net", "403 wrong_name"},
		{"another node", caller{certificate: certificate("", "a.nodes.example.org")}, "b.nodes.example.org", "403 wrong_name"},
		{"no name with a certificate", caller{certificate: certificate("", "a.nodes.example.org")}, "", "403 wrong_name"},
		{"wildcard certificate", caller{certificate: certificate("", "*.nodes.example.org")}, "a.nodes.example.org", "403 wrong_name"},
		{"IP address", caller{certificate: certificate("", "10.1.2.3")}, "10.1.2.3", "identity nodes"},
		{"URI", caller{certificate: certificate("", "spiffe://example.org/node/a", "a")}, "a", "403 wrong_name"},
		{"common name", caller{certificate: certificate("a.nodes.example.org")}, "a.nodes.example.org", "identity nodes"},
		{"common name beside a SAN", caller{certificate: certificate("a.nodes.example.org", "x.net")}, "a.nodes.example.org", "401 unknown_certificate"},
		{"names of the entry", caller{certificate: certificate("", "gw.example.org")}, "a.branch.example.org", "identity gateways"},
		{"own name, but names of the entry", caller{certificate: certificate("", "gw.example.org")}, "gw.example.org", "403 wrong_name"},
		{"nobody's certificate", caller{certificate: certificate("", "x.net")}, "x.net", "401 unknown_certificate"},
		{"certificate without names", caller{certificate: certificate("")}, "x.net", "401 unknown_certificate"},

		{"certificate, beside a token for something else", caller{bearer: "x", certificate: certificate("", "a.nodes.example.org")}, "a.nodes.example.org", "identity nodes"},
		{"token, beside another's certificate", caller{bearer: "db-token", certificate: certificate("", "a.nodes.example.org")}, "db-1.example.org", "identity db"},
		{"neither", caller{bearer: "x", certificate: certificate("", "x.net")}, "x.net", "401 unknown_token"},
		{"right token, other name, nobody's certificate", caller{bearer: "db-token", certificate: certificate("", "x.net")}, "x.net", "403 wrong_name"},
	} {
		g := newGuard(t, example)
		grant, err := g.client(tc.caller, tc.name)
		want(t, tc.what, tc.outcome, grant, err)
		if err == nil && !g.Valid(grant, tc.name) {
			t.Errorf("%s: the grant is not valid", tc.what)
		}
		if err == nil && g.Valid(grant, "other.example.net") {
			t.Errorf("%s: the grant is valid for another name", tc.what)
		}
	}
}

// No credential is for a client without a name, whatever the globs take.
func TestS2NameBindingEmpty(t *testing.T) {
	g := newGuard(t, "clients: [{identity: all, names: ['*'], san: ['*'], token_sha256: ["+sum("token")+"]}]")
	grant, err := g.client(caller{bearer: "token"}, "")
	want(t, "token", "403 wrong_name", grant, err)
	grant, err = g.client(caller{certificate: certificate("", "a")}, "")
	want(t, "certificate", "403 wrong_name", grant, err)
	grant, err = g.client(caller{bearer: "token"}, "a")
	want(t, "with a name", "identity all", grant, err)
}

// Of two entries that take a certificate, the one counts that takes the name.
func TestS2NameBindingOverlap(t *testing.T) {
	g := newGuard(t, `
clients:
  - {identity: narrow, san: ["*.example.org"], names: [one]}
  - {identity: wide, san: ["*.example.org"]}
`)
	c := caller{certificate: certificate("", "a.example.org")}
	for name, outcome := range map[string]string{
		"one": "identity narrow", "a.example.org": "identity wide", "b.example.org": "403 wrong_name",
	} {
		grant, err := g.client(c, name)
		want(t, name, outcome, grant, err)
	}
}

// A client cannot scrape, and so on.
func TestS6FacesAreSeparate(t *testing.T) {
	node := certificate("", "a.nodes.example.org")
	prometheus := certificate("", "prometheus.example.org")
	for _, tc := range []struct {
		what string
		caller
		client, scraper, lister string
	}{
		{"client's token", caller{bearer: "web-new"}, "403 wrong_name", "407 unknown_token", "401 unknown_token"},
		{"client's certificate", caller{certificate: node}, "identity nodes", "407 unknown_certificate", "401 unknown_certificate"},
		{"scraper's token", caller{bearer: "scrape-token"}, "401 unknown_token", "identity prometheus", "401 unknown_token"},
		{"scraper's certificate", caller{certificate: prometheus}, "401 unknown_certificate", "identity prometheus", "401 unknown_certificate"},
		{"lister's token", caller{bearer: "list-token"}, "401 unknown_token", "407 unknown_token", "identity sd"},
		{"nothing", caller{}, "401 missing", "407 missing", "401 missing"},
	} {
		g := newGuard(t, example)
		grant, err := g.client(tc.caller, "a.nodes.example.org")
		want(t, tc.what+" as client", tc.client, grant, err)
		grant, err = g.scraper(tc.caller)
		want(t, tc.what+" as scraper", tc.scraper, grant, err)
		grant, err = g.lister(tc.caller)
		want(t, tc.what+" as lister", tc.lister, grant, err)
	}
	// Who scrapes shows it in Proxy-Authorization alone: Authorization is for the target.
	g := newGuard(t, example)
	grant, err := g.Scraper(caller{bearer: "scrape-token"}.request("Authorization"))
	want(t, "the target's header", "407 missing", grant, err)
	grant, err = g.Lister(caller{bearer: "list-token"}.request("Proxy-Authorization"))
	want(t, "the scraper's header", "401 missing", grant, err)
}

func TestUsername(t *testing.T) {
	for _, tc := range []struct {
		what string
		caller
		outcome string
	}{
		{"right", caller{username: "prom", password: "scrape-token"}, "identity prometheus"},
		{"Bearer, which has none", caller{bearer: "scrape-token"}, "identity prometheus"},
		{"wrong", caller{username: "admin", password: "scrape-token"}, "407 wrong_username"},
		{"empty", caller{password: "scrape-token"}, "407 wrong_username"},
		{"right, wrong token", caller{username: "prom", password: "x"}, "407 unknown_token"},
	} {
		g := newGuard(t, example)
		grant, err := g.scraper(tc.caller)
		want(t, tc.what, tc.outcome, grant, err)
	}
}

// What the file does not name is closed, and what nobody's file says is open.
func TestS7DefaultDeny(t *testing.T) {
	everything := caller{bearer: "web-new", certificate: certificate("", "a.nodes.example.org")}
	for _, tc := range []struct {
		what, content           string
		client, scraper, lister string
	}{
		{"one section", "clients: anyone", "identity ", "403 closed", "403 closed"},
		{"empty sections", "clients: anyone\nscrapers: []\nlisters:\n", "identity ", "403 closed", "403 closed"},
		{"other section", "scrapers: anyone", "403 closed", "identity ", "403 closed"},
		{"third section", "listers: 'anyone'", "403 closed", "403 closed", "identity "},
	} {
		g := newGuard(t, tc.content)
		grant, err := g.client(everything, "a.nodes.example.org")
		want(t, tc.what+", client", tc.client, grant, err)
		grant, err = g.scraper(everything)
		want(t, tc.what+", scraper", tc.scraper, grant, err)
		grant, err = g.lister(everything)
		want(t, tc.what+", lister", tc.lister, grant, err)
		for face, outcome := range map[access.Face]string{
			access.FaceClient: tc.client, access.FaceScraper: tc.scraper, access.FaceLister: tc.lister,
		} {
			open := outcome == "identity "
			if g.Open(face) != open {
				t.Errorf("%s: Open(%s) is %v", tc.what, face, !open)
			}
			value := "0"
			if open {
				value = "1"
			}
			g.wantMetric(t, `promferry_proxy_auth_open{face="`+string(face)+`"} `+value)
		}
	}

	open, err := access.NewProxy("", slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	if err != nil {
		t.Fatal(err)
	}
	for _, face := range open.Faces() {
		if !open.Open(face) {
			t.Errorf("without a file, %s is closed", face)
		}
	}
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	grant, err := open.Client(r, "web-1")
	want(t, "client without a file", "identity ", grant, err)
	if !open.Valid(grant, "web-1") {
		t.Error("the grant of an open face is not valid")
	}
	if err := open.Reload(); err != nil {
		t.Error(err)
	}
	if open.Open("") || open.Valid(access.Grant{}, "web-1") {
		t.Error("there is a face without a name")
	}
}

// Only failures are limited, each address for itself.
func TestS21FailuresAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuard(t, example)
		fail := func(address string) int {
			_, err := g.client(caller{bearer: "x", address: address}, "web-1.example.org")
			return err.(*access.Error).Status //nolint:errorlint // Nothing wraps it.
		}
		for i := range 10 {
			if status := fail("192.0.2.1:" + strconv.Itoa(1000+i)); status != http.StatusUnauthorized {
				t.Fatalf("failure %d: %d", i, status)
			}
		}
		if status := fail("192.0.2.1:99"); status != http.StatusTooManyRequests {
			t.Errorf("11th failure: %d", status)
		}
		if status := fail("[::ffff:192.0.2.1]:99"); status != http.StatusTooManyRequests {
			t.Errorf("the same address as IPv6: %d", status)
		}
		if status := fail("192.0.2.2:99"); status != http.StatusUnauthorized {
			t.Errorf("another address: %d", status)
		}
		for range 100 {
			grant, err := g.client(caller{bearer: "web-new", address: "192.0.2.1:99"}, "web-1.example.org")
			want(t, "right token from there", "identity web", grant, err)
		}
		<-time.After(time.Second)
		if status := fail("192.0.2.1:99"); status != http.StatusUnauthorized {
			t.Errorf("a second later: %d", status)
		}
		if status := fail("192.0.2.1:99"); status != http.StatusTooManyRequests {
			t.Errorf("and again: %d", status)
		}
		// One host has a network of IPv6 to itself.
		for i := range 11 {
			status, want := fail("[2001:db8::"+strconv.Itoa(i+1)+"]:99"), http.StatusUnauthorized
			if i == 10 {
				want = http.StatusTooManyRequests
			}
			if status != want {
				t.Errorf("IPv6 failure %d: %d", i, status)
			}
		}
		if status := fail("[2001:db8:0:1::1]:99"); status != http.StatusUnauthorized {
			t.Errorf("another network: %d", status)
		}
		// The reason is counted as it is.
		g.wantMetric(t, `promferry_proxy_auth_failures_total{face="client",reason="unknown_token"} 27`)
	})
}

// However many addresses there are, what is kept of them is bounded, and nobody with the
// right token is harmed.
func TestS22AddressesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuard(t, example)
		addr := netip.MustParseAddr("10.0.0.1")
		statuses := make(map[int]int)
		for range 5000 {
			_, err := g.scraper(caller{bearer: "x", address: netip.AddrPortFrom(addr, 99).String()})
			statuses[err.(*access.Error).Status]++ //nolint:errorlint // Nothing wraps it.
			addr = addr.Next()
		}
		// 4,096 with a limit of their own, and 10 times the one of the rest.
		if statuses[http.StatusProxyAuthRequired] != 4106 || statuses[http.StatusTooManyRequests] != 894 {
			t.Errorf("statuses %v", statuses)
		}
		grant, err := g.scraper(caller{bearer: "scrape-token", address: netip.AddrPortFrom(addr, 99).String()})
		want(t, "right token from a new address", "identity prometheus", grant, err)
		// Once they have kept still, there is room.
		<-time.After(10 * time.Second)
		for range 4000 {
			_, err := g.scraper(caller{bearer: "x", address: netip.AddrPortFrom(addr, 99).String()})
			if status := err.(*access.Error).Status; status != http.StatusProxyAuthRequired { //nolint:errorlint // Nothing wraps it.
				t.Fatalf("%s: %d", addr, status)
			}
			addr = addr.Next()
		}
	})
}

// Every series is there from the start, and there are no others after all kinds of failure.
func TestS22MetricsAreBounded(t *testing.T) {
	g := newGuard(t, example)
	series := func() int { return strings.Count(g.metrics(t), "promferry_proxy_auth_failures_total{") }
	before := series()
	if before != 3*8 {
		t.Errorf("%d series at the start", before)
	}
	expired := certificate("", "a.nodes.example.org")
	expired.NotAfter = time.Now().Add(-time.Second)
	for _, c := range []caller{
		{},
		{bearer: "canary"},
		{raw: []string{"canary"}},
		{username: "canary", password: "scrape-token"},
		{certificate: certificate("canary")},
		{certificate: expired},
		{bearer: "web-new"},
	} {
		_, _ = g.client(c, "canary")
		_, _ = g.scraper(c)
		_, _ = g.lister(c)
	}
	if after := series(); after != before {
		t.Errorf("%d series, %d before", after, before)
	}
	for _, series := range []string{
		`face="client",reason="missing"`, `face="client",reason="malformed"`, `face="client",reason="wrong_name"`,
		`face="scraper",reason="wrong_username"`, `face="lister",reason="unknown_certificate"`, `face="client",reason="expired_certificate"`,
	} {
		g.wantMetric(t, "promferry_proxy_auth_failures_total{"+series+"} 1")
	}
	g.wantMetric(t, `promferry_proxy_auth_failures_total{face="lister",reason="closed"} 0`)
}

// Nothing of a credential is in an error, a log line, a metric or an answer.
func TestS26NoSecrets(t *testing.T) {
	g := newGuard(t, example)
	var said strings.Builder
	note := func(err error) {
		t.Helper()
		if err == nil {
			t.Fatal("let in")
		}
		e := err.(*access.Error) //nolint:errorlint // Nothing wraps it.
		header := make(http.Header)
		e.SetHeader(header)
		said.WriteString(e.Error() + e.Text())
		_ = header.Write(&said)
		slog.New(slog.NewJSONHandler(&said, nil)).Warn("Refused", "err", e, "all", *e)
	}
	for _, c := range []caller{
		{bearer: "canary"},
		{username: "canary", password: "canary"},
		{raw: []string{"canary"}},
		{raw: []string{"Basic canary"}},
		{raw: []string{"Bearer canary", "Bearer canary"}},
		{bearer: "canary", certificate: certificate("", "canary.example.org")},
	} {
		_, err := g.client(c, "web-1.example.org")
		note(err)
		_, err = g.scraper(c)
		note(err)
		_, err = g.lister(c)
		note(err)
	}
	_, err := g.scraper(caller{username: "canary", password: "scrape-token"})
	note(err)
	_, err = g.client(caller{bearer: "db-token"}, "web-1.example.org")
	note(err)
	all := said.String() + g.log.String() + g.metrics(t)
	for _, secret := range []string{"canary", "scrape-token", "db-token", sum("scrape-token")[:8], sum("db-token")[:8], sum("canary")[:8]} {
		if strings.Contains(strings.ToLower(all), secret) {
			t.Errorf("%q is in\n%s", secret, all)
		}
	}
}

// The operator's log tells what was wrong; the answer does not tell which names there are.
func TestErrorTexts(t *testing.T) {
	g := newGuard(t, example)
	_, unknown := g.client(caller{bearer: "x"}, "web-1.example.org")
	_, certified := g.client(caller{certificate: certificate("x.net")}, "web-1.example.org")
	_, theirs := g.client(caller{bearer: "db-token"}, "web-1.example.org")
	_, nobodys := g.client(caller{bearer: "db-token"}, "nobody.example.org")
	_, username := g.scraper(caller{username: "x", password: "scrape-token"})
	for err, want := range map[error]string{
		unknown:   `admit client "web-1.example.org": unknown token`,
		certified: `admit client "web-1.example.org": unknown certificate`,
		theirs:    `admit client "web-1.example.org": the credential is for other names, it is of identity "db"`,
		nobodys:   `admit client "nobody.example.org": the credential is for other names, it is of identity "db"`,
		username:  `admit scraper: the token goes with another username, it is of identity "prometheus"`,
	} {
		if err.Error() != want {
			t.Errorf("got %s, want %s", err, want)
		}
	}
	text := func(err error) string { return err.(*access.Error).Text() } //nolint:errorlint // Nothing wraps it.
	if text(theirs) != text(nobodys) || strings.Contains(text(theirs), "db") {
		t.Errorf("the answers tell names: %q, %q", text(theirs), text(nobodys))
	}
	if text(unknown) != text(certified) || text(unknown) != text(username) {
		t.Errorf("the answers differ: %q, %q, %q", text(unknown), text(certified), text(username))
	}
}

func TestErrorHeaders(t *testing.T) {
	for status, want := range map[int]string{
		http.StatusUnauthorized:      "Www-Authenticate: Basic realm=\"promferry\"\r\n",
		http.StatusProxyAuthRequired: "Proxy-Authenticate: Basic realm=\"promferry\"\r\n",
		http.StatusForbidden:         "",
		http.StatusTooManyRequests:   "Retry-After: 1\r\n",
	} {
		var b strings.Builder
		h := make(http.Header)
		(&access.Error{Status: status}).SetHeader(h)
		_ = h.Write(&b)
		if b.String() != want {
			t.Errorf("%d: %q, want %q", status, b.String(), want)
		}
	}
}
