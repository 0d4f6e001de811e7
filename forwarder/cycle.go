package forwarder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/exposition"
	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/pushgw"
	"github.com/promferry/promferry/target"
)

// contents is what a group shall hold after one cycle: of the target all families that
// can be put, or none when err says why, and its companions.
type contents struct {
	target   *pushTarget
	families []*dto.MetricFamily
	left     []exposition.LeftOut
	err      error
	// at is when the cycle began, until is when the next one does.
	at, until time.Time
	whole     func() (pushgw.Body, error)
	format    exposition.Format
}

// cycle scrapes t and hands what came of it to each worker. A cycle that would begin
// while another of t runs is skipped and counted. It returns the scrape's error, which is
// logged and counted.
func (f *Forwarder) cycle(ctx context.Context, t *pushTarget) error {
	if !t.cycling.TryLock() {
		f.metrics.skipped.WithLabelValues(t.Job).Inc()
		return nil
	}
	defer t.cycling.Unlock()
	t.running.start()
	defer t.running.stop()
	f.metrics.scrapes.WithLabelValues(t.Job).Inc()
	c := f.scrape(ctx, t)
	if se, ok := errors.AsType[*target.ScrapeError](c.err); ok {
		f.metrics.scrapeFailures.WithLabelValues(t.Job, string(se.Reason)).Inc()
		f.status.failed(c.err)
		t.faults.Failed(ctx, "Scrape failed", c.err)
	} else {
		t.faults.Succeeded(ctx, "Scrape succeeded again")
		f.showLeftOut(ctx, c)
	}
	for _, w := range f.workers {
		w.offer(c)
	}
	return c.err
}

// scrape reads t and makes the contents of its group.
func (f *Forwarder) scrape(ctx context.Context, t *pushTarget) *contents {
	begin := time.Now()
	scrapeCtx, cancel := context.WithTimeout(ctx, f.cfg.ScrapeTimeout)
	defer cancel()
	body, contentType, err := f.cfg.Scraper.Scrape(scrapeCtx, t.Target)
	var families []*dto.MetricFamily
	var left []exposition.LeftOut
	if err == nil {
		families, left, err = exposition.Read(scrapeCtx, body, contentType)
		if err != nil {
			reason := target.ReasonNotMetrics
			switch {
			case errors.Is(err, exposition.ErrEmpty):
				reason = target.ReasonEmpty
			case errors.Is(err, exposition.ErrTooLarge):
				reason = target.ReasonTooLarge
			case scrapeCtx.Err() != nil:
				reason, err = target.ReasonTimeout, errors.New("timed out while it was read")
			}
			if f.cfg.Shown != nil {
				err = errors.New(f.cfg.Shown(t.URL, err.Error()))
			}
			err = &target.ScrapeError{Reason: reason, URL: safeurl.String(t.URL), Err: err}
		}
	}
	samples := exposition.Samples(families)
	families, more := t.rules.Check(families)
	return f.contents(t, begin, err, append(left, more...),
		append(families, f.companions(err == nil, time.Since(begin), samples)...))
}

// down returns the contents of a group whose target is down, or is left: up 0 and its
// companions.
func (f *Forwarder) down(t *pushTarget, err error) *contents {
	return f.contents(t, time.Now(), err, nil, f.companions(false, 0, 0))
}

func (f *Forwarder) contents(t *pushTarget, at time.Time, err error, left []exposition.LeftOut, families []*dto.MetricFamily) *contents {
	c := &contents{
		target: t, families: families, left: left, err: err,
		at: at, until: at.Add(f.cfg.Schedule.Shortest()),
		format: f.cfg.Format,
	}
	c.whole = sync.OnceValues(func() (pushgw.Body, error) { return c.encode(nil) })
	return c
}

// body returns what to put: everything but the families named. Most often none is, and
// all workers share one body.
func (c *contents) body(without map[string]bool) (pushgw.Body, error) {
	if len(without) == 0 {
		return c.whole()
	}
	return c.encode(without)
}

