package expiry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/internal/labelmatch"
	"github.com/promferry/promferry/pushgw"
)

// Prune finds and deletes groups that nobody pushes to any more, with an expiry or without.
type Prune struct {
	// OlderThan is how long ago the last push that succeeded must be. A group that never had
	// one has no age, and is left alone.
	OlderThan time.Duration
	// Match must all match the labels of a group's grouping key, job among them. Without any,
	// every group is.
	Match []labelmatch.Matchers
	// ListTimeout is how long reading the list of groups may take.
	ListTimeout time.Duration
	// PushTimeout is how long one delete, and the question for the time, may take.
	PushTimeout time.Duration
}

// Old is a group that was not pushed to for a long time.
type Old struct {
	pushgw.Group
	// Age is the time since the last push, by the Pushgateway's clock.
	Age time.Duration
}

// Find returns the groups that match, the oldest first.
func (p Prune) Find(ctx context.Context, g Gateway) ([]Old, error) {
	statusCtx, cancel := context.WithTimeout(ctx, p.PushTimeout)
	defer cancel()
	status, err := g.Status(statusCtx)
	if err != nil {
		return nil, err
	}
	listCtx, cancel := context.WithTimeout(ctx, p.ListTimeout)
	defer cancel()
	var found []Old
	for group, err := range g.Groups(listCtx) {
		if err != nil {
			return nil, err
		}
		age := status.Now.Sub(group.Pushed)
		if group.Key.Job != "" && !group.Pushed.IsZero() && age > p.OlderThan && p.matches(group.Key) {
			found = append(found, Old{group, age})
		}
	}
	slices.SortStableFunc(found, func(a, b Old) int { return cmp.Compare(b.Age, a.Age) })
	return found, nil
}

func (p Prune) matches(key pushgw.GroupingKey) bool {
	labels := map[string]string{model.JobLabel: key.Job}
	maps.Copy(labels, key.Labels)
	return !slices.ContainsFunc(p.Match, func(m labelmatch.Matchers) bool { return !m.Match(labels) })
}

// Delete deletes those of the groups found that still are what Find returns: it lists them
// once more. It returns those that it deleted, and all that went wrong.
func (p Prune) Delete(ctx context.Context, g Gateway, found []Old) ([]Old, error) {
	still, err := p.Find(ctx, g)
	if err != nil {
		return nil, err
	}
	wanted := make(map[string]bool)
	for _, old := range found {
		wanted[old.Key.Path()] = true
	}
	var deleted []Old
	var errs []error
	for _, old := range still {
		if !wanted[old.Key.Path()] {
			continue
		}
		if err := old.Key.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("group %s: %w", old.Key, err))
			continue
		}
		deleteCtx, cancel := context.WithTimeout(ctx, p.PushTimeout)
		err := g.Delete(deleteCtx, old.Key)
		cancel()
		if err == nil {
			deleted = append(deleted, old)
			continue
		}
		errs = append(errs, err)
		if !onlyThis(err) {
			break
		}
	}
	return deleted, errors.Join(errs...)
}
