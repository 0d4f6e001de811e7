package longpoll_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/promferry/promferry/internal/access"
	"github.com/promferry/promferry/internal/pushprox"
	"github.com/promferry/promferry/reverse"
)

// Each test here is of something that PushProx is weak at, and shows that we are not.

// TestW1IdleClientsStayListed: PushProx's proxy lists a client for five minutes after its last
// poll began, and forgets one that just waits; Prometheus then never scrapes it again.
func TestW1IdleClientsStayListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		stop := run(t, p.client)
		for range 100 {
			pass(time.Hour)
			if got := p.clients(t); got != "web-1" {
				t.Fatalf("/clients has %q, with the poll open", got)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		// One that is gone stays for a while, so that its absence shows as a target that is down.
		pass(4 * time.Minute)
		if got := p.clients(t); got != "web-1" {
			t.Errorf("/clients has %q, four minutes after the client's end", got)
		}
		pass(2 * time.Minute)
		if got := p.clients(t); got != "" {
			t.Errorf("/clients has %q, six minutes after the client's end", got)
		}
	})
}

// TestW2TruncatedIsNotClean: with PushProx, what a target breaks off in the middle arrives as a
// success, with the number that was cut for the value.
func TestW2TruncatedIsNotClean(t *testing.T) {
	broken := func(t *testing.T, what string, a answer) {
		t.Helper()
		if a.err == nil && a.status == http.StatusOK {
			t.Errorf("%s: %v, a success", what, a)
		}
	}
	// With a body that is small enough for all buffers, and one that is not.
	const small, big = "/torn", "/torn/large"
	t.Run("its client at our proxy", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			run(t, p.client)
			pass(time.Second)
			for _, path := range []string{small, big, "/short"} {
				a := p.scrape(t, site+path, "10")
				broken(t, path, a)
				a.between(t, path, 0, 100*time.Millisecond)
			}
			if got := value(t, p.metrics, "promferry_proxy_scrapes_total", "result", "broken_off"); got != 3 {
				t.Errorf("the proxy counts %v that broke off, want 3", got)
			}
		})
	})
	for _, noUpgrade := range []bool{false, true} {
		t.Run(fmt.Sprint("our client at our proxy, upgrades ", !noUpgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{noUpgrade: noUpgrade})
				node := startNode(t, p.network, "http://hub:8080", 1)
				pass(3 * time.Second)
				for _, path := range []string{small, big, "/short"} {
					a := p.scrape(t, site+path, "10")
					broken(t, path, a)
					a.between(t, path, 0, 600*time.Millisecond) // Its line may be opened anew.
				}
				if got := value(t, p.metrics, "promferry_proxy_scrapes_total", "result", "success"); got != 0 {
					t.Errorf("the proxy counts %v successes", got)
				}
				if got := value(t, node.metrics, "promferry_client_scrapes_total", "result", "broken_off"); got != 3 {
					t.Errorf("the client counts %v that broke off, want 3", got)
				}
			})
		})
	}
	// Its proxy takes what it got for the whole: only the client can help it.
	t.Run("our client at its proxy", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			x := startTheirs(t)
			startNode(t, x.network, "http://hub:8080", 1)
			pass(2 * time.Second)
			for _, path := range []string{small, big, "/short"} {
				a := x.scrape(t, site+path, "10")
				if len(a.body) > 100 {
					a.body = a.body[:100]
				}
				broken(t, path, a)
			}
		})
	})
}

// TestW3NoLeakPerVanishedClient: PushProx's proxy keeps a goroutine, a connection and 20 KiB for
// each client that polled and went away, for ever.
func TestW3NoLeakPerVanishedClient(t *testing.T) {
	n := &network{}
	h := startHub(t, n, "hub:8080", n.listenTCP(t, "hub:8080"), options{level: slog.LevelError})
	vanish := func(clients, from int) {
		conns := make([]net.Conn, clients)
		for i := range conns {
			conn, err := n.Dial(t.Context(), "tcp", "hub:8080")
			if err != nil {
				t.Fatal(err)
			}
			conns[i] = conn
			if _, err := io.WriteString(conn, pollOf(fmt.Sprint("pod-", from+i))); err != nil {
				t.Fatal(err)
			}
		}
		until(t, "all polls are there", func() bool { return value(t, h.metrics, "promferry_proxy_lines") == float64(clients) })
		for _, conn := range conns {
			_ = conn.Close()
		}
		until(t, "no poll is left", func() bool { return value(t, h.metrics, "promferry_proxy_lines") == 0 })
	}
	vanish(10, 0)
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	vanish(1000, 10)
	until(t, "no more file descriptors and goroutines than before", func() bool {
		return openFiles(t) <= fds+5 && runtime.NumGoroutine() <= goroutines+5
	})
}

// TestW4ClientDeath: PushProx's proxy gives a scrape to a client that is dead, and whoever
// scrapes waits for all of its time, whether the client was there a moment ago or never.
func TestW4ClientDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		a := p.scrape(t, site+"/metrics", "10")
		a.is(t, "never there", http.StatusNotFound, "unknown_client", "*")
		a.between(t, "never there", 0, 10*time.Millisecond)

		stop := run(t, p.client)
		pass(time.Second)
		slow := p.begin(t, site+"/slow?8s", "10")
		pass(time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		a = <-slow
		a.is(t, "killed with a scrape on its way", http.StatusServiceUnavailable, "client_gone", "*")
		a.between(t, "killed with a scrape on its way", time.Second, 1010*time.Millisecond)
		pass(time.Second)
		a = p.scrape(t, site+"/metrics", "10")
		a.is(t, "killed a second ago", http.StatusServiceUnavailable, "client_away", "*")
		a.between(t, "killed a second ago", 0, 2*time.Second) // It may be back, after a pause.
		if a.header.Get("Retry-After") == "" {
			t.Error("nothing says when to try again")
		}

		// One that comes back this moment gets the scrape that was there before it.
		stop = run(t, p.client)
		pass(time.Second)
		p.scrape(t, site+"/metrics", "10").is(t, "started again", http.StatusOK, "", metrics)
		if err := stop(); err != nil {
			t.Error(err)
		}
		waits := p.begin(t, site+"/metrics", "10")
		pass(400 * time.Millisecond)
		run(t, p.client)
		a = <-waits
		a.is(t, "a restart in 400 ms", http.StatusOK, "", metrics)
		a.between(t, "a restart in 400 ms", 400*time.Millisecond, 410*time.Millisecond)
	})
}

