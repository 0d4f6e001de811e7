package reverse_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/reverse"
)

// rawTarget is a target that answers with these bytes, and closes.
func rawTarget(t *testing.T, answer string) reverse.PullTarget {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer func() { _ = c.Close() }()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					_, _ = io.WriteString(c, answer)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		serving.Wait()
	})
	p := reverse.PullTarget{Job: "node", URL: mustURL(t, "http://"+l.Addr().String()+"/metrics")}
	return p
}

func zipped(t *testing.T, s string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.WriteString(z, s); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestR1TruncatedBodyAborts: what breaks off at the target breaks off at the scraper.
func TestR1TruncatedBodyAborts(t *testing.T) {
	gz := zipped(t, strings.Repeat("metric 1\n", 10000))
	big := strings.Repeat("m 1\n", 50000)
	for name, answer := range map[string]string{
		"chunked":           "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nm 1\n\r\n",
		"inside a chunk":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + big[:1000],
		"large chunks":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strconv.FormatInt(int64(len(big)), 16) + "\r\n" + big + "\r\n",
		"Content-Length":    "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nm 1\n",
		"large by length":   fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(big)+1, big),
		"none of its bytes": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
		"gzip by length":    fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", len(gz), gz[:len(gz)-5]),
		"gzip in chunks":    fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", 20, gz[:20]),
	} {
		for _, kind := range kinds {
			t.Run(kind+" "+name, func(t *testing.T) {
				w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
				p := rawTarget(t, answer)
				w.join(clientName, anySession, p)
				w.connected(clientName, 1)
				a := w.scrape(at(clientName, p), 5*time.Second)
				// Where nothing was passed on yet it is an error of its own.
				if a.broken == nil && a.status < 500 {
					t.Errorf("the scraper sees a clean end: %v", a)
				}
				if n := w.metric("promferry_proxy_scrapes_total", "result", "success"); n != 0 {
					t.Error("counted as a success")
				}
				w.connected(clientName, 1) // The client is there for the next one.
			})
		}
	}
}

// TestR1AtTheLimit: an answer as large as may be that breaks off there is none.
func TestR1AtTheLimit(t *testing.T) {
	body := strings.Repeat("x", 200_000) // More than is read before any is passed on.
	chunk := fmt.Sprintf("%x\r\n%s\r\n", len(body), body)
	for _, tt := range []struct {
		name, end string
		whole     bool
	}{{"whole", "0\r\n\r\n", true}, {"broken off", "", false}, {"one more byte", "1\r\nx\r\n0\r\n\r\n", false}} {
		for _, kind := range kinds {
			t.Run(kind+" "+tt.name, func(t *testing.T) {
				w := newWorld(t, newLoopback(t), options{
					noPTTH: kind == reverse.KindLongPoll, proxy: func(c *reverse.ProxyConfig) { c.MaxBytes = int64(len(body)) },
				})
				p := rawTarget(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"+chunk+tt.end)
				w.join(clientName, anySession, p)
				w.connected(clientName, 1)
				if a := w.scrape(at(clientName, p), 5*time.Second); (a.broken == nil && a.status == http.StatusOK) != tt.whole {
					t.Errorf("got %v", a)
				}
			})
			t.Run(kind+" "+tt.name+", at the client", func(t *testing.T) {
				w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
				p := rawTarget(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"+chunk+tt.end)
				w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) { c.MaxBytes = int64(len(body)) }, p)
				w.connected(clientName, 1)
				if a := w.scrape(at(clientName, p), 5*time.Second); (a.broken == nil && a.status == http.StatusOK) != tt.whole {
					t.Errorf("got %v", a)
				}
			})
		}
	}
}

// TestR1BodyIsOpaque: what the target sends arrives bit for bit, whatever it is.
func TestR1BodyIsOpaque(t *testing.T) {
	all := make([]byte, 1<<16)
	for i := range all {
		all[i] = byte(i * 7)
	}
	for _, kind := range kinds {
		for _, length := range []bool{true, false} {
			t.Run(fmt.Sprint(kind, " length known ", length), func(t *testing.T) {
				p, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", "application/vnd.google.protobuf")
					if length {
						w.Header().Set("Content-Length", strconv.Itoa(len(all)))
					}
					for i := 0; i < len(all); i += 1 << 12 {
						_, _ = w.Write(all[i : i+1<<12])
						if !length {
							w.(http.Flusher).Flush()
						}
					}
				})
				w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
				w.join(clientName, anySession, p)
				w.connected(clientName, 1)
				for range 3 {
					if a := w.scrape(at(clientName, p), 5*time.Second); a.broken != nil || !bytes.Equal(a.body, all) {
						t.Errorf("got %v", a)
					}
				}
			})
		}
	}
}

