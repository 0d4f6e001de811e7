package expiry_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/promferry/promferry/expiry"
	"github.com/promferry/promferry/internal/labelmatch"
	"github.com/promferry/promferry/pushgw"
)

func TestPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.skew = -time.Hour
		g.push("oldest", 0)
		<-time.After(time.Hour)
		g.push("old", 40)
		g.push("back", 40)
		g.push("refused", 0)
		g.set(func() {
			g.groups["never"] = pushgw.Group{Key: key("never")}
			g.groups["unreadable"] = pushgw.Group{Pushed: g.now()}
		})
		<-time.After(30*24*time.Hour + time.Second)
		g.push("new", 40)
		p := expiry.Prune{OlderThan: 30 * 24 * time.Hour, ListTimeout: time.Minute, PushTimeout: time.Second}
		find := func(match ...string) (names []string) {
			p.Match = nil
			for _, text := range match {
				m, err := labelmatch.Parse(text)
				if err != nil {
					t.Fatal(err)
				}
				p.Match = append(p.Match, m)
			}
			found, err := p.Find(t.Context(), g)
			if err != nil {
				t.Fatal(err)
			}
			for _, old := range found {
				names = append(names, fmt.Sprint(old.Key.Labels["instance"], " ", old.Age))
			}
			return names
		}
		for _, tc := range []struct {
			match []string
			want  string
		}{
			{nil, "[oldest 721h0m1s back 720h0m1s old 720h0m1s refused 720h0m1s]"},
			{[]string{"job=node"}, "[oldest 721h0m1s back 720h0m1s old 720h0m1s refused 720h0m1s]"},
			{[]string{"job=node", "instance=old"}, "[old 720h0m1s]"},
			{[]string{`{job="node",instance=~"old.*"}`}, "[oldest 721h0m1s old 720h0m1s]"},
			{[]string{"job=nod"}, "[]"},
			{[]string{`env!=""`}, "[]"},
		} {
			if got := fmt.Sprint(find(tc.match...)); got != tc.want {
				t.Errorf("%v: %s, want %s", tc.match, got, tc.want)
			}
		}

		p.Match = nil
		found, err := p.Find(t.Context(), g)
		if err != nil {
			t.Fatal(err)
		}
		g.push("back", 40) // While somebody reads the list and thinks.
		refusal := &pushgw.StatusError{Code: 400}
		g.answer = func(o op) error {
			if o.instance == "refused" {
				return refusal
			}
			return nil
		}
		g.begin = time.Now()
		deleted, err := p.Delete(t.Context(), g, found)
		if !errors.Is(err, refusal) || len(deleted) != 2 {
			t.Errorf("deleted %v, error %v", deleted, err)
		}
		equal(t, g.did(), op{0, "delete", "oldest"}, op{0, "delete", "old"}, op{0, "delete", "refused"})

		g.cutAt = 2
		if found, err := p.Find(t.Context(), g); !errors.Is(err, errBroken) || found != nil {
			t.Errorf("a list that breaks off: %v, error %v", found, err)
		}
	})
}
