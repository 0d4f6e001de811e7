//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/promferry/promferry/e2e/real"
)

// A batchHost is a host on which batch jobs run.
type batchHost struct {
	gateways []string // URLs
	stateDir string
}

func newBatchHost(t *testing.T, gateways ...string) batchHost {
	t.Helper()
	return batchHost{gateways: gateways, stateDir: filepath.Join(t.TempDir(), "state")}
}

func (n batchHost) env() []string {
	return []string{
		"PROMFERRY_PUSH_URLS=" + strings.Join(n.gateways, ","), "PROMFERRY_STATE_DIR=" + n.stateDir,
		"PROMFERRY_INSTANCE=web-1",
	}
}

// ferry runs promferry to its end.
func (n batchHost) ferry(t *testing.T, stdin string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, err := real.Start(real.Command{Path: promferry(t), Args: args, Env: n.env(), Stdin: strings.NewReader(stdin)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	status, err = p.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return status, p.Stdout(), p.Stderr()
}

// mustFerry is ferry for what has to succeed, and to say nothing.
func (n batchHost) mustFerry(t *testing.T, args ...string) {
	t.Helper()
	if status, _, stderr := n.ferry(t, "", args...); status != 0 || stderr != "" {
		t.Fatalf("promferry %q: status %d: %s", args, status, stderr)
	}
}

// startAgent starts an agent that delivers what waits here.
func (n batchHost) startAgent(t *testing.T) *agent {
	t.Helper()
	a := &agent{stateDir: n.stateDir}
	server, err := real.Serve(t.Context(), "", real.Command{
		Path: promferry(t), Args: []string{"agent", "--push.target=none=http://" + refusing(t)}, Env: n.env(),
	})
	if err != nil {
		t.Fatal(err)
	}
	a.Server = server
	t.Cleanup(a.Kill)
	return a
}

// waits returns how many pushes wait or were refused.
func (n batchHost) waits(t *testing.T) (waiting, refused int) {
	t.Helper()
	_, stdout, _ := n.ferry(t, "", "flush", "--list")
	return strings.Count(stdout, "  waits  "), strings.Count(stdout, "  refused  ")
}

// jobLabels are those of a group that these tests push.
func jobLabels(job string) map[string]string {
	return map[string]string{"job": job, "instance": "web-1"}
}

// number returns the value of a family's only series, and fails where there is none.
func number(t *testing.T, g real.Group, family string) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(value(g, family), 64)
	if err != nil {
		t.Errorf("%s of %v is %q", family, g.Labels, value(g, family))
	}
	return f
}

// TestBatchOutage has runs before, during and after times in which the Pushgateway is
// away: nothing is lost, the order is kept, and the times are those of the runs.
func TestBatchOutage(t *testing.T) {
	gateway := startPushgateway(t)
	prometheus := startPrometheus(t, gateway)
	n := newBatchHost(t, gateway.URL)
	n.mustFerry(t, "run", "--job=backup", "--", "true")
	waitQuery(t, prometheus, `batch_job_last_exit_code{job="backup",instance="web-1"}`, exactly(0))
	before, err := group(t.Context(), gateway, jobLabels("backup"))
	if err != nil {
		t.Fatal(err)
	}

	gateway.Kill()
	begin := time.Now()
	for i, code := range []int{3, 0, 4} {
		status, _, stderr := n.ferry(t, "", "run", "--job=backup", "--", "sh", "-c", fmt.Sprintf("echo step %d >$PROMFERRY_METRICS_FILE; exit %d", i, code))
		if status != code || strings.Count(stderr, "connection refused; kept in") != 1 {
			t.Errorf("run %d: status %d: %s", i, status, stderr)
		}
	}
	end := time.Now()
	if waiting, refused := n.waits(t); waiting != 6 || refused != 0 {
		t.Errorf("%d wait, %d refused; want the metrics of three runs, and the commands' own", waiting, refused)
	}
	if err := gateway.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The next run, of another job, delivers them too.
	n.mustFerry(t, "run", "--job=other", "--", "true")
	if waiting, refused := n.waits(t); waiting+refused != 0 {
		t.Errorf("%d wait, %d refused", waiting, refused)
	}
	waitQuery(t, prometheus, `batch_job_last_exit_code{job="backup"}`, exactly(4))
	waitQuery(t, prometheus, `step{job="backup"}`, exactly(2))
	waitQuery(t, prometheus, `batch_job_runs_total{job="backup",outcome="failure"}`, exactly(2))
	waitQuery(t, prometheus, `batch_job_runs_total{job="backup",outcome="success"}`, exactly(2))
	g, err := group(t.Context(), gateway, jobLabels("backup"))
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range []string{"batch_job_last_completion_timestamp_seconds", "batch_job_last_start_timestamp_seconds", "batch_job_last_success_timestamp_seconds"} {
		if at := number(t, g, family); at < epoch(begin)-0.001 || at > epoch(end) {
			t.Errorf("%s is %v, the runs were from %v to %v", family, at, epoch(begin), epoch(end))
		}
	}
	if number(t, g, "batch_job_last_success_timestamp_seconds") >= number(t, g, "batch_job_last_start_timestamp_seconds") {
		t.Error("the last success is not that of the run before the last")
	}
	if number(t, g, "push_time_seconds") <= number(t, g, "batch_job_last_completion_timestamp_seconds") {
		t.Error("the delivery was not after the end")
	}
	if number(t, before, "batch_job_last_success") != 1 || number(t, g, "batch_job_last_success") != 0 || number(t, g, "batch_job_running") != 0 {
		t.Errorf("%v", g.Families)
	}
}

// TestBatchAgentDelivers has the agent deliver what runs left, and tell of it.
func TestBatchAgentDelivers(t *testing.T) {
	gateway := startPushgateway(t)
	n := newBatchHost(t, gateway.URL)
	gateway.Kill()
	a := n.startAgent(t)
	for _, code := range []int{3, 4} {
		if status, _, stderr := n.ferry(t, "", "run", "--job=a", "--", "sh", "-c", fmt.Sprint("exit ", code)); status != code || !strings.Contains(stderr, "kept in") {
			t.Errorf("status %d: %s", status, stderr)
		}
	}
	a.waitSum(t, exactly(2), "promferry_outbox_waiting_pushes", "gateway", gateway.URL)
	a.waitSum(t, above(0), "promferry_outbox_delivery_failures_total", "gateway", gateway.URL, "reason", "refused")
	if oldest := a.mustSum(t, "promferry_outbox_oldest_push_timestamp_seconds"); time.Since(time.Unix(int64(oldest), 0)) > patience {
		t.Errorf("the oldest push is of %v", oldest)
	}
	if err := gateway.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.waitSum(t, exactly(2), "promferry_outbox_delivered_pushes_total", "gateway", gateway.URL)
	a.waitSum(t, exactly(0), "promferry_outbox_waiting_pushes")
	a.waitSum(t, exactly(0), "promferry_outbox_oldest_push_timestamp_seconds")
	g, err := group(t.Context(), gateway, jobLabels("a"))
	if err != nil {
		t.Fatal(err)
	}
	if number(t, g, "batch_job_last_exit_code") != 4 {
		t.Errorf("%v", g.Families)
	}
}

// TestBatchHangingGateway has a Pushgateway that accepts connections and never answers: a
// job pays the push timeout at most, and loses nothing.
func TestBatchHangingGateway(t *testing.T) {
	good := startPushgateway(t)
	n := newBatchHost(t, "http://"+hanging(t), good.URL)
	for name, command := range map[string]string{"at once": "exit 5", "later": "sleep 0.7; exit 5"} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			status, _, stderr := n.ferry(t, "", "run", "--job=a", "--push.timeout=1s", "--", "sh", "-c", command)
			if took := time.Since(begin); took > 2500*time.Millisecond {
				t.Errorf("took %v, with a push timeout of 1s", took)
			}
			if status != 5 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "timed out; kept in") {
				t.Errorf("status %d: %s", status, stderr)
			}
			g, err := group(t.Context(), good, jobLabels("a"))
			if err != nil {
				t.Fatal(err)
			}
			if number(t, g, "batch_job_last_exit_code") != 5 || number(t, g, "batch_job_running") != 0 {
				t.Errorf("%v", g.Families)
			}
		})
	}
	if waiting, refused := n.waits(t); waiting != 2 || refused != 0 {
		t.Errorf("%d wait, %d refused", waiting, refused)
	}
}