// TestW4Reconnect: PushProx's client pauses for up to 1.5 s after a poll that broke off. Whoever
// scrapes meanwhile waits for half a second, and after the pause all is well: nothing is given to
// the poll that is gone.
func TestW4Reconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		drop := make(chan struct{})
		p.client.Faults.Drop = drop
		run(t, p.client)
		pass(time.Second)
		for range 5 {
			drop <- struct{}{}
			synctest.Wait()
			a := p.scrape(t, site+"/metrics", "10")
			a.between(t, "a scrape while the client pauses", 0, 510*time.Millisecond)
			pass(1500 * time.Millisecond)
			p.scrape(t, site+"/metrics", "10").is(t, "a scrape after the pause", http.StatusOK, "", metrics)
		}
	})
}

// TestW5HalfOpen: a client's address changes, or what lies between forgets the connection. Its
// poll stays with the proxy, which PushProx's gives the next scrape to if no newer poll came.
func TestW5HalfOpen(t *testing.T) {
	// dead is a poll that has its answer taken by the kernel, and nobody there.
	dead := func(t *testing.T, p *pair, from, head string) {
		t.Helper()
		conn, err := p.network.from(from)(t.Context(), "tcp", "hub:8080")
		if err != nil {
			t.Fatal(err)
		}
		raw{conn}.send(t, head)
		var draining sync.WaitGroup
		draining.Go(func() { _, _ = io.Copy(io.Discard, conn) })
		t.Cleanup(func() {
			_ = conn.Close()
			draining.Wait()
		})
		synctest.Wait()
	}
	ours := strings.Replace(pollOf(name), "\r\n\r\n", "\r\nPromferry-Session: K7QX2B5C6J4Z3N7M\r\n\r\n", 1)
	for what, tc := range map[string]struct {
		from string
		ours bool
	}{
		"from another address":           {"203.0.113.7", false},
		"from the same address":          {"192.0.2.1", false}, // As with a NAT, or a reverse proxy.
		"ours, from another address":     {"203.0.113.7", true},
		"ours, which has restarted":      {"192.0.2.1", true},
		"ours, in place of its client's": {"203.0.113.7", true},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{noUpgrade: true})
				if tc.ours {
					dead(t, p, tc.from, strings.Replace(ours, "K7QX", "AAAA", 1))
					startNode(t, p.network, "http://hub:8080", 3)
				} else {
					dead(t, p, tc.from, pollOf(name))
					run(t, p.client)
				}
				pass(3 * time.Second)
				// Several exporters of one node are scraped at a time.
				var answers []<-chan answer
				for range 3 {
					answers = append(answers, p.begin(t, site+"/slow?1s", "10"))
				}
				for i, c := range answers {
					(<-c).is(t, fmt.Sprint("scrape ", i, ", with a dead poll around"), http.StatusOK, "", metrics)
				}
			})
		})
	}

	t.Run("found out", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			dead(t, p, "192.0.2.1", ours)
			if got := value(t, p.metrics, "promferry_proxy_clients", "state", "connected"); got != 1 {
				t.Errorf("%v clients connected", got)
			}
			pass(2 * heartbeat)
			if got := value(t, p.metrics, "promferry_proxy_clients", "state", "away"); got != 1 {
				t.Errorf("%v clients away after two heartbeats", got)
			}
			pass(time.Minute)
			if got := value(t, p.metrics, "promferry_proxy_lines"); got != 0 {
				t.Errorf("%v lines after a minute", got)
			}
		})
	})

	// The client, too, finds out by itself, and takes no other connection that is as dead.
	t.Run("proxy half-open", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			h := startHub(t, n, "hub:8080", n.listen("hub:8080"), options{noUpgrade: true})
			serveTarget(t, n)
			var mu sync.Mutex
			var conns []*blackHole
			healthy := n.hosts["hub:8080"]
			n.set("hub:8080", func(ctx context.Context, from string) (net.Conn, error) {
				conn, err := healthy(ctx, from)
				if err != nil || from != "192.0.2.1" {
					return conn, err
				}
				b := &blackHole{Conn: conn, dead: make(chan struct{}), closed: make(chan struct{})}
				mu.Lock()
				defer mu.Unlock()
				conns = append(conns, b)
				return b, nil
			})
			node := startNode(t, n, "http://hub:8080", 2)
			pass(3 * time.Second)
			var before []<-chan answer
			for range 4 { // Which leaves it some connections with nothing to do.
				before = append(before, h.begin(t, site+"/slow?1s", "10"))
			}
			for _, c := range before {
				(<-c).is(t, "before", http.StatusOK, "", metrics)
			}
			mu.Lock()
			for _, c := range conns {
				close(c.dead)
			}
			mu.Unlock()
			// Two until it is found out, and one for the rest.
			pass(3 * heartbeat)
			if got := node.kind(); got != "longpoll 2" {
				t.Errorf("lines %q", got)
			}
			h.scrape(t, site+"/metrics", "10").is(t, "after three heartbeats", http.StatusOK, "", metrics)
		})
	})
}

