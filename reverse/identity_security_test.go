package reverse_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/reverse"
)

// byToken lets a client be what its token says: the name, and the name with anything after it.
func byToken(r *http.Request, name string) (reverse.Grant, error) {
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	switch {
	case token == "":
		return nil, &reverse.Refusal{Status: http.StatusUnauthorized, Text: "no"}
	case token != name && !strings.HasPrefix(token, "any-"):
		return nil, &reverse.Refusal{Status: http.StatusForbidden, Text: "no"}
	}
	return who(token), nil
}

func withTokens(c *reverse.RegistryConfig) { c.Authorize = byToken }

func bearer(token string) string { return "Authorization: Bearer " + token + "\r\n" }

// ask sends a request by hand and returns the status of its answer.
func (w *world) ask(request string) int {
	w.t.Helper()
	c := w.raw()
	c.send(request)
	resp, _, err := c.response()
	if err != nil {
		w.t.Errorf("%.60q: %v", request, err)
		return 0
	}
	return resp.StatusCode
}

const upgrade = "Connection: Upgrade\r\nUpgrade: PTTH/1.0\r\n"

func hello(name, session string) string {
	return reverse.HeaderClient + ": " + name + "\r\n" + reverse.HeaderSession + ": " + session + "\r\n"
}

// TestS1NothingBeforeAuthentication: who shows nothing leaves nothing behind.
func TestS1NothingBeforeAuthentication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{registry: withTokens})
		for what, request := range map[string]string{
			"a line":         "GET /ptth HTTP/1.1\r\nHost: x\r\n" + upgrade + hello(clientName, anySession) + nodeAnnounced + "\r\n",
			"a poll":         "POST /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nweb-1",
			"our own poll":   "POST /poll HTTP/1.1\r\nHost: x\r\n" + hello(clientName, anySession) + nodeAnnounced + "Content-Length: 5\r\n\r\nweb-1",
			"goodbye":        "DELETE /ptth HTTP/1.1\r\nHost: x\r\n" + hello(clientName, anySession) + "\r\n",
			"a poll as PUT":  "POST /poll HTTP/1.1\r\nHost: x\r\nAuthorization: \r\nContent-Length: 5\r\n\r\nweb-1",
			"without a name": "POST /poll HTTP/1.1\r\nHost: x\r\nAuthorization: \r\nContent-Length: 5\r\n\r\nweb-1",
		} {
			if status := w.ask(request); status != http.StatusUnauthorized {
				t.Errorf("%s: %d", what, status)
			}
		}
		if known := w.registry.Status().Clients; len(known) != 0 {
			t.Errorf("kept: %+v", known)
		}
		if code, body := sd(w); code != http.StatusOK && code != http.StatusServiceUnavailable || strings.Contains(body, "web-1") {
			t.Errorf("listed: %d %s", code, body)
		}
	})
}

// TestS2NameBinding: a credential for one name is none for another, whatever is done with it.
func TestS2NameBinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{registry: withTokens})
		victim := w.line("victim", anySession, bearer("victim"))
		synctest.Wait()
		evil := bearer("evil")
		for what, request := range map[string]string{
			"a line":                 "GET /ptth HTTP/1.1\r\nHost: x\r\n" + upgrade + evil + hello("victim", nextSession) + "\r\n",
			"a line of its session":  "GET /ptth HTTP/1.1\r\nHost: x\r\n" + upgrade + evil + hello("victim", anySession) + "\r\n",
			"a poll":                 "POST /poll HTTP/1.1\r\nHost: x\r\n" + evil + "Content-Length: 6\r\n\r\nvictim",
			"a poll as another":      "POST /poll HTTP/1.1\r\nHost: x\r\n" + evil + hello("evil", nextSession) + "Content-Length: 6\r\n\r\nvictim",
			"goodbye of its session": "DELETE /ptth HTTP/1.1\r\nHost: x\r\n" + evil + hello("victim", anySession) + "\r\n",
		} {
			if status := w.ask(request); status != http.StatusForbidden {
				t.Errorf("%s: %d", what, status)
			}
		}
		done := make(chan answer)
		go func() { done <- w.scrape("http://victim:9100/metrics", 5*time.Second) }()
		victim.request()
		victim.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if a := <-done; string(a.body) != "ok" {
			t.Errorf("the victim's scrape: %v", a)
		}
	})
}

