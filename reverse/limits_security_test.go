package reverse_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/ptth"
)

// ended waits until the other end closes a connection that says nothing more.
func (c *raw) ended(within time.Duration) bool {
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, c.r)
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(within):
		return false
	}
}

// TestS17Slowloris: nobody holds a connection by saying slowly, or not at all, what it began to.
func TestS17Slowloris(t *testing.T) {
	hello := reverse.HeaderClient + ": web-1\r\n" + reverse.HeaderSession + ": " + anySession + "\r\n"
	for name, said := range map[string]string{
		"nothing":                          "",
		"half a request line":              "GET http://web-1:9100/me",
		"half a header":                    "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\nA: b",
		"half a line's header":             "GET /ptth HTTP/1.1\r\nHost: x\r\nPromferry-Cl",
		"a poll without its body":          "POST /poll HTTP/1.1\r\nHost: x\r\n" + hello + "Content-Length: 5\r\n\r\nwe",
		"a response without its head":      "POST /push HTTP/1.1\r\nHost: x\r\n" + hello + "Content-Length: 500\r\n\r\nHTTP/1.1 200",
		"a response in chunks":             "POST /push HTTP/1.1\r\nHost: x\r\n" + hello + "Transfer-Encoding: chunked\r\n\r\n5\r\nHTT",
		"a scrape without its body":        "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\nContent-Length: 5\r\n\r\n",
		"a POST without its body":          "POST http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
		"a line with a body that is owed":  "GET /ptth HTTP/1.1\r\nHost: x\r\n" + hello + "Content-Length: 5\r\n\r\n",
		"discovery with a body":            "GET /sd HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
		"a line that answers nothing":      "GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + hello + "\r\n",
		"a line that answers half":         "GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + hello + "\r\n|HTTP/1.1 200 O",
		"a line that speaks without cause": "GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + hello + "\r\n|" + noContent + "x",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{})
				c := w.raw()
				said, later, more := strings.Cut(said, "|")
				c.send(said)
				if more {
					c.request2xx()
					c.send(later)
				}
				if !c.ended(35 * time.Second) {
					t.Error("the connection is still there after 35 s")
				}
			})
		})
	}
}

// request2xx reads the upgrade and the first heartbeat.
func (c *raw) request2xx() {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		c.t.Fatalf("%v %v", resp, err)
	}
	_ = resp.Body.Close()
	c.request()
}

// TestS17NonReader: nobody holds a connection by not reading what it asked for.
func TestS17NonReader(t *testing.T) {
	for name, said := range map[string]string{
		"scrape of an unknown client":  "GET http://nobody:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\n\r\n",
		"scrape that is malformed":     "GET https://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\n\r\n",
		"scrape that is not allowed":   "GET http://web-1:9100/secret HTTP/1.1\r\nHost: web-1:9100\r\nUnauthorized: 1\r\n\r\n",
		"an answer that is passed on":  "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n",
		"no timeout that is its own":   "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\n\r\n",
		"a poll by a name that is bad": "POST /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n/",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{proxy: func(c *reverse.ProxyConfig) {
					c.Authorize = func(r *http.Request) (reverse.Grant, error) {
						if r.Header.Get("Unauthorized") != "" {
							return nil, &reverse.Refusal{Status: http.StatusProxyAuthRequired, Text: "no"}
						}
						return nil, nil
					}
				}})
				n := w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
					c.HTTP = doer(func(*http.Request) (*http.Response, error) { return plain(strings.Repeat("m 1\n", 10000)), nil })
				}, reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:9100/metrics")})
				<-time.After(time.Second)
				conn, err := w.net.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(conn, said); err != nil {
					t.Fatal(err)
				}
				<-time.After(2 * time.Minute)
				if _, err := io.WriteString(conn, "x"); err == nil {
					t.Error("the connection is still there after two minutes")
				}
				_ = conn.Close()
				n.stop()
			})
		})
	}
}

// TestS17LineIsTakenBack: a scraper that reads nothing does not keep the line.
func TestS17LineIsTakenBack(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{noPTTH: kind == reverse.KindLongPoll})
				w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
					c.HTTP = doer(func(*http.Request) (*http.Response, error) { return plain(strings.Repeat("m 1\n", 10000)), nil })
				}, reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:9100/metrics")})
				<-time.After(3 * time.Second)
				conn, err := w.net.dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = conn.Close() }()
				if _, err := io.WriteString(conn, "GET http://web-1:9100/metrics HTTP/1.1\r\nHost: web-1:9100\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				<-time.After(10 * time.Second)
				if n := w.proxy.InFlight(); n != 0 {
					t.Errorf("%d scrapes are in flight after twice the timeout", n)
				}
				if a := w.scrape("http://web-1:9100/metrics", time.Second); len(a.body) != 40000 {
					t.Errorf("the next scrape: %v", a)
				}
			})
		})
	}
}

