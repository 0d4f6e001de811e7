package access_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/internal/access"
)

// within is how long Run may take to see a change: two looks.
const within = 6 * time.Second

// listing is a file with one lister.
func listing(token string) string {
	return "listers: [{identity: sd, token_sha256: [" + sum(token) + "]}]\n"
}

// watched runs a guard of its own in a bubble, with a count of what OnChange told.
type watched struct {
	*guarded
	changes int
}

func watch(t *testing.T, g *guarded) *watched {
	t.Helper()
	w := &watched{guarded: g}
	g.OnChange(func() { w.changes++ })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return w
}

// after lets time pass, and what happens then happen.
func after(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// takes fails unless a lister with one token gets in, and one with the other does not.
func (g *guarded) takes(t *testing.T, yes, no string) {
	t.Helper()
	if _, err := g.lister(caller{bearer: yes}); err != nil {
		t.Errorf("token %s: %v", yes, err)
	}
	if _, err := g.lister(caller{bearer: no}); err == nil {
		t.Errorf("token %s is taken", no)
	}
}

// However another content comes to be behind the path, it is used.
func TestS27ContentChanges(t *testing.T) {
	for what, change := range map[string]func(t *testing.T, path, content string){
		"write in place": func(t *testing.T, path, content string) { write(t, path, content) },
		"same size and time": func(t *testing.T, path, content string) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			write(t, path, content)
			if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
				t.Fatal(err)
			}
		},
		"rename": func(t *testing.T, path, content string) {
			write(t, path+".new", content)
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		},
		"removed, and written anew": func(t *testing.T, path, content string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			write(t, path, content)
		},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := watch(t, newGuard(t, listing("one")))
				w.takes(t, "one", "two")
				change(t, w.path, listing("two"))
				after(within)
				w.takes(t, "two", "one")
				if w.changes != 1 {
					t.Errorf("told of %d changes", w.changes)
				}
				after(time.Hour)
				if w.changes != 1 {
					t.Errorf("told of %d changes, an hour later", w.changes)
				}
			})
		})
	}
}

// Kubernetes has the file behind two links, and replaces the one in the middle.
func TestS27LinkSwap(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "auth.yml")
	publish := func(version, content string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "auth.yml"), content)
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	publish("..1", listing("one"))
	if err := os.Symlink(filepath.Join("..data", "auth.yml"), path); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		g := &guarded{path: path, registry: prometheus.NewPedanticRegistry(), log: &buffer{}}
		var err error
		if g.Guard, err = access.NewProxy(path, slog.New(slog.NewTextHandler(g.log, nil)), g.registry); err != nil {
			t.Fatal(err)
		}
		w := watch(t, g)
		publish("..2", listing("two"))
		after(within)
		w.takes(t, "two", "one")
	})
}

// A file that is wrong, or gone, changes nothing, and is said to be so once.
func TestS27BadFileChangesNothing(t *testing.T) {
	for what, spoil := range map[string]func(path string) error{
		"wrong": func(path string) error { return os.WriteFile(path, []byte("listers: canary"), 0o600) },
		"empty": func(path string) error { return os.Truncate(path, 0) },
		"gone":  os.Remove,
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := watch(t, newGuard(t, listing("one")))
				w.wantMetric(t, "promferry_proxy_auth_last_reload_successful 1")
				if err := spoil(w.path); err != nil {
					t.Fatal(err)
				}
				after(within)
				w.takes(t, "one", "two")
				w.wantMetric(t, "promferry_proxy_auth_last_reload_successful 0")
				after(time.Hour)
				if n := strings.Count(w.log.String(), "level=ERROR msg=\"Auth file not used, all stays as it was\""); n != 1 {
					t.Errorf("said %d times:\n%s", n, w.log)
				}
				if strings.Contains(w.log.String(), "canary") {
					t.Errorf("the log shows what stands there:\n%s", w.log)
				}
				write(t, w.path, listing("one"))
				after(within)
				w.wantMetric(t, "promferry_proxy_auth_last_reload_successful 1")
				if w.changes != 0 {
					t.Errorf("told of %d changes", w.changes)
				}
				write(t, w.path, listing("two"))
				after(within)
				w.takes(t, "two", "one")
				if w.changes != 1 {
					t.Errorf("told of %d changes", w.changes)
				}
			})
		})
	}
}

// The first half of a file that is being written is never used, though it has no fault.
func TestS27HalfAFileIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		whole := listing("one") + "scrapers: anyone\n"
		w := watch(t, newGuard(t, "scrapers: anyone\n"+listing("one")))
		after(time.Second)
		write(t, w.path, listing("one"))
		after(3 * time.Second) // One look.
		write(t, w.path, whole)
		if !w.Open(access.FaceScraper) {
			t.Fatal("the half was used")
		}
		after(within)
		if !w.Open(access.FaceScraper) || w.changes != 1 {
			t.Errorf("told of %d changes", w.changes)
		}
	})
}

// Reload does not wait for Run.
func TestS27Reload(t *testing.T) {
	g := newGuard(t, listing("one"))
	write(t, g.path, listing("two"))
	if err := g.Reload(); err != nil {
		t.Fatal(err)
	}
	g.takes(t, "two", "one")
	write(t, g.path, "scrapers: anyone")
	if err := g.Reload(); err != nil {
		t.Fatal(err)
	}
	g.wantMetric(t, `promferry_proxy_auth_open{face="scraper"} 1`)
	write(t, g.path, "nothing")
	if err := g.Reload(); err == nil || !strings.HasPrefix(err.Error(), "use "+g.path+": ") {
		t.Errorf("got %v", err)
	}
	g.wantMetric(t, "promferry_proxy_auth_last_reload_successful 0")
	if !g.Open(access.FaceScraper) {
		t.Error("not as it was")
	}
}

func TestRunWithoutFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, err := access.NewProxy("", slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("returned early: %v", err)
		default:
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A grant is valid as long as the same credential would give the same.
func TestS8Revocation(t *testing.T) {
	const name = "a.example.org"
	bearer := caller{bearer: "client-token"}
	cert := caller{certificate: certificate("", name)}
	digests := "token_sha256: [" + sum("client-token") + "]"
	for _, tc := range []struct {
		what string
		caller
		before, after string
		valid         bool
	}{
		{"untouched", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: a, names: ['*'], " + digests + "}]\nlisters: anyone", true},
		{"narrower, but wide enough", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: a, names: ['a.*'], " + digests + "}]", true},
		{"another token beside", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: a, names: ['*'], token_sha256: [" + sum("new") + ", " + sum("client-token") + "]}]", true},
		{"token gone", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: a, names: ['*'], token_sha256: [" + sum("new") + "]}]", false},
		{"entry gone", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: b, names: ['*'], token_sha256: [" + sum("new") + "]}]", false},
		{"section gone", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "listers: anyone", false},
		{"name gone", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: a, names: ['b.*'], " + digests + "}]", false},
		{"token moved to the scrapers", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: []\nscrapers: [{identity: a, " + digests + "}]", false},
		{"other identity", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: [{identity: b, names: ['*'], " + digests + "}]", false},
		{"opened", bearer, "clients: [{identity: a, names: ['*'], " + digests + "}]", "clients: anyone", false},
		{"no longer open", bearer, "clients: anyone", "clients: [{identity: a, names: ['*'], " + digests + "}]", false},
		{"still open", bearer, "clients: anyone", "clients: anyone\nlisters: anyone", true},
		{"certificate, wider", cert, "clients: [{identity: a, san: ['a.*']}]", "clients: [{identity: a, san: ['*']}]", true},
		{"certificate, gone", cert, "clients: [{identity: a, san: ['a.*']}]", "clients: [{identity: a, san: ['b.*']}]", false},
		{"certificate, other names", cert, "clients: [{identity: a, san: ['a.*']}]", "clients: [{identity: a, san: ['a.*'], names: [b]}]", false},
		{"certificate, other entry first", cert, "clients: [{identity: a, san: ['*']}]", "clients: [{identity: b, san: ['a.*']}, {identity: a, san: ['*']}]", false},
	} {
		g := newGuard(t, tc.before)
		changed := false
		g.OnChange(func() { changed = true })
		grant, err := g.client(tc.caller, name)
		if err != nil || !g.Valid(grant, name) {
			t.Errorf("%s: before: %v", tc.what, err)
			continue
		}
		write(t, g.path, tc.after)
		if err := g.Reload(); err != nil {
			t.Fatalf("%s: %v", tc.what, err)
		}
		if got := g.Valid(grant, name); got != tc.valid {
			t.Errorf("%s: valid %v", tc.what, got)
		}
		if !changed && tc.before != tc.after {
			t.Errorf("%s: not told of the change", tc.what)
		}
		again, err := g.client(tc.caller, name)
		if (err == nil && again.Identity() == grant.Identity()) != tc.valid {
			t.Errorf("%s: valid %v, but asked again: %q, %v", tc.what, tc.valid, again.Identity(), err)
		}
	}
}

// A tunnel of who scrapes ends as well.
func TestS8RevocationOfScraper(t *testing.T) {
	entry := "scrapers: [{identity: prometheus, username: prom, token_sha256: [" + sum("scrape-token") + "]}]"
	for after, valid := range map[string]bool{
		entry + "\nlisters: anyone":                                  true,
		strings.Replace(entry, "prom,", "admin,", 1):                 false,
		strings.Replace(entry, sum("scrape-token"), sum("other"), 1): false,
	} {
		g := newGuard(t, entry)
		grant, err := g.scraper(caller{username: "prom", password: "scrape-token"})
		if err != nil {
			t.Fatal(err)
		}
		write(t, g.path, after)
		if err := g.Reload(); err != nil {
			t.Fatal(err)
		}
		if got := g.Valid(grant, ""); got != valid {
			t.Errorf("%s: valid %v", after, got)
		}
	}
}

// A connection that outlives its certificate shows nothing any more.
func TestS3ExpiryIsCheckedEachTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuard(t, example)
		c := caller{certificate: certificate("", "a.nodes.example.org")}
		grant, err := g.client(c, "a.nodes.example.org")
		want(t, "before", "identity nodes", grant, err)
		if !g.Valid(grant, "a.nodes.example.org") {
			t.Error("not valid before")
		}
		after(time.Hour + time.Second)
		if g.Valid(grant, "a.nodes.example.org") {
			t.Error("valid after it expired")
		}
		grant, err = g.client(c, "a.nodes.example.org")
		want(t, "after", "401 expired_certificate", grant, err)
	})
}

// Callers are let in, and their grants looked at, while the file is read again.
func TestReloadBesideRequests(t *testing.T) {
	g := newGuard(t, example)
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for range 200 {
				grant, err := g.client(caller{bearer: "web-new"}, "web-1.example.org")
				if err != nil || !g.Valid(grant, "web-1.example.org") {
					t.Errorf("%v, %q", err, grant.Identity())
				}
				if _, err := g.lister(caller{bearer: "x"}); err == nil {
					t.Error("let in")
				}
			}
		})
	}
	for i := range 50 {
		write(t, g.path+".new", example+strings.Repeat("\n", i%2))
		if err := os.Rename(g.path+".new", g.path); err != nil {
			t.Fatal(err)
		}
		if err := g.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	callers.Wait()
}