func (c *contents) encode(without map[string]bool) (pushgw.Body, error) {
	families := slices.DeleteFunc(slices.Clone(c.families), func(family *dto.MetricFamily) bool { return without[family.GetName()] })
	gzipped, err := exposition.Encode(families, c.format)
	return pushgw.Body{ContentType: c.format.ContentType(), Gzipped: gzipped}, err
}

// have returns those of names that families of c have.
func (c *contents) have(names []string) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		return !slices.ContainsFunc(c.families, func(family *dto.MetricFamily) bool { return family.GetName() == name })
	})
}

// companions returns the families that stand in every group: those that Prometheus itself
// would record of the scrape, and ours.
func (f *Forwarder) companions(up bool, took time.Duration, samples int) []*dto.MetricFamily {
	value := 0.0
	if up {
		value = 1
	}
	families := []*dto.MetricFamily{
		gauge("up", "1 if the target was scraped, 0 if the scrape failed or the agent stopped.", value),
		gauge("scrape_duration_seconds", "How long the scrape took.", took.Seconds()),
		gauge("scrape_samples_scraped", "How many samples the target exposed.", float64(samples)),
		gauge("promferry_info", "What put this group.", 1, "mode", "push", "version", f.cfg.Version),
	}
	if f.cfg.ExpiresAfter > 0 {
		families = append(families, gauge("promferry_expires_after_seconds",
			"For how long after a put this group is good.", f.cfg.ExpiresAfter.Seconds()))
	}
	return families
}

func gauge(name, help string, value float64, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: &value}}
	for i := 0; i < len(labels); i += 2 {
		if labels[i+1] != "" {
			m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
		}
	}
	return &dto.MetricFamily{Name: &name, Help: &help, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{m}}
}

// showLeftOut shows what is not put in a metric, and in the log when it is not what was
// left out before.
func (f *Forwarder) showLeftOut(ctx context.Context, c *contents) {
	families := make(map[exposition.Reason]int)
	for _, l := range c.left {
		families[l.Reason]++
	}
	for _, reason := range exposition.Reasons {
		f.metrics.leftOut.WithLabelValues(c.target.Job, string(reason)).Set(float64(families[reason]))
	}
	c.target.left.log(ctx, c.left)
}

// leftOutLog logs what is left out of a target's expositions, when it changes and at most
// once a minute. It is used within a cycle only.
type leftOutLog struct {
	logger *slog.Logger
	told   string
	at     time.Time
}

// maxToldFamilies is how many families are named in one line of the log.
const maxToldFamilies = 20

func (l *leftOutLog) log(ctx context.Context, left []exposition.LeftOut) {
	descriptions := make([]string, 0, len(left))
	for i, out := range left {
		if i == maxToldFamilies {
			descriptions = append(descriptions, fmt.Sprintf("and %d more", len(left)-i))
			break
		}
		descriptions = append(descriptions, describe(out))
	}
	told := strings.Join(descriptions, ", ")
	if told == l.told || told != "" && time.Since(l.at) < faultlog.Every {
		return
	}
	l.told, l.at = told, time.Now()
	if told != "" {
		l.logger.LogAttrs(ctx, slog.LevelWarn, "Left out of the exposition", slog.String("families", told))
	}
}

// maxToldName is how much of a name is shown, in bytes: names come from the network.
const maxToldName = 120

func describe(l exposition.LeftOut) string {
	name := l.Family
	if len(name) > maxToldName {
		name = strings.ToValidUTF8(name[:maxToldName], "") + "..."
	}
	if !model.LegacyValidation.IsValidMetricName(name) {
		name = strconv.Quote(name)
	}
	if l.Series == 0 {
		return fmt.Sprintf("%s (%s)", name, l.Reason)
	}
	return fmt.Sprintf("%s (%s, %d series)", name, l.Reason, l.Series)
}