// TestS18TooLarge: a body larger than the limit is not passed on, with its length known or not.
func TestS18TooLarge(t *testing.T) {
	for _, kind := range kinds {
		for _, where := range []string{"proxy", "client"} {
			for _, length := range []bool{true, false} {
				t.Run(fmt.Sprint(kind, " at the ", where, " length known ", length), func(t *testing.T) {
					const limit = 100_000
					var sent atomic.Int64
					p, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
						if length {
							w.Header().Set("Content-Length", "100000000")
						}
						block := make([]byte, 10_000)
						for range 10_000 {
							n, err := w.Write(block)
							sent.Add(int64(n))
							if err != nil {
								return
							}
						}
					})
					o := options{noPTTH: kind == reverse.KindLongPoll, proxy: func(c *reverse.ProxyConfig) { c.MaxBytes = 1 << 40 }}
					if where == "proxy" {
						o.proxy = func(c *reverse.ProxyConfig) { c.MaxBytes = limit }
					}
					w := newWorld(t, newLoopback(t), o)
					w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
						if c.MaxBytes = limit; where == "proxy" {
							c.MaxBytes = 1 << 40
						}
					}, p)
					w.connected(clientName, 1)
					a := w.scrape(at(clientName, p), 10*time.Second)
					switch {
					case length && a.status != http.StatusRequestEntityTooLarge:
						t.Errorf("got %v", a)
					case !length && a.broken == nil && a.status < 400:
						t.Errorf("a clean end: %v", a)
					case len(a.body) > limit:
						t.Errorf("%d bytes were passed on", len(a.body))
					}
					if sent.Load() > 50_000_000 {
						t.Error("the target was read much further")
					}
				})
			}
		}
	}
}

// TestS19PerClientLimits: who asks for too much is refused, and others are not.
func TestS19PerClientLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{registry: func(c *reverse.RegistryConfig) { c.MaxLines, c.MaxScrapes, c.MaxClients = 3, 2, 2 }})
		for range 3 {
			w.line(clientName, anySession, "")
		}
		refused := func(name, session string, status int) {
			t.Helper()
			c := w.raw()
			c.send("GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + reverse.HeaderClient + ": " + name + "\r\n" + reverse.HeaderSession + ": " + session + "\r\n\r\n")
			resp, body, err := c.response()
			if err != nil || resp.StatusCode != status || resp.Header.Get("Retry-After") == "" {
				t.Errorf("%s: %v %v %q, want %d", name, resp, err, body, status)
			}
		}
		refused(clientName, anySession, http.StatusTooManyRequests)
		other := w.line("web-2", anySession, "")
		refused("web-3", anySession, http.StatusServiceUnavailable)
		synctest.Wait()
		// Scrapes: two hang, the third is refused, and another client's is not.
		var hanging sync.WaitGroup
		for range 2 {
			hanging.Go(func() { w.scrape("http://web-1:9100/metrics", 5*time.Second) })
		}
		synctest.Wait()
		if a := w.scrape("http://web-1:9100/metrics", time.Second); a.status != http.StatusTooManyRequests || a.header.Get(reverse.HeaderError) != "client_limit" {
			t.Errorf("got %v", a)
		}
		done := make(chan answer)
		go func() { done <- w.scrape("http://web-2:9100/metrics", time.Second) }()
		other.request()
		other.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if a := <-done; string(a.body) != "ok" {
			t.Errorf("another client: %v", a)
		}
		hanging.Wait()
	})
}

// TestS19GlobalLimit: more scrapes than the limit get 503.
func TestS19GlobalLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{proxy: func(c *reverse.ProxyConfig) { c.MaxScrapes = 2 }})
		for range 2 {
			w.line(clientName, anySession, "")
		}
		synctest.Wait()
		var hanging sync.WaitGroup
		for range 2 {
			hanging.Go(func() { w.scrape("http://web-1:9100/metrics", 5*time.Second) })
		}
		synctest.Wait()
		if a := w.scrape("http://web-1:9100/metrics", time.Second); a.status != http.StatusServiceUnavailable || a.header.Get(reverse.HeaderError) != "proxy_limit" {
			t.Errorf("got %v", a)
		}
		hanging.Wait()
		if n := w.proxy.InFlight(); n != 0 {
			t.Errorf("%d scrapes are in flight", n)
		}
	})
}