// blackHole is a connection that says nothing and takes everything once it is dead.
type blackHole struct {
	net.Conn
	dead   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (b *blackHole) isDead() bool {
	select {
	case <-b.dead:
		return true
	default:
		return false
	}
}

func (b *blackHole) Write(p []byte) (int, error) {
	if b.isDead() {
		return len(p), nil
	}
	return b.Conn.Write(p)
}

func (b *blackHole) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if b.isDead() {
		<-b.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (b *blackHole) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Conn.Close()
}

// TestW6Authentication: whoever reaches PushProx's proxy can poll under any name, and gets the
// credentials of the next scrape, and forges its answer.
func TestW6Authentication(t *testing.T) {
	digest := func(token string) string {
		sum := sha256.Sum256([]byte(token))
		return hex.EncodeToString(sum[:])
	}
	right, other := strings.Repeat("right-token-", 3), strings.Repeat("other-token-", 3)
	file := filepath.Join(t.TempDir(), "auth.yml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf(
		"clients:\n- {identity: web, names: [web-1], token_sha256: [%s]}\n- {identity: db, names: [db-1], token_sha256: [%s]}\nscrapers: anyone\nlisters: anyone\n",
		digest(right), digest(other))), 0o600); err != nil {
		t.Fatal(err)
	}
	guard, err := access.NewProxy(file, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{authorize: func(r *http.Request, name string) (reverse.Grant, error) {
			grant, err := guard.Client(r, name)
			if e, ok := errors.AsType[*access.Error](err); ok {
				return nil, &reverse.Refusal{Status: e.Status, Text: e.Text()}
			}
			return grant, err
		}})
		bearer := func(text, token string) string {
			return strings.Replace(text, "\r\n\r\n", "\r\nAuthorization: Bearer "+token+"\r\n\r\n", 1)
		}
		said := func(what, request string, status int) {
			t.Helper()
			conn, answers := p.connect(t)
			conn.send(t, request)
			if resp := answers.response(t); resp.status != status {
				t.Errorf("%s: %d %q, want %d", what, resp.status, resp.body, status)
			}
		}
		said("no token", pollOf(name), http.StatusUnauthorized)
		said("a wrong token", bearer(pollOf(name), strings.Repeat("wrong-token-", 3)), http.StatusUnauthorized)
		said("another client's token", bearer(pollOf(name), other), http.StatusForbidden)
		p.scrape(t, site+"/metrics", "10").is(t, "nobody was let in", http.StatusNotFound, "unknown_client", "*")

		conn, answers := p.connect(t)
		conn.send(t, bearer(pollOf(name), right))
		synctest.Wait()
		got := p.begin(t, site+"/metrics", "10")
		_, id := answers.scraped(t)
		forged := pushOf("HTTP/1.1 200 OK\r\nId: " + id + "\r\nContent-Length: 11\r\n\r\nforged 666\n")
		said("a push without a token", forged, http.StatusUnauthorized)
		said("a push by another client", bearer(forged, other), http.StatusForbidden)
		said("a push in another's name", strings.Replace(bearer(forged, other), "\r\n\r\n", "\r\nPromferry-Client: db-1\r\n\r\n", 1), http.StatusForbidden)
		said("the client's push", bearer(pushOf("HTTP/1.1 200 OK\r\nId: "+id+"\r\nContent-Length: 7\r\n\r\ngood 1\n"), right), http.StatusOK)
		(<-got).is(t, "the scrape", http.StatusOK, "", "good 1\n")
	})
	// With the token in the URL, as a password: this is how PushProx's client can have one.
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{authorize: func(r *http.Request, name string) (reverse.Grant, error) { return guard.Client(r, name) }})
		p.client.ProxyURL = "http://any:" + right + "@hub:8080"
		run(t, p.client)
		pass(time.Second)
		p.scrape(t, site+"/metrics", "10").is(t, "its client with a token", http.StatusOK, "", metrics)
	})
}

// TestW7ClientScrapesItsTargetsOnly: PushProx's client fetches any port, path and method, and
// follows redirects to any host.
func TestW7ClientScrapesItsTargetsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startTheirs(t)
		elsewhere := &target{}
		serve(t, x.network.listen("elsewhere:80"), elsewhere)
		serve(t, x.network.listen("web-1:22"), elsewhere)
		serve(t, x.network.listen("127.0.0.1:9100"), elsewhere)
		node := startNode(t, x.network, "http://hub:8080", 1, reverse.Allowance{Port: 9100, Path: "/moved"})
		pass(2 * time.Second)
		send := func(method, target string) answer {
			t.Helper()
			return <-begin(t, x.network, "hub:8080", nil, method, target, "10", nil)
		}
		send(http.MethodGet, site).is(t, "the target", http.StatusOK, "", metrics)
		for _, bad := range []string{"http://web-1:22/", site + "/admin", site + "/metrics/../admin", site + "//", "http://web-1/"} {
			send(http.MethodGet, bad).is(t, bad, http.StatusForbidden, "not_allowed", "*")
		}
		for _, method := range []string{http.MethodDelete, http.MethodPost, http.MethodPut} {
			send(method, site).is(t, method, http.StatusMethodNotAllowed, "bad_request", "*")
		}
		a := send(http.MethodGet, site+"/moved")
		a.is(t, "a redirect", http.StatusBadGateway, "redirect", "*")
		if heard := elsewhere.heard.Load(); heard != nil {
			t.Errorf("the other host heard %v", heard)
		}
		if got := value(t, node.metrics, "promferry_client_scrapes_total", "result", "not_allowed"); got != 5 {
			t.Errorf("%v scrapes counted as not allowed, want 5", got)
		}
	})
}