// TestS4ResultBelongsToItsClient: a response is taken from the client that the scrape was issued
// to, once, and before the scrape's time is up.
func TestS4ResultBelongsToItsClient(t *testing.T) {
	for _, early := range []bool{false, true} { // The ID as a header of the request, as our clients have it.
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, newPipes(), options{registry: withTokens})
			push := func(id, token string) int {
				body, more := "HTTP/1.1 200 OK\r\nId: "+id+"\r\nContent-Length: 5\r\n\r\n"+token[:5], bearer(token)
				if early {
					more += "Id: " + id + "\r\n"
				}
				c := w.raw()
				c.push(body, more)
				resp, _, err := c.response()
				if err != nil {
					t.Fatal(err)
				}
				return resp.StatusCode
			}
			c := w.raw()
			c.send("POST /poll HTTP/1.1\r\nHost: x\r\n" + bearer("victim") + hello("victim", anySession) + "Content-Length: 6\r\n\r\nvictim")
			synctest.Wait()
			done := make(chan answer)
			go func() { done <- w.scrape("http://victim:9100/metrics", 5*time.Second) }()
			id := c.polled().Header.Get("Id")
			if len(id) < 26 {
				t.Errorf("the ID %q has less than 128 bits", id)
			}
			for _, token := range []string{"evil-client", "any-victim", ""} {
				if token == "" {
					token = "     "
				}
				if status := push(id, token); status != http.StatusForbidden && status != http.StatusUnauthorized {
					t.Errorf("a response of %q: %d", token, status)
				}
			}
			if status := push(strings.Repeat("A", len(id)), "victim"); status != http.StatusGone {
				t.Errorf("a made up ID: %d", status)
			}
			if status := push("", "victim"); status != http.StatusGone {
				t.Errorf("no ID: %d", status)
			}
			if status := push(id, "victim"); status != http.StatusOK {
				t.Errorf("the client's own: %d", status)
			}
			if a := <-done; string(a.body) != "victi" {
				t.Errorf("the scraper got %v", a)
			}
			if status := push(id, "victim"); status != http.StatusGone {
				t.Errorf("the same again: %d", status)
			}
			// Too late.
			c.send("POST /poll HTTP/1.1\r\nHost: x\r\n" + bearer("victim") + hello("victim", anySession) + "Content-Length: 6\r\n\r\nvictim")
			synctest.Wait()
			go func() { done <- w.scrape("http://victim:9100/metrics", 2*time.Second) }()
			id = c.polled().Header.Get("Id")
			if a := <-done; a.status != http.StatusGatewayTimeout {
				t.Errorf("the scraper got %v", a)
			}
			if status := push(id, "victim"); status != http.StatusGone {
				t.Errorf("too late: %d", status)
			}
		})
	}
}

// TestS5DuplicateName: another identity does not get a name that is held, and the same one takes
// over seen.
func TestS5DuplicateName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{registry: withTokens})
		first := w.line(clientName, anySession, bearer(clientName))
		synctest.Wait()
		if status := w.ask("GET /ptth HTTP/1.1\r\nHost: x\r\n" + upgrade + bearer("any-other") + hello(clientName, nextSession) + "\r\n"); status != http.StatusConflict {
			t.Errorf("another identity: %d", status)
		}
		second := w.line(clientName, nextSession, bearer(clientName))
		synctest.Wait()
		if n := w.metric("promferry_proxy_duplicate_sessions_total"); n != 1 {
			t.Errorf("%v sessions were counted as duplicate", n)
		}
		done := make(chan answer)
		go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
		second.request()
		second.send("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
		if a := <-done; string(a.body) != "second" {
			t.Errorf("the newest is scraped: %v", a)
		}
		// When the newest goes, the one that is still there is scraped, at once.
		_ = second.Close()
		synctest.Wait()
		go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
		go func() {
			first.request()
			_, _ = io.WriteString(first, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst")
		}()
		if a := <-done; string(a.body) != "first" {
			t.Errorf("the one that is left: %v", a)
			_ = first.Close()
		}
	})
}

// TestS8Revocation ends lines and polls at once.
func TestS8Revocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{registry: withTokens})
		line := w.line(clientName, anySession, bearer(clientName))
		poll := w.raw()
		poll.send("POST /poll HTTP/1.1\r\nHost: x\r\n" + bearer("web-2") + hello("web-2", anySession) + "Content-Length: 5\r\n\r\nweb-2")
		synctest.Wait()
		revoke := func(valid bool) {
			w.revoke(func(reverse.Grant, string) bool { return valid })
			synctest.Wait()
		}
		revoke(true)
		if n := w.metric("promferry_proxy_lines"); n != 2 {
			t.Errorf("%v lines", n)
		}
		revoke(false)
		if n := w.metric("promferry_proxy_lines"); n != 0 {
			t.Errorf("%v lines are left", n)
		}
		if !line.ended(time.Second) || !poll.ended(time.Second) {
			t.Error("a connection is left")
		}
	})
}

// face is that of clients, which a reload of the rules opens to all or closes.
type face struct{ open atomic.Bool }

func (f *face) authorize(r *http.Request, name string) (reverse.Grant, error) {
	if f.open.Load() {
		return who(""), nil
	}
	return byToken(r, name)
}