// TestS20Deadline: the scrape's timeout bounds the whole path, is clamped, and what Prometheus
// gives up is cancelled at the target.
func TestS20Deadline(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			type seen struct {
				timeout string
				ended   chan struct{}
			}
			asked := make(chan seen, 10)
			p, _ := target(t, func(w http.ResponseWriter, r *http.Request) {
				s := seen{r.Header.Get(reverse.HeaderTimeout), make(chan struct{})}
				asked <- s
				if r.URL.RawQuery == "body" {
					_, _ = io.WriteString(w, "half")
					w.(http.Flusher).Flush()
				}
				<-r.Context().Done()
				close(s.ended)
			})
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll, proxy: func(c *reverse.ProxyConfig) { c.MaxTimeout = 2 * time.Second }})
			w.join(clientName, anySession, p, reverse.PullTarget{Job: "b", URL: mustURL(t, "http://127.0.0.1:1/b")}, reverse.PullTarget{Job: "c", URL: mustURL(t, "http://127.0.0.1:1/c")})
			w.connected(clientName, 3)
			began := time.Now()
			a := w.scrape(at(clientName, p), 20*time.Second)
			if took := time.Since(began); a.status != http.StatusGatewayTimeout || took > 4*time.Second {
				t.Errorf("clamped: %v after %v", a, took)
			}
			s := <-asked
			var seconds float64
			if _, err := fmt.Sscan(s.timeout, &seconds); err != nil || seconds > 2 || seconds < 1 {
				t.Errorf("the target is told %q", s.timeout)
			}
			for _, query := range []string{"head", "body"} {
				ctx, cancel := context.WithCancel(t.Context())
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, at(clientName, p)+"?"+query, nil)
				if err != nil {
					t.Fatal(err)
				}
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					if resp, err := w.scraper().Do(req); err == nil {
						_, _ = io.Copy(io.Discard, resp.Body)
						_ = resp.Body.Close()
					}
				}()
				s := <-asked
				began := time.Now()
				cancel()
				<-gone
				<-s.ended
				if took := time.Since(began); took > time.Second {
					t.Errorf("%s: cancelled at the target only after %v", query, took)
				}
			}
			settle(t, "scrapes in flight", w.proxy.InFlight, 0)
			w.connected(clientName, 1)
		})
	}
}

// TestS20ClientThatDoesNotRead: a client that asks for a scrape and does not read it holds it no
// longer than the scrape's time.
func TestS20ClientThatDoesNotRead(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{})
				if kind == reverse.KindPTTH {
					w.line(clientName, anySession, "")
				} else {
					w.raw().poll(clientName, anySession)
				}
				synctest.Wait()
				began := time.Now()
				done := make(chan answer, 1)
				go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
				select {
				case a := <-done:
					// A poll that does not take its answer is given up sooner than the scrape.
					if a.status != http.StatusGatewayTimeout && (kind == reverse.KindPTTH || a.status != http.StatusServiceUnavailable) {
						t.Errorf("got %v", a)
					}
				case <-time.After(time.Minute):
					t.Errorf("no answer within a minute, and %d scrapes in flight", w.proxy.InFlight())
				}
				if n := w.proxy.InFlight(); n != 0 {
					t.Errorf("%d scrapes in flight after %v", n, time.Since(began))
				}
			})
		})
	}
}