// TestW8Limits: PushProx's proxy has no time limits on what comes, keeps whole bodies in memory,
// and passes on nothing before it has all.
func TestW8Limits(t *testing.T) {
	t.Run("slow loris", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			var ends []<-chan error
			for _, begins := range []string{
				"POST /push HTTP/1.1\r\nHost: hub\r\n", "POST /push HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\nHTTP/1.1 200 OK\r\nId",
				"POST /poll HTTP/1.1\r\n", "POST /poll HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\nweb", "G",
			} {
				conn, answers := p.connect(t)
				conn.send(t, begins)
				end := make(chan error, 1)
				go func() {
					_, err := io.Copy(io.Discard, answers)
					end <- err
				}()
				ends = append(ends, end)
			}
			pass(12 * time.Second)
			for i, end := range ends {
				select {
				case <-end: //nolint:errcheck // Any end will do.
				default:
					t.Errorf("connection %d is still there", i)
				}
			}
		})
	})
	t.Run("a long name", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			for _, bad := range []string{strings.Repeat("x", 254), strings.Repeat("x", 1100), "", "a b", "a/b", "a\nb"} {
				conn, answers := p.connect(t)
				conn.send(t, pollOf(bad))
				if resp := answers.response(t); resp.status/100 != 4 {
					t.Errorf("%d bytes of name: %d", len(bad), resp.status)
				}
			}
			if got := p.clients(t); got != "" {
				t.Errorf("/clients has %q", got)
			}
		})
	})
	t.Run("a large header", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			conn, answers := p.connect(t)
			response := "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20)
			var sending sync.WaitGroup
			sending.Go(func() { _, _ = io.WriteString(conn, pushOf(response)) })
			if resp := answers.response(t); resp.status != http.StatusBadRequest {
				t.Errorf("status %d", resp.status)
			}
			_ = conn.Close()
			sending.Wait()
		})
	})
	t.Run("as it comes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			conn, answers := p.connect(t)
			conn.send(t, pollOf(name))
			synctest.Wait()
			scraper, got := p.connect(t)
			scraper.send(t, "GET "+site+"/metrics HTTP/1.1\r\nHost: web-1:9100\r\n\r\n")
			_, id := answers.scraped(t)
			half := strings.Repeat("x", 128<<10)
			response := "HTTP/1.1 200 OK\r\nId: " + id + fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n", 2*len(half)) + half + half
			pusher, told := p.connect(t)
			var sending sync.WaitGroup
			whole := pushOf(response)
			more := make(chan struct{})
			sending.Go(func() {
				_, _ = io.WriteString(pusher, whole[:len(whole)-len(half)])
				<-more
				_, _ = io.WriteString(pusher, whole[len(whole)-len(half):])
			})
			resp, err := http.ReadResponse(got.Reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			if n, err := io.ReadFull(resp.Body, make([]byte, 96<<10)); err != nil {
				t.Errorf("%d bytes of what was pushed: %v", n, err)
			}
			close(more)
			if rest, err := io.Copy(io.Discard, resp.Body); err != nil || rest != 160<<10 {
				t.Errorf("%d bytes after it, %v", rest, err)
			}
			sending.Wait()
			if resp := told.response(t); resp.status != http.StatusOK {
				t.Errorf("the push was answered %d", resp.status)
			}
		})
	})
	t.Run("too large", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{maxBytes: int64(len(large)) - 1})
			run(t, p.client)
			pass(time.Second)
			// It does not say how large it is: the status is out when it is found to be too large.
			if a := p.scrape(t, site+"/large", "10"); a.err == nil {
				t.Errorf("too large: %d with %d bytes, a success", a.status, len(a.body))
			}
			p.scrape(t, site+"/metrics", "10").is(t, "the next one", http.StatusOK, "", metrics)
			conn, answers := p.connect(t)
			conn.send(t, pollOf("web-2"))
			synctest.Wait()
			got := p.begin(t, "http://web-2:9100/", "10")
			_, id := answers.scraped(t)
			pusher, told := p.connect(t)
			pusher.send(t, fmt.Sprintf("POST /push HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n%-100s\r\n", fmt.Sprintf("HTTP/1.1 200 OK\r\nId: %s\r\nContent-Length: %d\r\n\r\n", id, len(large))))
			(<-got).is(t, "too large, which it says", http.StatusRequestEntityTooLarge, "too_large", "*")
			if resp := told.response(t); resp.status/100 != 4 {
				t.Errorf("the push was answered %d", resp.status)
			}
			if got := value(t, p.metrics, "promferry_proxy_scrapes_total", "result", "too_large"); got != 2 {
				t.Errorf("%v scrapes counted as too large, want 2", got)
			}
		})
	})
	t.Run("memory", func(t *testing.T) {
		n := &network{}
		h := startHub(t, n, "hub:8080", n.listenTCP(t, "hub:8080"), options{})
		const size = 64 << 20
		respond := func(id string) {
			pusher, told := h.connect(t)
			head := fmt.Sprintf("HTTP/1.1 200 OK\r\nId: %s\r\nContent-Length: %d\r\n\r\n", id, size)
			pusher.send(t, fmt.Sprintf("POST /push HTTP/1.1\r\nHost: hub\r\nContent-Length: %d\r\n\r\n%s", len(head)+size, head))
			piece := make([]byte, 64<<10)
			for range size / len(piece) {
				if _, err := pusher.Write(piece); err != nil {
					break // It is not wanted.
				}
			}
			_, _ = http.ReadResponse(told.Reader, nil) //nolint:bodyclose // The connection ends.
		}
		allocated := func() uint64 {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.TotalAlloc
		}
		conn, answers := h.connect(t)
		conn.send(t, pollOf(name))
		until(t, "the poll is there", func() bool { return value(t, h.metrics, "promferry_proxy_lines") == 1 })
		scraper, got := h.connect(t)
		scraper.send(t, "GET "+site+"/metrics HTTP/1.1\r\nHost: web-1:9100\r\n\r\n")
		_, id := answers.scraped(t)
		before := allocated()
		var responding sync.WaitGroup
		responding.Go(func() { respond(id) })
		resp, err := http.ReadResponse(got.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		_ = resp.Body.Close()
		responding.Wait()
		if used := allocated() - before; used > 4<<20 {
			t.Errorf("%d bytes allocated for an answer of %d", used, size)
		}
		before = allocated()
		respond("nobody")
		if used := allocated() - before; used > 4<<20 {
			t.Errorf("%d bytes allocated for a response of %d that nobody waits for", used, size)
		}
	})
}