// TestR1HostileStatus: a client's answer with a status that is none is an error with a status
// and a metric of its own, and never a success.
func TestR1HostileStatus(t *testing.T) {
	for _, status := range []string{"000", "007", "099", "100", "101", "103", "199"} {
		for _, kind := range kinds {
			t.Run(kind+" "+status, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, newPipes(), options{})
					done := make(chan answer)
					ask := func() { go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }() }
					said := "HTTP/1.1 " + status + " X\r\nContent-Length: 4\r\n\r\nm 1\n"
					if kind == reverse.KindPTTH {
						c := w.line(clientName, anySession, "")
						synctest.Wait()
						ask()
						c.request()
						c.send(said)
					} else {
						c, c2 := w.raw(), w.raw()
						c.poll(clientName, anySession)
						synctest.Wait()
						ask()
						r := c.polled()
						go func() { _, _ = io.Copy(io.Discard, c2) }()
						c2.push(strings.Replace(said, "\r\n", "\r\nId: "+r.Header.Get("Id")+"\r\n", 1), "")
					}
					a := <-done
					if a.status == http.StatusOK || a.status != 0 && a.status < 500 || a.status == 0 && status != "100" && status != "103" && status != "199" {
						t.Errorf("got %v", a)
					}
					if n := w.metric("promferry_proxy_scrapes_total", "result", "success"); n != 0 {
						t.Error("counted as a success")
					}
					if n := w.metric("promferry_proxy_scrapes_total"); n != 1 {
						t.Errorf("counted %v times", n)
					}
				})
			})
		}
	}
}

// TestR1MalformedResponse: a response over long-poll that is none, or more than one, is bad_answer at
// once. Where some of it is out already, the scraper's answer breaks off.
func TestR1MalformedResponse(t *testing.T) {
	body := strings.Repeat("m 1\n", 50_000)
	small := "HTTP/1.1 200 OK\r\nId: ID\r\nContent-Length: 4\r\n\r\nm 1\n"
	large := fmt.Sprintf("HTTP/1.1 200 OK\r\nId: ID\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	for name, tt := range map[string]struct {
		said  string
		large bool
	}{
		"no status line":           {"Id: ID\r\n\r\nm 1\n", false},
		"a status below 100":       {strings.Replace(small, "200", "099", 1), false},
		"a broken header":          {strings.Replace(small, "\r\n\r\n", "\r\nA b\r\n\r\n", 1), false},
		"more than its length":     {small + "m 2\n", false},
		"two":                      {small + small, false},
		"two large ones":           {large + large, true},
		"large, more than it says": {large + "m", true},
	} {
		for _, early := range []bool{true, false} { // The ID as a header of the request, as our clients have it.
			t.Run(fmt.Sprint(name, " early ", early), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, newPipes(), options{})
					poll, push := w.raw(), w.raw()
					poll.poll(clientName, anySession)
					synctest.Wait()
					done := make(chan answer)
					go func() { done <- w.scrape("http://web-1:9100/metrics", 5*time.Second) }()
					id, more := poll.polled().Header.Get("Id"), ""
					if early {
						more = "Id: " + id + "\r\n"
					}
					began := time.Now()
					go func() { _, _ = io.Copy(io.Discard, push) }()
					push.push(strings.ReplaceAll(tt.said, "ID", id), more)
					switch a := <-done; {
					case tt.large && (a.broken == nil || len(a.body) >= len(body)):
						t.Errorf("the scraper sees a clean end: %v", a)
					case !tt.large && (a.status != http.StatusBadGateway || a.header.Get(reverse.HeaderError) != "bad_answer"):
						t.Errorf("got %v", a)
					}
					if took := time.Since(began); took != 0 {
						t.Errorf("only after %v", took)
					}
					if n := w.metric("promferry_proxy_scrapes_total", "result", "bad_answer"); n != 1 {
						t.Errorf("counted %v times", n)
					}
					<-time.After(time.Second) // The server waits that long for what it does not read.
				})
			})
		}
	}
}