// valid tells whether a grant of what the face was is one of what it is.
func (f *face) valid(g reverse.Grant, _ string) bool { return f.open.Load() == (g.Identity() == "") }

// revoke ends what is not valid any more, as cmd has it.
func (w *world) revoke(valid func(reverse.Grant, string) bool) {
	w.registry.Revoke(valid)
	w.lines.Revoke(valid)
	w.polls.Revoke(valid)
	w.proxy.Revoke(func(g reverse.Grant) bool { return valid(g, "") })
}

// pollAs asks for a scrape by hand, as web-1.
func (c *raw) pollAs(more string) {
	c.send("POST /poll HTTP/1.1\r\nHost: x\r\n" + more + "Content-Length: 5\r\n\r\nweb-1")
}

// TestS8FaceOpenedAndClosed: what began while anybody could be a client ends when that is over, and
// the other way round. The name is free at once: the client whose it is connects again.
func TestS8FaceOpenedAndClosed(t *testing.T) {
	ours := reverse.HeaderSession + ": " + anySession + "\r\n"
	half := "HTTP/1.1 200 OK\r\nId: ID\r\nContent-Length: 200000\r\n\r\n" + strings.Repeat("x", 100_000)
	respond := func(w *world, poll *raw, more, idHeader string) *raw {
		id := poll.polled().Header.Get("Id")
		c := w.raw()
		c.send("POST /push HTTP/1.1\r\nHost: x\r\n" + more + strings.ReplaceAll(idHeader, "ID", id) +
			"Content-Length: 300000\r\n\r\n" + strings.ReplaceAll(half, "ID", id))
		return c
	}
	for name, begin := range map[string]func(w *world, credential string, ask func()) *raw{
		"an idle line": func(w *world, credential string, _ func()) *raw { return w.line(clientName, anySession, credential) },
		"a line in use": func(w *world, credential string, ask func()) *raw {
			c := w.line(clientName, anySession, credential)
			ask()
			c.request()
			return c
		},
		"half an answer": func(w *world, credential string, ask func()) *raw {
			c := w.line(clientName, anySession, credential)
			ask()
			c.request()
			c.send(half)
			return c
		},
		"a session whose lines have ended": func(w *world, credential string, _ func()) *raw {
			c := w.line(clientName, anySession, credential)
			synctest.Wait()
			_ = c.Close()
			return c
		},
		"a poll": func(w *world, credential string, _ func()) *raw {
			c := w.raw()
			c.pollAs(credential + ours)
			return c
		},
		"a poll of PushProx's": func(w *world, credential string, _ func()) *raw {
			c := w.raw()
			c.pollAs(credential)
			return c
		},
		"a scrape that is taken": func(w *world, credential string, ask func()) *raw {
			c := w.raw()
			c.pollAs(credential + ours)
			synctest.Wait()
			ask()
			c.polled()
			return c
		},
		"half a response": func(w *world, credential string, ask func()) *raw {
			c := w.raw()
			c.pollAs(credential + ours)
			synctest.Wait()
			ask()
			return respond(w, c, credential+ours, "Id: ID\r\n")
		},
		"half a response of PushProx's": func(w *world, credential string, ask func()) *raw {
			c := w.raw()
			c.pollAs(credential)
			synctest.Wait()
			ask()
			return respond(w, c, credential, "")
		},
	} {
		for _, closes := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " closes ", closes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := &face{}
					f.open.Store(closes)
					before, after := "", bearer(clientName)
					if !closes {
						before, after = after, before
					}
					w := newWorld(t, newPipes(), options{registry: func(c *reverse.RegistryConfig) { c.Authorize = f.authorize }})
					done := make(chan answer, 1)
					asked := false
					c := begin(w, before, func() {
						asked = true
						synctest.Wait()
						go func() { done <- w.scrape("http://web-1:9100/metrics", 30*time.Second) }()
					})
					synctest.Wait()
					f.open.Store(!closes)
					began := time.Now()
					w.revoke(f.valid)
					if asked {
						if a := <-done; a.broken == nil && a.status != http.StatusServiceUnavailable {
							t.Errorf("the scrape: %v", a)
						}
					}
					again := w.line(clientName, anySession, after) // Refused, it would fail.
					synctest.Wait()
					if took := time.Since(began); took != 0 {
						t.Errorf("only after %v", took)
					}
					if !c.ended(time.Second) {
						t.Error("the connection is left")
					}
					go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
					again.request()
					again.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
					if a := <-done; string(a.body) != "ok" {
						t.Errorf("the next scrape: %v", a)
					}
					if n := w.metric("promferry_proxy_lines"); n != 1 {
						t.Errorf("%v lines", n)
					}
					if n := w.metric("promferry_proxy_duplicate_sessions_total"); n != 0 {
						t.Errorf("%v sessions were counted as duplicate", n)
					}
					<-time.After(time.Second) // The server waits that long for what it does not read.
				})
			})
		}
	}
}

