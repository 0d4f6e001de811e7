package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/version"
)

// apiStatus tells of the gateway itself as a Pushgateway does.
func (g *Gateway) apiStatus(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, map[string]any{
		"status": "success",
		"data": map[string]any{
			"build_information": map[string]string{
				"branch": version.Branch, "buildDate": version.BuildDate, "buildUser": version.BuildUser,
				"goVersion": version.GoVersion, "revision": version.Revision, "version": version.Version,
			},
			"flags":      g.config.Flags,
			"start_time": g.started,
		},
	})
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(steady(w)).Encode(v)
}

// apiMetrics lists all groups as a Pushgateway does, or those that the query selects, one after
// the other, so that they are not all in memory in this form.
func (g *Gateway) apiMetrics(w http.ResponseWriter, r *http.Request) {
	states, leave, ok := g.chosen(w, r)
	defer leave()
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	body, done := packed(w, r)
	defer done()
	if _, err := fmt.Fprint(body, `{"status":"success","data":[`); err != nil {
		return
	}
	now := time.Now()
	for i, s := range states {
		if i > 0 {
			_, _ = io.WriteString(body, ",")
		}
		if err := s.list(body, now, g.config.Logger); err != nil {
			g.config.Logger.Debug("Groups not listed", "err", err)
			return // The listing is cut, so that no reader takes it for all groups.
		}
	}
	_, _ = fmt.Fprint(body, "]}")
}

// list writes a group as it is listed: each family under its name, and its labels. Of its families
// one is in memory at a time.
func (s *state) list(w io.Writer, now time.Time, logger *slog.Logger) error {
	if _, err := io.WriteString(w, "{"); err != nil {
		return err
	}
	err := s.families(now, func(f family) error {
		if f.name == listedLabels || f.name == listedSuccess {
			return nil
		}
		parsed, err := f.fromText()
		if err != nil { // It was checked when it was pushed.
			logger.Warn("Family not listed", "group", s.group.key.String(), "err", err)
			return nil
		}
		name, err := json.Marshal(f.name)
		if err != nil {
			return err
		}
		family, err := json.Marshal(listedFamily(parsed, s.pushed))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s:%s,", name, family)
		return err
	})
	if err != nil {
		return err
	}
	labels, err := json.Marshal(s.group.key.AllLabels())
	if err != nil {
		return err
	}
	success := (s.content != nil || s.awaited) && !s.failed.After(s.pushed)
	_, err = fmt.Fprintf(w, "%q:%s,%q:%v}", listedLabels, labels, listedSuccess, success)
	return err
}

// What is listed of a group beside its families.
const (
	listedLabels  = "labels"
	listedSuccess = "last_push_successful"
)

// families calls each with every family of a group, as on a page with all groups. It is valid until
// each returns.
func (s *state) families(now time.Time, each func(family) error) error {
	if c := s.content; c != nil && !s.silent(now) {
		if err := c.families(readPlain(c.Own, 0), each); err != nil {
			return err
		}
		if err := c.families(readPacked(&c.Text, 0), each); err != nil {
			return err
		}
	}
	for _, m := range made {
		if value, ok := m.value(s, now); ok {
			text := appendHeader(nil, m.name, m.help)
			f := family{name: m.name, typ: dto.MetricType_GAUGE, header: len(text)}
			f.text = appendGauge(text, m.name, s.group.labels, value)
			if err := each(f); err != nil {
				return err
			}
		}
	}
	return nil
}

func listedFamily(f *dto.MetricFamily, at time.Time) map[string]any {
	series := make([]map[string]any, 0, len(f.GetMetric()))
	for _, m := range f.GetMetric() {
		labels := make(map[string]string, len(m.GetLabel()))
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		one := map[string]any{"labels": labels}
		switch f.GetType() {
		case dto.MetricType_SUMMARY:
			quantiles := make(map[string]string)
			for _, q := range m.GetSummary().GetQuantile() {
				quantiles[number64(q.GetQuantile())] = number64(q.GetValue())
			}
			one["quantiles"] = quantiles
			one["count"], one["sum"] = strconv.FormatUint(m.GetSummary().GetSampleCount(), 10), number64(m.GetSummary().GetSampleSum())
		case dto.MetricType_HISTOGRAM:
			buckets := make(map[string]string)
			for _, b := range m.GetHistogram().GetBucket() {
				buckets[number64(b.GetUpperBound())] = strconv.FormatUint(b.GetCumulativeCount(), 10)
			}
			one["buckets"] = buckets
			one["count"], one["sum"] = strconv.FormatUint(m.GetHistogram().GetSampleCount(), 10), number64(m.GetHistogram().GetSampleSum())
		case dto.MetricType_GAUGE:
			one["value"] = number64(m.GetGauge().GetValue())
		case dto.MetricType_COUNTER:
			one["value"] = number64(m.GetCounter().GetValue())
		default:
			one["value"] = number64(m.GetUntyped().GetValue())
		}
		series = append(series, one)
	}
	family := map[string]any{"time_stamp": at, "type": f.GetType().String(), "metrics": series}
	if f.GetHelp() != "" {
		family["help"] = f.GetHelp()
	}
	return family
}

func number64(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