// TestR2EachFailureHasItsName: each fault has its own status, header and metric label.
func TestR2EachFailureHasItsName(t *testing.T) {
	release := make(chan struct{})
	slow, _ := target(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	defer close(release)
	dead, server := target(t, nil)
	server.Close()
	large, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "2000000")
	})
	teapot, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set(reverse.HeaderError, "timeout") // It cannot say this.
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, "short and stout")
	})
	for i, p := range []*reverse.PullTarget{&slow, &dead, &large, &teapot} {
		p.Job = strconv.Itoa(i)
	}
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
			n := w.join(clientName, anySession, slow, dead, large, teapot)
			w.connected(clientName, 4)
			for _, tt := range []struct {
				url    string
				status int
				name   string
			}{
				{"http://nobody:1/metrics", http.StatusNotFound, "unknown_client"},
				{"http://web-1:1/metrics", http.StatusForbidden, "not_allowed"},
				{at(clientName, dead), http.StatusBadGateway, "target_down"},
				{at(clientName, large), http.StatusRequestEntityTooLarge, "too_large"},
				{at(clientName, slow), http.StatusGatewayTimeout, "timeout"},
				{"http://user:pass@web-1:1/", http.StatusBadRequest, "bad_request"},
			} {
				before := w.metric("promferry_proxy_scrapes_total", "result", tt.name)
				a := w.scrape(tt.url, time.Second)
				if tt.name == "bad_request" { // A client of Go's makes a header of it.
					c := w.raw()
					c.send("GET " + tt.url + " HTTP/1.1\r\nHost: web-1\r\n\r\n")
					resp, body, err := c.response()
					a = answer{resp.StatusCode, resp.Header, []byte(body), err}
				}
				if a.status != tt.status || a.header.Get(reverse.HeaderError) != tt.name || len(a.body) == 0 {
					t.Errorf("%s: %v, want %d %s", tt.url, a, tt.status, tt.name)
				}
				if n := w.metric("promferry_proxy_scrapes_total", "result", tt.name) - before; n != 1 {
					t.Errorf("%s: counted %v times", tt.name, n)
				}
			}
			// R3: what the target says passes, whole.
			a := w.scrape(at(clientName, teapot), time.Second)
			if a.status != http.StatusTeapot || string(a.body) != "short and stout" || a.header.Get(reverse.HeaderError) != "" {
				t.Errorf("the target's own answer: %v", a)
			}
			n.stop()
			if a := w.scrape(at(clientName, teapot), time.Second); a.status != http.StatusServiceUnavailable || a.header.Get(reverse.HeaderError) != "client_away" || a.header.Get("Retry-After") == "" {
				t.Errorf("away: %v", a)
			}
			w.proxy.Stopping()
			if a := w.scrape(at(clientName, teapot), time.Second); a.status != http.StatusServiceUnavailable || a.header.Get(reverse.HeaderError) != "stopping" || a.header.Get("Retry-After") == "" {
				t.Errorf("stopping: %v", a)
			}
		})
	}
}

// TestR2ClientGone: a client that dies with the scrape is told apart from one that is slow.
func TestR2ClientGone(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{})
				done := make(chan answer)
				ask := func() { go func() { done <- w.scrape("http://web-1:9100/metrics", 10*time.Second) }() }
				began := time.Now()
				if kind == reverse.KindPTTH {
					c := w.line(clientName, anySession, "")
					synctest.Wait()
					ask()
					c.request()
					_ = c.Close()
				} else {
					c := w.raw()
					c.poll(clientName, anySession)
					synctest.Wait()
					ask()
					c.polled()
					c.poll(clientName, anySession)
					synctest.Wait()
					_ = c.Close()
				}
				if a := <-done; a.status != http.StatusServiceUnavailable || a.header.Get(reverse.HeaderError) != "client_gone" {
					t.Errorf("got %v", a)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("only after %v", took)
				}
			})
		})
	}
}

// memory is a store.
type memory struct {
	mu sync.Mutex
	b  []byte
}

func (m *memory) Load() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b, nil
}

func (m *memory) Save(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.b = b
	return nil
}

// sd returns status and body of the service discovery.
func sd(w *world) (int, string) {
	rec := httptest.NewRecorder()
	w.registry.Discovery(rec, httptest.NewRequest(http.MethodGet, "/sd", nil))
	return rec.Code, strings.TrimSpace(rec.Body.String())
}

