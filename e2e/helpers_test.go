//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// patience is how long a test waits for what is to happen within some cycles of a
// second. Only a failing test takes so long.
const patience = 30 * time.Second

// wait waits until check finds nothing wrong, and ends the test when it still does after
// patience.
func wait(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := real.Until(ctx, check); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// An agent is a running `promferry agent`.
type agent struct {
	*real.Server
	stateDir string
}

// startAgent starts an agent with these flags. It forwards each second unless they say
// otherwise.
func startAgent(t *testing.T, flags ...string) *agent {
	t.Helper()
	return startAgentAt(t, filepath.Join(t.TempDir(), "state"), flags...)
}

// startAgentAt is startAgent with the state directory of an agent that has ended.
func startAgentAt(t *testing.T, stateDir string, flags ...string) *agent {
	t.Helper()
	a := &agent{stateDir: stateDir}
	server, err := real.Serve(t.Context(), "", real.Command{
		Path: promferry(t), Args: append([]string{"agent", "--state.dir=" + a.stateDir}, flags...),
		Env: []string{"PROMFERRY_PUSH_INTERVAL=1s"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a.Server = server
	t.Cleanup(func() {
		a.Kill()
		if t.Failed() {
			t.Logf("the agent's log:\n%s", tail(a.Stderr(), 8<<10))
		}
	})
	return a
}

func promferry(t *testing.T) string {
	t.Helper()
	path, err := real.Promferry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// runAgent runs an agent that ends by itself, and returns its exit status.
func runAgent(t *testing.T, flags ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, err := real.Start(real.Command{Path: promferry(t), Args: append([]string{"agent"}, flags...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	status, err = p.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return status, p.Stdout(), p.Stderr()
}

// stop ends the agent as systemd does.
func (a *agent) stop(t *testing.T) {
	t.Helper()
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}

// sum returns the sum of those series of one of the agent's own metrics that have these
// labels, given as name, value, name, value. It fails where there is none.
func (a *agent) sum(ctx context.Context, name string, labels ...string) (float64, error) {
	body, err := a.Get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	return sum(body, name, labels...)
}

func sum(text []byte, name string, labels ...string) (float64, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return 0, err
	}
	total, found := 0.0, 0
	for _, m := range families[name].GetMetric() {
		have := make(map[string]string)
		for _, l := range m.GetLabel() {
			have[l.GetName()] = l.GetValue()
		}
		matches := true
		for pair := range slices.Chunk(labels, 2) {
			matches = matches && have[pair[0]] == pair[1]
		}
		if matches {
			total += m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue()
			found++
		}
	}
	if found == 0 {
		return 0, fmt.Errorf("no series %s%v", name, labels)
	}
	return total, nil
}

// mustSum is sum where the metric must be there now.
func (a *agent) mustSum(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	value, err := a.sum(t.Context(), name, labels...)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// waitCycles waits until the agent has begun n more scrapes of a target.
func (a *agent) waitCycles(t *testing.T, target string, n float64) {
	t.Helper()
	const metric = "promferry_forwarder_scrapes_total"
	before := a.mustSum(t, metric, "target", target)
	wait(t, fmt.Sprintf("%v more cycles of %s", n, target), func(ctx context.Context) error {
		now, err := a.sum(ctx, metric, "target", target)
		if err == nil && now < before+n {
			err = fmt.Errorf("%v scrapes, %v before", now, before)
		}
		return err
	})
}

// waitSum waits until one of the agent's own metrics has a value that is good.
func (a *agent) waitSum(t *testing.T, good func(float64) bool, name string, labels ...string) {
	t.Helper()
	wait(t, name, func(ctx context.Context) error {
		value, err := a.sum(ctx, name, labels...)
		if err == nil && !good(value) {
			err = fmt.Errorf("%s%v is %v", name, labels, value)
		}
		return err
	})
}

// counts are what an agent has counted for a target and a Pushgateway.
type counts struct {
	agent           *agent
	target, gateway string

	scrapes, puts, failures, superseded, skipped float64
}

// count counts from the second put on: the first cycle runs at once, and one on schedule
// may come in the middle of it.
func (a *agent) count(t *testing.T, target string, gateway *real.Gateway) counts {
	t.Helper()
	a.waitSum(t, above(1), "promferry_forwarder_puts_total", "target", target, "gateway", gateway.URL)
	return a.countNow(t, target, gateway.URL)
}

func (a *agent) countNow(t *testing.T, target, gateway string) counts {
	t.Helper()
	body, err := a.Get(t.Context(), "/metrics") // all at one time
	if err != nil {
		t.Fatal(err)
	}
	number := func(name string, labels ...string) float64 {
		value, err := sum(body, "promferry_forwarder_"+name, append(labels, "target", target)...)
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	return counts{
		agent: a, target: target, gateway: gateway,
		scrapes:    number("scrapes_total"),
		skipped:    number("cycles_skipped_total"),
		puts:       number("puts_total", "gateway", gateway),
		failures:   number("put_failures_total", "gateway", gateway),
		superseded: number("puts_superseded_total", "gateway", gateway),
	}
}

// checkEachPut checks that since then the target was put in each cycle.
func (c counts) checkEachPut(t *testing.T) {
	t.Helper()
	now := c.agent.countNow(t, c.target, c.gateway)
	scrapes, puts := now.scrapes-c.scrapes, now.puts-c.puts
	if scrapes == 0 || puts < scrapes-1 { // one may be on its way
		t.Errorf("%s: %v puts in %v cycles", c.target, puts, scrapes)
	}
	if failures, superseded, skipped := now.failures-c.failures, now.superseded-c.superseded, now.skipped-c.skipped; failures+superseded+skipped != 0 {
		t.Errorf("%s: %v puts failed, %v were superseded, %v cycles were skipped", c.target, failures, superseded, skipped)
	}
}

func above(limit float64) func(float64) bool   { return func(v float64) bool { return v > limit } }
func exactly(value float64) func(float64) bool { return func(v float64) bool { return v == value } }

// reload makes the agent read its files again.
func (a *agent) reload(t *testing.T) {
	t.Helper()
	const reloads = "promferry_agent_reloads_total"
	before := a.mustSum(t, reloads, "outcome", "success")
	if err := a.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	a.waitSum(t, above(before), reloads, "outcome", "success")
}

func startExporter(t *testing.T, flags ...string) *real.Server {
	t.Helper()
	s, err := real.NodeExporter(t.Context(), "", flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() }) // not s.Kill: Restart makes another process
	return s
}

func startPushgateway(t *testing.T, flags ...string) *real.Gateway {
	t.Helper()
	g, err := real.Pushgateway(t.Context(), "", flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Kill() })
	return g
}

// startPrometheus starts a Prometheus that scrapes the gateways as it should: with
// honor_labels.
func startPrometheus(t *testing.T, gateways ...*real.Gateway) *real.PrometheusServer {
	t.Helper()
	var addresses []string
	for _, g := range gateways {
		addresses = append(addresses, g.Addr)
	}
	list, _ := json.Marshal(addresses)
	p, err := real.Prometheus(t.Context(), t.TempDir(), fmt.Sprintf(
		"- job_name: pushgateway\n  honor_labels: true\n  static_configs: [{targets: %s}]\n", list))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// waitQuery waits until a query has exactly one series as its answer, and its value is
// good.
func waitQuery(t *testing.T, p *real.PrometheusServer, promql string, good func(float64) bool) {
	t.Helper()
	wait(t, promql, func(ctx context.Context) error {
		samples, err := p.Query(ctx, promql)
		if err == nil && (len(samples) != 1 || !good(samples[0].Value)) {
			err = fmt.Errorf("the answer is %v", samples)
		}
		return err
	})
}

// waitEnded waits until a query has no series as its answer.
func waitEnded(t *testing.T, p *real.PrometheusServer, promql string) {
	t.Helper()
	wait(t, "the end of "+promql, func(ctx context.Context) error {
		samples, err := p.Query(ctx, promql)
		if err == nil && len(samples) != 0 {
			err = fmt.Errorf("the answer is %v", samples)
		}
		return err
	})
}

// group returns the group that has exactly these labels.
func group(ctx context.Context, g *real.Gateway, labels map[string]string) (real.Group, error) {
	groups, err := g.Groups(ctx)
	if err != nil {
		return real.Group{}, err
	}
	var have []map[string]string
	for _, group := range groups {
		if maps.Equal(group.Labels, labels) {
			return group, nil
		}
		have = append(have, group.Labels)
	}
	return real.Group{}, fmt.Errorf("no group %v, only %v", labels, have)
}

// value returns the value of a family's only series; "" when the group has no such family.
func value(g real.Group, family string) string {
	if metrics := g.Families[family].Metrics; len(metrics) == 1 {
		return metrics[0].Value
	}
	return ""
}

// own are the families that stand in every group, whatever the target exposes; the last
// two are the Pushgateway's.
var own = []string{
	"up", "scrape_duration_seconds", "scrape_samples_scraped", "promferry_info", "promferry_expires_after_seconds",
	"push_time_seconds", "push_failure_time_seconds",
}

// others returns the names of the families in a group that are not own, sorted.
func others(g real.Group) []string {
	names := slices.Sorted(maps.Keys(g.Families))
	return slices.DeleteFunc(names, func(name string) bool { return slices.Contains(own, name) })
}

// checkGroup checks up and the names of the target's own families in a group.
func checkGroup(g real.Group, up string, families ...string) error {
	if value(g, "up") != up || !slices.Equal(others(g), families) {
		return fmt.Errorf("group %v: up %q with %v, want up %q with %v", g.Labels, value(g, "up"), others(g), up, families)
	}
	return nil
}

// put replaces a group on a Pushgateway with a text, as a stranger would.
func put(t *testing.T, g *real.Gateway, path, text string) {
	t.Helper()
	if status, body := send(t, http.MethodPut, g.URL+path, "", []byte(text)); status != http.StatusOK {
		t.Fatalf("put %s: status %d: %s", path, status, body)
	}
}

// send sends a request and returns the answer. It follows no redirect.
func send(t *testing.T, method, url, contentType string, body []byte) (status int, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := noRedirects.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	_, _ = b.ReadFrom(resp.Body)
	return resp.StatusCode, strings.TrimSpace(b.String())
}

var noRedirects = &http.Client{
	Timeout:       patience,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// serve starts an HTTP server that ends with the test, and returns its URL. Handlers
// that would never end have to watch their request's context.
func serve(t *testing.T, handler http.Handler) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// expose answers with an exposition.
func expose(contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write([]byte(body))
	}
}

// refusing returns an address where connections are refused until the test ends or listens
// there itself: it is bound, so that nobody else gets it, and nothing listens.
func refusing(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	address, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", address.(*syscall.SockaddrInet4).Port)
}

// hanging returns an address where connections are accepted, by the kernel, and nobody
// ever answers.
func hanging(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

const textType = "text/plain; version=0.0.4; charset=utf-8"

func tail(s string, n int) string {
	if len(s) > n {
		return "..." + s[len(s)-n:]
	}
	return s
}

// listenAt listens at an address that refusing returned before.
func listenAt(t *testing.T, address string) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var optErr error
		err := c.Control(func(fd uintptr) {
			optErr = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
		return errors.Join(err, optErr)
	}}).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func gunzip(t *testing.T, r io.Reader) string {
	t.Helper()
	z, err := gzip.NewReader(r)
	if err != nil {
		t.Error(err)
		return ""
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(b))
}
