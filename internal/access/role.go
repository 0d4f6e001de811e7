package access

import "strings"

// role is what sets the guards of a proxy and of a gateway apart.
type role struct {
	// faces are in the order of the file.
	faces []Face
	// scope is the field of an entry that says what its credentials are good for, and other the
	// reason for which one is refused that is good for something else.
	scope string
	other Reason
	// apart is why a token of the first face must not stand under another one.
	apart string
	// newFile returns what the file is read into.
	newFile func() file
	// The names of the metrics.
	failures, open, reloaded string
}

var proxy = role{
	faces: []Face{FaceClient, FaceScraper, FaceLister},
	scope: "names", other: ReasonName, apart: "a client must not scrape or list",
	newFile:  func() file { return &proxyFile{} },
	failures: "promferry_proxy_auth_failures_total",
	open:     "promferry_proxy_auth_open",
	reloaded: "promferry_proxy_auth_last_reload_successful",
}

var gateway = role{
	faces: []Face{FacePusher, FaceReader},
	scope: "groups", other: ReasonGroup, apart: "a pusher must not read",
	newFile:  func() file { return &gatewayFile{} },
	failures: "promferry_gateway_auth_failures_total",
	open:     "promferry_gateway_auth_open",
	reloaded: "promferry_gateway_auth_last_reload_successful",
}

// sectionOf returns the name of the section of a face.
func sectionOf(face Face) string { return string(face) + "s" }

// sections lists the names of all sections, with a word before the last one.
func (r *role) sections(word string) string {
	names := make([]string, len(r.faces))
	for i, face := range r.faces {
		names[i] = sectionOf(face)
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " " + word + " " + names[last]
}
