//go:build e2e

package browser

import (
	"context"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	gatewaypage "github.com/promferry/promferry/gateway/page"
	"github.com/promferry/promferry/reverse/page"
)

// patience is how long a browser may take for one test. Only a failing one does.
const patience = 2 * time.Minute

// chromium returns the path of the browser: what CHROMIUM_BIN names, or what `make tools`
// or the system has.
func chromium(t *testing.T) string {
	t.Helper()
	candidates := []string{filepath.Join("..", "..", ".tools", "bin", "chromium"), "chromium", "chromium-browser", "google-chrome"}
	if path := os.Getenv("CHROMIUM_BIN"); path != "" {
		candidates = []string{path}
	}
	for _, candidate := range candidates {
		if path, err := exec.LookPath(candidate); err == nil {
			if path, err = filepath.Abs(path); err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	t.Fatalf("no Chromium: none of %q is a program; install it, or set CHROMIUM_BIN to its path", candidates)
	return ""
}

// tab is a page of a browser that shows nothing to anybody.
type tab struct {
	t   *testing.T
	ctx context.Context //nolint:containedctx // It is the browser.

	mu         sync.Mutex
	complaints []string
}

// open starts a browser of its own.
func open(t *testing.T) *tab {
	t.Helper()
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium(t)), chromedp.UserDataDir(t.TempDir()), chromedp.DisableGPU,
		chromedp.NoSandbox, // It shows pages of ours only, and root cannot have one.
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-sync", true))
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b := &tab{t: t}
	if err := chromedp.Listen(ctx, b.hear); err != nil {
		t.Fatalf("start Chromium: %v", err)
	}
	b.ctx, cancel = context.WithTimeout(ctx, patience)
	t.Cleanup(cancel)
	return b
}

// hear keeps what the browser complains of: violations of the policy and other faults that
// it logs, what scripts log, and what they throw.
func (b *tab) hear(event any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch event := event.(type) {
	case *log.EventEntryAdded:
		b.complaints = append(b.complaints, fmt.Sprintf("%s: %s", event.Entry.Level, event.Entry.Text))
	case *runtime.EventConsoleAPICalled:
		b.complaints = append(b.complaints, fmt.Sprintf("console.%s", event.Type))
	case *runtime.EventExceptionThrown:
		b.complaints = append(b.complaints, event.ExceptionDetails.Text)
	}
}

// complained returns what hear has kept. All of a page's is there once a script that was
// sent after its load has answered.
func (b *tab) complained() []string {
	b.t.Helper()
	value[string](b, "document.readyState")
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.complaints
}

func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// load runs steps that lead to another page, which must be there.
func (b *tab) load(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	response, err := chromedp.RunResponse(b.ctx, steps...)
	if err != nil {
		b.t.Fatal(err)
	}
	if response == nil || response.Status != http.StatusOK {
		b.t.Fatalf("answer %+v, want a 200", response)
	}
}

// value evaluates an expression as the developer's tools do, also where the page itself may
// run no script.
func value[T any](b *tab, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// scripts allows the page to run scripts, or not.
func (b *tab) scripts(allowed bool) {
	b.t.Helper()
	if _, err := chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: !allowed}); err != nil {
		b.t.Fatal(err)
	}
}

// screen sets the width and the colours that the page is shown with.
func (b *tab) screen(width int64, scheme string) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, 900))
	if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	}); err != nil {
		b.t.Fatal(err)
	}
}

// shoot writes what is seen into the folder that SCREENSHOTS names, if it does.
func (b *tab) shoot(name string) {
	b.t.Helper()
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Fatal(err)
	}
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		return
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// unharmed checks that nothing that a client sent has become more than text, and that the
// browser finds no fault.
func (b *tab) unharmed(title string) {
	b.t.Helper()
	if got := value[string](b, "document.title"); got != title {
		b.t.Errorf("title %q, want %q", got, title)
	}
	if n := value[int](b, "document.querySelectorAll('script, img, svg, iframe, object, [onerror], [onload], [onmouseover]').length"); n != 0 {
		b.t.Errorf("%d elements that no template has", n)
	}
	for _, complaint := range b.complained() {
		b.t.Errorf("the browser says %q", complaint)
	}
}

