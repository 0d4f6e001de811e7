package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// TestMain is also the process that is killed: with CRASH_DIR set it works on the groups there,
// says what was answered, and ends by SIGKILL at the step CRASH_AT.
func TestMain(m *testing.M) {
	if os.Getenv("CRASH_DIR") != "" {
		if err := crash(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crashSteps are what is done, one after the other, and what groups there are then after a
// restart, by path: all that they have, or "awaited", "down" or "silent".
var crashSteps = []struct {
	method, path, body string // no method: a sweep
	groups             map[string]string
}{
	{http.MethodPut, "/metrics/job/a", "a 1\n", map[string]string{"/job/a": "a 1"}},
	{http.MethodPost, "/metrics/job/a", "b 2\n", map[string]string{"/job/a": "a 1, b 2"}},
	{http.MethodPut, "/metrics/job/a", "a 3\n", map[string]string{"/job/a": "a 3"}},
	// One that expires, and both kinds in the place of the other.
	{http.MethodPut, "/metrics/job/b", "a 4\npromferry_expires_after_seconds 3600\n", map[string]string{"/job/a": "a 3", "/job/b": "awaited"}},
	{http.MethodPut, "/metrics/job/a", "a 5\npromferry_expires_after_seconds 3600\n", map[string]string{"/job/a": "awaited", "/job/b": "awaited"}},
	{http.MethodPut, "/metrics/job/b", "a 6\n", map[string]string{"/job/a": "awaited", "/job/b": "a 6"}},
	{http.MethodPut, "/metrics/job/a", "a 7\n", map[string]string{"/job/a": "a 7", "/job/b": "a 6"}},
	{http.MethodPut, "/metrics/job/a", "a 8 1\n", map[string]string{"/job/a": "a 7", "/job/b": "a 6"}}, // refused
	{http.MethodDelete, "/metrics/job/b", "", map[string]string{"/job/a": "a 7"}},
	{http.MethodPut, "/metrics/job/b", "a 9\n", map[string]string{"/job/a": "a 7", "/job/b": "a 9"}},
	// One that is down, and that a sweep finds silent.
	{http.MethodPut, "/metrics/job/c", "up 0\npromferry_expires_after_seconds 0.1\n", map[string]string{"/job/a": "a 7", "/job/b": "a 9", "/job/c": "down"}},
	{"", "", "", map[string]string{"/job/a": "a 7", "/job/b": "a 9", "/job/c": "silent"}},
	{http.MethodPut, "/metrics/job/c", "a 10\n", map[string]string{"/job/a": "a 7", "/job/b": "a 9", "/job/c": "a 10"}},
	{http.MethodPut, "/api/v1/admin/wipe", "", map[string]string{}},
	{http.MethodPut, "/metrics/job/a", "a 11\n", map[string]string{"/job/a": "a 11"}},
	{http.MethodPut, "/metrics/job/d", "a 12\n", map[string]string{"/job/a": "a 11", "/job/d": "a 12"}},
	{http.MethodDelete, "/api/v1/metrics?match[]=%7Bjob%3D~%22a%7Cd%22%7D", "", map[string]string{}},
}

func openForCrash() (*Gateway, error) {
	registry := prometheus.NewRegistry()
	return New(Config{
		StoreConfig:  StoreConfig{File: filepath.Join(os.Getenv("CRASH_DIR"), "groups.db"), ForgetAfter: time.Hour, MaxGroups: 100, MaxSeries: 1000, MaxGroupBytes: 1 << 24, MaxBytes: 1 << 28},
		MaxBodyBytes: 1 << 20, AdminAPI: true, Gatherer: registry, Registerer: registry, Logger: slog.New(slog.DiscardHandler),
	})
}

func crash() error {
	at, err := strconv.Atoi(os.Getenv("CRASH_AT"))
	if err != nil {
		return err
	}
	g, err := openForCrash()
	if err != nil {
		return err
	}
	n := 0
	step := func(step string) {
		if n++; n == at {
			fmt.Println("killed at", step)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	g.store.disk.step = step
	for i, s := range crashSteps {
		step("begin")
		if s.method == "" {
			<-time.After(100 * time.Millisecond)
			g.store.sweep()
		} else {
			w := httptest.NewRecorder()
			g.ServeHTTP(w, httptest.NewRequest(s.method, "http://hub:9091"+s.path, strings.NewReader(s.body)))
			if w.Code >= http.StatusInternalServerError {
				return errors.New(w.Body.String())
			}
		}
		step("answer")
		fmt.Println("answered", i)
	}
	fmt.Println("done")
	return nil
}

// TestCrash kills a gateway at each step: before and after each write, before each request and
// each answer. What is there then is what was answered last, or what was begun after it.
func TestCrash(t *testing.T) {
	steps := make(map[string]int)
	for at := 1; ; at++ {
		step, done := crashAt(t, at)
		if done {
			break
		}
		steps[step]++
	}
	// All of them write but the one that is refused.
	n := len(crashSteps)
	if want := map[string]int{"begin": n, "write": n - 1, "written": n - 1, "answer": n}; !maps.Equal(steps, want) {
		t.Errorf("the steps are %v, want %v", steps, want)
	}
}

func crashAt(t *testing.T, at int) (step string, done bool) {
	t.Helper()
	t.Setenv("CRASH_DIR", t.TempDir())
	t.Setenv("CRASH_AT", strconv.Itoa(at))
	out, err := exec.CommandContext(t.Context(), os.Args[0]).Output()
	done = strings.HasSuffix(string(out), "done\n")
	said, step, killed := strings.Cut(strings.TrimSpace(string(out)), "killed at ")
	if done == killed || done != (err == nil) {
		t.Fatalf("step %d: %v: %s", at, err, out)
	}
	answered := strings.Count(said, "answered")
	// After a second restart as well: nothing comes back, and nothing goes.
	for range 2 {
		g, err := openForCrash()
		if err != nil {
			t.Fatalf("killed at step %d, %s: %v", at, step, err)
		}
		got := fmt.Sprint(inShort(t, g))
		before, after := "map[]", "map[]"
		if answered > 0 {
			before = fmt.Sprint(crashSteps[answered-1].groups)
		}
		if answered < len(crashSteps) {
			after = fmt.Sprint(crashSteps[answered].groups)
		}
		// Before it begins and before it is written nothing is changed; after that all is.
		switch {
		case step == "begin" || step == "write" || done:
			after = before
		case step == "written" || step == "answer":
			before = after
		}
		if got != before && got != after {
			t.Errorf("killed at step %d, %s, after %d answers: there is %s, want %s or %s", at, step, answered, got, before, after)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	return step, done
}

// inShort returns the groups as crashSteps has them.
func inShort(t *testing.T, g *Gateway) map[string]string {
	t.Helper()
	groups := make(map[string]string)
	for _, s := range g.store.states(time.Now()) {
		if s.content == nil {
			groups[s.group.path] = s.in(g.store.started)
			continue
		}
		var all []string
		for _, f := range familiesOf(t, s.content) {
			all = append(all, fmt.Sprint(f.name, " ", f.number()))
		}
		groups[s.group.path] = strings.Join(all, ", ")
	}
	return groups
}
