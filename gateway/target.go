package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// targetGroup is an entry of http_sd.
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// discovery answers service discovery (http_sd_configs) with one target for each group, silent
// ones included.
func (g *Gateway) discovery(w http.ResponseWriter, r *http.Request) {
	if r.Host == "" {
		http.Error(w, "the request has no Host, which is to be the targets' address", http.StatusBadRequest)
		return
	}
	states := g.store.states(time.Now())
	slices.SortFunc(states, func(a, b *state) int { return strings.Compare(a.group.path, b.group.path) })
	entries := make([]targetGroup, 0, len(states))
	for _, s := range states {
		labels := s.group.key.AllLabels()
		labels[model.MetricsPathLabel] = targetPath(s.group)
		if r.TLS != nil {
			labels[model.SchemeLabel] = "https"
		}
		entries = append(entries, targetGroup{[]string{r.Host}, labels})
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(steady(w)).Encode(entries)
}

// targetPath returns the path of the target that serves a group.
func targetPath(g *group) string { return "/groups" + g.path + "/metrics" }

// target answers a scrape of one group: what was pushed there, without what Prometheus makes of
// each scrape itself.
func (g *Gateway) target(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimSuffix(strings.TrimPrefix(escapedPath(r.URL), "/groups"), "/metrics")
	key, err := parseKey(path)
	if err != nil {
		refuse(w, asRefusal(err))
		return
	}
	now := time.Now()
	s := g.store.state(key, now)
	switch {
	case s == nil:
		http.Error(w, fmt.Sprintf("there is no group %s: nothing was pushed there, or it was deleted, or was silent for too long", key), http.StatusNotFound)
	case s.content == nil && !s.awaited:
		// Nothing is down: push_failure_time_seconds tells.
		comment(w, "No push to the group ever succeeded; the last one was refused at %s.", stamp(s.failed))
		_, _ = w.Write(s.times())
	case s.silent(now) && s.pushed.IsZero():
		unavailable(w, "the group %s is silent since %s: no push came in the time after the gateway had restarted", key, stamp(s.silentFrom))
	case s.silent(now):
		unavailable(w, "the group %s is silent since %s: the last push, at %s, was good until then", key, stamp(s.silentFrom), stamp(s.pushed))
	case !s.downSince.IsZero() && s.awaited:
		unavailable(w, "the group %s is down since %s: its last push before the gateway restarted says up 0", key, stamp(s.downSince))
	case !s.downSince.IsZero():
		unavailable(w, "the group %s is down since %s: its last push, at %s, says up 0", key, stamp(s.downSince), stamp(s.pushed))
	case s.awaited:
		// Its node lives, as far as anybody knows: up is to stay 1.
		comment(w, "The gateway has restarted: the group is here again with its next push, or silent from %s on.", stamp(s.silentFrom))
	default:
		s.serve(w, r, g)
	}
}

func unavailable(w http.ResponseWriter, format string, args ...any) {
	http.Error(w, fmt.Sprintf(format, args...), http.StatusServiceUnavailable)
}

// comment begins a text with a comment, of one line.
func comment(w http.ResponseWriter, format string, args ...any) {
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	_, _ = fmt.Fprintf(w, "# "+format+"\n", args...)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// serve writes the page of a group, in the format that the scrape prefers.
func (s *state) serve(w http.ResponseWriter, r *http.Request, g *Gateway) {
	format := expfmt.NegotiateAccept(r.Header, expfmt.DefaultAcceptedFormats()...)
	w.Header().Set("Content-Type", string(format))
	if format.FormatType() != expfmt.TypeTextPlain || len(s.content.Quoted) > 0 && format.ToEscapingScheme() != model.NoEscaping {
		if err := s.encode(w, r, format, g.config.Logger); err != nil {
			g.config.Logger.Debug("Group not written", "group", s.group.key.String(), "err", err)
		}
		return
	}
	w.Header().Set("Vary", "Accept, Accept-Encoding")
	text, times := &s.content.Text, s.times()
	if acceptsGzip(r) {
		before, behind := text.gzip(times)
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Length", strconv.Itoa(len(before)+len(text.Stream)+len(behind)))
		for _, b := range [][]byte{before, text.Stream, behind} {
			_, _ = w.Write(b)
		}
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(text.Size+len(times)))
	reader := readPacked(text, 0)
	defer reader.release()
	for reader.more() == nil { // An error would cut the answer. It was checked when it was read from disk.
		if reader.take(w, len(reader.rest)) != nil {
			return
		}
	}
	_, _ = w.Write(times)
}

// encode writes the page of a group in a format that it is not ready in.
func (s *state) encode(w http.ResponseWriter, r *http.Request, format expfmt.Format, logger *slog.Logger) error {
	body, done := packed(w, r)
	defer done()
	if format.FormatType() == expfmt.TypeTextPlain {
		p := newPage(format.ToEscapingScheme())
		p.addText(s.content, s.group.labels, func(at int) textReader { return readPacked(&s.content.Text, at) })
		p.states, p.now = []*state{s}, time.Time{} // A time at which no group is silent.
		return p.write(body)
	}
	encoder := expfmt.NewEncoder(body, format)
	err := s.content.families(readPacked(&s.content.Text, 0), func(f family) error {
		escaped, err := f.escaped(format.ToEscapingScheme())
		if err != nil {
			logger.Debug("Family left out", "group", s.group.key.String(), "family", f.name, "err", err)
			return nil
		}
		return encoder.Encode(escaped)
	})
	if err != nil {
		return err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	times, err := parser.TextToMetricFamilies(bytes.NewReader(s.times()))
	if err != nil {
		return err
	}
	for _, name := range []string{pushFailureTimeName, pushTimeName} {
		if err := encoder.Encode(times[name]); err != nil {
			return err
		}
	}
	return nil
}

// times returns the text of when the group was pushed to.
func (s *state) times() []byte {
	var b []byte
	for _, m := range made[:2] {
		value, _ := m.value(s, time.Time{})
		b = appendGauge(appendHeader(b, m.name, m.help), m.name, s.group.labels, value)
	}
	return b
}

// acceptsGzip tells whether an answer may be gzipped.
func acceptsGzip(r *http.Request) bool {
	for part := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		name, params, _ := strings.Cut(part, ";")
		if strings.TrimSpace(name) == "gzip" {
			weight, err := strconv.ParseFloat(strings.TrimPrefix(strings.TrimSpace(params), "q="), 64)
			return err != nil || weight > 0
		}
	}
	return false
}

// packed returns where to write a long answer, gzipped where that is accepted, and what to call
// at its end.
func packed(w http.ResponseWriter, r *http.Request) (body io.Writer, done func()) {
	w.Header().Set("Vary", "Accept, Accept-Encoding")
	if !acceptsGzip(r) {
		return steady(w), func() {}
	}
	w.Header().Set("Content-Encoding", "gzip")
	z := newGzip(steady(w))
	return z, func() {
		_ = z.Close()
		gzips.Put(z)
	}
}

// gzips are used again: a new one allocates some hundred KiB.
var gzips = sync.Pool{New: func() any {
	// An error would mean that BestSpeed is no level.
	z, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return z
}}

func newGzip(w io.Writer) *gzip.Writer {
	z := gzips.Get().(*gzip.Writer)
	z.Reset(w)
	return z
}

// steadyWriter gives each write a time of its own, so that a long answer may take long, but
// nobody who stops to read it, or reads a little at a time, holds it for ever.
type steadyWriter struct {
	w       io.Writer
	control *http.ResponseController
	end     time.Time
}

// answerTime is how long an answer may take in all.
const answerTime = 5 * time.Minute

func steady(w http.ResponseWriter) io.Writer {
	return steadyWriter{w, http.NewResponseController(w), time.Now().Add(answerTime)}
}

func (s steadyWriter) Write(b []byte) (int, error) {
	next := time.Now().Add(writeTime)
	if next.After(s.end) {
		next = s.end
	}
	_ = s.control.SetWriteDeadline(next)
	return s.w.Write(b)
}
