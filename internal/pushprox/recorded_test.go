package pushprox_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/internal/pushprox"
)

// What differs from run to run, and nothing else, is masked before bytes are compared. All
// of it has a fixed width, so Content-Length is compared as it is.
var (
	date      = regexp.MustCompile(`(?m)^Date: [A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT\r$`)
	id        = regexp.MustCompile(`(?m)^Id: ([0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})\r$`)
	remaining = regexp.MustCompile(`(?m)^X-Prometheus-Scrape-Timeout: 4\.\d{6}\r$`) // Of the 5 s that each recorded scrape had.
)

func masked(b []byte, what ...*regexp.Regexp) string {
	for _, re := range what {
		b = re.ReplaceAll(b, []byte("(masked)\r"))
	}
	return string(b)
}

// recorded returns what one side of a recorded connection said, cut in front of each start.
func recorded(t *testing.T, file, start string, want int) [][]byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	var messages [][]byte
	for i, m := range bytes.Split(b, []byte(start)) {
		if i > 0 {
			messages = append(messages, append([]byte(start), m...))
		} else if len(m) > 0 {
			t.Fatalf("%s begins with %q", file, m)
		}
	}
	if len(messages) != want {
		t.Fatalf("%s has %d messages, want %d", file, len(messages), want)
	}
	return messages
}

// A peer is one end of a TCP connection that sends and compares bytes.
type peer struct {
	t    *testing.T
	conn net.Conn
}

func newPeer(t *testing.T, conn net.Conn) *peer {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() })
	// Only a test that fails waits for so long.
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &peer{t: t, conn: conn}
}

func connect(t *testing.T, server *httptest.Server) *peer {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, conn)
}