// TestW8ClientThatDoesNotRead: an answer to a poll is written to a client that takes it, or
// not. It holds up neither the scrape beyond its time nor the polls of others.
func TestW8ClientThatDoesNotRead(t *testing.T) {
	t.Run("scrape", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			conn, _ := p.connect(t)
			conn.send(t, pollOf(name))
			synctest.Wait()
			a := p.scrape(t, site+"/metrics", "10")
			if a.err != nil || a.status/100 != 5 {
				t.Errorf("the scrape: %v", a)
			}
			a.between(t, "the scrape", 0, 10*time.Second)
		})
	})
	t.Run("heartbeats", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{})
			ours := func(name string) (raw, reader) {
				conn, answers := p.connect(t)
				conn.send(t, strings.Replace(pollOf(name), "\r\n\r\n", "\r\nPromferry-Session: K7QX2B5C6J4Z3N7M\r\n\r\n", 1))
				return conn, answers
			}
			for i := range 20 {
				ours(fmt.Sprint("stuck-", i))
			}
			_, answers := ours(name)
			began := time.Now()
			if resp := answers.response(t); resp.status != http.StatusNoContent || time.Since(began) > 2*heartbeat {
				t.Errorf("%d after %v, want 204 within two heartbeats", resp.status, time.Since(began))
			}
		})
	})
}

// TestW9UnknownNamesKeepNothing: PushProx's proxy keeps something for each name that was ever
// scraped.
func TestW9UnknownNamesKeepNothing(t *testing.T) {
	n := &network{}
	h := startHub(t, n, "hub:8080", n.listenTCP(t, "hub:8080"), options{})
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	scrape := func(from, to int) {
		for i := from; i < to; i++ {
			w := httptest.NewRecorder()
			h.proxy.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://host-%d.example.org:9100/metrics", i), nil))
			if w.Code != http.StatusNotFound {
				t.Fatalf("status %d", w.Code)
			}
		}
	}
	scrape(0, 100)
	before := heap()
	scrape(100, 20_100)
	if after := heap(); after > before+1<<20 {
		t.Errorf("%d bytes more after scrapes of 20,000 names that nobody has", after-before)
	}
	if got := value(t, h.metrics, "promferry_proxy_clients"); got != 0 {
		t.Errorf("%v clients known", got)
	}
}

// TestW10SideBySideOverLatency: PushProx's client has one poll, so each scrape costs those after
// it a round trip: twenty take two seconds at 100 ms. Ours has a line for each target.
func TestW10SideBySideOverLatency(t *testing.T) {
	const trip = 100 * time.Millisecond
	for _, noUpgrade := range []bool{false, true} {
		t.Run(fmt.Sprint("upgrades ", !noUpgrade), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{noUpgrade: noUpgrade})
				direct := p.network.hosts["hub:8080"]
				p.network.set("hub:8080", func(ctx context.Context, from string) (net.Conn, error) {
					conn, err := direct(ctx, from)
					if err != nil || from != "192.0.2.1" {
						return conn, err
					}
					return delayed(t, conn, trip/2), nil
				})
				node := startNode(t, p.network, "http://hub:8080", 20)
				pass(5 * time.Second)
				if !strings.HasSuffix(node.kind(), " 20") {
					t.Errorf("lines %q", node.kind())
				}
				for _, what := range []string{"first", "second", "third"} {
					var answers []<-chan answer
					for i := range 20 {
						path := "/"
						if i > 0 {
							path = fmt.Sprint("/", i)
						}
						answers = append(answers, p.begin(t, site+path, "10"))
					}
					for i, c := range answers {
						a := <-c
						a.is(t, fmt.Sprint("scrape ", i), http.StatusOK, "", metrics)
						a.between(t, fmt.Sprint(what, " scrape of ", i), trip, 2*trip)
					}
					pass(3 * trip)
				}
			})
		})
	}
}

// delayed returns an end of a connection that everything takes d to get through.
func delayed(t *testing.T, conn net.Conn, d time.Duration) net.Conn {
	t.Helper()
	here, there := net.Pipe()
	var passing sync.WaitGroup
	later := func(to, from net.Conn) {
		type piece struct {
			b  []byte
			at time.Time
		}
		pieces := make(chan piece, 1000)
		passing.Go(func() {
			defer close(pieces)
			for {
				b := make([]byte, 32<<10)
				n, err := from.Read(b)
				if n > 0 {
					pieces <- piece{b[:n], time.Now().Add(d)}
				}
				if err != nil {
					return
				}
			}
		})
		passing.Go(func() {
			for p := range pieces {
				<-time.After(time.Until(p.at))
				_, _ = to.Write(p.b)
			}
			_ = to.Close()
		})
	}
	later(conn, there)
	later(there, conn)
	t.Cleanup(func() {
		_ = here.Close()
		_ = there.Close()
		_ = conn.Close()
		passing.Wait()
	})
	return here
}

