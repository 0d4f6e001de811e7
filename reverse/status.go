package reverse

import "time"

// ClientStatus is what a proxy knows of a client, for its page and for /clients.
type ClientStatus struct {
	// Name is the client's.
	Name string
	// Kind is the kind of its lines: "ptth", "longpoll", or "pushprox" for the lines of
	// PushProx's client; the last one's when it is away.
	Kind string
	// Version is the client's, "" when it does not say.
	Version string
	// Remote is the IP address that the lines come from; the last one's when it is away.
	Remote string
	// Connected tells whether it has a line.
	Connected bool
	// Since is when its first line of now was opened, or its last line ended.
	Since time.Time
	// Goodbye tells that it went away on purpose.
	Goodbye bool
	// Lines is how many there are, Busy how many of these are in use by a scrape.
	Lines, Busy int
	// Sessions is how many processes have lines under this name: more than one is a mistake,
	// but for a moment.
	Sessions int
	// Instance and Labels are those of its targets.
	Instance string
	Labels   map[string]string
	// Targets are what it announced.
	Targets []TargetStatus
	// Last is the last scrape of anything else, or of a client that announced nothing.
	Last ScrapeStatus
}

// TargetStatus is a target with what came of its last scrape.
type TargetStatus struct {
	Target
	Last ScrapeStatus
	// Holder is the client that is listed for service discovery with the same job and
	// instance; "" when this one is.
	Holder string
	// Duplicate tells that this is a conflict. It is none when this client is not connected,
	// and Holder is the same node under another name.
	Duplicate bool
}

// ScrapeStatus is what came of a scrape.
type ScrapeStatus struct {
	// At is when it ended; zero when there was none.
	At time.Time
	// Duration is how long it took.
	Duration time.Duration
	// Status is the HTTP status that Prometheus got.
	Status int
	// Result is "success", or what went wrong: see docs/protocol.md.
	Result string
}

// ProxyStatus is all that a proxy knows, for its page.
type ProxyStatus struct {
	// Clients are sorted by name.
	Clients []ClientStatus
	// Settling tells that the proxy waits for clients that it knew before its start.
	Settling bool
	// Version is this program's.
	Version string
	// Now is when this was so.
	Now time.Time
}

// LineStatus is what a client knows of its way to one proxy, for the agent's page.
type LineStatus struct {
	// Proxy is the proxy's URL, as it may be shown.
	Proxy string
	// Kind is "ptth", "longpoll", "pushprox" for long-poll to PushProx's proxy, or "" when not
	// connected yet.
	Kind string
	// Lines is how many there are, Busy how many of these are in use by a scrape.
	Lines, Busy int
	// Since is when it was connected, or stopped to be so.
	Since time.Time
	// Err is the last fault while there is no line; "" when there is one.
	Err string
}