// fits checks that the page is no wider than the screen.
func (b *tab) fits() {
	b.t.Helper()
	if width, screen := value[int](b, "document.documentElement.scrollWidth"), value[int](b, "document.documentElement.clientWidth"); width > screen {
		b.t.Errorf("the page is %d pixels wide, the screen %d", width, screen)
	}
}

// pale returns the texts of the page whose contrast is below what WCAG 2 asks for (4.5 to 1).
const pale = `(() => {
	const parse = (color) => color.match(/[\d.]+/g).map(Number);
	const luminance = (rgb) => {
		const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
		return .2126 * r + .7152 * g + .0722 * b;
	};
	const behind = (e) => {
		for (; e; e = e.parentElement) {
			const [r, g, b, alpha = 1] = parse(getComputedStyle(e).backgroundColor);
			if (alpha > 0) return [r, g, b];
		}
		return [255, 255, 255];
	};
	const faults = new Set();
	const look = (e, color, text) => {
		const [a, b] = [luminance(parse(color).slice(0, 3)), luminance(behind(e))];
		const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
		if (contrast < 4.5) faults.add(contrast.toFixed(2) + ': ' + text.trim().slice(0, 40));
	};
	for (const e of document.body.querySelectorAll('*')) {
		if (!e.getClientRects().length) continue; // Not drawn.
		for (const n of e.childNodes) {
			if (n.nodeType == Node.TEXT_NODE && n.data.trim()) look(e, getComputedStyle(e).color, n.data);
		}
		if (e.placeholder) look(e, getComputedStyle(e, '::placeholder').color, e.placeholder);
	}
	return [...faults];
})()`

// unlabelled returns what a screen reader would have no name for.
const unlabelled = `[
	...[...document.querySelectorAll('input:not([type=hidden]), select')].filter(e => !e.labels.length),
	...[...document.querySelectorAll('a, button, summary, h1, h2, thead th')].filter(e => !e.textContent.trim()),
	...[...document.querySelectorAll('th')].filter(e => !e.scope),
	...[...document.querySelectorAll('section')].filter(e => !document.getElementById(e.getAttribute('aria-labelledby'))),
].map(e => e.outerHTML.slice(0, 80))`

// accessible checks that texts stand out, and that everything has a name.
func (b *tab) accessible() {
	b.t.Helper()
	for _, text := range value[[]string](b, pale) {
		b.t.Errorf("contrast %s", text)
	}
	for _, element := range value[[]string](b, unlabelled) {
		b.t.Errorf("no name: %s", element)
	}
}

func serve(t *testing.T, handler http.Handler) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL + "/"
}

// names returns the clients that the page shows.
func (b *tab) names() []string {
	b.t.Helper()
	return value[[]string](b, "[...document.querySelectorAll('tbody th .name')].map(e => e.textContent.trim())")
}

func TestProxy(t *testing.T) {
	address := serve(t, page.Proxy(fleet))
	for name, scripts := range map[string]bool{"without scripts": false, "with scripts": true} {
		t.Run(name, func(t *testing.T) {
			b := open(t)
			b.scripts(scripts)
			b.screen(1400, "light")
			b.load(chromedp.Navigate(address))
			b.unharmed("promferry proxy")
			b.fits()
			// The style sheet is in force: the policy's hash is its own.
			if got := value[string](b, "getComputedStyle(document.body).marginTop"); got != "0px" {
				t.Errorf("margin %s: the style sheet is not in force", got)
			}
			if n := len(b.names()); n != 300 {
				t.Errorf("%d clients, want 300", n)
			}

			b.load(chromedp.SendKeys(chromedp.ID("q"), "job-of-nobody"), chromedp.Submit(chromedp.ID("q")))
			if got := b.names(); len(got) != 0 {
				t.Errorf("found %q", got)
			}
			b.load(chromedp.Navigate(address))
			b.load(chromedp.SendKeys(chromedp.ID("q"), "DB-01 8443"), chromedp.Click(chromedp.CSS("form button")))
			// Each third client has this port: 010, 013, 016, 019; 010 is PushProx's and says
			// nothing, and 016 is away and stands above the others.
			if got := strings.Join(b.names(), " "); got != "db-016.fra1.example.org db-013.fra1.example.org db-019.fra1.example.org" {
				t.Errorf("found %s", got)
			}
			if got := value[string](b, "document.getElementById('q').value"); got != "DB-01 8443" {
				t.Errorf("the field says %q", got)
			}
			b.unharmed("promferry proxy")

			b.load(chromedp.Click(chromedp.CSS(".tiles a[href*=failing]")))
			if got := value[[]string](b, "[...document.querySelectorAll('h2')].map(e => e.id)"); len(got) != 1 || got[0] != "failing" {
				t.Errorf("sections %q, want failing alone", got)
			}
		})
	}
}

