package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"promferry": func() {
		machineIDFile = os.Getenv("MACHINE_ID_FILE")
		agentDefaultsFile = cmp.Or(os.Getenv("AGENT_DEFAULTS_FILE"), "/nowhere")
		batchDefaultsFile = cmp.Or(os.Getenv("BATCH_DEFAULTS_FILE"), "/nowhere")
		systemctlPath = cmp.Or(os.Getenv("SYSTEMCTL"), systemctlPath)
		main()
	}})
}

// TestScripts runs the scripts in testdata. Each has in $EXPORTER the address of an
// exporter, in $GATEWAY that of a Pushgateway that writes what it is asked to the file
// puts and lists what the file groups.json has, in $HANGING that of one that writes that it was asked to the file hanging and never
// answers, in $REFUSING that of one that refuses all, in $ECHOING that of an echo, and in
// $CLOSED one where nothing listens.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Condition: func(name string) (bool, error) {
			if name != "root" {
				return false, fmt.Errorf("no such condition: %s", name)
			}
			return os.Geteuid() == 0, nil
		},
		Setup: func(env *testscript.Env) error {
			exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if user, password, _ := r.BasicAuth(); r.URL.Path == "/secret" && (user != "me" || password != "canary") {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				w.Header().Set("Content-Type", "text/plain; version=0.0.4")
				_, _ = io.WriteString(w, "# TYPE node_load1 gauge\nnode_load1 0.5\n")
			}))
			env.Defer(exporter.Close)
			var mu sync.Mutex
			gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				switch {
				case r.Method == http.MethodGet && r.URL.Path == "/api/v1/status":
					_, _ = io.WriteString(w, `{"status":"success","data":{"start_time":"2020-01-01T00:00:00Z"}}`)
					return
				case r.Method == http.MethodGet:
					http.ServeFile(w, r, filepath.Join(env.WorkDir, "groups.json"))
					return
				}
				f, err := os.OpenFile(filepath.Join(env.WorkDir, "puts"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
				if err != nil {
					return
				}
				defer func() { _ = f.Close() }()
				_, _ = fmt.Fprintln(f, r.Method, r.URL.Path)
				if body, err := gzip.NewReader(r.Body); err == nil {
					_, _ = io.Copy(f, io.LimitReader(body, 1<<20))
				}
			}))
			env.Defer(gateway.Close)
			hanging := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				_ = os.WriteFile(filepath.Join(env.WorkDir, "hanging"), []byte(r.Method), 0o600)
				_, _ = io.Copy(io.Discard, r.Body)
				<-r.Context().Done()
			}))
			env.Defer(func() {
				hanging.CloseClientConnections()
				hanging.Close()
			})
			refusing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				http.Error(w, "no such luck", http.StatusBadRequest)
			}))
			env.Defer(refusing.Close)
			echoing := httptest.NewServer(echo(filepath.Join(env.WorkDir, "echoing")))
			env.Defer(echoing.Close)
			closed := httptest.NewServer(nil)
			closed.Close()
			machineID := filepath.Join(env.WorkDir, "machine-id")
			if err := os.WriteFile(machineID, []byte("0123456789abcdef0123456789abcdef\n"), 0o600); err != nil {
				return err
			}
			env.Setenv("MACHINE_ID_FILE", machineID)
			previous, err := filepath.Abs(filepath.Join("testdata", "previous"))
			if err != nil {
				return err
			}
			env.Setenv("PREVIOUS", previous)
			env.Setenv("GORACE", "atexit_sleep_ms=0") // A second, else, at each end of a process.
			env.Setenv("EXPORTER", exporter.URL)
			env.Setenv("GATEWAY", gateway.URL)
			env.Setenv("HANGING", hanging.URL)
			env.Setenv("REFUSING", refusing.URL)
			env.Setenv("ECHOING", echoing.URL)
			env.Setenv("CLOSED", closed.URL)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitfor": waitFor, "scrape": scrape, "scrapefile": scrapeFile, "raw": raw, "signal": sendSignal, "post": post, "get": get, "put": put, "delete": del, "lacks": lacks, "gone": gone,
		},
	})
}