// TestS8RevocationOfTunnels: a tunnel ends when either end is not let in any more.
func TestS8RevocationOfTunnels(t *testing.T) {
	for _, revoked := range []string{"", "scraper"} { // Of the client and of the scraper.
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, newPipes(), options{
				registry: func(c *reverse.RegistryConfig) {
					c.Authorize = func(*http.Request, string) (reverse.Grant, error) { return who(""), nil }
				},
				proxy: func(c *reverse.ProxyConfig) {
					c.Authorize = func(*http.Request) (reverse.Grant, error) { return who("scraper"), nil }
				},
			})
			line := w.line(clientName, anySession, "")
			synctest.Wait()
			scraper := w.raw()
			scraper.send("CONNECT web-1:8443 HTTP/1.1\r\nHost: web-1:8443\r\n\r\n")
			line.request()
			line.send("HTTP/1.1 200 OK\r\n\r\n")
			if resp, err := http.ReadResponse(scraper.r, &http.Request{Method: http.MethodConnect}); err != nil || resp.StatusCode != http.StatusOK { //nolint:bodyclose // It has none.
				t.Fatalf("no tunnel: %v %v", resp, err)
			}
			go func() { _, _ = io.WriteString(scraper, "hello") }()
			b := make([]byte, 5)
			if _, err := io.ReadFull(line.r, b); err != nil || string(b) != "hello" {
				t.Fatalf("%q %v", b, err)
			}
			w.revoke(func(g reverse.Grant, _ string) bool { return g != who(revoked) })
			if !line.ended(time.Second) || !scraper.ended(time.Second) {
				t.Errorf("the tunnel is left when %q is revoked", revoked)
			}
		})
	}
}

// credential is a grant by one of several tokens of an identity.
type credential struct{ token string }

func (credential) Identity() string { return "web" }

// TestS8RevocationOfOneToken: of the lines of one session, those end that were opened by the token
// that is taken away.
func TestS8RevocationOfOneToken(t *testing.T) {
	for _, kind := range []string{reverse.KindPTTH, reverse.KindLongPoll, reverse.KindPushProx} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{registry: func(c *reverse.RegistryConfig) {
					c.Authorize = func(r *http.Request, _ string) (reverse.Grant, error) {
						return credential{r.Header.Get("Authorization")}, nil
					}
				}})
				open := func(token string) *raw {
					if kind == reverse.KindPTTH {
						return w.line(clientName, anySession, bearer(token))
					}
					c, session := w.raw(), ""
					if kind == reverse.KindLongPoll {
						session = reverse.HeaderSession + ": " + anySession + "\r\n"
					}
					c.pollAs(bearer(token) + session)
					synctest.Wait()
					return c
				}
				stolen := open("old")
				genuine := open("new")
				synctest.Wait()
				w.revoke(func(g reverse.Grant, _ string) bool { return g != credential{"Bearer old"} })
				synctest.Wait()
				if !stolen.ended(time.Second) {
					t.Error("the connection by the old token is left")
				}
				if n := w.metric("promferry_proxy_lines"); n != 1 {
					t.Errorf("%v lines", n)
				}
				if genuine.ended(time.Second) {
					t.Error("the connection by the new token ended")
				}
				// No line stays open that is not scraped any more.
				open("old")
				synctest.Wait()
				w.revoke(func(g reverse.Grant, _ string) bool { return g != credential{"Bearer old"} })
				synctest.Wait()
				if n := w.metric("promferry_proxy_lines"); n == 0 && !genuine.ended(time.Second) {
					t.Error("a connection is left that no scrape uses")
				}
			})
		})
	}
}

// asProxy sends a request over a line of a client, as a hostile proxy may.
func asProxy(t *testing.T, c *reverse.Client, request string) *httptest.ResponseRecorder {
	t.Helper()
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
	if err != nil {
		t.Logf("%.60q makes no request: %v", request, err)
		return nil
	}
	rec := httptest.NewRecorder()
	c.ServeHTTP(rec, req.WithContext(t.Context()))
	return rec
}

