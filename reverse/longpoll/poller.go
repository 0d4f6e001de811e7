package longpoll

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/ptth"
)

// Poller polls one proxy. It is safe for concurrent use.
type Poller struct {
	// URL is the proxy's.
	URL *url.URL
	// HTTP sends the requests.
	HTTP ptth.Doer
	// Name is the client's.
	Name string
	// Header says who the client is, see docs/protocol.md.
	Header http.Header
	// Handler answers the scrapes.
	Handler http.Handler
	// Logger is logged to.
	Logger *slog.Logger
	// Responded is told what came of each response that was sent.
	Responded func(error)

	inFlight sync.WaitGroup
	once     sync.Once
	slots    chan struct{}
}

// maxScrapes is how many scrapes there are at a time, whatever the proxy hands out.
const maxScrapes = 256

// Answer is what a poll was answered with.
type Answer struct {
	// Heartbeat is how long a promferry proxy holds a poll at most; zero for PushProx's, which
	// has no limit, and takes one poll at a time only.
	Heartbeat time.Duration
	// Displaced tells that another poll of this name took the place of this one.
	Displaced bool
	scrape    *http.Request
}

// HasScrape tells whether there is a scrape to answer.
func (a Answer) HasScrape() bool { return a.scrape != nil }

// Poll asks for a scrape, and waits for one until ctx ends. An answer without a scrape means
// to poll again. The error is a *reverse.Refusal when the proxy does not want the poll.
func (p *Poller) Poll(ctx context.Context) (Answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ptth.Endpoint(p.URL, "/poll"), strings.NewReader(p.Name))
	if err != nil {
		return Answer{}, errors.New("the URL makes no request")
	}
	maps.Copy(req.Header, p.Header)
	// It may be sent again on another connection, when an idle one turns out to be closed. (With
	// no value, it is for http.Transport only.)
	req.Header["Idempotency-Key"] = []string{}
	resp, err := p.HTTP.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer func() {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxHeader))
		_ = resp.Body.Close()
	}()
	a := Answer{}
	if resp.Header.Get(reverse.HeaderProxy) != "" {
		if a.Heartbeat, err = ptth.Heartbeat(resp); err != nil {
			return a, err
		}
	}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNoContent:
		return a, nil
	case http.StatusRequestTimeout:
		a.Displaced = true
		return a, nil
	default:
		return a, ptth.NewRefusal(resp, "a poll")
	}
	a.scrape, err = http.ReadRequest(bufio.NewReader(io.LimitReader(resp.Body, maxHeader)))
	if err != nil {
		return a, errors.New("the answer to a poll is no request: is this the URL of a proxy?")
	}
	return a, nil
}

// Start answers the scrape of an answer, if it has one, while the caller goes on, unless there
// are many already. Wait waits for it; when ctx ends it is given up.
func (p *Poller) Start(ctx context.Context, a Answer) {
	if a.scrape == nil {
		return
	}
	p.once.Do(func() { p.slots = make(chan struct{}, maxScrapes) })
	p.slots <- struct{}{} // Each has a deadline.
	p.inFlight.Go(func() {
		defer func() { <-p.slots }()
		err := p.respond(ctx, a)
		if err != nil {
			p.Logger.Debug("Response not taken", "err", err)
		}
		p.Responded(err)
	})
}

// Wait waits until all scrapes are answered.
func (p *Poller) Wait() { p.inFlight.Wait() }

// respond answers a scrape, and passes on the answer as it comes.
func (p *Poller) respond(ctx context.Context, a Answer) error {
	scrape := a.scrape
	limit := defaultScrape
	if seconds, err := strconv.ParseFloat(scrape.Header.Get(reverse.HeaderTimeout), 64); err == nil && seconds > 0 {
		limit = time.Duration(min(seconds, maxScrape.Seconds()) * float64(time.Second))
	}
	if a.Heartbeat == 0 {
		// PushProx's proxy waits no longer than what it says: leave time to tell it.
		limit -= min(limit/10, time.Second)
		scrape.Header.Set(reverse.HeaderTimeout, strconv.FormatFloat(limit.Seconds(), 'f', 3, 64))
	}
	// What is said about a target that was too slow takes a moment as well.
	ctx, cancel := context.WithTimeout(ctx, limit+time.Second)
	defer cancel()
	if a.Heartbeat == 0 {
		return p.push(ctx, a, p.collect(ctx, scrape))
	}
	body, to := io.Pipe()
	w := &responder{to: bufio.NewWriterSize(to, 4<<10), id: lastOf(scrape.Header[headerID]), header: make(http.Header), head: scrape.Method == http.MethodHead}
	var answering sync.WaitGroup
	answering.Go(func() {
		defer func() {
			if failed := recover(); failed != nil {
				if failed != http.ErrAbortHandler { //nolint:errorlint // It is that, or a fault of ours.
					panic(failed)
				}
				_ = to.CloseWithError(errors.New("the answer broke off"))
				return
			}
			_ = to.CloseWithError(w.end())
		}()
		p.Handler.ServeHTTP(w, scrape.WithContext(ctx))
	})
	defer answering.Wait()
	defer func() { _ = body.Close() }()
	err := p.push(ctx, a, body)
	cancel() // Of a scrape that nobody waits for.
	return err
}

