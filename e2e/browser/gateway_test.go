//go:build e2e

package browser

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/promferry/promferry/gateway"
	"github.com/promferry/promferry/gateway/page"
	"github.com/promferry/promferry/pushgw"
)

// pushed is what a gateway with 20,000 groups holds: most are well, some of each other state.
var pushed = sync.OnceValue(func() gateway.Status {
	status := gateway.Status{Version: "1.4.0", Now: now}
	add := func(g gateway.GroupStatus, job string, labels map[string]string) *gateway.GroupStatus {
		g.Key = pushgw.GroupingKey{Job: job, Labels: labels}
		g.Target = "/groups" + strings.TrimPrefix(g.Key.Path(), "/metrics") + "/metrics"
		status.Groups = append(status.Groups, g)
		return &status.Groups[len(status.Groups)-1]
	}
	batch := []string{"backup", "certificate-renewal", "etl", "report"}
	for i := range 20_000 {
		g := gateway.GroupStatus{State: gateway.StateLive, Pushed: now.Add(-time.Duration(i%15) * time.Second), Series: 480 + i*7%90, ExpiresAfter: 45 * time.Second}
		g.Bytes = g.Series * 71
		labels := map[string]string{"instance": fmt.Sprintf("%s-%04d.fra1.example.org", []string{"web", "db", "cache", "edge"}[i/5000], i%5000+1), "env": "prod", "dc": "fra1"}
		job := "node"
		switch {
		case i%20 == 7:
			job, g.Series, g.Bytes, g.ExpiresAfter, g.OnDisk = batch[i/20%4], 8, 612, 0, true
			g.Pushed = now.Add(-time.Duration(i%40) * time.Hour)
		case i%1500 == 3:
			g.State, g.Since, g.Pushed = gateway.StateSilent, now.Add(-time.Duration(i)*time.Second), now.Add(-time.Duration(i+45)*time.Second)
		case i%2500 == 5:
			g.State, g.Since, g.Series, g.Bytes = gateway.StateDown, now.Add(-time.Duration(i)*time.Second), 4, 380
		case i%4000 == 9:
			g.State, g.Pushed = gateway.StateAwaited, time.Time{}
		case i == 11_111:
			g.Series, g.Bytes = 96_000, 7_300_000
		}
		add(g, job, labels)
	}
	failed := add(gateway.GroupStatus{State: gateway.StateRefused, Failed: now.Add(-4 * time.Minute), Failure: "text format parsing error in line 3: expected float as value, got \"n/a\""}, "etl", map[string]string{"instance": "dw-1.fra1.example.org"})
	failed.Series = 0
	add(gateway.GroupStatus{
		State: gateway.StateLive, Pushed: now.Add(-50 * time.Hour), Failed: now.Add(-3 * time.Hour), Series: 31, Bytes: 2750, OnDisk: true,
		Failure: `collected metric "backup_size_bytes" {label:{name:"disk" value:"sda"}} was collected before with the same name and label values`,
	}, "backup", map[string]string{"instance": "nas-2.fra1.example.org", "volume": "/srv/archive"})
	add(gateway.GroupStatus{
		State: gateway.StateLive, Pushed: now.Add(-9 * time.Second), Failed: now.Add(-26 * time.Hour), Series: 512, Bytes: 40_100, ExpiresAfter: 45 * time.Second,
		Failure: "the group would have 120000 series, and may have 100000 (--limit.group-series)",
	}, "app", map[string]string{"instance": "app-1.fra1.example.org"})
	for i, value := range hostile {
		add(gateway.GroupStatus{State: gateway.StateRefused, Failed: now.Add(-time.Hour), Failure: value}, value, map[string]string{"instance": value, "n": fmt.Sprint(i)})
	}
	long := strings.Repeat("a-very-long-value-", 300)
	add(gateway.GroupStatus{State: gateway.StateSilent, Since: now.Add(-time.Hour), Pushed: now.Add(-2 * time.Hour), Failed: now.Add(-time.Minute), Failure: long, ExpiresAfter: 36 * time.Hour, Series: 99_999, Bytes: 1 << 30}, long, map[string]string{"instance": long, strings.Repeat("name_", 300): "x"})
	return status
})

// groups returns the groups that the page shows.
func (b *tab) groups() []string {
	b.t.Helper()
	return value[[]string](b, "[...document.querySelectorAll('tbody .group')].map(e => e.textContent.trim())")
}