// TestS9AllowList: a hostile proxy reaches what is configured, and nothing else.
func TestS9AllowList(t *testing.T) {
	var reached atomic.Pointer[string]
	note := func(r *http.Request) (*http.Response, error) {
		s := r.Method + " " + r.URL.String()
		reached.Store(&s)
		return plain("x"), nil
	}
	dialed := func(_ context.Context, _, address string) (net.Conn, error) {
		reached.Store(&address)
		return nil, errors.New("refused")
	}
	w := newWorld(t, newLoopback(t), options{})
	n := w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
		c.HTTP, c.OwnHTTP, c.Dial, c.DialOwn = doer(note), doer(note), dialed, dialed
		c.Allow = []reverse.Allowance{{Port: 9200, Path: "/health"}, {Port: 9300, Path: "/a/b"}}
	},
		reverse.PullTarget{Job: "probe", URL: mustURL(t, "http://127.0.0.1:9115/probe?module=a")},
		reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:9100/metrics")},
		reverse.PullTarget{Job: "tls", URL: mustURL(t, "https://10.0.0.1:8443/m")},
	)
	const timeout = "X-Prometheus-Scrape-Timeout-Seconds: 5\r\n"
	for _, target := range []string{
		"GET http://169.254.169.254/latest/meta-data", "GET http://[fd00:ec2::254]/", "GET http://127.0.0.1:9100/metrics", "GET http://localhost:9100/metrics",
		"GET http://[::1]:9100/metrics", "GET http://[::ffff:127.0.0.1]:9100/metrics", "GET http://0x7f000001:9100/metrics", "GET http://2130706433:9100/metrics",
		"GET http://0:9100/metrics", "GET http://web-1.:9100/metrics", "GET http://WEB-1:9100/metrics", "GET http://web-1.evil.example:9100/metrics",
		"GET http://web-1@169.254.169.254:9100/metrics", "GET http://169.254.169.254%40web-1:9100/metrics", "GET http://web-1:9100@evil/metrics",
		"GET http://web-1:9101/metrics", "GET http://web-1:9100/", "GET http://web-1:9100/metrics/../secret", "GET http://web-1:9100//metrics",
		"GET http://web-1:9100/metrics%00", "GET http://web-1:9100/metrics/", "GET http://web-1:9100/metrics;x", "GET http://web-1:9100/metrics%3Fx",
		"GET http://web-1:09100.1/metrics", "GET http://web-1:+9100/metrics", "GET http://web-1:74636/metrics", "GET http://web-1:-1/metrics", "GET http://web-1:0/health",
		"GET http://web-1:9200/health/../x", "GET http://web-1:9200/health%2f..%2fx", "GET http://web-1:9200/", "GET https://web-1:9100/metrics", "GET file:///etc/passwd",
		"GET http://web-1:9300/a%2fb", "GET http://web-1:9300/a%2Fb", "GET http://web-1:9300/a/../b", "GET http://web-1:9300/a//b", "GET http://web-1:9300/a/%2e/b",
		"GET http://web-1:9115/probe", "GET http://web-1:9115/probe?module=b", "GET http://web-1:9115/probe?module=a&target=evil", "GET http://web-1:9115/probe?module=a&module=b", "GET http://web-1:9115/probe?module=a;target=evil",
		"GET ftp://web-1:9100/metrics", "GET gopher://web-1:9100/metrics", "GET unix:///run/docker.sock", "GET /metrics", "GET *", "GET //web-1:9100/metrics",
		"GET http:web-1:9100/metrics", "GET http:///metrics", "GET http://web-1:9100/metrics?_scheme=https",
		"POST http://web-1:9100/metrics", "PUT http://web-1:9100/metrics", "DELETE http://web-1:9100/metrics", "TRACE http://web-1:9100/metrics", "OPTIONS http://web-1:9100/metrics", "PATCH http://web-1:9100/metrics", "get http://web-1:9100/metrics",
		"CONNECT 169.254.169.254:80", "CONNECT web-1:22", "CONNECT web-1:9100", "CONNECT web-1:9200", "CONNECT web-1", "CONNECT /web-1:8443", "CONNECT web-1:0", "CONNECT 10.0.0.1:8443", "CONNECT evil@web-1:8443", "CONNECT web-1:8443@evil:1", "CONNECT [::1]:8443", "CONNECT web-1:73979",
	} {
		reached.Store(nil)
		rec := asProxy(t, n.client, target+" HTTP/1.1\r\nHost: web-1:9100\r\n"+timeout+"\r\n")
		if s := reached.Load(); s != nil {
			t.Errorf("%s reaches %s", target, *s)
		}
		if rec != nil && rec.Code < 400 {
			t.Errorf("%s: %d", target, rec.Code)
		}
	}
	for target, want := range map[string]string{
		"GET http://web-1:9100/metrics": "GET http://127.0.0.1:9100/metrics", "GET http://web-1:9200/health": "GET http://web-1:9200/health",
		"GET http://web-1:9300/%61/b": "GET http://web-1:9300/a/b", "GET http://web-1:9115/probe?_scheme=&mod%75le=a": "GET http://127.0.0.1:9115/probe?module=a", "CONNECT web-1:8443": "10.0.0.1:8443",
	} {
		reached.Store(nil)
		asProxy(t, n.client, target+" HTTP/1.1\r\nHost: evil\r\n"+timeout+"\r\n")
		if s := reached.Load(); s == nil || *s != want {
			t.Errorf("%s does not reach %s", target, want)
		}
	}
	// What is owed on a scrape, and a time that is none.
	for _, more := range []string{timeout + "Content-Length: 1\r\n", timeout + "Transfer-Encoding: chunked\r\n", "", "X-Prometheus-Scrape-Timeout-Seconds: NaN\r\n", "X-Prometheus-Scrape-Timeout-Seconds: -1\r\n", "X-Prometheus-Scrape-Timeout-Seconds: Inf\r\n", "X-Prometheus-Scrape-Timeout-Seconds: 1e300\r\n"} {
		reached.Store(nil)
		asProxy(t, n.client, "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1\r\n"+more+"\r\nx")
		if s := reached.Load(); s != nil {
			t.Errorf("with %q it reaches %s", more, *s)
		}
	}
}