func (p *peer) send(b []byte) {
	p.t.Helper()
	if _, err := p.conn.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

// response returns the bytes of the next HTTP response, and request those of the next request.
func (p *peer) response() []byte {
	p.t.Helper()
	return p.message(func(r *bufio.Reader) (io.ReadCloser, error) {
		m, err := http.ReadResponse(r, nil)
		if err != nil {
			return nil, err
		}
		return m.Body, nil
	})
}

func (p *peer) request() []byte {
	p.t.Helper()
	return p.message(func(r *bufio.Reader) (io.ReadCloser, error) {
		m, err := http.ReadRequest(r)
		if err != nil {
			return nil, err
		}
		return m.Body, nil
	})
}

func (p *peer) message(read func(*bufio.Reader) (io.ReadCloser, error)) []byte {
	p.t.Helper()
	var b bytes.Buffer
	body, err := read(bufio.NewReader(io.TeeReader(p.conn, &b)))
	if err == nil {
		_, err = io.Copy(io.Discard, body)
		_ = body.Close()
	}
	if err != nil {
		p.t.Fatalf("after %q: %v", b.Bytes(), err)
	}
	return b.Bytes()
}

// rest returns what comes until the other end closes.
func (p *peer) rest() []byte {
	p.t.Helper()
	b, err := io.ReadAll(p.conn)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

func same(t *testing.T, what string, got, want []byte, mask ...*regexp.Regexp) {
	t.Helper()
	if g, w := masked(got, mask...), masked(want, mask...); g != w {
		t.Errorf("%s:\n%q\nrecorded:\n%q", what, g, w)
	}
}

// TestProxyAsRecorded plays the recorded scrapers and the recorded client to our proxy.
func TestProxyAsRecorded(t *testing.T) {
	polls := recorded(t, "client-1-to-proxy.bin", "POST /poll", 3)
	scrapes := recorded(t, "client-1-from-proxy.bin", "HTTP/1.1 200 OK", 2)
	pushes := recorded(t, "client-2-to-proxy.bin", "POST /push", 2)
	answers := recorded(t, "client-2-from-proxy.bin", "HTTP/1.1 200 OK", 2)
	scrape1 := recorded(t, "scraper-1-to-proxy.bin", "GET ", 1)[0]
	scrape4 := recorded(t, "scraper-4-to-proxy.bin", "GET ", 1)[0]
	ask := recorded(t, "scraper-3-to-proxy.bin", "GET ", 1)[0]

	parked := make(chan string, 3)
	proxy := pushprox.NewProxy(pushprox.ProxyConfig{Parked: func(name string) { parked <- name }})
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	t.Cleanup(proxy.Close)

	poller, pusher := connect(t, server), connect(t, server)
	poller.send(polls[0])
	receive(t, parked)

	respond := func(i int) {
		t.Helper()
		work := poller.response()
		same(t, "answer to a poll", work, scrapes[i], date, id)
		poller.send(polls[i+1]) // At once, before it pushes.
		receive(t, parked)
		issued := id.FindSubmatch(work)
		if issued == nil {
			t.Fatalf("no Id in %q", work)
		}
		pusher.send(bytes.Replace(pushes[i], id.FindSubmatch(pushes[i])[1], issued[1], 1))
		same(t, "answer to a push", pusher.response(), answers[i], date)
	}

	scraper := connect(t, server)
	scraper.send(scrape1)
	respond(0)
	// All of it came with the push, the date too.
	same(t, "answer to scraper 1", scraper.response(), recorded(t, "scraper-1-from-proxy.bin", "HTTP/1.1 ", 1)[0])
	if b := scraper.rest(); len(b) > 0 {
		t.Errorf("after Connection: close came %q", b)
	}

	scraper = connect(t, server)
	scraper.send(ask)
	same(t, "answer to GET /clients", scraper.response(), recorded(t, "scraper-3-from-proxy.bin", "HTTP/1.1 ", 1)[0], date)

	scraper = connect(t, server)
	scraper.send(scrape4)
	respond(1)
	same(t, "answer to scraper 4", scraper.response(), recorded(t, "scraper-4-from-proxy.bin", "HTTP/1.1 ", 1)[0], date)

	proxy.Close()
	if b := poller.rest(); len(b) > 0 {
		t.Errorf("the parked poll got %q", b)
	}
}

// TestProxyAsRecordedWithoutClient has the scrape that nobody takes. Its second is shortened
// by the proxy's limit, which the answer does not show.
func TestProxyAsRecordedWithoutClient(t *testing.T) {
	server := httptest.NewServer(pushprox.NewProxy(pushprox.ProxyConfig{MaxTimeout: time.Millisecond}))
	t.Cleanup(server.Close)
	scraper := connect(t, server)
	scraper.send(recorded(t, "scraper-2-to-proxy.bin", "GET ", 1)[0])
	same(t, "answer to scraper 2", scraper.response(), recorded(t, "scraper-2-from-proxy.bin", "HTTP/1.1 ", 1)[0], date)
}

// TestClientAsRecorded plays the recorded proxy, and the target that the recorded push shows,
// to our client. Target and refusal wait until the next poll has come, because only then is
// it certain which connection the push takes.
func TestClientAsRecorded(t *testing.T) {
	polls := recorded(t, "client-1-to-proxy.bin", "POST /poll", 3)
	scrapes := recorded(t, "client-1-from-proxy.bin", "HTTP/1.1 200 OK", 2)
	pushes := recorded(t, "client-2-to-proxy.bin", "POST /push", 2)
	answers := recorded(t, "client-2-from-proxy.bin", "HTTP/1.1 200 OK", 2)

	// The target said what was pushed, less three lines: two that the client adds, and
	// Connection: close, which it adds to any answer in HTTP/1.0.
	_, targetSays, _ := bytes.Cut(pushes[0], []byte("\r\n\r\n"))
	for _, line := range []*regexp.Regexp{id, remaining, regexp.MustCompile(`(?m)^Connection: close\r$`)} {
		found := line.FindIndex(targetSays)
		if found == nil {
			t.Fatalf("no %v in %q", line, targetSays)
		}
		targetSays = append(bytes.Clone(targetSays[:found[0]]), targetSays[found[1]+len("\n"):]...)
	}
	// What it was asked is the recorded scrape in origin form, with what net/http adds.
	const targetHears = "GET /metrics?x=1 HTTP/1.1\r\n" +
		"Host: localhost:18190\r\n" +
		"User-Agent: Prometheus/3.0\r\n" +
		"Accept: text/plain;version=0.0.4\r\n" +
		"Id: f39f1f44-fe1f-4b56-87e3-0bbe3f73957c\r\n" +
		"Proxy-Connection: Keep-Alive\r\n" +
		"X-Prometheus-Scrape-Timeout-Seconds: 5\r\n" +
		"Accept-Encoding: gzip\r\n\r\n"

	proxy, target := listen(t), listen(t)
	polledAgain := make(chan struct{})
	pushed := make(chan int, 2)
	client := &pushprox.Client{
		FQDN: "localhost", ProxyURL: "http://127.0.0.1:18182",
		Pushed: func(status int) { pushed <- status },
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			switch address {
			case "127.0.0.1:18182":
				address = proxy.Addr().String()
			case "localhost:18190":
				address = target.Addr().String()
			case "localhost:1":
				<-polledAgain
				return nil, &net.OpError{
					Op: "dial", Net: network, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
					Err: os.NewSyscallError("connect", syscall.ECONNREFUSED),
				}
			default:
				return nil, errors.New("unexpected dial of " + address)
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}
	run(t, client)

	poller := accept(t, proxy)
	same(t, "poll 1", poller.request(), polls[0])
	poller.send(scrapes[0])
	same(t, "poll 2", poller.request(), polls[1])

	scraped := accept(t, target)
	same(t, "scrape", scraped.request(), []byte(targetHears))
	scraped.send(targetSays)
	pusher := accept(t, proxy)
	same(t, "push 1", pusher.request(), pushes[0], remaining)
	pusher.send(answers[0])
	if status := receive(t, pushed); status != http.StatusOK {
		t.Errorf("push 1 was answered with %d", status)
	}

	poller.send(scrapes[1])
	same(t, "poll 3", poller.request(), polls[2])
	close(polledAgain)
	same(t, "push 2", pusher.request(), pushes[1], remaining)
	pusher.send(answers[1])
	if status := receive(t, pushed); status != http.StatusOK {
		t.Errorf("push 2 was answered with %d", status)
	}
}

// receive waits for a value. Only a test that fails waits for long.
func receive[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(30 * time.Second):
		t.Fatal("waited for 30 s")
	}
	return v
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func accept(t *testing.T, l net.Listener) *peer {
	t.Helper()
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, conn)
}

// run runs a client until the test ends, or until the function that is returned is called,
// which gives Run's error.
func run(t *testing.T, client *pushprox.Client) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- client.Run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return stop
}