func TestGateway(t *testing.T) {
	address := serve(t, page.Gateway(pushed))
	for name, scripts := range map[string]bool{"without scripts": false, "with scripts": true} {
		t.Run(name, func(t *testing.T) {
			b := open(t)
			b.scripts(scripts)
			b.screen(1400, "light")
			b.load(chromedp.Navigate(address))
			b.unharmed("promferry gateway")
			b.fits()
			if got := value[string](b, "getComputedStyle(document.body).marginTop"); got != "0px" {
				t.Errorf("margin %s: the style sheet is not in force", got)
			}
			if got := value[string](b, "[...document.querySelectorAll('h2')].map(e => e.firstChild.textContent.trim()).join(', ')"); got != "Last push refused, Silent, Down, Awaited, Live" {
				t.Errorf("sections %s", got)
			}
			if n := len(b.groups()); n != 500 {
				t.Errorf("%d groups shown, want 500", n)
			}

			// By keyboard alone: to the field, the words, Enter.
			for range 40 {
				if value[string](b, "document.activeElement.id") == "q" {
					break
				}
				b.do(chromedp.KeyEvent(kb.Tab))
			}
			b.load(chromedp.KeyEvent("JOB=node web-0012."), chromedp.KeyEvent(kb.Enter))
			if got := strings.Join(b.groups(), ", "); got != "node dc=fra1 env=prod instance=web-0012.fra1.example.org" {
				t.Errorf("found %s", got)
			}
			if got := value[string](b, "document.querySelector('tbody th a').pathname"); got != "/groups/job/node/dc/fra1/env/prod/instance/web-0012.fra1.example.org/metrics" {
				t.Errorf("the group's link leads to %s", got)
			}
			b.unharmed("promferry gateway")

			b.load(chromedp.Navigate(address))
			b.load(chromedp.Click(chromedp.CSS(".tiles a[href*=silent]")))
			if got := value[string](b, "[...document.querySelectorAll('tbody .state .badge')].map(e => e.textContent).sort().filter((s, i, all) => s != all[i-1]).join()"); got != "silent" {
				t.Errorf("states %s, want silent alone", got)
			}
			b.load(chromedp.Navigate(address))
			b.do(chromedp.SendKeys(chromedp.ID("sort"), "Largest"))
			b.load(chromedp.Click(chromedp.CSS("form button")))
			if got := b.groups(); len(got) != 500 || !strings.HasSuffix(got[1], "instance=cache-1112.fra1.example.org") {
				t.Errorf("%d groups, the second largest %s", len(got), got[1])
			}
			b.unharmed("promferry gateway")
		})
	}
}

// TestGatewayItself shows on the page of a real gateway what was pushed to it.
func TestGatewayItself(t *testing.T) {
	state := filepath.Join(t.TempDir(), "groups.db")
	// start returns a gateway's address, and what stops it.
	start := func() (string, func()) {
		registry := prometheus.NewRegistry()
		g, err := gateway.New(gateway.Config{
			StoreConfig:  gateway.StoreConfig{File: state, ForgetAfter: time.Hour, MaxGroups: 100, MaxSeries: 100, MaxGroupBytes: 1 << 20, MaxBytes: 1 << 20},
			MaxBodyBytes: 1 << 20, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		mux := http.NewServeMux()
		mux.Handle("/", g)
		mux.Handle("/{$}", page.Gateway(g.Status))
		server := httptest.NewServer(mux)
		stop := sync.OnceFunc(func() {
			server.Close()
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(stop)
		return server.URL, stop
	}
	address, stop := start()
	put := func(path, body string, want int) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, address+"/metrics/job/"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != want {
			t.Fatalf("%s: %s, want %d", path, resp.Status, want)
		}
	}
	put("node/instance/well", "up 1\npromferry_expires_after_seconds 3600\nload 0.5\n", http.StatusOK)
	put("node/instance/broken", "up 0\npromferry_expires_after_seconds 3600\n", http.StatusOK)
	put("node/instance/dead", "up 1\npromferry_expires_after_seconds 0.001\n", http.StatusOK)
	put("backup/instance/nas", "size_bytes 4e9\n", http.StatusOK)
	put("backup/instance/nas", "size_bytes many<script>document.title='owned'</script>\n", http.StatusBadRequest)
	put("etl", "rows 1\nrows 2\n", http.StatusBadRequest)

	b := open(t)
	// rows returns the section and the cells of each group but its times, and why a push was refused.
	rows := func() string {
		return value[string](b, `[...document.querySelectorAll('tbody')].map(body =>
			[body.parentElement.previousElementSibling.firstChild, ...body.querySelectorAll('.group, .badge, .good, .series, .why bdi')].
				map(e => e.textContent.trim()).join(' | ')).join('\n')`)
	}
	b.load(chromedp.Navigate(address + "/"))
	b.unharmed("promferry gateway")
	if got, want := rows(), strings.Join([]string{
		`Last push refused | backup instance=nas | live | on disk, does not expire | 1 | text format parsing error in line 1: expected float as value, got "many<script>document.title='owned'</script>"`,
		`Last push refused | etl | refused |  | 0 | pushed metrics are invalid or inconsistent: family "rows", series {instance="",job="etl"}: it was collected before with the same name and label values; labels of the grouping key replace those of a series`,
		`Silent | node instance=dead | silent | 1ms | 2`,
		`Down | node instance=broken | down | 1h | 2`,
		`Live | node instance=well | live | 1h | 3`,
	}, "\n"); got != want {
		t.Errorf("the page shows\n%s\nwant\n%s", got, want)
	}
	b.load(chromedp.Click(chromedp.CSS("section.live .group a")))
	if got := value[string](b, "document.body.textContent"); !strings.Contains(got, `load{instance="well",job="node"} 0.5`) {
		t.Errorf("the link leads to %q", got)
	}

	stop()
	address, _ = start()
	b.load(chromedp.Navigate(address + "/?q=node"))
	if got, want := rows(), strings.Join([]string{
		`Silent | node instance=dead | silent | 1ms | 0`,
		`Down | node instance=broken | down | 1h | 0`,
		`Awaited | node instance=well | awaited | 1h | 0`,
	}, "\n"); got != want {
		t.Errorf("after a restart the page shows\n%s\nwant\n%s", got, want)
	}
}

func TestGatewayHostileSearch(t *testing.T) {
	address := serve(t, page.Gateway(pushed))
	b := open(t)
	for _, text := range hostile {
		b.load(chromedp.Navigate(address + "?q=" + url.QueryEscape(text)))
		b.unharmed("promferry gateway")
	}
}