// TestS22: names and sessions are checked before anything is kept of them.
func TestS22NamesAreChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{})
		for _, name := range []string{"", "a b", "a/b", "a%00", "<b>", strings.Repeat("a", 254), "ünï", `"`, "a,b", "a{b=\"c\"}"} {
			for _, session := range []string{anySession, "short", strings.Repeat("A", 65), "AAAAAAAAAAAAAAAA-"} {
				if session == anySession || name == "" {
					c := w.raw()
					c.send("GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + reverse.HeaderClient + ": " + name + "\r\n" + reverse.HeaderSession + ": " + session + "\r\n\r\n")
					if resp, _, err := c.response(); err != nil || resp.StatusCode != http.StatusBadRequest {
						t.Errorf("%q %q: %v %v", name, session, resp, err)
					}
				}
			}
		}
		for _, announcement := range []string{
			`{}`, `[]`, `x`, `{"instance":"a","labels":{"__address__":"x"}}`, `{"instance":"a","labels":{"job":"x"}}`, `{"instance":"a","labels":{"instance":"x"}}`,
			`{"instance":"a","targets":[{"job":"a","port":1,"path":"/","query":"_scheme=https"}]}`, `{"instance":"a","targets":[{"job":"","port":1,"path":"/"}]}`,
			`{"instance":"` + strings.Repeat("a", reverse.MaxAnnouncement) + `"}`, strings.Repeat("[", 20000),
		} {
			c := w.raw()
			c.send("GET /ptth HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n" + reverse.HeaderClient + ": web-1\r\n" + reverse.HeaderSession + ": " + anySession + "\r\n" + reverse.HeaderAnnounce + ": " + announcement + "\r\n\r\n")
			if resp, _, err := c.response(); err != nil || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%.60q: %v %v", announcement, resp, err)
			}
		}
		if known := w.registry.Status().Clients; len(known) != 0 {
			t.Errorf("kept: %+v", known)
		}
	})
}

// TestS22NoNamesInMetrics: no client, target or scraper makes a series.
func TestS22NoNamesInMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newPipes(), options{})
		count := func() int {
			families, err := w.metrics.Gather()
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, f := range families {
				n += len(f.GetMetric())
				if strings.Contains(f.String(), "canary") {
					t.Errorf("a name in %s", f.GetName())
				}
			}
			return n
		}
		before := count()
		for i := range 5 {
			c := w.line(fmt.Sprint("canary-", i), anySession, strings.ReplaceAll(nodeAnnounced, "web-1", fmt.Sprint("canary-", i)))
			synctest.Wait()
			done := make(chan answer)
			go func() { done <- w.scrape(fmt.Sprintf("http://canary-%d:9100/canary", i), time.Second) }()
			c.request()
			c.send("HTTP/1.1 404 canary\r\nContent-Length: 0\r\nPromferry-Error: canary\r\n\r\n")
			if a := <-done; a.header.Get(reverse.HeaderError) == "canary" {
				t.Errorf("the client's own word is passed on: %v", a)
			}
		}
		w.scrape("http://canary:1/canary", time.Second)
		if after := count(); after != before {
			t.Errorf("%d series, before %d", after, before)
		}
	})
}

// TestS23FlappingProxyIsLeftAlone: a proxy that takes lines and drops them at once is not dialled ever faster.
func TestS23FlappingProxyIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opened atomic.Int64
		n := newPipes()
		var serving sync.WaitGroup
		serving.Go(func() {
			for {
				conn, err := n.Accept()
				if err != nil {
					return
				}
				serving.Go(func() {
					defer func() { _ = conn.Close() }()
					c := &raw{t: t, Conn: conn, r: nil}
					buf := make([]byte, 64<<10)
					if _, err := c.Read(buf); err != nil {
						return
					}
					opened.Add(1)
					_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\nPromferry-Proxy: 1\r\nPromferry-Heartbeat: 15\r\n\r\n"+
						"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
					_, _ = c.Read(buf)
				})
			}
		})
		w := &world{t: t, net: n}
		node := w.join(clientName, anySession)
		<-time.After(10 * time.Minute)
		node.stop()
		_ = n.Close()
		serving.Wait()
		// Ten minutes at the longest delay, half of it on average, are 120.
		if got := opened.Load(); got > 300 {
			t.Errorf("%d lines in ten minutes", got)
		}
	})
}

// TestS23PollsAreNotAHotLoop: something that answers polls at once without a scrape is not asked
// as fast as can be.
func TestS23PollsAreNotAHotLoop(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 204 No Content\r\nPromferry-Proxy: 1\r\nPromferry-Heartbeat: 15\r\n\r\n",
		"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 302 Found\r\nLocation: /poll\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(strings.Fields(answer)[1]+fmt.Sprint(strings.Contains(answer, "Proxy")), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var polls atomic.Int64
				stopped := make(chan struct{})
				transport := roundTripper(func(r *http.Request) (*http.Response, error) {
					if strings.HasSuffix(r.URL.Path, "/ptth") {
						return &http.Response{StatusCode: http.StatusNotFound, Header: http.Header{}, Body: http.NoBody, Request: r}, nil
					}
					if n := polls.Add(1); n >= 5000 { // Time stands still in a bubble while somebody is busy.
						if n == 5000 {
							close(stopped)
						}
						<-r.Context().Done()
						return nil, r.Context().Err()
					}
					return response(answer, r)
				})
				node := newHandMadeLink(t, transport)
				select {
				case <-stopped:
				case <-time.After(time.Minute):
				}
				node()
				if n := polls.Load(); n > 300 {
					t.Errorf("%d polls within a minute", n)
				}
			})
		})
	}
}

