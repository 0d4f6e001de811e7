package gateway

import (
	"net/http"

	"github.com/promferry/promferry/pushgw"
)

// Rights say who may push to which groups. Whoever may push to a group may delete it. They are
// asked before anything of a body is read, and have answered the request where they refuse.
type Rights interface {
	// Push tells whether the sender of r may push to a group.
	Push(w http.ResponseWriter, r *http.Request, key pushgw.GroupingKey) bool
	// PushToAll tells whether the sender may push to every group that there can be.
	PushToAll(w http.ResponseWriter, r *http.Request) bool
	// PushToSome returns what tells to which groups the sender may push, for the time of the
	// request; nil where to none.
	PushToSome(w http.ResponseWriter, r *http.Request) (may func(key pushgw.GroupingKey) bool)
}

// everybody may push to every group.
type everybody struct{}

func (everybody) Push(http.ResponseWriter, *http.Request, pushgw.GroupingKey) bool { return true }

func (everybody) PushToAll(http.ResponseWriter, *http.Request) bool { return true }

func (everybody) PushToSome(http.ResponseWriter, *http.Request) func(pushgw.GroupingKey) bool {
	return func(pushgw.GroupingKey) bool { return true }
}
