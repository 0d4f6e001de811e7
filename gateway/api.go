package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
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
	comma := ""
	for _, s := range states {
		group, err := s.listed(now)
		if err != nil {
			g.config.Logger.Warn("Group listed without its families", "group", s.group.key.String(), "err", err)
		}
		b, err := json.Marshal(group)
		if err != nil {
			g.config.Logger.Warn("Group not listed", "group", s.group.key.String(), "err", err)
			continue
		}
		if _, err := fmt.Fprintf(body, "%s%s", comma, b); err != nil {
			return
		}
		comma = ","
	}
	_, _ = fmt.Fprint(body, "]}")
}

// listed returns a group as it is listed: each family under its name, and its labels.
func (s *state) listed(now time.Time) (map[string]any, error) {
	p := newPage(model.NoEscaping)
	p.state(s, now)
	b := getBuffer()
	defer putBuffer(b)
	_ = p.write(b)
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(b)
	group := make(map[string]any, len(families)+2)
	if err == nil {
		for name, family := range families {
			group[name] = listedFamily(family, s.pushed)
		}
	}
	group["labels"] = s.group.key.AllLabels()
	group["last_push_successful"] = (s.content != nil || s.awaited) && !s.failed.After(s.pushed)
	return group, err
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