// TestS11NoRedirects: a target cannot send the client elsewhere, and neither it nor a client the
// scraper to another client or port, with its credential.
func TestS11NoRedirects(t *testing.T) {
	var reached atomic.Bool
	secret, _ := target(t, func(http.ResponseWriter, *http.Request) { reached.Store(true) })
	for _, kind := range kinds {
		var location atomic.Pointer[string]
		p, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", *location.Load())
			w.WriteHeader(http.StatusFound)
		})
		w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
		n := w.join(clientName, anySession, p)
		w.connected(clientName, 1)
		for to, want := range map[string]int{
			secret.URL.String(): http.StatusBadGateway, "http://web-2:9100/metrics": http.StatusBadGateway, "//web-1:1/metrics": http.StatusBadGateway,
			"/login": http.StatusFound, at(clientName, p) + "/": http.StatusFound,
		} {
			location.Store(&to)
			if a := w.scrape(at(clientName, p), 5*time.Second); a.status != want || reached.Load() || want == http.StatusFound && a.header.Get("Location") != to {
				t.Errorf("%s, %s: %v", kind, to, a)
			}
			// At the client itself: the proxy may be another one.
			if rec := asProxy(t, n.client, "GET "+at(clientName, p)+" HTTP/1.1\r\nHost: x\r\n"+reverse.HeaderTimeout+": 5\r\n\r\n"); rec.Code != want {
				t.Errorf("%s, %s: the client answers %d %s", kind, to, rec.Code, rec.Body)
			}
		}
		if n := w.metric("promferry_proxy_scrapes_total", "result", "redirect"); n != 3 {
			t.Errorf("%s: %v redirects are counted", kind, n)
		}
	}
}

// TestS11RedirectOfAClient: what a hostile client answers sends the scraper nowhere else, by no
// status and by no header.
func TestS11RedirectOfAClient(t *testing.T) {
	const away = "http://me:canary@victim:9100/admin?token=canary"
	for _, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, newPipes(), options{})
			done := make(chan answer)
			line := &raw{}
			if kind == reverse.KindPTTH {
				line = w.line(clientName, anySession, "")
			}
			scrape := func(said string) answer {
				if kind == reverse.KindPTTH {
					synctest.Wait()
					go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
					line.request()
					line.send(said)
					return <-done
				}
				poll, push := w.raw(), w.raw()
				poll.poll(clientName, anySession)
				synctest.Wait()
				go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
				id := poll.polled().Header.Get("Id")
				go func() { _, _ = io.Copy(io.Discard, push) }()
				push.push(said, "Id: "+id+"\r\n")
				return <-done
			}
			for status := 300; status < 400; status++ {
				said := fmt.Sprintf("HTTP/1.1 %d Moved\r\n%s: timeout\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n", status, reverse.HeaderError, away)
				a := scrape(said)
				if a.status != http.StatusBadGateway || a.header.Get(reverse.HeaderError) != "redirect" || a.header.Get("Location") != "" {
					t.Errorf("%s: %d: %v %v", kind, status, a, a.header)
				}
				if text := string(a.body); !strings.Contains(text, "victim:9100/admin") || strings.Contains(text, "canary") {
					t.Errorf("%s: %d: %s", kind, status, text)
				}
			}
			if n := w.metric("promferry_proxy_scrapes_total", "result", "redirect"); n != 100 {
				t.Errorf("%s: %v redirects are counted", kind, n)
			}
			two := scrape("HTTP/1.1 302 Found\r\nLocation: /login\r\nlocation: " + away + "\r\nContent-Length: 0\r\n\r\n")
			if two.status != http.StatusBadGateway {
				t.Errorf("%s: two Locations: %v", kind, two)
			}
			long := scrape("HTTP/1.1 302 Found\r\nLocation: http://victim/" + strings.Repeat("a", 60_000) + "\r\nContent-Length: 0\r\n\r\n")
			if long.status != http.StatusBadGateway || len(long.body) > 500 {
				t.Errorf("%s: a long Location: %v with %d bytes", kind, long, len(long.body))
			}
			none := scrape("HTTP/1.1 304 Not Modified\r\n\r\n")
			if none.status != http.StatusNotModified {
				t.Errorf("%s: without a Location: %v", kind, none)
			}
			others := ""
			for _, name := range []string{"Refresh", "Content-Location", "Link", "Alt-Svc", "Uri", "Clear-Site-Data", "Strict-Transport-Security"} {
				others += name + ": " + away + "\r\n"
			}
			a := scrape("HTTP/1.1 200 OK\r\n" + others + "Content-Length: 2\r\n\r\nok")
			if string(a.body) != "ok" {
				t.Errorf("%s: %v", kind, a)
			}
			for name, values := range a.header {
				if strings.Contains(strings.Join(values, ""), "victim") {
					t.Errorf("%s: the scraper gets %s: %q", kind, name, values)
				}
			}
			<-time.After(time.Second) // The server waits that long for what it does not read.
		})
	}
}