// TestS24HalfOpen: a link whose other end vanished is found within twice the heartbeat, on
// both sides.
func TestS24HalfOpen(t *testing.T) {
	const beat = 15 * time.Second
	for _, idle := range []time.Duration{time.Second, 7 * time.Second, 12 * time.Second, 40 * time.Second, time.Hour} {
		t.Run(idle.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hole := &blackHole{pipes: newPipes()}
				w := newWorld(t, hole, options{beat: beat})
				n := w.join(clientName, anySession, reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:1/m")})
				<-time.After(idle)
				if s := n.link.Status(); s.Lines != 1 {
					t.Fatalf("%+v", s)
				}
				hole.swallow()
				began := time.Now()
				proxySees, clientSees := time.Duration(0), time.Duration(0)
				for range 3 * beat / (100 * time.Millisecond) {
					<-time.After(100 * time.Millisecond)
					synctest.Wait()
					if c := w.registry.Status().Clients[0]; c.Lines == 0 && proxySees == 0 {
						proxySees = time.Since(began)
					}
					if n.link.Status().Lines == 0 && clientSees == 0 {
						clientSees = time.Since(began)
					}
				}
				if proxySees == 0 || proxySees > 2*beat {
					t.Errorf("the proxy finds it after %v", proxySees)
				}
				if clientSees == 0 || clientSees > 2*beat {
					t.Errorf("the client finds it after %v", clientSees)
				}
			})
		})
	}
}

// blackHole is a network that may lose all that is sent from one moment on, while no end hears of it.
type blackHole struct {
	*pipes
	lost atomic.Bool
}

func (h *blackHole) swallow() { h.lost.Store(true) }

func (h *blackHole) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if h.lost.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	ours, theirs := net.Pipe()
	select {
	case h.conns <- pipeConn{&swallowed{Conn: theirs, hole: h}}:
		return &swallowed{Conn: ours, hole: h}, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

type swallowed struct {
	net.Conn
	hole *blackHole
}

func (s *swallowed) Write(b []byte) (int, error) {
	if s.hole.lost.Load() {
		return len(b), nil
	}
	return s.Conn.Write(b)
}

func (s *swallowed) Close() error {
	if !s.hole.lost.Load() {
		return s.Conn.Close()
	}
	// The other end must not hear of it: this one sees a timeout.
	return s.SetDeadline(time.Unix(1, 0))
}

// TestS38NoLeaks: after clients, scrapers and targets have come, broken off and gone, nothing is left.
func TestS38NoLeaks(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			goroutines, open := runtime.NumGoroutine(), files()
			cut := &cutter{network: newLoopback(t)}
			p, server := target(t, func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.RawQuery {
				case "abort":
					_, _ = io.WriteString(w, "half")
					w.(http.Flusher).Flush()
					panic(http.ErrAbortHandler)
				case "slow":
					<-r.Context().Done()
				default:
					_, _ = io.WriteString(w, strings.Repeat("m 1\n", 5000))
				}
			})
			w := newWorld(t, cut, options{noPTTH: kind == reverse.KindLongPoll})
			for i := range 5 {
				n := w.join(clientName, strings.Repeat(string(rune('A'+i)), 16), p)
				w.connected(clientName, 1)
				var scrapes sync.WaitGroup
				c := w.scraper()
				for _, query := range []string{"", "abort", "slow", "x"} {
					scrapes.Go(func() { scrape(t, c, at(clientName, p)+"?"+query, 300*time.Millisecond) })
				}
				if i%2 == 0 {
					cut.cut()
				}
				scrapes.Wait()
				n.stop()
				c.CloseIdleConnections()
			}
			settle(t, "scrapes in flight", w.proxy.InFlight, 0)
			settle(t, "lines", func() int { return int(w.metric("promferry_proxy_lines")) }, 0)
			for _, kind := range kinds {
				if n := w.metric("promferry_proxy_lines", "kind", kind, "state", "busy"); n != 0 {
					t.Errorf("%v %s lines are in use", n, kind)
				}
			}
			w.stop()
			server.Close()
			settle(t, "goroutines", runtime.NumGoroutine, goroutines)
			settle(t, "files", files, open)
		})
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) Do(r *http.Request) (*http.Response, error) { return f(r) }

var _ ptth.Doer = roundTripper(nil)
