//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/promferry/promferry/e2e/natlab"
	"github.com/promferry/promferry/e2e/real"
)

// A natted is a node behind a NAT, seen by Prometheus through a proxy.
type natted struct {
	lab           *natlab.Lab
	proxy, client *daemon
	prometheus    *real.PrometheusServer
}

const app = `{job="app",instance="web-1"}`

// arrives waits until a scrape that began from now on has arrived: up is 1, and the value is
// that of a new scrape.
func (n *natted) arrives(t *testing.T) {
	t.Helper()
	since := now(t, n.prometheus)
	waitScraped(t, n.prometheus, app, since)
	waitQuery(t, n.prometheus, fmt.Sprintf("timestamp(app_scrapes%s > 0) > %f", app, since), above(since))
}

// noLines waits until both ends know that they are not connected. Without a heartbeat, that
// would take minutes: the kernel goes on sending again for a quarter of an hour.
func (n *natted) noLines(t *testing.T) {
	t.Helper()
	began := time.Now()
	n.proxy.waitSum(t, exactly(0), "promferry_proxy_lines")
	n.client.waitSum(t, exactly(0), "promferry_client_lines")
	// Twice the heartbeat of a second, and ten for a busy machine.
	if took := time.Since(began); took > 12*time.Second {
		t.Errorf("both ends knew it after %v", took)
	}
}

// TestPullFaults breaks what lies between an agent and its proxy, in each way that a network
// has. The steps share the programs and follow each other: each begins with all well.
func TestPullFaults(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, new(counting))
	n := &natted{lab: lab, proxy: startProxy(t, lab)}
	n.client = startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
	n.prometheus = startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	n.arrives(t)
	vanished := always(t, "/sd", func(ctx context.Context) error {
		have, err := listed(ctx, n.proxy)
		if err == nil && !slices.Equal(have, []string{"app of web-1"}) {
			err = fmt.Errorf("it lists %q", have)
		}
		return err
	})

	steps := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"half-open", func(t *testing.T) {
			lab.Cut(t, natlab.HubIP)
			n.noLines(t)
			waitQuery(t, n.prometheus, "up"+app, exactly(0))
			waitFault(t, n.prometheus, "app", http.StatusServiceUnavailable)
			lab.Heal(t)
			n.arrives(t)
		}},
		{"the NAT restarts", func(t *testing.T) {
			lab.FlushConntrack(t)
			n.arrives(t) // over new lines: nothing comes over the old ones any more
		}},
		{"connections reset", func(t *testing.T) {
			lab.Reset(t, natlab.HubIP)
			n.noLines(t)
			waitQuery(t, n.prometheus, "up"+app, exactly(0))
			lab.Heal(t)
			n.arrives(t)
		}},
		{"the node's network goes away", func(t *testing.T) {
			lab.LinkDown(t)
			n.noLines(t)
			waitQuery(t, n.prometheus, "up"+app, exactly(0))
			lab.LinkUp(t)
			n.arrives(t)
		}},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return
		}
	}
	vanished()
}

// TestPullCutInTheMiddle cuts a node off while a scrape of it goes on, which neither end can
// tell from a target that thinks.
func TestPullCutInTheMiddle(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	slow := hold("app_scrapes 1\n")
	serveIn(t, lab.Worker, appAddr, slow)
	n := &natted{lab: lab, proxy: startProxy(t, lab)}
	n.client = startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"})
	n.prometheus = startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  scrape_interval: 5s\n  scrape_timeout: 5s\n")

	await(t, "a scrape", slow.began)
	lab.Cut(t, natlab.HubIP)
	select {
	case slow.end <- struct{}{}: // the answer gets nowhere
	case <-time.After(patience):
		t.Fatal("the scrape was given up")
	}
	waitQuery(t, n.prometheus, "up"+app, exactly(0))
	n.proxy.waitSum(t, exactly(0), "promferry_proxy_lines")
	n.client.waitSum(t, exactly(0), "promferry_client_lines")

	close(slow.end) // from now on it answers at once
	lab.Heal(t)
	n.arrives(t)
}

// TestPullHeartbeat shows that both ends find dead lines out by themselves, when nobody scrapes.
func TestPullHeartbeat(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	n := &natted{lab: lab, proxy: startProxy(t, lab)}
	n.client = startClient(t, lab, []string{"a=http://" + appAddr + "/a", "b=http://" + appAddr + "/b", "c=http://" + appAddr + "/c"})
	three := func() {
		t.Helper()
		n.proxy.waitSum(t, exactly(3), "promferry_proxy_lines", "kind", "ptth", "state", "free")
		n.client.waitSum(t, exactly(3), "promferry_client_lines")
	}
	for i, fault := range []struct{ breaks, heals func() }{
		{func() { lab.Cut(t, natlab.HubIP) }, func() { lab.Heal(t) }},
		{func() { lab.LinkDown(t) }, func() { lab.LinkUp(t) }},
	} {
		three()
		fault.breaks()
		n.noLines(t)
		n.proxy.waitSum(t, exactly(float64(3*(i+1))), "promferry_proxy_half_open_lines_total")
		n.proxy.waitSum(t, exactly(1), "promferry_proxy_clients", "state", "away")
		fault.heals()
	}
	three()

	lab.FlushConntrack(t)
	n.proxy.waitSum(t, exactly(9), "promferry_proxy_half_open_lines_total")
	three()
}

// TestPullNewSession shows that a node that comes back is scraped at once, while the proxy still
// has lines of it that are dead and cannot know that.
func TestPullNewSession(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	serveIn(t, lab.Worker, appAddr, new(counting))
	n := &natted{lab: lab, proxy: startProxy(t, lab, "--heartbeat=10m")}
	n.client = startClient(t, lab, []string{"app=http://" + appAddr + "/metrics", "b=http://" + appAddr + "/b"})
	n.proxy.waitSum(t, exactly(2), "promferry_proxy_lines", "state", "free")

	lab.Cut(t, natlab.HubIP) // nobody hears of the agent's end
	n.client.Kill()
	lab.FlushConntrack(t)
	lab.Heal(t)
	n.client.restart(t)
	n.proxy.waitSum(t, exactly(4), "promferry_proxy_lines", "state", "free")
	for range 3 {
		scrape(t, lab, "http://web-1:8000/metrics", time.Minute).check(t, http.StatusOK, "")
	}

	n.prometheus = startPrometheusIn(t, lab.Hub, prometheusAddr, discovered)
	n.arrives(t)
	waitQuery(t, n.prometheus, "min_over_time(up"+app+"[10m])", exactly(1))
}

// TestPullFarAway scrapes a node half a second away: a scrape goes there and back once.
func TestPullFarAway(t *testing.T) {
	t.Parallel()
	lab := natlab.New(t)
	const delay = 500 * time.Millisecond
	serveIn(t, lab.Worker, appAddr, new(counting))
	n := &natted{lab: lab, proxy: startProxy(t, lab, "--heartbeat=5s")}
	far := lab.Hub.Relay(t, natlab.HubIP+":8081", proxyAddr, delay)
	n.client = startClient(t, lab, []string{"app=http://" + appAddr + "/metrics"}, "--proxy-url=http://"+far)
	n.prometheus = startPrometheusIn(t, lab.Hub, prometheusAddr, discovered+"  scrape_interval: 5s\n  scrape_timeout: 5s\n")
	n.arrives(t)
	waitQuery(t, n.prometheus, "scrape_duration_seconds"+app, func(v float64) bool {
		return v >= 2*delay.Seconds() && v < 4*delay.Seconds()
	})
}
