package access_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/access"
)

func load(t testing.TB, content string) (*access.Guard, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "auth.yml")
	write(t, path, content)
	return access.NewProxy(path, slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
}

func TestFilePasses(t *testing.T) {
	for what, content := range map[string]string{
		"flow style":                    `{"clients": "anyone", "listers": []}`,
		"with a start of the document":  "---\nclients: anyone\n",
		"an anchor":                     "scrapers: &who [{identity: prometheus, token_sha256: [" + sum("a") + "]}]\nlisters: *who\n",
		"capital digits":                "scrapers: [{identity: prometheus, token_sha256: [" + strings.ToUpper(sum("a")) + "]}]\n",
		"same identity for two faces":   "scrapers: [{identity: a, san: [a]}]\nlisters: [{identity: a, san: [a]}]\n",
		"the prober's token twice":      "scrapers: [{identity: a, token_sha256: [" + sum("a") + "]}]\nlisters: [{identity: b, token_sha256: [" + sum("a") + "]}]\n",
		"token and certificate, names":  "clients: [{identity: a, san: [a], token_sha256: [" + sum("a") + "], names: ['*']}]\n",
		"an identity that is a number":  "listers: [{identity: 7, san: [a]}]\n",
		"a digest of decimal digits":    "listers: [{identity: a, token_sha256: [" + strings.Repeat("12345678", 8) + "]}]\n",
		"a digest that looks octal":     "listers: [{identity: a, token_sha256: [" + strings.Repeat("01234567", 8) + "]}]\n",
		"a digest that looks like 1e10": "listers: [{identity: a, token_sha256: [1e" + strings.Repeat("12", 31) + "]}]\n",
	} {
		if _, err := load(t, content); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Whatever is wrong is told, with its place, and without what stands there.
func TestFileFaults(t *testing.T) {
	const entry = "\n  - identity: web\n    "
	for _, tc := range []struct {
		what, content string
		faults        []string
	}{
		{"empty", "", []string{"lets nobody do anything: want clients, scrapers or listers"}},
		{"all sections empty", "clients: []\nscrapers:\n", []string{"lets nobody do anything: want clients, scrapers or listers"}},
		{"no mapping", "canary", []string{"line 1: want clients, scrapers and listers"}},
		{"no YAML", "clients:\n  - @canary", []string{"not YAML: line 2: found character that cannot start any token"}},
		{"unclosed", "clients: [canary", []string{"not YAML: line 1: did not find expected ',' or ']'"}},
		{"unknown anchor", "clients: *canary", []string{"not YAML"}},
		{"unknown section", "canary: []\nclients: anyone", []string{"line 1: unknown field: want clients, scrapers and listers"}},
		{"section twice", "clients: anyone\nclients: []", []string{"line 2: a field stands there twice"}},
		{"two documents", "clients: anyone\n---\nclients: []", []string{"want one YAML document, there is more"}},
		{"other word", "clients: canary", []string{"clients: want a list of entries, or the word anyone"}},
		{"word in capitals", "clients: Anyone", []string{"clients: want a list of entries, or the word anyone"}},
		{"true", "clients: true", []string{"clients: want a list of entries, or the word anyone"}},
		{"no list", "clients: {canary: canary}", []string{"line 1: want a list of entries, or the word anyone"}},
		{"word for an entry", "clients: [anyone]", []string{"clients[0]: identity: is missing", "clients[0]: line 1: want an entry, which has fields"}},
		{"no entry", "clients:\n  -\n", []string{"clients[0]: want an entry, there is nothing"}},
		{"unknown field", "clients:" + entry + "token: canary", []string{"clients[0] (web): line 3: unknown field: an entry has identity, names, san, username and token_sha256"}},
		{"text for a list", "clients:" + entry + "token_sha256: canary", []string{"clients[0] (web): line 3: want a list of texts"}},
		{"list for a text", "scrapers:" + entry + "username: [canary]", []string{"scrapers[0] (web): line 3: want one text"}},
		{"field twice", "clients:" + entry + "san: [a]\n    san: [b]", []string{"clients[0] (web): line 4: a field stands there twice"}},
		{"nothing that lets in", "clients:" + entry + "names: [canary]", []string{"clients[0] (web): want token_sha256, san or both"}},
		{"no identity", "clients:\n  - san: [canary]", []string{"clients[0]: identity: is missing"}},
		{"identity of two lines", "clients: [{identity: \"a\\nb\", san: [canary]}]", []string{"clients[0]: identity: has characters that cannot be printed"}},
		{"long identity", "clients: [{identity: " + strings.Repeat("a", 129) + ", san: [canary]}]", []string{"clients[0]: identity: more than 128 bytes"}},
		{
			"identity twice", "clients: [{identity: web, san: [a]}, {identity: web, san: [b]}]",
			[]string{"clients[1] (web): identity: another entry of clients has it"},
		},
		{
			"token without names", "clients:" + entry + "token_sha256: [" + sum("canary") + "]",
			[]string{"clients[0] (web): names: a token needs them, as it has no name of its own"},
		},
		{
			"token without names, with a certificate", "clients:" + entry + "san: [a]\n    token_sha256: [" + sum("canary") + "]",
			[]string{"clients[0] (web): names: a token needs them, as it has no name of its own"},
		},
		{
			"no digests", "scrapers:" + entry + "token_sha256: [canary, '', " + sum("canary")[:62] + ", " + sum("canary") + "00, ~, [canary], {canary: canary}]",
			[]string{
				"scrapers[0] (web): token_sha256[0]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[1]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[2]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[3]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[4]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[5]: want the SHA-256 of a token, 64 hexadecimal digits",
				"scrapers[0] (web): token_sha256[6]: want the SHA-256 of a token, 64 hexadecimal digits",
			},
		},
		{
			// What `echo -n "" | sha256sum` and `echo | sha256sum` print.
			"empty tokens", "scrapers:" + entry + "token_sha256: [e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855, 01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b]",
			[]string{"scrapers[0] (web): token_sha256[0]: is the SHA-256 of an empty token", "scrapers[0] (web): token_sha256[1]: is the SHA-256 of an empty token"},
		},
		{"no globs", "clients:" + entry + "names: ['[canary', '']\n    san: ['canary\\']", []string{
			"clients[0] (web): names[0]: want a text, with *, ? and [...] for unknown characters",
			"clients[0] (web): names[1]: want a text, with *, ? and [...] for unknown characters",
			"clients[0] (web): san[0]: want a text, with *, ? and [...] for unknown characters",
		}},
		{"username of a client", "clients:" + entry + "san: [a]\n    username: canary", []string{"clients[0] (web): username: not for clients"}},
		{"username without token", "scrapers:" + entry + "san: [a]\n    username: canary", []string{"scrapers[0] (web): username: goes with token_sha256, which is missing"}},
		{
			"username with password", "scrapers:" + entry + "username: 'a:canary'\n    token_sha256: [" + sum("a") + "]",
			[]string{"scrapers[0] (web): username: has a colon or a control character, which Basic cannot carry"},
		},
		{"groups of a client", "clients:" + entry + "san: [a]\n    groups: ['{job=\"canary\"}']", []string{"clients[0] (web): groups: only for pushers"}},
		{"names of a scraper", "scrapers:" + entry + "san: [a]\n    names: [canary]", []string{"scrapers[0] (web): names: only for clients"}},
		{
			"token of two", "listers: [{identity: a, token_sha256: [" + sum("canary") + "]}, {identity: b, token_sha256: [" + sum("canary") + "]}]",
			[]string{`listers[1] (b): token_sha256[0]: stands there before, for identity "a"`},
		},
		{
			"token of a client for a scraper and a lister", "scrapers: [{identity: a, token_sha256: [" + sum("canary") + "]}]\nlisters: [{identity: a, token_sha256: [" + sum("canary") + "]}]\nclients: [{identity: web, names: [a], token_sha256: [" + sum("canary") + "]}]",
			[]string{
				`scrapers[0] (a): token_sha256[0]: is that of the clients' identity "web": a client must not scrape or list`,
				`listers[0] (a): token_sha256[0]: is that of the clients' identity "web": a client must not scrape or list`,
			},
		},
		{"several", "more: canary\nclients: [{identity: a%d, canary: 1, token_sha256: [canary]}]\nscrapers: canary", []string{
			"line 1: unknown field: want clients, scrapers and listers",
			"clients[0] (a%d): line 2: unknown field: an entry has identity, names, san, username and token_sha256",
			"clients[0] (a%d): token_sha256[0]: want the SHA-256 of a token, 64 hexadecimal digits",
			"scrapers: want a list of entries, or the word anyone",
		}},
	} {
		_, err := load(t, tc.content)
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

func TestFileMissing(t *testing.T) {
	_, err := access.NewProxy(filepath.Join(t.TempDir(), "auth.yml"), slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	if !errors.Is(err, os.ErrNotExist) || strings.Count(err.Error(), "auth.yml") != 1 {
		t.Errorf("got %v", err)
	}
}

// Whatever stands in the file, a face is open only when the file says so, and nobody
// without a credential gets through one that is not.
func FuzzFile(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("clients: anyone\nscrapers: &a [{identity: a, san: ['*', '[a-'], <<: {username: x}}]\nlisters: *a"))
	f.Add([]byte("clients: [~, {}, [], 1, anyone, {token_sha256: [~, [], 0x1]}]"))
	f.Add([]byte("a: &a [x]\nb: &b [*a, *a]\nclients: [*b, *b]"))
	f.Add([]byte("clients: !!binary YW55b25l\n---\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(t.TempDir(), "auth.yml")
		write(t, path, string(content))
		g, err := access.NewProxy(path, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			return
		}
		for _, face := range g.Faces() {
			if g.Open(face) && !bytes.Contains(content, []byte("anyone")) && !bytes.Contains(content, []byte("!!binary")) && !bytes.Contains(content, []byte(`\`)) {
				t.Errorf("%s is open", face)
			}
		}
		r := caller{}.request("Authorization")
		if _, err := g.Client(r, "web-1"); err == nil && !g.Open(access.FaceClient) {
			t.Error("a client without credential got in")
		}
		if _, err := g.Scraper(r); err == nil && !g.Open(access.FaceScraper) {
			t.Error("a scraper without credential got in")
		}
		if _, err := g.Lister(r); err == nil && !g.Open(access.FaceLister) {
			t.Error("a lister without credential got in")
		}
	})
}

// What the documentation shows is taken, and what it says of it is so.
func TestFileOfDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/authentication.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```yaml\nclients:")
	content, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("no example")
	}
	g := newGuard(t, "clients:"+content)
	const node = "a.nodes.example.org"
	grant, err := g.client(caller{certificate: certificate("", node)}, node)
	want(t, "node", "identity nodes", grant, err)
	grant, err = g.lister(caller{certificate: certificate("", "joe@ops.example.org")})
	want(t, "operator", "identity operators", grant, err)
	grant, err = g.scraper(caller{bearer: "test"})
	want(t, "a token that everybody would try", "407 unknown_token", grant, err)
}