// TestW11OneNameTwice: two of PushProx's clients with one name take turns, so that Prometheus
// mixes two hosts, and throw each other's polls out. With us the newer one is scraped, and
// somebody is told.
func TestW11OneNameTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		targets := map[string]*target{"192.0.2.10": {}, "192.0.2.20": {}}
		var counted noted
		for _, ip := range []string{"192.0.2.10", "192.0.2.20"} {
			own := &network{}
			serve(t, own.listen("web-1:9100"), targets[ip])
			c := &pushprox.Client{FQDN: name, ProxyURL: "http://hub:8080", Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				if address == "web-1:9100" {
					return own.Dial(ctx, network, address)
				}
				return p.network.from(ip)(ctx, network, address)
			}}
			counted.hook(c)
			run(t, c)
			pass(time.Minute)
		}
		for range 25 {
			p.scrape(t, site+"/metrics", "10").is(t, "a scrape", http.StatusOK, "", metrics)
			pass(15 * time.Second)
		}
		if targets["192.0.2.10"].heard.Load() != nil || targets["192.0.2.20"].heard.Load() == nil {
			t.Error("not only the newer one was scraped")
		}
		if failed := counted.failures("poll"); failed != 0 {
			t.Errorf("%d polls failed", failed)
		}
		if got := value(t, p.metrics, "promferry_proxy_duplicate_sessions_total"); got != 1 {
			t.Errorf("%v duplicates counted, want 1", got)
		}
		if got := p.logs.lines("WARN"); got != 1 || !strings.Contains(p.logs.String(), "192.0.2.10") {
			t.Errorf("%d warnings in %s", got, p.logs)
		}
	})
}

// TestW12LateResponses: PushProx's proxy holds a response that nobody waits for, with all of it,
// for 15 s, and its client takes the refusal for a success.
func TestW12LateResponses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		conn, answers := p.connect(t)
		conn.send(t, pollOf(name))
		synctest.Wait()
		got := p.begin(t, site+"/metrics", "2")
		_, id := answers.scraped(t)
		(<-got).is(t, "the scrape", http.StatusGatewayTimeout, "timeout", "*")
		pusher, told := p.connect(t)
		began := time.Now()
		for range 3 { // On one connection, which stays good.
			pusher.send(t, pushOf("HTTP/1.1 200 OK\r\nId: "+id+"\r\nContent-Length: 2\r\n\r\n1\n"))
			if resp := told.response(t); resp.status != http.StatusGone {
				t.Errorf("status %d", resp.status)
			}
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v to say no", took)
		}
		p.counts(t, 3, map[string]int{"timeout": 1})
	})
	// Ours counts it.
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		serveTarget(t, n)
		polls := 0
		handler := http.NewServeMux()
		handler.HandleFunc("/poll", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.ReadAll(r.Body)
			if polls++; polls > 1 {
				<-r.Context().Done()
				return
			}
			_, _ = io.WriteString(w, "GET "+site+" HTTP/1.1\r\nHost: web-1:9100\r\nId: 1\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n")
		})
		handler.HandleFunc("/push", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.ReadAll(r.Body)
			http.Error(w, "Error pushing: context deadline exceeded", http.StatusInternalServerError)
		})
		serve(t, n.listen("hub:8080"), handler)
		node := startNode(t, n, "http://hub:8080", 1)
		pass(3 * time.Second)
		if got := value(t, node.metrics, "promferry_client_connect_failures_total", "reason", "response"); got != 1 {
			t.Errorf("%v responses that were not taken are counted, want 1", got)
		}
	})
}

// TestW12InTime: a response that somebody waited for is never taken for a late one.
func TestW12InTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		run(t, p.client)
		pass(time.Second)
		const rounds, scrapes = 300, 2
		for range rounds {
			var answers []<-chan answer
			for range scrapes {
				answers = append(answers, p.begin(t, site+"/metrics", "10"))
			}
			for _, c := range answers {
				(<-c).is(t, "a scrape", http.StatusOK, "", metrics)
			}
		}
		synctest.Wait()
		p.counts(t, 0, map[string]int{"success": rounds * scrapes})
		if got := p.noted.statuses(); strings.Contains(got, "410") {
			t.Errorf("%d of %d pushes were answered 410", strings.Count(got, "410"), rounds*scrapes)
		}
	})
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{})
				run(t, p.client)
				pass(time.Second)
				(<-begin(t, p.network, "hub:8080", nil, method, site+"/metrics", "10", nil)).is(t, "a scrape", http.StatusOK, "", "*")
				synctest.Wait()
				if got := p.noted.statuses(); got != "[200]" {
					t.Errorf("the pushes were answered %s", got)
				}
			})
		})
	}
}

// TestW12NoResponse: what is no response that a scraper could get is refused, and nothing of it
// reaches the scraper: a status below 200 is none, or no final one.
func TestW12NoResponse(t *testing.T) {
	for _, line := range []string{"HTTP/1.1 000 No", "HTTP/1.1 099 No", "HTTP/1.1 100 Continue", "HTTP/1.1 101 Switching Protocols", "HTTP/1.1 103 Early Hints"} {
		t.Run(line, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, options{level: slog.LevelDebug})
				conn, answers := p.connect(t)
				conn.send(t, pollOf(name))
				synctest.Wait()
				got := p.begin(t, site+"/metrics", "2")
				_, id := answers.scraped(t)
				pusher, told := p.connect(t)
				pusher.send(t, pushOf(line+"\r\nId: "+id+"\r\nContent-Length: 0\r\n\r\n"))
				if resp := told.response(t); resp.status != http.StatusBadRequest {
					t.Errorf("the push was answered %d", resp.status)
				}
				if a := <-got; a.err != nil || a.status/100 != 5 {
					t.Errorf("the scraper got %v", a)
				}
				if strings.Contains(p.logs.String(), "panic") {
					t.Errorf("a panic: %s", p.logs)
				}
			})
		})
	}
	// And what is no poll is told so.
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		conn, answers := p.connect(t)
		conn.send(t, "POST /poll HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n")
		if resp := answers.response(t); resp.status/100 != 4 {
			t.Errorf("a poll with a malformed body was answered %d", resp.status)
		}
	})
}