const nodeAnnounced = reverse.HeaderAnnounce + `: {"instance":"web-1","targets":[{"job":"node","port":9100,"path":"/metrics"}]}` + "\r\n"

// TestR4DiscoveryDoesNotShrink: not when a client is away, nor when the proxy starts anew.
func TestR4DiscoveryDoesNotShrink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		keep := func(c *reverse.RegistryConfig) { c.Store = store }
		w := newWorld(t, newPipes(), options{registry: keep})
		c := w.line(clientName, anySession, nodeAnnounced)
		<-time.After(20 * time.Second)
		code, listed := sd(w)
		if code != http.StatusOK || !strings.Contains(listed, "web-1:9100") {
			t.Fatalf("%d %s", code, listed)
		}
		_ = c.Close()
		<-time.After(30 * time.Minute)
		if code, now := sd(w); code != http.StatusOK || now != listed {
			t.Errorf("away: %d %s", code, now)
		}
		w.stop()
		w = newWorld(t, newPipes(), options{registry: keep})
		if code, now := sd(w); code != http.StatusServiceUnavailable {
			t.Errorf("just started: %d %s", code, now)
		}
		<-time.After(16 * time.Second)
		if code, now := sd(w); code != http.StatusOK || now != listed {
			t.Errorf("settled: %d %s", code, now)
		}
	})
}

// TestR5Drain: scrapes in flight end well while the proxy stops, for new ones there is 503, and
// clients go elsewhere.
func TestR5Drain(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			entered, release := make(chan struct{}), make(chan struct{})
			p, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
				entered <- struct{}{}
				<-release
				_, _ = io.WriteString(w, "whole")
			})
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
			w.join(clientName, anySession, p)
			w.connected(clientName, 1)
			done := make(chan answer)
			go func() { done <- w.scrape(at(clientName, p), 10*time.Second) }()
			<-entered
			w.proxy.Stopping()
			w.registry.Stopping()
			w.lines.Move()
			w.polls.Move()
			if a := w.scrape(at(clientName, p), time.Second); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
				t.Errorf("a new scrape: %v", a)
			}
			close(release)
			if a := <-done; a.status != http.StatusOK || string(a.body) != "whole" || a.broken != nil {
				t.Errorf("the scrape in flight: %v", a)
			}
			settle(t, "scrapes in flight", w.proxy.InFlight, 0)
		})
	}
}

// TestR5ClientDrain: scrapes in flight end well while the client stops.
func TestR5ClientDrain(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			entered, release := make(chan struct{}), make(chan struct{})
			p, _ := target(t, func(w http.ResponseWriter, _ *http.Request) {
				entered <- struct{}{}
				<-release
				_, _ = io.WriteString(w, "whole")
			})
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
			n := w.join(clientName, anySession, p)
			w.connected(clientName, 1)
			done := make(chan answer)
			go func() { done <- w.scrape(at(clientName, p), 10*time.Second) }()
			<-entered
			stopped := make(chan struct{})
			go func() {
				n.stop()
				close(stopped)
			}()
			settle(t, "clients connected", func() int { return int(w.metric("promferry_proxy_clients", "state", "connected")) }, 0)
			close(release)
			if a := <-done; a.status != http.StatusOK || string(a.body) != "whole" || a.broken != nil {
				t.Errorf("the scrape in flight: %v", a)
			}
			<-stopped
		})
	}
}

// TestR6SlowDelaysNobody: neither a slow target of the same client, nor another client that is
// slow, delays a scrape.
func TestR6SlowDelaysNobody(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			release := make(chan struct{})
			var waiting atomic.Int64
			slow, _ := target(t, func(http.ResponseWriter, *http.Request) {
				waiting.Add(1)
				<-release
			})
			defer close(release)
			quick, _ := target(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "quick") })
			slow.Job = "slow"
			w := newWorld(t, newLoopback(t), options{noPTTH: kind == reverse.KindLongPoll})
			w.join(clientName, anySession, slow, quick)
			w.join("web-2", nextSession, quick)
			w.connected(clientName, 2)
			w.connected("web-2", 1)
			var scrapes sync.WaitGroup
			defer scrapes.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			for range 4 {
				scrapes.Go(func() {
					req, err := http.NewRequestWithContext(ctx, http.MethodGet, at(clientName, slow), nil)
					if err != nil {
						t.Error(err)
						return
					}
					if resp, err := w.scraper().Do(req); err == nil {
						_ = resp.Body.Close()
					}
				})
			}
			settle(t, "slow scrapes to come", func() int { return 1 - int(min(waiting.Load(), 1)) }, 0)
			for range 20 {
				for _, name := range []string{clientName, "web-2"} {
					began := time.Now()
					if a := w.scrape(at(name, quick), 5*time.Second); string(a.body) != "quick" || a.broken != nil {
						t.Errorf("%s: %v", name, a)
					}
					if took := time.Since(began); took > 2*time.Second {
						t.Errorf("%s: only after %v", name, took)
					}
				}
			}
		})
	}
}

