// Package reverse scrapes targets over connections that their nodes opened: the proxy next
// to Prometheus, which routes each scrape to a line, and the client on the node, where the
// line ends. Both are HTTP handlers and know nothing of how a line is made: that is ptth
// and longpoll.
package reverse

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"
)

// The headers of the wire, see docs/protocol.md.
const (
	HeaderClient    = "Promferry-Client"
	HeaderSession   = "Promferry-Session"
	HeaderAnnounce  = "Promferry-Announce"
	HeaderVersion   = "Promferry-Version"
	HeaderProxy     = "Promferry-Proxy"
	HeaderHeartbeat = "Promferry-Heartbeat"
	HeaderError     = "Promferry-Error"
	// HeaderTimeout is Prometheus's own: for how many seconds it waits.
	HeaderTimeout = "X-Prometheus-Scrape-Timeout-Seconds"
)

// The limits of what a client says of itself.
const (
	// MaxAnnouncement is the size of an announcement on the wire, in bytes: some 200 targets.
	MaxAnnouncement = 32 << 10
	maxName         = 253 // of a host name, RFC 1035
	// maxLabels and maxTargets are how many there are at most.
	maxLabels  = 64
	maxTargets = 1000
	// maxLabelBytes bounds what the labels take in service discovery, where they stand with each
	// target, in bytes: 200 targets may have 1.3 KB each.
	maxLabelBytes = 256 << 10
	minSession    = 16
	maxSession    = 64
)

// nameBytes are what a client's name is made of; the letters and digits come first.
const nameBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:"

// Target is what a client offers to be scraped, as Prometheus sees it: the host is the
// client's name.
type Target struct {
	// Job is the job label.
	Job string `json:"job"`
	// Scheme is "https", or "http", or "" for http.
	Scheme string `json:"scheme,omitempty"`
	// Port is the TCP port, 1 to 65535.
	Port uint16 `json:"port"`
	// Path begins with a slash; it is written as in a URL.
	Path string `json:"path"`
	// Query is written as in a URL. No parameter stands in it twice.
	Query string `json:"query,omitempty"`
}

// URL returns what Prometheus asks the proxy for, or would with scheme: http in the way of
// PushProx, for the target of a client called name.
func (t Target) URL(name string) string {
	u := t.scheme() + "://" + net.JoinHostPort(name, strconv.Itoa(int(t.Port))) + t.Path
	if t.Query != "" {
		u += "?" + t.Query
	}
	return u
}

// plainPath returns the path without escapes: Prometheus adds them itself.
func (t Target) plainPath() string {
	path, err := url.PathUnescape(t.Path)
	if err != nil {
		return t.Path // Validated, so this does not happen.
	}
	return path
}

func (t Target) scheme() string {
	if t.Scheme == "" {
		return "http"
	}
	return t.Scheme
}

// Announcement is what a client says that it offers.
type Announcement struct {
	// Instance is the instance label of all targets.
	Instance string `json:"instance"`
	// Labels are further labels of all targets; nil means none.
	Labels map[string]string `json:"labels,omitempty"`
	// Targets are what can be scraped.
	Targets []Target `json:"targets"`
	// HostID tells hosts apart: 32 hexadecimal digits, "" when it is not known. It is not
	// shown to anyone.
	HostID string `json:"host_id,omitempty"`
}

// String writes the announcement for its header.
func (a *Announcement) String() string {
	b, err := json.Marshal(a)
	if err != nil {
		panic(err) // Strings and numbers.
	}
	return asciiJSON(string(b))
}

