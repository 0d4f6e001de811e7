package real

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
)

// A Sample is one series of the answer to an instant query.
type Sample struct {
	Labels map[string]string // with __name__
	Value  float64
}

// Query asks for the value of a PromQL expression now. It must be an instant vector;
// one without series is no error.
func (p *PrometheusServer) Query(ctx context.Context, promql string) ([]Sample, error) {
	body, err := p.Get(ctx, "/api/v1/query?"+url.Values{"query": {promql}}.Encode())
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct {
			ResultType string
			Result     json.RawMessage
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("query %s: %w", promql, err)
	}
	if answer.Data.ResultType != "vector" {
		return nil, fmt.Errorf("query %s: the answer is a %s, not an instant vector", promql, answer.Data.ResultType)
	}
	var vector []struct {
		Metric map[string]string
		Value  [2]any // time, value as a string
	}
	if err := json.Unmarshal(answer.Data.Result, &vector); err != nil {
		return nil, fmt.Errorf("query %s: %w", promql, err)
	}
	samples := make([]Sample, 0, len(vector))
	for _, series := range vector {
		value, err := strconv.ParseFloat(fmt.Sprint(series.Value[1]), 64)
		if err != nil {
			return nil, fmt.Errorf("query %s: %w", promql, err)
		}
		samples = append(samples, Sample{Labels: series.Metric, Value: value})
	}
	return samples, nil
}

// A Group is what a Pushgateway holds under one grouping key.
type Group struct {
	Labels             map[string]string // the grouping key
	LastPushSuccessful bool
	Families           map[string]Family // by name
}

// A Family is a metric family in a group.
type Family struct {
	Type    string // GAUGE, COUNTER and so on
	Help    string
	Metrics []Metric
}

// A Metric is one series of a family, or one summary or histogram.
type Metric struct {
	Labels map[string]string // with those of the grouping key
	Value  string            // of a gauge, counter or untyped metric; else empty
	Count  string            // of a summary or histogram; else empty
}

// Groups returns what the Pushgateway holds, in no particular order.
func (g *Gateway) Groups(ctx context.Context) ([]Group, error) {
	const path = "/api/v1/metrics"
	body, err := g.Get(ctx, path)
	if err != nil {
		return nil, err
	}
	// A group is one object: two known keys, and a key for each family.
	var answer struct{ Data []map[string]json.RawMessage }
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("get %s%s: %w", g.URL, path, err)
	}
	groups := make([]Group, 0, len(answer.Data))
	for _, fields := range answer.Data {
		group := Group{Families: map[string]Family{}}
		for key, value := range fields {
			switch key {
			case "labels":
				err = json.Unmarshal(value, &group.Labels)
			case "last_push_successful":
				err = json.Unmarshal(value, &group.LastPushSuccessful)
			default:
				var family Family
				err = json.Unmarshal(value, &family)
				group.Families[key] = family
			}
			if err != nil {
				return nil, fmt.Errorf("get %s%s: %s: %w", g.URL, path, key, err)
			}
		}
		groups = append(groups, group)
	}
	return groups, nil
}
