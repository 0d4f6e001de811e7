//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/e2e/real"
)

const expiresAfterName = "promferry_expires_after_seconds"

// A groupState is what a group is after a push or a deletion of crashGroup. The zero one is that
// of no group.
type groupState struct {
	families map[string]float64 // all series of one have the same value; nil where there is no group
	// The push was begun and answered then. The time of the push is between.
	begun, answered time.Time
}

func (s groupState) expires() bool { return s.families[expiresAfterName] > 0 }

// check checks what a gateway that has restarted has of the group.
func (s groupState) check(got *servedGroup) error {
	switch {
	case got == nil && s.families == nil:
		return nil
	case got == nil:
		return fmt.Errorf("there is no group, want %v", s.families)
	case s.families == nil:
		return fmt.Errorf("there is a group with %v, want none", got.families)
	case (s.expires() || len(s.families) == 0) && len(got.families) == 0:
		return nil // It expires: all that is kept of it is that it is there.
	case s.expires() || !maps.Equal(got.families, s.families):
		return fmt.Errorf("there is %v, want %v", got.families, s.families)
	case got.pushed < seconds(s.begun) || got.pushed > seconds(s.answered):
		return fmt.Errorf("pushed at %f, want %f to %f", got.pushed, seconds(s.begun), seconds(s.answered))
	}
	return nil
}

// seconds is as exact as what a gateway serves is.
func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// A servedGroup is what a gateway serves of one.
type servedGroup struct {
	families map[string]float64
	pushed   float64
}

// servedGroups returns what a gateway has of the groups of the job crash, by instance, from what
// it answers at /sd and at /metrics.
func servedGroups(sd, page []byte) (map[string]*servedGroup, error) {
	var targets []struct{ Labels map[string]string }
	if err := json.Unmarshal(sd, &targets); err != nil {
		return nil, err
	}
	groups := make(map[string]*servedGroup)
	for _, target := range targets {
		if _, instance, ok := strings.Cut(target.Labels["__metrics_path__"], "/groups/job/crash/instance/"); ok {
			groups[strings.TrimSuffix(instance, "/metrics")] = &servedGroup{families: make(map[string]float64)}
		}
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		return nil, err
	}
	for name, family := range families {
		for _, m := range family.GetMetric() {
			labels := make(map[string]string)
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["job"] != "crash" {
				continue
			}
			g := groups[labels["instance"]]
			if g == nil {
				return nil, fmt.Errorf("%v is on the page and not in /sd", labels)
			}
			value := m.GetUntyped().GetValue() + m.GetGauge().GetValue()
			switch before, ok := g.families[name]; {
			case name == "push_time_seconds":
				g.pushed = value
			case name == "push_failure_time_seconds":
			case ok && before != value:
				return nil, fmt.Errorf("%v has %s of %v and of %v", labels, name, before, value)
			default:
				g.families[name] = value
			}
		}
	}
	return groups, nil
}

// A crashGroup is a group that one pusher alone changes, one push after the other.
type crashGroup struct {
	instance string
	// states are what it was and is after each push that was begun. The last one may be
	// without an answer.
	states   []groupState
	inFlight bool
}

func (g *crashGroup) last() groupState { return g.states[len(g.states)-1] }

// next begins a change, and returns the request for it. Number tells it from all others.
func (g *crashGroup) next(random *rand.Rand, number int, durable bool) (method, body string) {
	old := g.last()
	next := groupState{families: make(map[string]float64), begun: time.Now()}
	names := []string{"a", "b", "c"}[:1+random.IntN(3)]
	switch n := random.IntN(10); {
	case n == 0 && old.families != nil:
		method, next.families = http.MethodDelete, nil
	case n < 5:
		method = http.MethodPost
		maps.Copy(next.families, old.families)
		names = names[len(names)-1:]
	default:
		method = http.MethodPut
		if random.IntN(4) == 0 {
			names = append(slices.Clone(names), "large")
		}
		if random.IntN(5) == 0 && !durable {
			names = append(slices.Clone(names), expiresAfterName)
		}
	}
	if method != http.MethodDelete {
		var text strings.Builder
		for _, name := range names {
			series, value := 1, number
			switch name {
			case "large": // Of several pages.
				series = 20 + random.IntN(500)
			case expiresAfterName:
				value = 3600
			}
			for i := range series {
				fmt.Fprintf(&text, "%s{i=\"%d\",x=\"%x\"} %d\n", name, i, random.Uint64(), value)
			}
			next.families[name] = float64(value)
		}
		body = text.String()
	}
	g.states, g.inFlight = append(g.states, next), true
	return method, body
}