// TestW13Statuses: with PushProx every failure is a 500 after all of the scrape's time, a scrape
// without a timeout fails, one with an Id hangs, and CONNECT does not work.
func TestW13Statuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{noUpgrade: true})
		startNode(t, p.network, "http://hub:8080", 1, reverse.Allowance{Port: 9100}, reverse.Allowance{Port: 9})
		pass(3 * time.Second)
		now := func(what string, a answer, status int, reason string) {
			t.Helper()
			a.is(t, what, status, reason, "*")
			a.between(t, what, 0, 10*time.Millisecond)
			if a.body == "" || strings.Count(a.body, "\n") != 1 {
				t.Errorf("%s: the sentence is %q", what, a.body)
			}
		}
		now("unknown", p.scrape(t, "http://web-2:9100/metrics", "10"), http.StatusNotFound, "unknown_client")
		now("refused", p.scrape(t, "http://web-1:9/metrics", "10"), http.StatusBadGateway, "target_down")
		now("not allowed", p.scrape(t, "http://web-1:10/metrics", "10"), http.StatusForbidden, "not_allowed")
		now("another case", p.scrape(t, "http://WEB-1:9100/metrics", "10"), http.StatusNotFound, "unknown_client")
		for _, timeout := range []string{"0", "-1", "NaN", "inf", "-inf", "ten"} {
			now("timeout "+timeout, p.scrape(t, site+"/metrics", timeout), http.StatusBadRequest, "bad_request")
		}
		p.scrape(t, site+"/metrics", "1e300").is(t, "timeout 1e300", http.StatusOK, "", metrics)
		p.scrape(t, site+"/metrics", "").is(t, "no timeout", http.StatusOK, "", metrics)
		(<-begin(t, p.network, "hub:8080", nil, http.MethodGet, site+"/metrics", "10", http.Header{"Id": {"mine"}})).is(t, "an Id", http.StatusOK, "", metrics)
		a := p.scrape(t, site+"/slow?20s", "10")
		a.is(t, "too slow", http.StatusGatewayTimeout, "timeout", "*")
		a.between(t, "too slow", 8*time.Second, 10*time.Second-time.Millisecond)

		conn, answers := p.connect(t)
		conn.send(t, "CONNECT web-1:9100 HTTP/1.1\r\nHost: web-1:9100\r\n\r\n")
		if resp := answers.response(t); resp.status != http.StatusNotImplemented || resp.header.Get(reverse.HeaderError) != "no_tunnel" || !strings.Contains(resp.body, "_scheme") {
			t.Errorf("CONNECT over long-poll: %v", resp)
		}
		p.scrape(t, site+"/metrics", "10").is(t, "after all that", http.StatusOK, "", metrics)
	})
}

// TestW14Headers: through PushProx, a target gets what was for the proxy, the credentials among
// it, and the scraper what was for the proxy's client.
func TestW14Headers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{noUpgrade: true})
		startNode(t, p.network, "http://hub:8080", 1)
		pass(3 * time.Second)
		header := http.Header{
			"Proxy-Authorization": {"Basic c2VjcmV0"}, "Proxy-Connection": {"keep-alive"}, "Connection": {"X-Private"}, "X-Private": {"1"},
			"Keep-Alive": {"1"}, "Te": {"trailers"}, "Id": {"mine"}, "Promferry-Client": {"x"}, "Promferry-Session": {"x"}, "Cookie": {"x=1"},
			"Authorization": {"Bearer for-the-target"}, "Accept": {"text/plain"}, "User-Agent": {"Prometheus/3.0"},
		}
		a := <-begin(t, p.network, "hub:8080", nil, http.MethodGet, site+"/metrics", "10", header)
		a.is(t, "the scrape", http.StatusOK, "", metrics)
		got := p.target.heard.Load().Header
		for _, own := range []string{
			"Proxy-Authorization", "Proxy-Connection", "Connection", "X-Private", "Keep-Alive", "Te", "Id", "Promferry-Client", "Promferry-Session", "Cookie",
		} {
			if got[own] != nil {
				t.Errorf("the target gets %s: %q", own, got[own])
			}
		}
		for _, its := range []string{"Authorization", "Accept", "User-Agent"} {
			if got.Get(its) != header.Get(its) {
				t.Errorf("the target gets %s: %q, want %q", its, got[its], header[its])
			}
		}
		for _, private := range []string{"Id", "X-Prometheus-Scrape-Timeout", "X-Prometheus-Scrape-Timeout-Seconds", "Promferry-Proxy"} {
			if a.header[private] != nil {
				t.Errorf("the scraper gets %s: %q", private, a.header[private])
			}
		}
	})
}

// TestW15PollStatus: PushProx's client looks at no status: a wrong password and a missing path
// both are a "malformed HTTP request". Ours says what it was, in one line.
func TestW15PollStatus(t *testing.T) {
	for _, status := range []int{301, 400, 401, 403, 404, 405, 407, 411, 413, 429, 500, 501, 502, 503, 504} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &network{}
				serve(t, n.listen("hub:8080"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.ReadAll(r.Body)
					if r.URL.Path != "/poll" {
						http.NotFound(w, r) // As where PushProx's proxy is.
						return
					}
					http.Error(w, "<html>\nno\n", status)
				}))
				node := startNode(t, n, "http://hub:8080", 1)
				pass(time.Minute)
				s := node.link.Status()
				if s.Lines != 0 || !strings.Contains(s.Err, fmt.Sprint("status ", status)) || strings.Contains(s.Err, "\n") {
					t.Errorf("status %+v", s)
				}
				if got := node.failed(t); got < 3 || got > 60 {
					t.Errorf("%v failures in a minute", got)
				}
				if got := node.logs.lines("WARN"); got < 1 || got > 5 {
					t.Errorf("%d warnings in a minute: %s", got, node.logs)
				}
			})
		})
	}
	t.Run("no request", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			serve(t, n.listen("hub:8080"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/poll" {
					http.NotFound(w, r)
					return
				}
				_, _ = io.WriteString(w, "<html>Welcome</html>")
			}))
			node := startNode(t, n, "http://hub:8080", 1)
			pass(time.Minute)
			if s := node.link.Status(); s.Lines != 0 || !strings.Contains(s.Err, "is this the URL of a proxy?") {
				t.Errorf("status %+v", s)
			}
		})
	})
	// A reverse proxy that ends each poll after a minute costs no scrape, and ours does not come
	// to that: its poll is answered sooner.
	t.Run("idle timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, options{noUpgrade: true})
			node := startNode(t, p.network, "http://hub:8080", 1)
			pass(time.Hour)
			if got := node.failed(t); got != 0 {
				t.Errorf("%v failures in an hour", got)
			}
			p.scrape(t, site+"/metrics", "10").is(t, "after an hour", http.StatusOK, "", metrics)
		})
	})
}