// push sends a response, which is read from body as it comes.
func (p *Poller) push(ctx context.Context, a Answer, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ptth.Endpoint(p.URL, "/push"), body)
	if err != nil {
		return errors.New("the URL makes no request")
	}
	maps.Copy(req.Header, p.Header)
	req.Header.Del(reverse.HeaderAnnounce)
	req.Header.Set(headerID, lastOf(a.scrape.Header[headerID]))
	resp, err := p.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return ptth.NewRefusal(resp, "a response")
	}
	return nil
}

// collect answers a scrape of PushProx's proxy, which holds it in memory as well, and takes a
// response that breaks off for whole: it gets only what has come to its end.
func (p *Poller) collect(ctx context.Context, scrape *http.Request) io.Reader {
	var text bytes.Buffer
	w := &responder{
		to: bufio.NewWriter(&text), id: lastOf(scrape.Header[headerID]), header: make(http.Header), head: scrape.Method == http.MethodHead,
		held: &bytes.Buffer{},
	}
	whole := func() (whole bool) {
		defer func() {
			if failed := recover(); failed != nil && failed != http.ErrAbortHandler { //nolint:errorlint // As above.
				panic(failed)
			}
		}()
		p.Handler.ServeHTTP(w, scrape.WithContext(ctx))
		return true
	}()
	if !whole || w.held.Len() > maxHeld {
		w = &responder{to: w.to, id: w.id, header: make(http.Header), head: w.head, held: &bytes.Buffer{}}
		w.header.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, "the answer of the target broke off\n")
	}
	w.flush()
	return &text
}

// maxHeld is how large an answer may be that is collected, in bytes.
const maxHeld = 256 << 20

// How long a scrape may take at most, and one that does not say it: PushProx's defaults.
const (
	maxScrape     = 5 * time.Minute
	defaultScrape = 15 * time.Second
)

// responder writes an answer as the text of an HTTP response.
type responder struct {
	to     *bufio.Writer
	id     string
	header http.Header
	head   bool
	wrote  bool
	body   io.Writer
	chunks io.WriteCloser // nil when the length is known
	held   *bytes.Buffer  // the body, where it is collected
	status int
}

func (w *responder) Header() http.Header { return w.header }

func (w *responder) WriteHeader(status int) {
	if w.wrote {
		return
	}
	w.wrote, w.status = true, status
	if w.held == nil {
		w.start()
	}
}

// start writes what comes before the body.
func (w *responder) start() {
	status := w.status
	fmt.Fprintf(w.to, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	w.header.Set(headerID, w.id)
	// For PushProx's proxy, which else waits 15 s for somebody to take the response.
	w.header.Set(reverse.HeaderTimeout, "1")
	w.body = w.to
	if w.header.Get("Content-Length") == "" && !w.head && status != http.StatusNoContent && status != http.StatusNotModified {
		w.header.Set("Transfer-Encoding", "chunked")
		w.chunks = httputil.NewChunkedWriter(w.to)
		w.body = w.chunks
	}
	_ = w.header.Write(w.to)
	_, _ = w.to.WriteString("\r\n")
}

func (w *responder) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if w.head {
		return len(b), nil
	}
	if w.held != nil {
		if w.held.Len() > maxHeld {
			return 0, errors.New("too large")
		}
		return w.held.Write(b)
	}
	return w.body.Write(b)
}

// flush writes an answer that was collected.
func (w *responder) flush() {
	w.WriteHeader(http.StatusOK)
	if !w.head && w.status != http.StatusNoContent && w.status != http.StatusNotModified {
		w.header.Set("Content-Length", strconv.Itoa(w.held.Len()))
	}
	w.start()
	_, _ = w.to.Write(w.held.Bytes())
	_ = w.to.Flush()
}

// end completes the answer.
func (w *responder) end() error {
	w.WriteHeader(http.StatusOK)
	if w.chunks != nil {
		_ = w.chunks.Close()
		_, _ = w.to.WriteString("\r\n")
	}
	if err := w.to.Flush(); err != nil {
		return err
	}
	return io.EOF
}

// lastOf returns the last value: PushProx's proxy adds its Id after one that the scraper sent.
func lastOf(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}
