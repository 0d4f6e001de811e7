package outbox_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/outbox"
)

// TestMain is also the process that is killed: with CRASH_AT set it works on the outbox in
// CRASH_DIR, says each entry that was accepted, and ends by SIGKILL before that step.
func TestMain(m *testing.M) {
	if os.Getenv("CRASH_DIR") != "" {
		if err := crash(context.Background()); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crash adds five entries and delivers them, twice.
func crash(ctx context.Context) error {
	at, err := strconv.Atoi(os.Getenv("CRASH_AT"))
	if err != nil {
		return err
	}
	o, err := outbox.Open(os.Getenv("CRASH_DIR"))
	if err != nil {
		return err
	}
	n := 0
	o.OnStep(func(step string) {
		if n++; n == at {
			fmt.Println("killed before", step)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	number := 0
	for range 2 {
		for _, op := range []outbox.Op{outbox.Add, outbox.Add, outbox.Put, outbox.Add, outbox.Add} {
			number++
			body := fmt.Sprint(number)
			if number%5 == 4 {
				body += " refused"
			}
			fmt.Println("adding", number)
			if err := o.Add(ctx, entry(op, "a", body)); err != nil {
				return err
			}
			fmt.Println("accepted", number)
		}
		waiting, err := o.Waiting(ctx, gateway)
		if err != nil {
			return err
		}
		for _, w := range waiting {
			if _, err := o.Deliver(ctx, w, time.Second, send(os.Getenv("CRASH_URL"))); err != nil {
				return err
			}
		}
	}
	fmt.Println("done")
	return nil
}

// send posts the body. The answer 400 is a rejection.
func send(url string) func(context.Context, *outbox.Entry) error {
	return func(ctx context.Context, e *outbox.Entry) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(string(e.Op)+" "+string(e.Body)))
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req) //nolint:forbidigo // The test has a timeout.
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusBadRequest {
			return &outbox.RejectedError{Err: errors.New("refused")}
		}
		return nil
	}
}

// TestCrash kills a process before each step of what it writes and delivers, delivers what
// is left, and checks that whatever was accepted has arrived, whole and in order: a push
// may come twice, but none older than one that came before; only what a put made needless
// may be missing. What was refused is set aside.
func TestCrash(t *testing.T) {
	steps := 0
	for at := 1; ; at++ {
		step, done := crashAt(t, at)
		if done {
			break
		}
		steps++
		t.Logf("killed before step %2d, %s", at, step)
	}
	// Ten adds of four steps, two of them puts with one more; eight deliveries of at least three.
	if steps < 60 {
		t.Errorf("only %d steps", steps)
	}
}

func crashAt(t *testing.T, at int) (step string, done bool) {
	t.Helper()
	dir := t.TempDir()
	var mu sync.Mutex
	var arrived []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return // Cut off by the kill: not a whole request.
		}
		mu.Lock()
		defer mu.Unlock()
		arrived = append(arrived, string(b))
		if strings.HasSuffix(string(b), "refused") {
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	defer server.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "CRASH_DIR="+dir, "CRASH_URL="+server.URL, fmt.Sprint("CRASH_AT=", at))
	out, err := cmd.Output()
	accepted, begun := 0, 0
	for line := range strings.Lines(string(out)) {
		_, _ = fmt.Sscanf(line, "adding %d", &begun)
		_, _ = fmt.Sscanf(line, "accepted %d", &accepted)
		if rest, ok := strings.CutPrefix(line, "killed before "); ok {
			step = strings.TrimSpace(rest)
		}
	}
	done = strings.HasSuffix(string(out), "done\n")
	if done != (err == nil) || !done && step == "" {
		t.Fatalf("step %d: %v: %s", at, err, out)
	}

	o := open(t, dir)
	waiting, err := o.Waiting(t.Context(), gateway)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range waiting {
		if _, err := o.Deliver(t.Context(), w, time.Second, send(server.URL)); err != nil {
			t.Fatal(err)
		}
	}
	checkArrived(t, fmt.Sprintf("killed before step %d, %s", at, step), arrived, accepted, begun)

	stats, err := o.Stats(gateway)
	if err != nil || stats.Waiting[gateway]+stats.Other != 0 {
		t.Errorf("killed before step %d, %s: %+v left, %v", at, step, stats, err)
	}
	list, err := o.List()
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, n := range []int{4, 9} {
		if n <= accepted {
			refused++
		}
	}
	if len(list) < refused || len(list) > refused+1 {
		t.Errorf("killed before step %d, %s: %d set aside, want %d, or one that was being added", at, step, len(list), refused)
	}
	for _, l := range list {
		if l.Rejected != "refused" {
			t.Errorf("killed before step %d, %s: reason %q", at, step, l.Rejected)
		}
	}
	return step, done
}

// checkArrived checks what arrived when numbers up to accepted were accepted, and the one
// that was begun may have been.
func checkArrived(t *testing.T, when string, arrived []string, accepted, begun int) {
	t.Helper()
	have := make(map[int]bool)
	last := 0
	for _, a := range arrived {
		var op string
		var n int
		if _, err := fmt.Sscanf(a, "%s %d", &op, &n); err != nil || n == 0 || n > begun {
			t.Errorf("%s: %q arrived", when, a)
			continue
		}
		if n < last {
			t.Errorf("%s: %d arrived after %d: %q", when, n, last, arrived)
		}
		last = n
		have[n] = true
	}
	var missing []int
	for n := 1; n <= accepted; n++ {
		// 3 and 8 are puts: what is older need not arrive.
		needless := n < 3 && (have[3] || accepted >= 3) || n < 8 && n > 5 && (have[8] || accepted >= 8) || n <= 5 && have[8]
		if !have[n] && !needless {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		t.Errorf("%s: %v were accepted and did not arrive: %q", when, missing, arrived)
	}
}

// TestTwoProcesses has two processes that add and deliver at the same time, one of which is
// killed in the middle again and again.
func TestTwoProcesses(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	got := make(map[string]int)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		got[string(b)]++
	}))
	defer server.Close()
	var accepted []string
	o := open(t, dir)
	for i := range 12 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "CRASH_DIR="+dir, "CRASH_URL="+server.URL, fmt.Sprint("CRASH_AT=", 5+6*i))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() {
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if strings.HasPrefix(lines.Text(), "error") {
					t.Error(lines.Text())
				}
			}
		})
		both.Go(func() {
			for n := range 20 {
				body := fmt.Sprintf("ours %d %d", i, n)
				if err := o.Add(t.Context(), entry(outbox.Add, "ours", body)); err != nil {
					t.Error(err)
				}
				accepted = append(accepted, body)
				waiting, err := o.Waiting(t.Context(), gateway)
				if err != nil {
					t.Error(err)
				}
				for _, w := range waiting {
					if _, err := o.Deliver(t.Context(), w, time.Second, send(server.URL)); err != nil {
						t.Error(err)
					}
				}
			}
		})
		both.Wait()
		_ = cmd.Wait()
	}
	for _, body := range accepted {
		if got["add "+body] == 0 {
			t.Errorf("%s did not arrive", body)
		}
	}
	if list, err := o.List(); err != nil || slices.ContainsFunc(list, func(l outbox.Listed) bool { return l.Entry.Job == "ours" }) {
		t.Errorf("left: %+v, %v", list, err)
	}
}
