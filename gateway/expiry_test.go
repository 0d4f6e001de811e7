package gateway

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// TestExpiry follows a node that stops to push: one second too early, and at the time.
func TestExpiry(t *testing.T) {
	for _, test := range []struct {
		name, body    string
		expireDefault time.Duration
	}{
		{"said by the group", "up 1\na 1\npromferry_expires_after_seconds 30\n", 0},
		{"said by the group, before the default", "up 1\na 1\npromferry_expires_after_seconds 30\n", time.Hour},
		{"by default", "up 1\na 1\n", 30 * time.Second},
		{"by default, for what it says is no time", "up 1\na 1\npromferry_expires_after_seconds NaN\n", 30 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newTest(t, func(c *Config) { c.ExpireDefault = test.expireDefault })
				const group = "/job/node/instance/web-1"
				put(t, g, "/metrics"+group, test.body)
				want(t, ask(g, http.MethodPut, "/metrics/job/batch", "b 1\npromferry_expires_after_seconds 1e300\n"), http.StatusOK)
				pushed := time.Now()
				<-time.After(30*time.Second - 1)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusOK, `a{instance="web-1",job="node"} 1`, "!up{")
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `a{instance="web-1",job="node"} 1`, `up{instance="web-1",job="node"} 1`)
				<-time.After(1)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusServiceUnavailable,
					"silent since "+time.Now().UTC().Format(time.RFC3339), "the last push, at "+pushed.UTC().Format(time.RFC3339))
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `up{instance="web-1",job="node"} 0`, "!\na{", "!\npromferry_expires_after_seconds{instance=\"web-1",
					fmt.Sprintf(`push_time_seconds{instance="web-1",job="node"} %v`, float64(pushed.Unix())), `b{instance="",job="batch"} 1`,
					`promferry_gateway_groups{state="silent"} 1`)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"instance":"web-1"`)
				<-time.After(24*time.Hour - 1)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"instance":"web-1"`)
				<-time.After(1)
				want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"instance":"web-1"`, `"job":"batch"`)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusNotFound, `{job="node",instance="web-1"}`)
				want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, "!web-1")
				// What it adds then does not come to what it had before.
				want(t, ask(g, http.MethodPost, "/metrics"+group, "c 1\n"), http.StatusOK)
				want(t, ask(g, http.MethodGet, "/groups"+group+"/metrics", ""), http.StatusOK, "c{", "!a{")
			})
		})
	}
}

// TestBack has a node that comes back while it is silent.
func TestBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, nil)
		const body = "a 1\npromferry_expires_after_seconds 30\n"
		put(t, g, "/metrics/job/j", body)
		<-time.After(time.Hour)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable)
		put(t, g, "/metrics/job/j", body)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
		// A push that is refused is no sign of life.
		<-time.After(29 * time.Second)
		want(t, ask(g, http.MethodPut, "/metrics/job/j", "a 1 1\n"), http.StatusBadRequest)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusOK)
		<-time.After(time.Second)
		want(t, ask(g, http.MethodGet, "/groups/job/j/metrics", ""), http.StatusServiceUnavailable)
	})
}

// TestSilentBeside has a group fall silent that is older than one whose up has no type: that one
// keeps it.
func TestSilentBeside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, nil)
		put(t, g, "/metrics/job/old", "a 1\npromferry_expires_after_seconds 30\n")
		put(t, g, "/metrics/job/young", "up 1\n")
		<-time.After(30 * time.Second)
		page := ask(g, http.MethodGet, "/metrics", "")
		want(t, page, http.StatusOK, `up{instance="",job="old"} 0`, `up{instance="",job="young"} 1`, "!# Left out")
		readPage(t, page)
	})
}

// TestSweep shows that what is gone takes no memory, and that Run leaves nothing behind.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, func(c *Config) { c.MaxGroups = 3 })
		put(t, g, "/metrics/job/a", "promferry_expires_after_seconds 30\n")
		put(t, g, "/metrics/job/b", "a 1\n")
		want(t, ask(g, http.MethodPut, "/metrics/job/c", "a 1 1\n"), http.StatusBadRequest)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		// A group that holds nothing makes room, but not for another one that would hold nothing.
		want(t, ask(g, http.MethodPut, "/metrics/job/x", "a 1 1\n"), http.StatusBadRequest)
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `"c"`, `!"x"`)
		put(t, g, "/metrics/job/d", "a 1\n")
		want(t, ask(g, http.MethodGet, "/sd", ""), http.StatusOK, `!"c"`)
		want(t, ask(g, http.MethodPut, "/metrics/job/e", "a 1\n"), http.StatusTooManyRequests, "--limit.groups")
		<-time.After(24*time.Hour + 30*time.Second + sweepEvery)
		synctest.Wait()
		g.store.mu.RLock()
		got := len(g.store.groups)
		g.store.mu.RUnlock()
		if got != 2 {
			t.Errorf("%d groups, want 2", got)
		}
		want(t, ask(g, http.MethodPut, "/metrics/job/e", "a 1\n"), http.StatusOK)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestDown has a node whose exporter is down for some pushes.
func TestDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newTest(t, nil)
		const target = "/groups/job/j/metrics"
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 1\na 1\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusOK)
		<-time.After(time.Minute)
		since := time.Now().UTC().Format(time.RFC3339)
		for range 3 {
			put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 0\n")
			want(t, ask(g, http.MethodGet, target, ""), http.StatusServiceUnavailable, "down since "+since, "says up 0")
			want(t, ask(g, http.MethodGet, "/metrics", ""), http.StatusOK, `up{instance="",job="j"} 0`)
			<-time.After(time.Minute)
		}
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 1\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusOK, "!up{")
		put(t, g, "/metrics/job/j", "# TYPE up gauge\nup 0\n")
		want(t, ask(g, http.MethodGet, target, ""), http.StatusServiceUnavailable, "down since "+time.Now().UTC().Format(time.RFC3339))
	})
}
