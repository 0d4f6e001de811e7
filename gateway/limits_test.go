package gateway

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/common/expfmt"
)

// TestLimits goes beyond each limit. What was there stays, and others go on.
func TestLimits(t *testing.T) {
	g := newTest(t, func(c *Config) { c.MaxGroups, c.MaxSeries, c.MaxBodyBytes, c.MaxGroupBytes = 2, 3, 1000, 1000 })
	const group = "/metrics/job/j"
	put(t, g, group, "a 1\n")
	random := make([]byte, 2000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	noise := gzipText(t, string(random))
	for _, test := range []struct {
		name   string
		answer *httptest.ResponseRecorder
		status int
		part   string
	}{
		{"body", ask(g, http.MethodPut, group, "# "+strings.Repeat("x", 1000)+"\n"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"body unpacked", ask(g, http.MethodPut, group, gzipText(t, "# "+strings.Repeat("x", 1000)+"\n"), "Content-Encoding", "gzip"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"body packed", ask(g, http.MethodPut, group, noise, "Content-Encoding", "gzip"), http.StatusRequestEntityTooLarge, "--limit.body-bytes"},
		{"series", ask(g, http.MethodPut, group, "a 1\nb 1\nc 1\nd 1\n"), http.StatusUnprocessableEntity, "--limit.group-series"},
		{"series of a protobuf", ask(g, http.MethodPut, group, delimited(t, gauge("a"), gauge("b"), gauge("c"), gauge("d")), "Content-Type", string(expfmt.FmtProtoDelim)), http.StatusUnprocessableEntity, "--limit.group-series"},
		{"series, some of them there", ask(g, http.MethodPost, group, "b 1\nc 1\nd 1\n"), http.StatusUnprocessableEntity, "--limit.group-series"},
	} {
		want(t, test.answer, test.status, test.part)
		if t.Failed() {
			t.Fatal(test.name)
		}
	}
	longKey := "/metrics/job/j/l/" + strings.Repeat("x", 500)
	for _, test := range []struct {
		name, path, body string
		headers          []string
		status           int
		part             string
	}{
		{"families without series", group, "# TYPE a gauge\n # TYPE b gauge\n#TYPE c gauge\n# TYPE d gauge\n", nil, http.StatusUnprocessableEntity, "the push has 4 families"},
		{"families without series, protobuf", group, strings.Repeat("\x00", 4), []string{"Content-Type", string(expfmt.FmtProtoDelim)}, http.StatusUnprocessableEntity, "the push has 4 families"},
		{"text with the labels", longKey, "a 1\nb 1\n", nil, http.StatusRequestEntityTooLarge, "--limit.group-bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			want(t, ask(g, http.MethodPut, test.path, test.body, test.headers...), test.status, test.part)
		})
	}
	put(t, g, "/metrics/job/k", "a 1\nb 1\nc 1\n")
	want(t, ask(g, http.MethodPut, "/metrics/job/l", "a 1\n"), http.StatusTooManyRequests, "--limit.groups")
	want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK, `a{instance="",job="j"} 1`, "!b{")
	want(t, ask(g, http.MethodDelete, "/metrics/job/k", ""), http.StatusAccepted)
	put(t, g, "/metrics/job/l", "a 1\n")
}

// TestEnded has a push whose request ends before it is read. That is no reason for who sent it
// to give it up, as a 400 would be.
func TestEnded(t *testing.T) {
	g := newTest(t, nil)
	ctx, end := context.WithCancel(t.Context())
	end()
	for contentType, body := range map[string]string{"": "a 1\n", string(expfmt.FmtProtoDelim): delimited(t, gauge("a"))} {
		for range 20 { // Whether there is room to read is asked at the same time.
			r := httptest.NewRequest(http.MethodPut, "/metrics/job/j", strings.NewReader(body))
			r.Header.Set("Content-Type", contentType)
			w := httptest.NewRecorder()
			g.ServeHTTP(w, r.WithContext(ctx))
			want(t, w, http.StatusTooManyRequests, "push it again")
		}
	}
}

// listener accepts the far ends of pipes.
type listener struct {
	net.Listener
	ends chan net.Conn
}

func (l listener) Accept() (net.Conn, error) {
	c, ok := <-l.ends
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (listener) Close() error   { return nil }
func (listener) Addr() net.Addr { return &net.TCPAddr{} }

// TestSlow has clients that stop in the middle: of a body, and of reading a page. Neither is
// waited for longer than its step may take.
func TestSlow(t *testing.T) {
	for _, test := range []struct {
		name, request string
		took          time.Duration
		answer        string
	}{
		{"body", "PUT /metrics/job/j HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\na 1\n", bodyTime, "408 Request Timeout"},
		{"page", "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n", writeTime, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newTest(t, nil)
				put(t, g, "/metrics/job/j", "a 1\n")
				ends := make(chan net.Conn)
				gone := make(chan time.Duration, 1)
				begin := time.Now()
				server := &http.Server{Handler: g, ReadHeaderTimeout: time.Second, ConnState: func(_ net.Conn, s http.ConnState) {
					if s == http.StateClosed {
						gone <- time.Since(begin)
					}
				}}
				var wg sync.WaitGroup
				wg.Go(func() { _ = server.Serve(listener{ends: ends}) })
				near, far := net.Pipe()
				ends <- far
				_, _ = io.WriteString(near, test.request)
				if test.answer != "" {
					if b, _ := bufio.NewReader(near).ReadString('\n'); !strings.Contains(b, test.answer) {
						t.Errorf("the answer is %q", b)
					}
					wg.Go(func() { _, _ = io.Copy(io.Discard, near) })
				}
				if took := <-gone; took < test.took || took > test.took+time.Second {
					t.Errorf("it took %v, want %v", took, test.took)
				}
				_ = near.Close()
				close(ends)
				wg.Wait()
				_ = server.Close()
			})
		})
	}
}

