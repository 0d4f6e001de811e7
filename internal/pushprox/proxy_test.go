package pushprox_test

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/internal/pushprox"
)

const (
	poll  = "http://hub/poll"
	push  = "http://hub/push"
	nodeA = "http://node-a:9100/metrics"
)

// get is the scrape of nodeA as a poll gets it, in front of its Id.
const get = "GET http://node-a:9100/metrics HTTP/1.1\r\nHost: node-a:9100\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n"

func TestNewerPollReleasesOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{})
		c := n.client(t)
		first, other := send(t, c, "POST", poll, "node-a", nil), send(t, c, "POST", poll, "node-b", nil)
		<-time.After(24 * time.Hour)
		pending(t, "poll without limit", first)
		second := send(t, c, "POST", poll, " node-a\r\n", nil)
		a := expect(t, "older poll", first, http.StatusRequestTimeout, "Error WaitForScrapeInstruction: request is expired\n")
		if got := a.header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
			t.Errorf("Content-Type %q", got)
		}
		pending(t, "newer poll", second)
		pending(t, "poll of another name", other)
		third := send(t, c, "GET", poll, "Node-A", nil) // No method is wrong, and case counts.
		pending(t, "newer poll", second)
		pending(t, "poll in other case", third)
	})
}

// TestRegistration shows that only the start of a poll counts, not that it is open.
func TestRegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{RegistrationTimeout: 3 * time.Second})
		c := n.client(t)
		clients := func(want string) {
			t.Helper()
			synctest.Wait()
			expect(t, "/clients", send(t, c, "GET", "http://hub/clients", "", nil), http.StatusOK, want)
		}
		clients("[]\n")
		parked := send(t, c, "POST", poll, "node-a", nil)
		clients(`[{"targets":["node-a"],"labels":null}]` + "\n")
		<-time.After(3*time.Second - 1)
		clients(`[{"targets":["node-a"],"labels":null}]` + "\n")
		<-time.After(1)
		clients("[]\n")
		send(t, c, "GET", nodeA, "", timeout("1"))
		synctest.Wait()
		clients("[]\n")
		if a := <-parked; !strings.HasPrefix(a.body, get) {
			t.Errorf("the client, which is not listed, got %q", a.body)
		}
		send(t, c, "POST", poll, "node-a", nil)
		clients(`[{"targets":["node-a"],"labels":null}]` + "\n")
	})
}

func TestScrapeTimeout(t *testing.T) {
	for name, tc := range map[string]struct {
		header http.Header
		want   time.Duration
	}{
		"none":           {nil, 15 * time.Second},
		"seconds":        {timeout("0.25"), 250 * time.Millisecond},
		"over the limit": {timeout("301"), 5 * time.Minute},
		"no number":      {timeout("10s"), 15 * time.Second},
		"zero":           {timeout("0"), 0},
		"negative":       {timeout("-1"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := network{}
				n.serveProxy(t, pushprox.ProxyConfig{})
				a := <-send(t, n.client(t), "GET", nodeA, "", tc.header)
				const text = `Error scraping "http://node-a:9100/metrics": timeout reached for "http://node-a:9100/metrics": context deadline exceeded` + "\n"
				if a.status != http.StatusInternalServerError || a.body != text || a.after != tc.want {
					t.Errorf("%d %q, %v after %v, want after %v", a.status, a.body, a.err, a.after, tc.want)
				}
			})
		})
	}
}

// TestPush has what a push gets when a scrape does not take it.
func TestPush(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nId: 7\r\nContent-Length: 2\r\n"
	for name, tc := range map[string]struct {
		body, want string
		after      time.Duration
	}{
		"no HTTP":               {"<html>\n", `Error pushing: malformed HTTP response "<html>"`, 0},
		"breaks off":            {"HTTP/1.1 200 OK\r\nId: 7\r\n", "Error pushing: unexpected EOF", 0},
		"nobody waits":          {ok + "\r\nhi", "Error pushing: context deadline exceeded", 15 * time.Second},
		"waits for as it says":  {ok + "X-Prometheus-Scrape-Timeout-Seconds: 2\r\n\r\nhi", "Error pushing: context deadline exceeded", 2 * time.Second},
		"not as clients say it": {ok + "X-Prometheus-Scrape-Timeout: 2\r\n\r\nhi", "Error pushing: context deadline exceeded", 15 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := network{}
				n.serveProxy(t, pushprox.ProxyConfig{})
				a := <-send(t, n.client(t), "POST", push, tc.body, nil)
				if a.status != http.StatusInternalServerError || a.body != tc.want+"\n" || a.after != tc.after {
					t.Errorf("%d %q, %v after %v", a.status, a.body, a.err, a.after)
				}
			})
		})
	}
}