// TestS12Authority: it is the URL that says whose scrape it is, and Host says nothing.
func TestS12Authority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{})
		line := w.line(clientName, anySession, "")
		w.line("web-2", nextSession, "")
		synctest.Wait()
		c := w.raw()
		c.send("GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-2:9100\r\n\r\n")
		if r := line.request(); r.Host != "web-1:9100" {
			t.Errorf("the client sees the host %q", r.Host)
		}
		line.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if resp, body, err := c.response(); err != nil || body != "ok" {
			t.Errorf("%v %q %v", resp, body, err)
		}
		for _, request := range []string{
			"GET https://web-1:9100/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n",
			"GET ftp://web-1:9100/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n",
			"GET http://web-2@web-1:9100/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n",
			"POST http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1\r\nContent-Length: 0\r\n\r\n",
			"CONNECT web-1 HTTP/1.1\r\nHost: web-1\r\n\r\n",
			"CONNECT /web-1:1 HTTP/1.1\r\nHost: web-1\r\n\r\n",
		} {
			if status := w.ask(request); status != http.StatusBadRequest && status != http.StatusMethodNotAllowed {
				t.Errorf("%q: %d", request, status)
			}
		}
	})
}

// TestS13HopByHop: what is between two neighbours stays between them, both ways.
func TestS13HopByHop(t *testing.T) {
	dropped := []string{
		"Connection", "Proxy-Connection", "Keep-Alive", "Te", "Trailer", "Upgrade", "Proxy-Authorization", "Proxy-Authenticate",
		"X-Named", "Id", "Cookie", reverse.HeaderClient, reverse.HeaderSession, reverse.HeaderAnnounce, reverse.HeaderVersion, reverse.HeaderProxy, reverse.HeaderHeartbeat, reverse.HeaderError,
	}
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			var mu sync.Mutex
			var got http.Header
			p, _ := target(t, func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				got = r.Header.Clone()
				for _, name := range dropped {
					if name != "Connection" {
						w.Header().Set(name, "canary")
					}
				}
				w.Header().Set("Set-Cookie", "a=canary")
				w.Header().Set("X-Internal", "canary")
				w.Header().Set("Content-Type", "text/plain")
				_, _ = io.WriteString(w, "ok")
			})
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
			w.join(clientName, anySession, p)
			w.connected(clientName, 1)
			c := w.raw()
			request := "GET " + at(clientName, p) + " HTTP/1.1\r\nHost: x\r\nConnection: X-Named, close\r\nAccept: text/plain\r\nAuthorization: Bearer target\r\n"
			for _, name := range dropped[1:] {
				request += name + ": canary\r\n"
			}
			c.send(request + "\r\n")
			resp, body, err := c.response()
			if err != nil || body != "ok" {
				t.Fatalf("%v %q %v", resp, body, err)
			}
			mu.Lock()
			defer mu.Unlock()
			for name, values := range got {
				if strings.Contains(strings.Join(values, ""), "canary") {
					t.Errorf("the target gets %s: %v", name, values)
				}
			}
			if got.Get("Accept") != "text/plain" || got.Get("Authorization") != "Bearer target" {
				t.Errorf("the target gets %v", got)
			}
			for name, values := range resp.Header {
				if strings.Contains(strings.Join(values, ""), "canary") {
					t.Errorf("the scraper gets %s: %v", name, values)
				}
			}
			if resp.Header.Get("X-Content-Type-Options") != "nosniff" || resp.Header.Get("Content-Type") != "text/plain" {
				t.Errorf("the scraper gets %v", resp.Header)
			}
		})
	}
}