func TestProxyHostileSearch(t *testing.T) {
	address := serve(t, page.Proxy(fleet))
	b := open(t)
	for _, text := range hostile {
		b.load(chromedp.Navigate(address + "?q=" + url.QueryEscape(text)))
		b.unharmed("promferry proxy")
	}
}

func TestScreens(t *testing.T) {
	for _, site := range []struct {
		name, title string
		handler     http.Handler
		// sections are the identifiers of headings to scroll to.
		sections []string
	}{
		{"agent", "web-001.fra1.example.org – promferry agent", page.Agent(agentOf), []string{"targets"}},
		{"proxy", "promferry proxy", page.Proxy(fleet), []string{"doubtful", "away", "fine"}},
		{"gateway", "promferry gateway", gatewaypage.Gateway(pushed), []string{"s-down"}},
	} {
		t.Run(site.name, func(t *testing.T) {
			address := serve(t, site.handler)
			b := open(t)
			for _, screen := range []struct {
				name   string
				width  int64
				scheme string
			}{
				{"desktop-light", 1400, "light"},
				{"desktop-dark", 1400, "dark"},
				{"tablet", 800, "light"},
				{"phone-light", 400, "light"},
				{"phone-dark", 400, "dark"},
				{"small-phone", 320, "light"},
			} {
				name := site.name + "-" + screen.name
				b.screen(screen.width, screen.scheme)
				b.load(chromedp.Navigate(address))
				b.unharmed(site.title)
				b.fits()
				b.shoot(name)
				for _, section := range site.sections {
					b.do(chromedp.Evaluate[chromedp.Void]("document.getElementById('" + section + "').scrollIntoView()"))
					b.shoot(name + "-" + section)
				}
				b.do(chromedp.Evaluate[chromedp.Void]("document.querySelector('details').open = true"), chromedp.Evaluate[chromedp.Void]("scrollTo(0, document.body.scrollHeight)"))
				b.fits()
				b.accessible()
				b.shoot(name + "-end")
			}
		})
	}
}

// TestDetects shows that the checks of the other tests find what they look for: the same
// values, written by somebody who forgot to escape them, on a page with the proxy's policy,
// and without it.
func TestDetects(t *testing.T) {
	recorder := httptest.NewRecorder()
	page.Proxy(fleet).ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/", nil))
	policy := recorder.Header().Get("Content-Security-Policy")
	if !strings.Contains(recorder.Body.String(), html.EscapeString(hostile[0])) {
		t.Error("the fleet has no hostile client")
	}
	address := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/guarded" {
			w.Header().Set("Content-Security-Policy", policy)
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, `<!doctype html><title>careless</title><p style="color: #888">pale<input placeholder="word">`+hostile[0])
	}))
	b := open(t)
	b.load(chromedp.Navigate(address + "guarded"))
	if got := value[string](b, "document.title"); got != "careless" {
		t.Errorf("title %q: the policy let a script run", got)
	}
	if got := strings.Join(b.complained(), "\n"); !strings.Contains(got, "Content Security Policy") {
		t.Errorf("complaints %q, want a violation of the policy", got)
	}
	b.load(chromedp.Navigate(address))
	if got := value[string](b, "document.title"); got != "owned" {
		t.Errorf("title %q: the script of a careless page did not run", got)
	}
	if got := value[[]string](b, pale); !slices.Equal(got, []string{"3.54: pale"}) {
		t.Errorf("pale %q", got)
	}
	if got := value[[]string](b, unlabelled); !slices.Equal(got, []string{`<input placeholder="word">`}) {
		t.Errorf("without a name %q", got)
	}
}
