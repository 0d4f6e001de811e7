package gateway

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// simplePage makes a page with all groups as newPage does, in memory, one group after the other.
type simplePage struct {
	scheme model.EscapingScheme
	header map[string]string
	series map[string]string
	types  map[string]dto.MetricType
	left   []string
}

func (p *simplePage) add(f family, labels []byte) {
	leave := func(why string) {
		p.left = append(p.left, fmt.Sprintf("# Left out: the family %.200q of %s: %s.\n", f.name, labels, why))
	}
	if f.quoted && p.scheme != model.NoEscaping {
		escaped, err := escape(f, p.scheme)
		if err != nil {
			leave(err.Error())
			return
		}
		f = escaped
	}
	if typ, ok := p.types[f.name]; !ok {
		if why := clash(heading{f.name, f.typ}, p.types); why != "" {
			leave(why)
			return
		}
		p.header[f.name], p.types[f.name] = string(f.text[:f.header]), f.typ
	} else if typ != f.typ {
		leave(fmt.Sprintf("it is a %s, and a %s in a group before", typeName(f.typ), typeName(typ)))
		return
	}
	p.series[f.name] += string(f.text[f.header:])
}

func (p *simplePage) gauge(name, help string, labels []byte, value float64) {
	typ, ok := p.types[name]
	if !ok {
		p.header[name], p.types[name] = string(appendHeader(nil, name, help)), dto.MetricType_GAUGE
	} else if typ == dto.MetricType_SUMMARY || typ == dto.MetricType_HISTOGRAM {
		p.left = append(p.left, fmt.Sprintf("# Left out: the family %q of %s: it is a %s in a group before.\n", name, labels, typeName(typ)))
		return
	}
	p.series[name] += string(appendGauge(nil, name, labels, value))
}

// text returns the page, without and with what is left out, which is in no order.
func (p *simplePage) text(t *testing.T, states []*state, now time.Time) (page string, left []string) {
	t.Helper()
	p.header, p.series, p.types = make(map[string]string), make(map[string]string), make(map[string]dto.MetricType)
	for _, s := range states {
		if s.content != nil && !s.silent(now) {
			families := familiesOf(t, s.content)
			rank := func(f family) int { // Those that get another name come last.
				n := 0
				if !slices.Contains(prometheusOwn, f.name) {
					n = 2
				}
				if f.quoted && p.scheme != model.NoEscaping {
					n++
				}
				return n
			}
			slices.SortStableFunc(families, func(a, b family) int { return cmp.Compare(rank(a), rank(b)) })
			for _, f := range families {
				p.add(f, s.group.labels)
			}
		}
	}
	for _, m := range made {
		for _, s := range states {
			if value, ok := m.value(s, now); ok {
				p.gauge(m.name, m.help, s.group.labels, value)
			}
		}
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(p.series)) {
		b.WriteString(p.header[name] + p.series[name])
	}
	slices.Sort(p.left)
	return b.String(), p.left
}

// madeUpPush makes a text whose families clash with those of others, or do not, and some of which
// are longer than a piece.
func madeUpPush(random *rand.Rand) string {
	names := []string{"a", "a_count", "a_sum", "a_bucket", "a_count_sum", "b", "up", "scrape_foo", "node_load1", "z_bucket", "z", "a.count", "a.sum", "z.z", "push.time.seconds", expiresAfterName}
	var b strings.Builder
	random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names[:random.IntN(len(names))] {
		shown := name
		open := name + "{"
		if strings.Contains(name, ".") {
			shown = `"` + name + `"`
			open = "{" + shown + ","
		}
		label := `l="` + strings.Repeat("x", random.IntN(20)) + `"`
		switch random.IntN(8) {
		case 0:
			label = `l="` + strings.Repeat("x#", random.IntN(2*pieceSize)) + `"`
		case 1:
			label = `"l.l"="y"`
		}
		switch random.IntN(5) {
		case 0:
			fmt.Fprintf(&b, "# HELP %s %s\n", shown, strings.Repeat("h # HELP", random.IntN(4000)))
		case 1:
			fmt.Fprintf(&b, "# HELP %s \n", shown)
		}
		suffixed := func(suffix string) string {
			if strings.Contains(name, ".") {
				return `{"` + name + suffix + `",`
			}
			return name + suffix + "{"
		}
		switch random.IntN(6) {
		case 0:
			fmt.Fprintf(&b, "# TYPE %s summary\n%squantile=\"0.5\",%s} 1\n%s%s} 2\n%s%s} 3\n", shown, open, label, suffixed("_sum"), label, suffixed("_count"), label)
		case 1:
			fmt.Fprintf(&b, "# TYPE %s histogram\n%sle=\"+Inf\",%s} 1\n%s%s} 2\n%s%s} 1\n", shown, suffixed("_bucket"), label, suffixed("_sum"), label, suffixed("_count"), label)
		case 2:
			fmt.Fprintf(&b, "# TYPE %s counter\n%s%s} 1\n", shown, open, label)
		default:
			fmt.Fprintf(&b, "# TYPE %s gauge\n", shown)
			for i := range random.IntN(4) {
				fmt.Fprintf(&b, "%si=\"%d\",%s} %d\n", open, i, label, random.IntN(3))
			}
		}
	}
	return b.String()
}

