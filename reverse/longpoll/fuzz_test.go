package longpoll_test

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/longpoll"
)

// FuzzPollBody: no body of a poll breaks the hub, or is a client whose name is none.
func FuzzPollBody(f *testing.F) {
	f.Add("web-1")
	f.Add(" web-1\n")
	f.Add("a/b\x00")
	f.Fuzz(func(t *testing.T, body string) {
		e := newEnd(t)
		defer e.stop()
		c, _ := e.dial(t)
		_ = c.SetDeadline(time.Now().Add(5 * time.Millisecond))
		_, _ = io.WriteString(c, poll(body))
		_, _ = c.Read(make([]byte, 1))
		_ = c.Close()
		for _, s := range e.registry.Status().Clients {
			if reverse.ValidateName(s.Name) != nil {
				t.Fatalf("%q is a client", s.Name)
			}
		}
	})
}

// FuzzResponse: no response breaks the hub, and a scrape ends with it or in its time.
func FuzzResponse(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\nId: ID\r\nContent-Length: 2\r\n\r\nok")
	f.Add("HTTP/0.0 200 OK\r\nId: ID\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
	f.Add("HTTP/1.1 100 Continue\r\nId: ID\r\n\r\n")
	f.Fuzz(func(t *testing.T, body string) {
		e := newEnd(t)
		defer e.stop()
		c, r := e.dial(t)
		_, _ = io.WriteString(c, poll("web-1"))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = e.scrape(ctx, http.MethodGet)
		}()
		_ = c.SetDeadline(time.Now().Add(20 * time.Millisecond))
		if resp, err := http.ReadResponse(r, nil); err == nil { //nolint:bodyclose // It is a pipe.
			if scrape, err := http.ReadRequest(bufio.NewReader(resp.Body)); err == nil {
				c2, r2 := e.dial(t)
				_ = c2.SetDeadline(time.Now().Add(20 * time.Millisecond))
				go func() { _, _ = io.Copy(io.Discard, r2) }()
				_, _ = io.WriteString(c2, push(strings.ReplaceAll(body, "ID", scrape.Header.Get("Id"))))
				_ = c2.Close()
			}
		}
		<-done
	})
}

// FuzzPollAnswer: no answer of a proxy to a poll breaks the client.
func FuzzPollAnswer(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\nContent-Length: 70\r\nPromferry-Proxy: 1\r\nPromferry-Heartbeat: 15\r\n\r\nGET http://web-1:9100/m HTTP/1.1\r\nHost: x\r\nId: a\r\n\r\n")
	f.Add("HTTP/1.1 204 No Content\r\nPromferry-Proxy: 1\r\n\r\n")
	f.Add("HTTP/1.1 408 x\r\n\r\n")
	f.Fuzz(func(t *testing.T, answer string) {
		p := &longpoll.Poller{
			URL: &url.URL{Scheme: "http", Host: "proxy"}, Name: "web-1", Header: http.Header{}, Logger: slog.New(slog.DiscardHandler), Responded: func(error) {},
			HTTP: doer(func(r *http.Request) (*http.Response, error) {
				if strings.HasSuffix(r.URL.Path, "/push") {
					b, err := io.ReadAll(r.Body)
					if err == nil {
						resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(b))), nil)
						if err != nil {
							t.Errorf("the response is %q: %v", b, err)
						} else {
							_ = resp.Body.Close()
						}
					}
					return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody}, nil
				}
				return http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), r)
			}),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }),
		}
		if a, err := p.Poll(t.Context()); err == nil {
			p.Start(t.Context(), a)
			p.Wait()
		}
	})
}