// answered notes that the last change was.
func (g *crashGroup) answered() {
	g.states[len(g.states)-1].answered, g.inFlight = time.Now(), false
}

// A pusher pushes to groups of its own over one connection.
type pusher struct {
	groups []*crashGroup
	random *rand.Rand
	number int
	client *http.Client
	// local is the address of the last connection.
	local net.Addr
	// durable tells that none of the groups ever expires.
	durable bool
}

func newPushers(pushers, groups int) []*pusher {
	all := make([]*pusher, pushers)
	for i := range all {
		p := &pusher{random: rand.New(rand.NewPCG(1, uint64(i)))}
		for n := range groups {
			p.groups = append(p.groups, &crashGroup{instance: fmt.Sprintf("%d-%d", i, n), states: make([]groupState, 1)})
		}
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil {
				p.local = conn.LocalAddr()
			}
			return conn, err
		}
		p.client = &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: dial, MaxConnsPerHost: 1}}
		all[i] = p
	}
	return all
}

// push changes one of the groups. An error means that there was no answer.
func (p *pusher) push(t *testing.T, url string) (*crashGroup, error) {
	p.number++
	g := p.groups[p.random.IntN(len(p.groups))]
	method, body := g.next(p.random, p.number, p.durable)
	req, err := http.NewRequestWithContext(t.Context(), method, url+"/metrics/job/crash/instance/"+g.instance, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	// Whoever does not know whether it was taken must not push it again.
	req.GetBody = nil
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if want := map[bool]int{true: http.StatusAccepted, false: http.StatusOK}[method == http.MethodDelete]; resp.StatusCode != want {
		return nil, fmt.Errorf("%s: status %d", method, resp.StatusCode)
	}
	g.answered()
	return g, nil
}

// TestGatewayKilled kills a gateway again and again while many push to it. What was answered is
// there after each restart; of what was not, either all or nothing.
func TestGatewayKilled(t *testing.T) {
	server := startGatewayAt(t, t.TempDir())
	const kills = 30
	random := rand.New(rand.NewPCG(2, 3))
	pushers := newPushers(16, 3)
	pushes, inFlight, taken := 0, 0, 0
	for kill := range kills {
		var pushing sync.WaitGroup
		for _, p := range pushers {
			pushing.Go(func() {
				for {
					if _, err := p.push(t, server.URL); err != nil {
						if strings.Contains(err.Error(), "status") {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		<-time.After(time.Duration(20+random.IntN(400)) * time.Millisecond)
		server.Kill()
		killed := time.Now()
		pushing.Wait()
		if err := server.Restart(t.Context()); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		if _, err := server.Get(t.Context(), "/-/ready"); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		a, b, c := checkGroups(t, server, pushers, killed)
		pushes, inFlight, taken = pushes+a, inFlight+b, taken+c
		if t.Failed() {
			t.Fatalf("the log:\n%s", tail(server.Stderr(), 4<<10))
		}
	}
	t.Logf("%d kills: %d pushes answered, %d in flight, of which %d were taken", kills, pushes, inFlight, taken)
	if inFlight < 4*kills || taken == 0 || taken == inFlight {
		t.Error("the kills did not hit what they were to hit")
	}
}

// checkGroups checks that a gateway that has restarted has what was answered before the old one
// ended, or what was begun then. It returns how many pushes were answered, how many were begun
// and not answered, and how many of these it has taken.
func checkGroups(t *testing.T, server *real.Gateway, pushers []*pusher, ended time.Time) (answered, inFlight, taken int) {
	t.Helper()
	sd, err := server.Get(t.Context(), "/sd")
	if err != nil {
		t.Fatal(err)
	}
	page, err := server.Get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	got, err := servedGroups(sd, page)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pushers {
		p.client.CloseIdleConnections()
		for _, g := range p.groups {
			answered += len(g.states) - 1
			is := g.last()
			if g.inFlight {
				answered--
				inFlight++
				is.answered = ended
			}
			err := is.check(got[g.instance])
			switch before := g.states[max(len(g.states)-2, 0)]; {
			case g.inFlight && err == nil:
				taken++
			case g.inFlight:
				if errBefore := before.check(got[g.instance]); errBefore != nil {
					err = fmt.Errorf("%w; or: %w", errBefore, err)
				} else {
					is, err = before, nil
				}
			}
			if err != nil {
				t.Errorf("group %s: %v", g.instance, err)
			}
			if is.expires() {
				is.families = make(map[string]float64) // They went with the process.
			}
			g.states, g.inFlight = []groupState{is}, false
		}
	}
	return answered, inFlight, taken
}