// echo returns a server that notes in a file each request and its credentials, and shows these in
// its answer in many ways. The first part of a path says how: a status; private, for 401 without
// credentials and else 200; malformed, for what is not HTTP; redirect; metrics, for an exposition
// that is not one; token, for an OAuth 2 token.
func echo(file string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		authorization := r.Header.Get("Authorization")
		_, password, _ := r.BasicAuth()
		other := r.Header.Get("X-Key")
		mode, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		if mode == "token" {
			other = r.FormValue("client_secret")
		}
		if f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			_, _ = fmt.Fprintf(f, "%s %s %q\n", r.Method, r.URL.Path, authorization)
			_ = f.Close()
		}
		_, bare, _ := strings.Cut(authorization, " ")
		shown := fmt.Sprintf("you sent %s, %s, %s, %s, %q, %s", authorization, bare, password, url.QueryEscape(password+" "+bare), html.EscapeString(password), other)
		if shown == `you sent , , , +, "", ` {
			shown = "you sent nothing"
		}
		status, err := strconv.Atoi(mode)
		switch {
		case err == nil:
			http.Error(w, shown, status)
		case mode == "private" && authorization == "":
			http.Error(w, shown, http.StatusUnauthorized)
		case mode == "malformed":
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				_, _ = fmt.Fprintf(conn, "HTTP/1.1 %s%s%s\r\n\r\n", bare, password, password)
				_ = conn.Close()
			}
		case mode == "redirect":
			w.Header().Set("Location", "http://["+bare)
			w.WriteHeader(http.StatusTemporaryRedirect)
		case mode == "metrics":
			w.Header().Set("Content-Type", "text/plain; version=0.0.4")
			_, _ = fmt.Fprintf(w, "# TYPE a gauge\na %s\n", cmp.Or(password, bare))
		case mode == "token" && strings.HasSuffix(r.URL.Path, "/refuses"):
			http.Error(w, shown, http.StatusBadRequest)
		case mode == "token":
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"access_token":"canary-token","token_type":"Bearer","expires_in":3600}`)
		}
	})
}

const patience = 20 * time.Second

// waitFor waits until a file has a text: waitfor FILE TEXT.
func waitFor(ts *testscript.TestScript, _ bool, args []string) {
	path, text := ts.MkAbs(args[0]), args[1]
	for deadline := time.Now().Add(patience); ; <-time.After(20 * time.Millisecond) {
		b, _ := os.ReadFile(path)
		if bytes.Contains(b, []byte(text)) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s has no %q:\n%s", args[0], text, b)
		}
	}
}

// sendSignal sends a signal to the process whose PID a file has, or to the group that it
// leads: signal HUP FILE [group].
func sendSignal(ts *testscript.TestScript, _ bool, args []string) {
	var pid int
	if _, err := fmt.Sscan(ts.ReadFile(args[1]), &pid); err != nil {
		ts.Fatalf("PID: %v", err)
	}
	sig := unix.SignalNum("SIG" + args[0])
	if len(args) > 2 { // To all of the group that it leads.
		pid = -pid
	}
	ts.Check(syscall.Kill(pid, sig))
}

// post, get, put and del send a request to the address in a log and print status and body to
// stdout: get LOG /path [HEADER=VALUE...].
func post(ts *testscript.TestScript, neg bool, args []string) {
	request(ts, neg, http.MethodPost, args)
}

func get(ts *testscript.TestScript, neg bool, args []string) {
	request(ts, neg, http.MethodGet, args)
}

func put(ts *testscript.TestScript, neg bool, args []string) {
	request(ts, neg, http.MethodPut, args)
}

func del(ts *testscript.TestScript, neg bool, args []string) {
	request(ts, neg, http.MethodDelete, args)
}

// listening returns the first address in a log.
func listening(ts *testscript.TestScript, log string) string {
	waitFor(ts, false, []string{log, "Listening on"})
	_, rest, _ := strings.Cut(ts.ReadFile(log), "Listening on\" address=")
	address, _, _ := strings.Cut(rest, "\n")
	return address
}

// scrape gets a URL through the proxy whose address a log has, and prints status,
// Promferry-Error and body: scrape LOG URL [USER:PASSWORD].
func scrape(ts *testscript.TestScript, neg bool, args []string) {
	proxy := &url.URL{Scheme: "http", Host: listening(ts, args[0])}
	if len(args) > 2 {
		user, password, _ := strings.Cut(args[2], ":")
		proxy.User = url.UserPassword(user, password)
	}
	client := &http.Client{Timeout: patience, Transport: &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[1], nil)
	ts.Check(err)
	resp, err := client.Do(req)
	ts.Check(err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	ts.Check(err)
	_, _ = fmt.Fprintf(ts.Stdout(), "%d %s %s", resp.StatusCode, resp.Header.Get("Promferry-Error"), b)
	if neg == (resp.StatusCode < 400) {
		ts.Fatalf("status %d: %s", resp.StatusCode, b)
	}
}

// scrapeFile is scrape of the URL that a file has.
func scrapeFile(ts *testscript.TestScript, neg bool, args []string) {
	args = slices.Clone(args)
	args[1] = strings.TrimSpace(ts.ReadFile(args[1]))
	scrape(ts, neg, args)
}

func request(ts *testscript.TestScript, neg bool, method string, args []string) {
	address := listening(ts, args[0])
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+address+args[1], nil)
	ts.Check(err)
	for _, header := range args[2:] {
		name, value, _ := strings.Cut(header, "=")
		req.Header.Set(name, value)
	}
	req.Host = req.Header.Get("Host")
	resp, err := (&http.Client{Timeout: patience}).Do(req)
	ts.Check(err)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	ts.Check(err)
	_, _ = fmt.Fprintf(ts.Stdout(), "%d %s", resp.StatusCode, b)
	if neg == (resp.StatusCode < 400) {
		ts.Fatalf("status %d: %s", resp.StatusCode, b)
	}
}

// raw sends lines, and an empty one, to the address in a log and prints what is answered until the
// connection ends: raw LOG LINE...
func raw(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", listening(ts, args[0]))
	ts.Check(err)
	defer func() { _ = conn.Close() }()
	ts.Check(conn.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(conn, strings.Join(args[1:], "\r\n")+"\r\n\r\n")
	ts.Check(err)
	b, err := io.ReadAll(conn)
	ts.Check(err)
	_, _ = ts.Stdout().Write(bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n")))
}

// lacks fails when a file has a text: lacks FILE TEXT.
func lacks(ts *testscript.TestScript, _ bool, args []string) {
	if strings.Contains(ts.ReadFile(args[0]), args[1]) {
		ts.Fatalf("%s has %q:\n%s", args[0], args[1], ts.ReadFile(args[0]))
	}
}

// gone fails when a process runs whose command line has a text: gone TEXT.
func gone(ts *testscript.TestScript, _ bool, args []string) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	ts.Check(err)
	if len(files) == 0 {
		ts.Fatalf("/proc shows no process")
	}
	for _, file := range files {
		line, _ := os.ReadFile(file) // Gone by now, perhaps.
		if strings.Contains(strings.ReplaceAll(string(line), "\x00", " "), args[0]) {
			ts.Fatalf("%s: %q runs", file, line)
		}
	}
}

func TestOwnMetricsLint(t *testing.T) {
	registry := newRegistry()
	_ = newReloader("agent", registry, nil, nil)
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "promferry_agent_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestNotify has a socket in systemd's place.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "4000000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	n := newNotifier(nil)
	if got := n.interval(); got != 2*time.Second {
		t.Errorf("alive is to be called each %v, want half of 4s", got)
	}
	n.ready()
	n.alive("One\nMAINPID=1\tthing")
	n.stopping()
	b := make([]byte, 1000)
	for _, want := range []string{"READY=1", "WATCHDOG=1\nSTATUS=One MAINPID=1 thing", "STOPPING=1\nSTATUS=Stopping"} {
		size, _, err := socket.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(b[:size]); got != want {
			t.Errorf("told %q, want %q", got, want)
		}
	}
	n.reloading()
	size, _, err := socket.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	var usec int64
	if _, err := fmt.Sscanf(string(b[:size]), "RELOADING=1\nMONOTONIC_USEC=%d", &usec); err != nil || usec == 0 {
		t.Errorf("told %q", b[:size])
	}
}

type textSetting = *setting[string]

// TestConfigurationPage checks docs/configuration.md against the settings. With
// WRITE_DOCS=1 it writes the page.
func TestConfigurationPage(t *testing.T) {
	t.Setenv("STATE_DIRECTORY", "")
	var b strings.Builder
	b.WriteString(`# Configuration

