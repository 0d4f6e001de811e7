package forwarder_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/promferry/promferry/forwarder"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/target"
)

// TestMain is also the process that is killed: with CRASH_AT set it forwards with its
// ledger in CRASH_DIR, and ends by SIGKILL before that step.
func TestMain(m *testing.M) {
	if os.Getenv("CRASH_DIR") != "" {
		if err := crash(context.Background()); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println("done")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// stepping is a Pushgateway with a step before and after each request.
type stepping struct {
	*pushgw.Client
	step func(string)
}

func (s stepping) Put(ctx context.Context, key pushgw.GroupingKey, body pushgw.Body) error {
	s.step("put")
	defer s.step("after put")
	return s.Client.Put(ctx, key, body)
}

func (s stepping) Delete(ctx context.Context, key pushgw.GroupingKey) error {
	s.step("delete")
	defer s.step("after delete")
	return s.Client.Delete(ctx, key)
}

// crash forwards two targets to two Pushgateways; then, under another name, one target to
// the second of them, and deletes that on stop.
func crash(ctx context.Context) error {
	at, err := strconv.Atoi(os.Getenv("CRASH_AT"))
	if err != nil {
		return err
	}
	var mu sync.Mutex
	n := 0
	step := func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if n++; n == at {
			fmt.Println("killed before", step)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	before, err := crashForwarder("before", step)
	if err != nil {
		return err
	}
	if err := before.Once(ctx); err != nil {
		return err
	}
	after, err := crashForwarder("after", step)
	if err != nil {
		return err
	}
	if err := after.Once(ctx); err != nil {
		return err
	}
	stopped, err := crashForwarder("stopped", step)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	return stopped.Run(ctx)
}

// crashForwarder returns a forwarder with one of the configurations of crash.
func crashForwarder(configuration string, step func(string)) (*forwarder.Forwarder, error) {
	dir := os.Getenv("CRASH_DIR")
	s := config(&scraper{})
	ledger, err := forwarder.NewLedger(dir, dir+"/agent.pid", machine)
	if err != nil {
		return nil, err
	}
	ledger.OnStep(step)
	s.Ledger, s.OnStop = ledger, forwarder.Keep
	s.GatewayAt = func(u *url.URL) forwarder.Gateway { return stepping{pushgw.New(u, &http.Client{}), step} }
	paths := []string{"/b"}
	switch configuration {
	case "before":
		paths = []string{"/a", "/b"}
		s.Targets = append(s.Targets, target.Target{Job: "app", URL: s.Targets[0].URL})
	case "after", "stopped":
		s.Instance = "web-2"
		if configuration == "stopped" {
			s.OnStop = forwarder.Delete
		}
	case "pull":
		s.Targets = nil
	}
	for _, path := range paths {
		u, err := url.Parse(os.Getenv("CRASH_URL") + path)
		if err != nil {
			return nil, err
		}
		s.Gateways = append(s.Gateways, s.GatewayAt(u))
	}
	return forwarder.New(s.Config)
}

// TestCrash kills a process before each step of noting, putting, deleting and forgetting.
// After one more start nothing is left behind, and what is configured is there.
func TestCrash(t *testing.T) {
	steps := make(map[string]int)
	for at := 1; ; at++ {
		step, done := crashAt(t, at)
		if done {
			break
		}
		steps[step]++
	}
	// Workers and cleaners run side by side, so which step is the nth is left to chance; how
	// many there are is not: six writes of the ledger, six puts and five deletions.
	total := 0
	for _, step := range []string{"write", "written", "put", "after put", "delete", "after delete"} {
		if steps[step] == 0 {
			t.Errorf("never killed before %s", step)
		}
		total += steps[step]
	}
	if total < 30 {
		t.Errorf("only %d steps: %v", total, steps)
	}
}

func crashAt(t *testing.T, at int) (step string, done bool) {
	t.Helper()
	var mu sync.Mutex
	groups := make(map[string]bool)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodDelete {
			delete(groups, r.URL.Path)
		} else {
			groups[r.URL.Path] = true
		}
	}))
	defer server.Close()
	t.Setenv("CRASH_DIR", t.TempDir())
	t.Setenv("CRASH_URL", server.URL)
	t.Setenv("CRASH_AT", strconv.Itoa(at))
	out, err := exec.CommandContext(t.Context(), os.Args[0]).Output()
	done = strings.HasSuffix(string(out), "done\n")
	_, step, killed := strings.Cut(strings.TrimSpace(string(out)), "killed before ")
	if done == killed || done != (err == nil) {
		t.Fatalf("step %d: %v: %s", at, err, out)
	}

	for _, tc := range []struct {
		configuration string
		want          []string
	}{
		{"after", []string{"/b/metrics/job/node/instance/web-2"}},
		{"pull", nil},
	} {
		f, err := crashForwarder(tc.configuration, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Once(t.Context()); err != nil {
			t.Errorf("killed before step %d, %s: %v", at, step, err)
		}
		mu.Lock()
		var got []string
		for group := range groups {
			got = append(got, group)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("killed before step %d, %s: then, %s, groups %q, want %q", at, step, tc.configuration, got, tc.want)
		}
		mu.Unlock()
	}
	return step, done
}