// TestLargeBodies has more large bodies come at once than are read at a time, and none of them
// come to its end: others go on, and one more is told so.
func TestLargeBodies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBodyBytes = 4 * smallBody })
		var wg sync.WaitGroup
		push := func(status int, part string) *io.PipeWriter {
			near, far := io.Pipe()
			r := httptest.NewRequest(http.MethodPut, "http://hub:9091/metrics/job/large", near)
			wg.Go(func() {
				w := httptest.NewRecorder()
				g.ServeHTTP(w, r)
				_ = near.Close()
				want(t, w, status, part)
			})
			wg.Go(func() { _, _ = far.Write(bytes.Repeat([]byte("# and so on\n"), smallBody/6)) })
			return far
		}
		var stuck []*io.PipeWriter
		for range largeBodies {
			stuck = append(stuck, push(http.StatusOK, ""))
		}
		synctest.Wait()
		push(http.StatusTooManyRequests, "8 bodies of more than 1048576 bytes are being read")
		put(t, g, "/metrics/job/small", "a 1\n")
		<-time.After(bodyTime)
		synctest.Wait()
		for _, far := range stuck {
			_ = far.Close()
		}
		wg.Wait()
		// There is room again.
		far := push(http.StatusOK, "")
		synctest.Wait()
		_ = far.Close()
		wg.Wait()
	})
}

// TestTurns has large bodies take all the time that there is for them: small ones go on, and
// a large one that is not read in time was not wrong, so its sender does not give it up.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBodyBytes = 4 * smallBody })
		for range cap(g.parsingLarge) {
			g.parsingLarge <- struct{}{}
		}
		put(t, g, "/metrics/job/small", "a 1\n")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		large := "b 1\n" + strings.Repeat("#\n", smallBody/2)
		w := httptest.NewRecorder()
		g.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPut, "http://hub:9091/metrics/job/small", strings.NewReader(large)))
		want(t, w, http.StatusTooManyRequests, "push it again")
		<-g.parsingLarge
		put(t, g, "/metrics/job/small", large)
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := readFamilies(ctx, []byte("a 1\n"), "", 1)
	if r := asRefusal(err); r.Status != http.StatusTooManyRequests {
		t.Errorf("cut while it is read: %d, %v", r.Status, r)
	}
}

// TestFewPages has two who do not read the answers with all groups that they asked for: a third
// one is told so, and targets go on.
func TestFewPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBodyBytes = 2 * largePage })
		put(t, g, "/metrics/job/j", "# HELP a "+strings.Repeat("x", largePage)+"\na 1\n")
		put(t, g, "/metrics/job/k", "b 1\n")
		for range maxPages {
			g.pages <- struct{}{}
		}
		for _, path := range []string{"/metrics", "/api/v1/metrics"} {
			begin := time.Now()
			want(t, ask(g, http.MethodGet, path, ""), http.StatusServiceUnavailable, "2 answers with many groups", "/sd")
			if took := time.Since(begin); took != pageTime {
				t.Errorf("it waited for %v", took)
			}
		}
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
		// Nobody is to think that the gateway is down.
		want(t, ask(g, http.MethodGet, "/metrics?match[]={job=\"\"}", ""), http.StatusOK, "promferry_gateway_groups{", "!\na{", "!\nb{")
		want(t, ask(g, http.MethodGet, "/metrics?match[]={job=\"k\"}", ""), http.StatusOK, "\nb{")
		<-g.pages
		want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "a{")
		want(t, ask(g, http.MethodGet, "/api/v1/metrics", ""), http.StatusOK)
		if len(g.pages) != maxPages-1 {
			t.Error("a turn was not given back")
		}
	})
}

// TestUnpackedLarge has bodies that are large only when they are unpacked: they wait for the turns
// of large ones.
func TestUnpackedLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxBodyBytes = 4 * smallBody })
		large := gzipText(t, strings.Repeat("#\n", smallBody)+"a 1\n")
		for range largeBodies {
			g.large <- struct{}{}
		}
		want(t, ask(g, http.MethodPut, "/metrics/job/j", large, "Content-Encoding", "gzip"), http.StatusTooManyRequests, "8 bodies of more than")
		want(t, ask(g, http.MethodPut, "/metrics/job/j", gzipText(t, "b 1\n"), "Content-Encoding", "gzip"), http.StatusOK)
		<-g.large
		want(t, ask(g, http.MethodPut, "/metrics/job/j", large, "Content-Encoding", "gzip"), http.StatusOK)
		if len(g.large) != largeBodies-1 || len(g.parsing) != 0 || len(g.parsingLarge) != 0 {
			t.Error("a turn was not given back")
		}
	})
}