// TestS14Smuggling: what two readers may take for different requests is passed on by none.
func TestS14Smuggling(t *testing.T) {
	const scrape = "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\n"
	const smuggled = "GET http://web-1:9100/smuggled HTTP/1.1\r\nHost: web-1:9100\r\n\r\n"
	for name, request := range map[string]string{
		"Content-Length and chunks":  scrape + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":                scrape + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
		"a list of lengths":          scrape + "Content-Length: 0, 5\r\n\r\n",
		"a length with a sign":       scrape + "Content-Length: +5\r\n\r\nhello",
		"a negative length":          scrape + "Content-Length: -1\r\n\r\n",
		"a length in hexadecimals":   scrape + "Content-Length: 0x5\r\n\r\nhello",
		"chunked and a comma":        scrape + "Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
		"chunked after identity":     scrape + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
		"chunked twice":              scrape + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"chunked behind a tab":       scrape + "Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n",
		"chunked, vertical tab":      scrape + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
		"a space before the colon":   scrape + "Content-Length : 5\r\n\r\nhello",
		"a tab before the colon":     scrape + "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
		"a folded first line":        "GET http://web-1:9100/metrics HTTP/1.1\r\n Host: x\r\nHost: web-1:9100\r\n\r\n",
		"a NUL in a value":           scrape + "A: b\x00c\r\n\r\n",
		"a bare CR in a value":       scrape + "A: b\rTransfer-Encoding: chunked\r\n\r\n",
		"a name that is none":        scrape + "A(b): c\r\n\r\n",
		"no name":                    scrape + ": c\r\n\r\n",
		"no colon":                   scrape + "hello\r\n\r\n",
		"two hosts":                  scrape + "Host: evil\r\n\r\n",
		"a host with a space":        "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: a b\r\n\r\n",
		"no host":                    "GET http://web-1:9100/metrics HTTP/1.1\r\n\r\n",
		"a space in the URL":         "GET http://web-1:9100/metrics x HTTP/1.1\r\nHost: x\r\n\r\n",
		"a tab in the URL":           "GET http://web-1:9100/metrics\tx HTTP/1.1\r\nHost: x\r\n\r\n",
		"a CR in the URL":            "GET http://web-1:9100/metrics\r HTTP/1.1\r\nHost: x\r\n\r\n",
		"version 2":                  "GET http://web-1:9100/metrics HTTP/2.0\r\nHost: x\r\n\r\n",
		"version 0.9":                "GET http://web-1:9100/metrics\r\n\r\n",
		"a body of a second request": scrape + "Content-Length: 71\r\n\r\n" + smuggled,
		"a chunk of one":             scrape + "Transfer-Encoding: chunked\r\n\r\n" + "47\r\n" + smuggled + "\r\n0\r\n\r\n",
		"a chunk with an extension":  scrape + "Transfer-Encoding: chunked\r\n\r\n5;a=\nb\r\nhello\r\n0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, newLoopback(t), options{})
			var seen atomic.Int64
			w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
				c.Allow = []reverse.Allowance{{}}
				count := doer(func(*http.Request) (*http.Response, error) {
					seen.Add(1)
					return plain("x"), nil
				})
				c.HTTP, c.OwnHTTP = count, count
			}, reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:9100/metrics")})
			w.connected(clientName, 1)
			c := w.raw()
			c.send(request)
			_ = c.Conn.(*net.TCPConn).CloseWrite()
			if resp, err := http.ReadResponse(c.r, nil); err == nil {
				_ = resp.Body.Close()
				if resp.StatusCode < 400 {
					t.Errorf("got %s", resp.Status)
				}
			}
			if n := seen.Load(); n != 0 {
				t.Errorf("%d scrapes reach the client", n)
			}
		})
	}
}

// TestS14OneRequestIsOne: over the line goes exactly one request for one scrape.
func TestS14OneRequestIsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{})
		line := w.line(clientName, anySession, "")
		synctest.Wait()
		c := w.raw()
		c.send("GET http://web-1:9100/a%0d%0aX:%20y?b=%0a&c=\"'<> HTTP/1.1\nHost: x\nA: 1\n folded\nB: \xff\xfe\nContent-Length: 0\n\n")
		r := line.request()
		if line.r.Buffered() > 0 || r.Header.Get("X") != "" || strings.Contains(r.Header.Get("A"), "\n") {
			t.Errorf("the line has %v and %d bytes more", r, line.r.Buffered())
		}
	})
}

// TestS16TargetsOfAnother: a client cannot take the place that another has in the service
// discovery.
func TestS16TargetsOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{})
		for i, name := range []string{clientName, "evil"} {
			w.line(name, strings.Repeat(string(rune('A'+i)), 16), nodeAnnounced) // Both say that they are web-1.
			synctest.Wait()
		}
		<-time.After(16 * time.Second)
		_, body := sd(w)
		if !strings.Contains(body, `"web-1:9100"`) || strings.Contains(body, `"evil:9100"`) {
			t.Error(body)
		}
	})
}