// TestPages makes pages of made-up groups, which are put and added to, and compares with pages that
// are made in memory; and the groups with ones that the same was put to at once.
func TestPages(t *testing.T) {
	outcomes := make(map[string]int)
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		g := newTest(t, nil)
		for i := range random.IntN(8) {
			path := fmt.Sprintf("/metrics/job/j/instance/%d", i)
			for range 1 + random.IntN(3) {
				method := []string{http.MethodPut, http.MethodPost}[random.IntN(2)]
				outcomes[fmt.Sprint(ask(g, method, path, madeUpPush(random)).Code)]++
			}
		}
		states := g.store.states(time.Now())
		for _, s := range states {
			if random.IntN(4) == 0 {
				s.silentFrom = time.Unix(1, 0)
			}
			if s.content == nil {
				continue
			}
			if want := rebuilt(t, s.content); !equalContent(s.content, want) {
				t.Fatalf("seed %d: %s is\n%+v, built at once\n%+v", seed, s.group.path, s.content, want)
			}
		}
		for _, scheme := range []model.EscapingScheme{model.NoEscaping, model.UnderscoreEscaping, model.ValueEncodingEscaping} {
			p := newPage(scheme)
			for _, s := range states {
				p.state(s)
			}
			var b bytes.Buffer
			if err := p.write(&b); err != nil {
				t.Fatal(err)
			}
			wantPage, wantLeft := (&simplePage{scheme: scheme}).text(t, states, p.now)
			slices.Sort(p.left)
			gotPage := b.String()
			if i := strings.Index(gotPage, "\n# Left out: "); i >= 0 {
				gotPage = gotPage[:i+1]
			}
			gotPage = strings.TrimPrefix(gotPage, strings.Join(p.left, ""))
			if gotPage != wantPage {
				at := 0
				for at < min(len(gotPage), len(wantPage)) && gotPage[at] == wantPage[at] {
					at++
				}
				from := max(0, at-200)
				t.Fatalf("seed %d, %v: of the page differs from byte %d on\n%.500s\nwant\n%.500s", seed, scheme, at, gotPage[from:], wantPage[from:])
			}
			if !slices.Equal(p.left, wantLeft) {
				t.Fatalf("seed %d, %v: left out %q\nwant %q", seed, scheme, p.left, wantLeft)
			}
			outcomes[scheme.String()] += p.leftOut
			outcomes["clashes"] += len(p.clashes)
		}
	}
	t.Log(outcomes)
	for _, outcome := range []string{"200", "400", "clashes", model.NoEscaping.String(), model.UnderscoreEscaping.String()} {
		if outcomes[outcome] < 10 {
			t.Errorf("%d times %s", outcomes[outcome], outcome)
		}
	}
}

// rebuilt returns a content that is made of the families of another one at once.
func rebuilt(t *testing.T, c *content) *content {
	t.Helper()
	again, err := build(familiesOf(t, c), c.size())
	if err != nil {
		t.Fatal(err)
	}
	return again
}

func equalContent(a, b *content) bool {
	byName := func(a, b heading) int { return strings.Compare(a.name, b.name) }
	slices.SortFunc(a.clashing, byName)
	slices.SortFunc(b.clashing, byName)
	return bytes.Equal(a.Own, b.Own) && bytes.Equal(a.Text.Stream, b.Text.Stream) && slices.Equal(a.Text.Ends, b.Text.Ends) && a.Text.Sum == b.Text.Sum &&
		a.Series == b.Series && slices.Equal(a.Quoted, b.Quoted) && a.Down == b.Down && a.ExpiresAfter == b.ExpiresAfter && slices.Equal(a.clashing, b.clashing)
}