// TestW16TwoProxies: PushProx's client knows one proxy. Ours is at several, each on its own.
func TestW16TwoProxies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		serveTarget(t, n)
		a := startHub(t, n, "a:8080", n.listen("a:8080"), options{noUpgrade: true})
		b := startHub(t, n, "b:8080", n.listen("b:8080"), options{})
		for _, at := range []string{"http://a:8080", "http://b:8080"} {
			startNode(t, n, at, 1)
		}
		pass(3 * time.Second)
		for _, h := range []*hub{a, b} {
			h.scrape(t, site+"/metrics", "10").is(t, h.address, http.StatusOK, "", metrics)
		}
		a.stop()
		pass(time.Second)
		b.scrape(t, site+"/metrics", "10").is(t, "with the other one gone", http.StatusOK, "", metrics)
	})
}

// TestW17Operations: PushProx's programs log eight lines of level info for each scrape, and
// have metrics with two prefixes.
func TestW17Operations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for what, noUpgrade := range map[string]bool{"pushprox": false, "longpoll": true} {
			p := newPair(t, options{noUpgrade: noUpgrade})
			var node *node
			if noUpgrade {
				node = startNode(t, p.network, "http://hub:8080", 1)
			} else {
				run(t, p.client)
			}
			pass(3 * time.Second)
			count := func() int {
				n := p.logs.lines("INFO") + p.logs.lines("WARN") + p.logs.lines("ERROR")
				if node != nil {
					n += node.logs.lines("INFO") + node.logs.lines("WARN") + node.logs.lines("ERROR")
				}
				return n
			}
			before := count()
			if before == 0 {
				t.Errorf("%s: nothing is logged of the connection", what)
			}
			for range 100 {
				p.scrape(t, site+"/metrics", "10").is(t, what, http.StatusOK, "", metrics)
			}
			for range 100 {
				p.scrape(t, "http://web-1:9/metrics", "10").is(t, what, map[bool]int{false: 500, true: 502}[noUpgrade], map[bool]string{true: "target_down"}[noUpgrade], "*")
			}
			if n := count() - before; n != 0 {
				t.Errorf("%s: %d lines for 200 scrapes: %s", what, n, p.logs)
			}
			registries := []*prometheus.Registry{p.metrics}
			if node != nil {
				registries = append(registries, node.metrics)
			}
			for _, r := range registries {
				problems, err := testutil.GatherAndLint(r)
				if err != nil || len(problems) > 0 {
					t.Errorf("%s: %v, %v", what, problems, err)
				}
				families, err := r.Gather()
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range families {
					if !strings.HasPrefix(f.GetName(), "promferry_proxy_") && !strings.HasPrefix(f.GetName(), "promferry_client_") {
						t.Errorf("%s: metric %s", what, f.GetName())
					}
				}
			}
		}
	})
}

// TestW18Memory: an idle client costs PushProx's proxy 20 KiB. What is measured here is all that
// this process has for a poll over TCP, the other end's bare connection included.
func TestW18Memory(t *testing.T) {
	n := &network{}
	h := startHub(t, n, "hub:8080", n.listenTCP(t, "hub:8080"), options{level: slog.LevelError})
	memory := func() uint64 {
		runtime.GC()
		runtime.GC() // What pools held until the first.
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	var conns []net.Conn
	connect := func(clients int) {
		for range clients {
			conn, err := n.Dial(t.Context(), "tcp", "hub:8080")
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
			if _, err := io.WriteString(conn, pollOf(fmt.Sprintf("host-%d.example.org", len(conns)))); err != nil {
				t.Fatal(err)
			}
		}
		until(t, "all polls are there", func() bool {
			return value(t, h.metrics, "promferry_proxy_lines", "state", "free") == float64(len(conns))
		})
	}
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	connect(100)
	before := memory()
	const clients = 1500
	connect(clients)
	each := (int64(memory()) - int64(before)) / clients
	t.Logf("%d bytes for each", each)
	if each > 14<<10 {
		t.Errorf("%d bytes for each, want at most 14 KiB", each)
	}
}

// TestW8HalfAnAnswer: a client has the Id when the rest of the answer to its poll does not get
// through. Its response must not wait for ever. (A goroutine that does ends the whole run.)
func TestW8HalfAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, options{})
		conn, _ := p.connect(t)
		conn.send(t, pollOf(name))
		synctest.Wait()
		got := p.begin(t, site+"/metrics", "10")
		said := ""
		for !regexp.MustCompile(`\nId: \S+\r\n`).MatchString(said) {
			b := make([]byte, 1)
			if _, err := conn.Read(b); err != nil {
				t.Fatal(err)
			}
			said += string(b)
		}
		_, id, _ := strings.Cut(strings.TrimSpace(said), "\nId: ")
		pusher, told := p.connect(t)
		pusher.send(t, pushOf("HTTP/1.1 200 OK\r\nId: "+id+"\r\nContent-Length: 2\r\n\r\n1\n"))
		synctest.Wait()
		_ = conn.Close()
		done := make(chan int, 1)
		go func() {
			resp, err := http.ReadResponse(told.Reader, nil) //nolint:bodyclose // The connection ends.
			if err != nil {
				done <- 0
				return
			}
			done <- resp.StatusCode
		}()
		<-got
		pass(time.Minute)
		select {
		case <-done:
		default:
			t.Error("the response waits for ever")
		}
		_ = pusher.Close()
	})
}