// TestR6HostileReaderDelaysNobody: a client that reads nothing any more keeps the heartbeats and
// scrapes of others from nothing, nor the proxy from stopping.
func TestR6HostileReaderDelaysNobody(t *testing.T) {
	for _, hostile := range kinds {
		t.Run(hostile, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newPipes(), options{})
				if hostile == reverse.KindPTTH {
					w.line("hostile", nextSession, "")
				} else {
					w.raw().poll("hostile", nextSession)
				}
				w.noPTTH = hostile == reverse.KindLongPoll
				n := w.joinWith(clientName, anySession, func(c *reverse.ClientConfig) {
					c.HTTP = doer(func(*http.Request) (*http.Response, error) { return plain("m 1\n"), nil })
				}, reverse.PullTarget{Job: "node", URL: mustURL(t, "http://127.0.0.1:9100/metrics")})
				<-time.After(3 * time.Second)
				if a := w.scrape("http://web-1:9100/metrics", time.Second); string(a.body) != "m 1\n" {
					t.Errorf("scrape of the other client: %v", a)
				}
				<-time.After(3 * time.Second)
				since := n.link.Status().Since
				<-time.After(10 * time.Minute)
				if s := n.link.Status(); s.Lines != 1 || !s.Since.Equal(since) {
					t.Errorf("the other client was disconnected: %+v", s)
				}
				if a := w.scrape("http://web-1:9100/metrics", time.Second); string(a.body) != "m 1\n" {
					t.Errorf("scrape of the other client: %v", a)
				}
				n.stop()
				stopped := make(chan struct{})
				go func() {
					w.stop()
					close(stopped)
				}()
				select {
				case <-stopped:
				case <-time.After(time.Minute):
					t.Fatal("the proxy does not stop")
				}
			})
		})
	}
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }

func plain(s string) *http.Response {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: int64(len(s)), Body: io.NopCloser(strings.NewReader(s))}
}

// TestR7AtMostOnce: however lines break, each scrape reaches the target once at most.
func TestR7AtMostOnce(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			var mu sync.Mutex
			seen := make(map[string]int)
			p, _ := target(t, func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				seen[r.URL.RawQuery]++
				mu.Unlock()
				_, _ = io.WriteString(w, r.URL.RawQuery)
			})
			cut := &cutter{network: newLoopback(t)}
			w := newWorld(t, cut, options{noPTTH: kind == reverse.KindLongPoll})
			w.join(clientName, anySession, p, reverse.PullTarget{Job: "b", URL: mustURL(t, "http://127.0.0.1:1/b")}, reverse.PullTarget{Job: "c", URL: mustURL(t, "http://127.0.0.1:1/c")})
			w.connected(clientName, 1)
			good := 0
			for i := range 60 {
				if i%3 == 0 {
					go cut.cut()
				}
				// Over a connection of its own: the scraper must not try again by itself.
				a := w.scrape(at(clientName, p)+"?n="+strconv.Itoa(i), 2*time.Second)
				if a.status == http.StatusOK && a.broken == nil {
					good++
					if string(a.body) != "n="+strconv.Itoa(i) {
						t.Errorf("scrape %d has the answer %q", i, a.body)
					}
				}
			}
			if good == 0 {
				t.Error("no scrape went well")
			}
			mu.Lock()
			defer mu.Unlock()
			for query, n := range seen {
				if n > 1 {
					t.Errorf("%s was scraped %d times", query, n)
				}
			}
		})
	}
}

// cutter breaks the connections of clients, which are those that dial ever again.
type cutter struct {
	network
	mu    sync.Mutex
	conns []net.Conn
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.network.Accept()
	if err == nil {
		c.mu.Lock()
		c.conns = append(c.conns, conn)
		c.mu.Unlock()
	}
	return conn, err
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.conns = nil
}