<!-- Written by "make docs" from the settings in cmd/promferry: edit them there. -->

Each setting is a flag and an environment variable; the flag wins. A flag that may be
repeated has a variable in the plural, with a comma between two values (a comma within a
URL is written %2C). A variable that is set but empty counts as not set. Times are written
500ms, 15s, 1m30s; sizes 512KiB, 64MiB.

The agent, the proxy, the gateway and expire refuse a variable that begins with PROMFERRY_ and is none of
these, and whatever is wrong. The commands that run in a job, or for one, only tell of a wrong or unknown
variable and go on without it; a wrong flag they refuse. As root, record takes no variable from the unit's
environment, but those in /etc/default/promferry-agent.

The files that their settings name are read again on SIGHUP and, with --web.enable-lifecycle, on a POST to /-/reload;
flags and variables need a restart. A bad file changes nothing, and says so in the log and
in promferry_agent_last_reload_successful (promferry_proxy_..., promferry_gateway_..., promferry_expiry_...).
`)
	flags := map[string]string{
		"agent":  "| `--once` | | | " + onceHelp + " |\n| `--dry-run` | | | " + dryRunHelp + " |\n",
		"expire": "| `--once` | | | " + expireOnceHelp + " |\n| `--dry-run` | | | " + expireDryRunHelp + " |\n",
		pruneName: "| `--older-than` | | | " + olderThanHelp + " |\n| `--match` | | | " + matchHelp + " |\n| `--all` | | | " + allHelp + " |\n" +
			"| `--yes` | | | " + yesHelp + " |\n| `--dry-run` | | | " + pruneDryRunHelp + " |\n",
		"run":   "| `--no-overlap` | | | " + noOverlapHelp + " |\n| `--no-start-push` | | | " + noStartPushHelp + " |\n",
		"push":  "| `--add` | | | " + addHelp + " |\n",
		"flush": "| `--list` | | | " + listHelp + " |\n",
	}
	commands, _ := newCommands(kingpin.New("promferry", ""))
	for _, c := range commands {
		_, settings := c.sets()
		fmt.Fprintf(&b, "\n## promferry %s\n\n| flag | variable | default | what it says |\n| --- | --- | --- | --- |\n", c.name())
		for _, setting := range settings {
			// These defaults depend on where they are looked at.
			if s, ok := setting.(textSetting); ok && s.flag == "instance" {
				s.value = "the host name"
			} else if ok && s.flag == "state.dir" && c.name() != "agent" && c.name() != "proxy" && c.name() != "gateway" {
				s.value = defaultStateDir + " for root, else $XDG_STATE_HOME/promferry"
			}
			b.WriteString(setting.row())
		}
		b.WriteString(flags[c.name()])
	}
	path := filepath.Join("..", "..", "docs", "configuration.md")
	if os.Getenv("WRITE_DOCS") != "" {
		if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(page) != b.String() {
		t.Error("docs/configuration.md is not what the settings are: run make docs")
	}
}