// TestScrapeIsPassed has a scrape that came before its client, with everything that a
// scraper can say.
func TestScrapeIsPassed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{})
		c := n.client(t)
		scrape := send(t, c, "PUT", nodeA+"?x=1", "body", http.Header{
			"Proxy-Authorization": {"Basic cHJvbTpzM2NyZXQ="}, "X-Forwarded-For": {"10.0.0.1"}, "Accept": {"text/plain"},
		})
		pending(t, "scrape before its client", scrape)
		a := <-send(t, c, "POST", poll, "node-a", nil)
		issued := id.FindStringSubmatch(a.body)
		if issued == nil {
			t.Fatalf("no Id in %q", a.body)
		}
		const want = "PUT http://node-a:9100/metrics?x=1 HTTP/1.1\r\nHost: node-a:9100\r\nUser-Agent: Go-http-client/1.1\r\n" +
			"Content-Length: 4\r\nAccept: text/plain\r\nAccept-Encoding: gzip\r\n(masked)\r\n" +
			"Proxy-Authorization: Basic cHJvbTpzM2NyZXQ=\r\nX-Forwarded-For: 10.0.0.1\r\n\r\nbody"
		if got := masked([]byte(a.body), id); got != want {
			t.Errorf("the client got %q, want %q", got, want)
		}
		pushed := send(t, c, "POST", push, "HTTP/1.1 503 Any text\r\nId: "+issued[1]+"\r\nX-Prometheus-Scrape-Timeout-Seconds: 3\r\n"+
			"X-Prometheus-Scrape-Timeout: 9\r\nX-Own: 1\r\n\r\nuntil the end", nil)
		expect(t, "push", pushed, http.StatusOK, "")
		a = expect(t, "scrape", scrape, http.StatusServiceUnavailable, "until the end")
		if a.header.Get("X-Own") != "1" || a.header.Get("X-Prometheus-Scrape-Timeout") != "9" ||
			a.header.Get("Id") != "" || a.header.Get("X-Prometheus-Scrape-Timeout-Seconds") != "" {
			t.Errorf("headers %v", a.header)
		}
	})
}

// TestOwnID shows that an Id of the scraper's own hides the proxy's, and nothing can be matched.
func TestOwnID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{})
		c := n.client(t)
		scrape := send(t, c, "GET", nodeA, "", http.Header{"Id": {"own"}})
		a := <-send(t, c, "POST", poll, "node-a", nil)
		if got := masked([]byte(a.body), id); got != get+"Id: own\r\n(masked)\r\n\r\n" {
			t.Errorf("the client got %q", got)
		}
		send(t, c, "POST", push, "HTTP/1.1 200 OK\r\nId: own\r\n\r\n", nil)
		<-time.After(15 * time.Second)
		expect(t, "scrape", scrape, http.StatusInternalServerError, `Error scraping "http://node-a:9100/metrics": context deadline exceeded`+"\n")
	})
}

// TestDeadPollTakesAScrape shows what becomes of a client that is gone: nobody notices, and the
// next scrape goes to it.
func TestDeadPollTakesAScrape(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		n.serveProxy(t, pushprox.ProxyConfig{})
		conn, err := n.Dial(t.Context(), "tcp", "hub:80")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("POST /poll HTTP/1.1\r\nHost: hub\r\nContent-Length: 6\r\n\r\nnode-a")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		_ = conn.Close()
		<-time.After(time.Hour)
		c := n.client(t)
		scrape := send(t, c, "GET", nodeA, "", timeout("8"))
		synctest.Wait()
		alive := send(t, c, "POST", poll, "node-a", nil)
		<-time.After(8 * time.Second)
		expect(t, "scrape", scrape, http.StatusInternalServerError, `Error scraping "http://node-a:9100/metrics": context deadline exceeded`+"\n")
		pending(t, "poll of the client that lives", alive)
		// One whose scraper has given up is not handed out.
		gone := send(t, c, "GET", "http://node-c/", "", timeout("1"))
		<-gone
		pending(t, "poll after the scrape's time", send(t, c, "POST", poll, "node-c", nil))
	})
}

func TestPathsAndPrefix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := network{}
		proxy := pushprox.NewProxy(pushprox.ProxyConfig{})
		t.Cleanup(proxy.Close)
		n.serve(t, "hub:80", proxy)
		n.serve(t, "hub:81", http.StripPrefix("/pre/fix", proxy))
		c := n.client(t)
		for _, path := range []string{":80/ptth", ":80/", ":80/poll/", ":80/pre/fix/clients", ":81/clients"} {
			expect(t, path, send(t, c, "GET", "http://hub"+path, "", nil), http.StatusNotFound, "404 page not found\n")
		}
		expect(t, "below the prefix", send(t, c, "GET", "http://hub:81/pre/fix/clients", "", nil), http.StatusOK, "[]\n")
		parked := send(t, c, "POST", poll, "node-a", nil)
		pending(t, "poll", parked)
		proxy.Close()
		if a := <-parked; a.err == nil {
			t.Errorf("a closed proxy answered %d %q", a.status, a.body)
		}
		if a := <-send(t, c, "GET", nodeA, "", nil); a.err == nil {
			t.Errorf("a closed proxy answered %d %q", a.status, a.body)
		}
	})
}
