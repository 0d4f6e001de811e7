package access

import (
	"slices"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/internal/labelmatch"
)

// wish is what a caller wants to do at a face.
type wish interface {
	// allowed tells whether a credential of the entry is good for it. Own are those names of a
	// certificate that the entry takes, and none with a token.
	allowed(e *entry, own []string) bool
	// reason is why not.
	reason() Reason
	// String tells it in an error.
	String() string
}

// anything is what whoever has a right credential may do.
type anything struct{}

func (anything) allowed(*entry, []string) bool { return true }
func (anything) reason() Reason                { return "" }
func (anything) String() string                { return "" }

// asClient is to be the client of this name.
type asClient string

func (name asClient) allowed(e *entry, own []string) bool {
	if name == "" {
		return false
	}
	if len(e.names) == 0 {
		return slices.Contains(own, string(name))
	}
	return matchesAny(e.names, string(name))
}

func (asClient) reason() Reason      { return ReasonName }
func (name asClient) String() string { return string(name) }

// toGroup is to push to the group with these labels.
type toGroup map[string]string

func (group toGroup) allowed(e *entry, own []string) bool {
	if len(e.groups) == 0 {
		instance := group[model.InstanceLabel]
		return instance != "" && slices.Contains(own, instance)
	}
	return slices.ContainsFunc(e.groups, func(m labelmatch.Matchers) bool { return m.Match(group) })
}

func (toGroup) reason() Reason { return ReasonGroup }

func (group toGroup) String() string {
	labels := make(model.LabelSet, len(group))
	for name, value := range group {
		labels[model.LabelName(name)] = model.LabelValue(value)
	}
	return labels.String()
}

// toAll is to push to every group.
type toAll struct{}

func (toAll) allowed(e *entry, _ []string) bool {
	return slices.ContainsFunc(e.groups, labelmatch.Matchers.All)
}

func (toAll) reason() Reason { return ReasonGroup }
func (toAll) String() string { return "every group" }