// asciiJSON writes characters that no header may hold as JSON does: \u and four digits.
func asciiJSON(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r < 0x7f:
			b.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// ParseAnnouncement reads an announcement from its header. Whatever a service discovery
// could not carry, or what a client must not say, is an error.
func ParseAnnouncement(s string) (*Announcement, error) {
	if len(s) > MaxAnnouncement {
		return nil, fmt.Errorf("more than %d bytes", MaxAnnouncement)
	}
	a := &Announcement{}
	if err := json.Unmarshal([]byte(s), a); err != nil {
		return nil, errors.New("no JSON of an announcement")
	}
	return a, a.Validate()
}

// Validate returns what is wrong with the announcement.
func (a *Announcement) Validate() error {
	if a.Instance == "" || !utf8.ValidString(a.Instance) {
		return fmt.Errorf("instance %q: want UTF-8, and not empty", a.Instance)
	}
	switch {
	case a.HostID != "" && (len(a.HostID) != 32 || strings.Trim(a.HostID, "0123456789abcdef") != ""):
		return fmt.Errorf("host ID %.60q: want 32 hexadecimal digits, in lower case", a.HostID)
	case len(a.Labels) > maxLabels:
		return fmt.Errorf("%d labels, at most %d", len(a.Labels), maxLabels)
	case len(a.Targets) > maxTargets:
		return fmt.Errorf("%d targets, at most %d", len(a.Targets), maxTargets)
	}
	for name, value := range a.Labels {
		switch {
		case name == model.JobLabel || name == model.InstanceLabel || strings.HasPrefix(name, model.ReservedLabelPrefix):
			return fmt.Errorf("label %q: not for a client to set", name)
		case !model.LegacyValidation.IsValidLabelName(name):
			return fmt.Errorf("label %q: no label name", name)
		case !utf8.ValidString(value):
			return fmt.Errorf("label %q: the value is not UTF-8", name)
		}
	}
	if each := jsonSize(a.Instance) + jsonSize(a.Labels); each*len(a.Targets) > maxLabelBytes {
		return fmt.Errorf("instance and labels take %d bytes at each of %d targets, together at most %d: shorten the labels or announce fewer targets",
			each, len(a.Targets), maxLabelBytes)
	}
	seen := make(map[Target]bool, len(a.Targets))
	jobs := make(map[string]bool, len(a.Targets))
	for _, t := range a.Targets {
		if err := t.validate(); err != nil {
			return fmt.Errorf("target %q: %w", t.Job, err)
		}
		place := Target{Port: t.Port, Path: t.Path, Query: t.Query}
		if seen[place] || jobs[t.Job] {
			return fmt.Errorf("target %q: stands there twice", t.Job)
		}
		seen[place], jobs[t.Job] = true, true
	}
	return nil
}

func jsonSize(v any) int {
	b, _ := json.Marshal(v) // Strings.
	return len(b)
}

func (t Target) validate() error {
	switch {
	case t.Job == "" || !utf8.ValidString(t.Job):
		return errors.New("the job is empty or not UTF-8")
	case !slices.Contains([]string{"", "http", "https"}, t.Scheme):
		return fmt.Errorf("scheme %q: want http or https", t.Scheme)
	case t.Port == 0:
		return errors.New("no port")
	}
	u, err := url.Parse("http://host" + t.Path)
	if err != nil || !strings.HasPrefix(t.Path, "/") || u.EscapedPath() != t.Path {
		return fmt.Errorf("path %q: no path of a URL", t.Path)
	}
	params, err := url.ParseQuery(t.Query)
	if err != nil {
		return fmt.Errorf("query: %w", err)
	}
	for name, values := range params {
		switch {
		case !model.LegacyValidation.IsValidLabelName("__param_" + name):
			return fmt.Errorf("parameter %q: service discovery carries letters, digits and _ only; set the whole query under params in Prometheus instead", name)
		case name == "_scheme":
			return errors.New("parameter _scheme: is the proxy's own")
		case len(values) > 1:
			return fmt.Errorf("parameter %q: service discovery carries one value only; set the whole query under params in Prometheus instead", name)
		case !utf8.ValidString(values[0]):
			return fmt.Errorf("parameter %q: the value is not UTF-8", name)
		}
	}
	return nil
}

// ValidateName returns what is wrong with the name of a client.
func ValidateName(name string) error {
	if name == "" || len(name) > maxName || strings.Trim(name, nameBytes) != "" {
		return fmt.Errorf("client name %.60q: want a host name or IP address, at most %d bytes", name, maxName)
	}
	if _, err := netip.ParseAddr(name); strings.Contains(name, ":") && err != nil {
		return fmt.Errorf("client name %.60q: want it without a port", name)
	}
	return nil
}

func validateSession(id string) error {
	if len(id) < minSession || len(id) > maxSession || strings.Trim(id, nameBytes[:62]) != "" {
		return fmt.Errorf("session: want %d to %d letters and digits", minSession, maxSession)
	}
	return nil
}