// TestBatchRunning sees a job that runs, and one that was killed with its host.
func TestBatchRunning(t *testing.T) {
	gateway := startPushgateway(t)
	n := newBatchHost(t, gateway.URL)
	p, err := real.Start(real.Command{Path: promferry(t), Args: []string{"run", "--job=stuck", "--", "sleep", "1000"}, Env: n.env()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	running := func(want string) func(context.Context) error {
		return func(ctx context.Context) error {
			g, err := group(ctx, gateway, jobLabels("stuck"))
			if err == nil && value(g, "batch_job_running") != want {
				err = fmt.Errorf("batch_job_running is %q", value(g, "batch_job_running"))
			}
			return err
		}
	}
	wait(t, "that it runs", running("1"))
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait(t, "that it does not", running("0"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if status, err := p.Wait(ctx); status != 143 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
	g, err := group(t.Context(), gateway, jobLabels("stuck"))
	if err != nil {
		t.Fatal(err)
	}
	if number(t, g, "batch_job_last_exit_code") != 143 {
		t.Errorf("%v", g.Families)
	}
}

// TestBatchRefused has metrics of a command's own that another group has with another type:
// they are set aside, the exit metrics are whole.
func TestBatchRefused(t *testing.T) {
	gateway := startPushgateway(t)
	put(t, gateway, "/metrics/job/other", "# TYPE rows counter\nrows 1\n")
	n := newBatchHost(t, gateway.URL)
	status, _, stderr := n.ferry(t, "", "run", "--job=a", "--", "sh", "-c", `printf '# TYPE rows gauge\nrows 5\n' >$PROMFERRY_METRICS_FILE; exit 3`)
	if status != 3 || !strings.Contains(stderr, "set aside in "+n.stateDir+"/outbox/rejected") || !strings.Contains(stderr, "rows") {
		t.Errorf("status %d: %s", status, stderr)
	}
	g, err := group(t.Context(), gateway, jobLabels("a"))
	if err != nil {
		t.Fatal(err)
	}
	if number(t, g, "batch_job_last_exit_code") != 3 || value(g, "rows") != "" {
		t.Errorf("%v", g.Families)
	}
	if waiting, refused := n.waits(t); waiting != 0 || refused != 1 {
		t.Errorf("%d wait, %d refused", waiting, refused)
	}
	a := n.startAgent(t)
	a.waitSum(t, exactly(1), "promferry_outbox_rejected_pushes")
}

// TestPushContract pushes and deletes groups whose labels a path cannot hold, with a real
// Pushgateway to say what it made of them.
func TestPushContract(t *testing.T) {
	gateway := startPushgateway(t)
	n := newBatchHost(t, gateway.URL)
	for _, v := range []string{"plain", "a b", "/", "/var/tmp", "", "ü", "a+b%20", ".", "..", "a\"b\\c", "日本", "1=2,3"} {
		flags := []string{"--job=a b/" + v, "--instance=", "--label=x=" + v}
		labels := map[string]string{"job": "a b/" + v, "x": v}
		status, _, stderr := n.ferry(t, "# TYPE rows gauge\nrows{x=\"own\"} 5\n", append([]string{"push"}, flags...)...)
		if status != 0 || stderr != "" {
			t.Errorf("%q: status %d: %s", v, status, stderr)
			continue
		}
		// Pushgateway 1.5.1 shows no instance where there is none, as its own label has no value.
		g, err := group(t.Context(), gateway, labels)
		if err != nil {
			t.Errorf("%q: %v", v, err)
			continue
		}
		if value(g, "rows") != "5" {
			t.Errorf("%q: %v", v, g.Families)
		}
		n.mustFerry(t, append([]string{"delete"}, flags...)...)
		wait(t, "the end of the group", func(ctx context.Context) error {
			if g, err := group(ctx, gateway, labels); err == nil {
				return fmt.Errorf("still there: %v", g.Labels)
			}
			return nil
		})
	}

	// A put replaces, an add does not.
	for _, step := range []struct {
		args []string
		text string
		want []string
	}{
		{[]string{"push", "--job=p"}, "a 1\nb 1\n", []string{"a", "b"}},
		{[]string{"push", "--job=p", "--add"}, "c 1\n", []string{"a", "b", "c"}},
		{[]string{"push", "--job=p"}, "d 1\n", []string{"d"}},
	} {
		if status, _, stderr := n.ferry(t, step.text, step.args...); status != 0 || stderr != "" {
			t.Fatalf("%q: status %d: %s", step.args, status, stderr)
		}
		g, err := group(t.Context(), gateway, jobLabels("p"))
		if err != nil {
			t.Fatal(err)
		}
		if got := others(g); !slices.Equal(got, step.want) {
			t.Errorf("%q: %v, want %v", step.args, got, step.want)
		}
	}
}

// TestPushChecksFirst has texts that a Pushgateway refuses: ours are refused before, and
// those that it takes are taken.
func TestPushChecksFirst(t *testing.T) {
	gateway := startPushgateway(t)
	n := newBatchHost(t, gateway.URL)
	for text, line := range map[string]string{
		"a 1\na 1\n":                      "line 2",
		"a 1 1700000000000\n":             "line 1",
		"a{__x=\"1\"} 1\n":                "line 1",
		"a 0x1p-2\n":                      "line 1",
		"ok 1\na 1_000\n":                 "line 2",
		"a 1\r\n":                         "line 1",
		"a{x=\"1\",x=\"2\"} 1\n":          "line 1",
		"# TYPE a gaugehistogram2\na 1\n": "line 1",
		"a{x=\"\xff\"} 1\n":               "line 1",
		"# TYPE s summary\ns_count 1\ns_sum 1 1 2\n": "line 3",
	} {
		path := "/metrics/job/raw/x/" + strconv.Itoa(len(text))
		if status, body := send(t, http.MethodPut, gateway.URL+path, "", []byte(text)); status != http.StatusBadRequest {
			t.Errorf("%q: a Pushgateway takes it: %d %s", text, status, body)
		}
		status, _, stderr := n.ferry(t, text, "push", "--job=ours")
		if status != 1 || !strings.Contains(stderr, "nothing was pushed: stdin: "+line) {
			t.Errorf("%q: status %d: %s; want a fault in %s", text, status, stderr, line)
		}
	}
	if _, err := group(t.Context(), gateway, jobLabels("ours")); err == nil {
		t.Error("something was pushed")
	}
	for _, text := range []string{"a NaN\nb +Inf\n", "a 1", "# HELP a x\n# HELP a y\na 1\n", "a{l=\"\"} 1\n", "# EOF\na 1\n"} {
		if status, _, stderr := n.ferry(t, text, "push", "--job=ours"); status != 0 || stderr != "" {
			t.Errorf("%q: status %d: %s", text, status, stderr)
		}
	}
}

// TestFullDisk fills the disk with the state directory: the command's status is returned,
// the push is tried, what waited is intact.
func TestFullDisk(t *testing.T) {
	gateway := startPushgateway(t)
	n := newBatchHost(t, gateway.URL)
	if err := os.Mkdir(n.stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", n.stateDir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal("mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(n.stateDir, unix.MNT_DETACH) })
	gateway.Kill()
	for range 2 {
		if status, _, stderr := n.ferry(t, "", "run", "--job=a", "--", "sh", "-c", "exit 3"); status != 3 || !strings.Contains(stderr, "kept in") {
			t.Fatalf("status %d: %s", status, stderr)
		}
	}
	fill := filepath.Join(n.stateDir, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filled the disk: %v", err)
	}
	status, _, stderr := n.ferry(t, "", "run", "--job=a", "--", "sh", "-c", "exit 4")
	if status != 4 || !strings.Contains(stderr, "no space left on device") || !strings.Contains(stderr, "what waited before is untouched") || !strings.Contains(stderr, "it is lost") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if waiting, refused := n.waits(t); waiting != 2 || refused != 0 {
		t.Errorf("%d wait, %d refused", waiting, refused)
	}
	if err := gateway.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	// With the Pushgateway back nothing is lost, full disk or not; what waits goes first.
	if status, _, stderr := n.ferry(t, "", "run", "--job=a", "--no-start-push", "--", "sh", "-c", "exit 5"); status != 5 || !strings.Contains(stderr, "no space left on device") {
		t.Errorf("status %d: %s", status, stderr)
	}
	g, err := group(t.Context(), gateway, jobLabels("a"))
	if err != nil {
		t.Fatal(err)
	}
	if number(t, g, "batch_job_last_exit_code") != 5 {
		t.Errorf("%v", g.Families)
	}
	if waiting, _ := n.waits(t); waiting != 0 {
		t.Errorf("%d wait", waiting)
	}
}

// TestPowerLoss takes pictures of a disk, as a loss of power would leave it, while pushes
// are kept on it: what has been accepted by then is there and whole, and nothing is half.
// A picture is a copy of the image behind a loop device: what the file system has not
// written yet is not in it.
func TestPowerLoss(t *testing.T) {
	dir := t.TempDir()
	image, mounted := filepath.Join(dir, "disk"), filepath.Join(dir, "mounted")
	makeDisk(t, image)
	mount(t, image, mounted)
	n := batchHost{gateways: []string{"http://" + refusing(t)}, stateDir: filepath.Join(mounted, "state")}

	type picture struct {
		file            string
		accepted, begun int
	}
	var mu sync.Mutex
	accepted, begun := 0, 0
	numbers := func() (int, int) {
		mu.Lock()
		defer mu.Unlock()
		return accepted, begun
	}
	const pushes = 40
	var pushing sync.WaitGroup
	done := make(chan struct{})
	pushing.Go(func() {
		defer close(done)
		for i := 1; i <= pushes; i++ {
			mu.Lock()
			begun = i
			mu.Unlock()
			status, _, stderr := n.ferry(t, fmt.Sprintf("number %d\n", i), "push", "--add", "--job=a")
			if status != 0 || !strings.Contains(stderr, "kept in") {
				t.Errorf("push %d: status %d: %s", i, status, stderr)
			}
			mu.Lock()
			accepted = i
			mu.Unlock()
		}
	})
	var pictures []picture
	for taking := true; taking; {
		select {
		case <-done:
			taking = false
		default:
		}
		p := picture{file: fmt.Sprintf("%s.%d", image, len(pictures))}
		p.accepted, _ = numbers()
		if out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", image, p.file).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		_, p.begun = numbers()
		pictures = append(pictures, p)
	}
	pushing.Wait()
	if len(pictures) < 10 {
		t.Fatalf("only %d pictures", len(pictures))
	}
	sawMiddle := false
	for _, p := range pictures {
		after := filepath.Join(dir, "after"+filepath.Ext(p.file))
		mount(t, p.file, after)
		got, refused := flushTo(t, batchHost{gateways: n.gateways, stateDir: filepath.Join(after, "state")})
		if refused != 0 {
			t.Errorf("after %d accepted: %d are damaged", p.accepted, refused)
		}
		if len(got) < p.accepted || len(got) > p.begun {
			t.Errorf("%d were accepted and %d begun, %d are there", p.accepted, p.begun, len(got))
		}
		for i, text := range got {
			if text != fmt.Sprintf("number %d", i+1) {
				t.Errorf("entry %d is %q", i+1, text)
			}
		}
		sawMiddle = sawMiddle || p.accepted > 0 && p.accepted < pushes
	}
	if !sawMiddle {
		t.Error("no picture was taken between the first and the last push")
	}
	t.Logf("%d pictures", len(pictures))
}

// makeDisk makes the image of an empty disk.
func makeDisk(t *testing.T, image string) {
	t.Helper()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "/sbin/mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}

func mount(t *testing.T, image, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "--lazy", dir).Run() })
}

// flushTo delivers what waits to a receiver of its own in the Pushgateway's place, and
// returns what came, the text's last line each.
func flushTo(t *testing.T, n batchHost) (got []string, refused int) {
	t.Helper()
	address := strings.TrimPrefix(n.gateways[0], "http://")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var mu sync.Mutex
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		text := gunzip(t, r.Body)
		mu.Lock()
		defer mu.Unlock()
		got = append(got, text[strings.LastIndex(text, "\n")+1:])
	})}
	listener := listenAt(t, address)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	defer serving.Wait()
	defer server.Close()
	if _, err := os.Stat(n.stateDir); err != nil {
		return nil, 0 // The power was lost before the first one.
	}
	p, err := real.Start(real.Command{Path: promferry(t), Args: []string{"flush"}, Env: n.env()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	if status, err := p.Wait(ctx); err != nil || status != 0 {
		t.Errorf("flush: status %d, %v: %s", status, err, p.Stderr())
	}
	_, refused = n.waits(t)
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(got), refused
}

// TestBatchTerminal runs commands at a terminal.
func TestBatchTerminal(t *testing.T) {
	n := newBatchHost(t, "http://"+refusing(t))
	t.Run("is the command's", func(t *testing.T) {
		tty := n.atTerminal(t, "promferry run --job=a -- sh -c 'test -t 0 && test -t 1 && test -t 2 && echo ready && read x && echo got $x; exit 4'; echo status $?")
		tty.waitFor(t, "ready")
		tty.write(t, "hello\n")
		tty.waitFor(t, "got hello")
		tty.waitFor(t, "status 4")
	})
	t.Run("interrupts the command once", func(t *testing.T) {
		tty := n.atTerminal(t, `promferry run --job=a -- sh -c 'n=0; trap "n=\$((n+1)); echo INT \$n." INT; trap "echo after \$n; exit 6" USR1; echo ready $$; while :; do sleep 0.05; done' 2>&3; echo status $?`)
		pid := tty.waitFor(t, `ready (\d+)`)
		tty.write(t, "\x03")
		tty.waitFor(t, `INT 1\.`)
		number, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(number, syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		tty.waitFor(t, "status 6")
		if strings.Contains(tty.text(), "INT 2") {
			t.Errorf("interrupted twice: %s", tty.text())
		}
	})
	t.Run("ends what runs too long, and nothing else", func(t *testing.T) {
		tty := n.atTerminal(t, `promferry run --job=a --timeout=400ms --kill-after=200ms -- sh -c '(trap "" TERM; exec sleep 99991) & (sleep 99992 &) ; sleep 99993' 2>&3 | cat; echo after`)
		tty.waitFor(t, "after")
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil || len(lines) == 0 {
			t.Fatalf("%q, %v", lines, err)
		}
		for _, file := range lines {
			if line, _ := os.ReadFile(file); bytes.HasPrefix(line, []byte("sleep\x009999")) {
				t.Errorf("left behind: %s: %q", file, line)
			}
		}
	})
	t.Run("stops and goes on", func(t *testing.T) {
		tty := n.atTerminal(t, `set -m; promferry run --job=a -- sh -c 'echo ready; read x; echo got $x; exit 3' 2>&3; echo stopped $?; fg; echo status $?`)
		tty.waitFor(t, "ready")
		tty.write(t, "\x1a")
		tty.waitFor(t, `stopped \d+`)
		tty.write(t, "hello\n")
		tty.waitFor(t, "got hello")
		tty.waitFor(t, "status 3")
	})
}

// A terminal is a shell's.
type terminal struct {
	master *os.File
	mu     sync.Mutex
	output bytes.Buffer
}

// atTerminal runs a script by a shell with a terminal of its own. Stderr of promferry goes
// to descriptor 3 there, which is nobody's.
func (n batchHost) atTerminal(t *testing.T, script string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-c", script)
	cmd.Env = append(n.env(), "PATH="+filepath.Dir(promferry(t))+":"+os.Getenv("PATH"), "HOME="+t.TempDir())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.ExtraFiles = []*os.File{null}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	_ = null.Close()
	tty := &terminal{master: master}
	var reading sync.WaitGroup
	reading.Go(func() {
		b := make([]byte, 4096)
		for {
			size, err := master.Read(b)
			tty.mu.Lock()
			tty.output.Write(b[:size])
			tty.mu.Unlock()
			if err != nil {
				return // The last process has closed its end.
			}
		}
	})
	t.Cleanup(func() {
		_ = cmd.Wait()
		_ = master.Close()
		reading.Wait()
	})
	return tty
}

func (tty *terminal) write(t *testing.T, s string) {
	t.Helper()
	if _, err := io.WriteString(tty.master, s); err != nil {
		t.Fatal(err)
	}
}

func (tty *terminal) text() string {
	tty.mu.Lock()
	defer tty.mu.Unlock()
	return tty.output.String()
}

// waitFor waits for output that a regular expression matches, and returns its first group.
func (tty *terminal) waitFor(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var found []string
	wait(t, pattern, func(context.Context) error {
		if found = re.FindStringSubmatch(tty.text()); found == nil {
			return fmt.Errorf("the terminal shows %q", tty.text())
		}
		return nil
	})
	return found[len(found)-1]
}
