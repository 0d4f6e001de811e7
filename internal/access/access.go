// Package access decides who may do what: at a proxy be which client, scrape, and list; at a
// gateway push to which groups, and read. It reads that from the file that --auth.file names,
// and again when the file changes.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A Face is one side of a proxy or of a gateway, with callers of its own.
type Face string

// The faces of a proxy. A credential for one is none for another, but where the file gives
// it to both a scraper and a lister.
const (
	// FaceClient: clients, who open lines.
	FaceClient Face = "client"
	// FaceScraper: who scrapes, Prometheus.
	FaceScraper Face = "scraper"
	// FaceLister: who reads the service discovery, /clients, the page and /metrics.
	FaceLister Face = "lister"
)

// The faces of a gateway. A credential for one is none for the other.
const (
	// FacePusher: who pushes to groups, and deletes them.
	FacePusher Face = "pusher"
	// FaceReader: who scrapes, and reads the service discovery, the API and the page.
	FaceReader Face = "reader"
)

// Guard lets callers in, or not. It is safe for concurrent use.
type Guard struct {
	role    *role
	path    string
	logger  *slog.Logger
	metrics *metrics
	rules   atomic.Pointer[rules]
	failed  limiter

	// mu is held while the file is taken into use.
	mu       sync.Mutex
	used     contentID // of what rules were read from
	tried    contentID // of what was read last
	onChange func()
}

// NewProxy returns the guard of a proxy. It does as the file at path says, or lets everybody do
// everything when path is "". It starts nothing: without Run, the file is read again by
// Reload only. The error names all that is wrong with the file, and shows no digest and no
// token.
func NewProxy(path string, logger *slog.Logger, r prometheus.Registerer) (*Guard, error) {
	return newGuard(&proxy, path, logger, r)
}

// NewGateway returns the guard of a gateway, as NewProxy does that of a proxy.
func NewGateway(path string, logger *slog.Logger, r prometheus.Registerer) (*Guard, error) {
	return newGuard(&gateway, path, logger, r)
}

func newGuard(role *role, path string, logger *slog.Logger, r prometheus.Registerer) (*Guard, error) {
	g := &Guard{role: role, path: path, logger: logger}
	next := make(rules)
	for _, face := range role.faces {
		next[face] = &section{open: true}
	}
	if path != "" {
		content, err := g.read()
		if err != nil {
			return nil, err
		}
		if next, err = g.parse(content); err != nil {
			return nil, err
		}
		g.used = fingerprint(content, nil)
		g.tried = g.used
	}
	g.metrics = newMetrics(role, r)
	g.use(next)
	return g, nil
}

// Faces are those that the guard has.
func (g *Guard) Faces() []Face { return g.role.faces }

func (g *Guard) use(next rules) {
	g.rules.Store(&next)
	for _, face := range g.role.faces {
		open := 0.0
		if next.section(face).open {
			open = 1
		}
		g.metrics.open.WithLabelValues(string(face)).Set(open)
	}
}

// Open tells whether a face asks nobody for anything.
func (g *Guard) Open(face Face) bool { return g.rules.Load().section(face).open }

// Client lets a client in under name, or returns an *Error. The credential is the
// request's Authorization, Bearer or Basic with the token as the password, or a verified
// certificate; either will do. It is to be asked for each request, and before anything is
// kept of it.
func (g *Guard) Client(r *http.Request, name string) (Grant, error) {
	return g.admit(FaceClient, r, "Authorization", asClient(name))
}

// Scraper lets in who scrapes, or returns an *Error. The credential is the request's
// Proxy-Authorization, as that of Client, for Authorization is the target's; or a verified
// certificate.
func (g *Guard) Scraper(r *http.Request) (Grant, error) {
	return g.admit(FaceScraper, r, "Proxy-Authorization", anything{})
}

// Lister lets in who lists, or returns an *Error. The credential is that of Client.
func (g *Guard) Lister(r *http.Request) (Grant, error) {
	return g.admit(FaceLister, r, "Authorization", anything{})
}

// Reader lets in who reads, or returns an *Error. The credential is that of Client.
func (g *Guard) Reader(r *http.Request) error {
	_, err := g.admit(FaceReader, r, "Authorization", anything{})
	return err
}

// Pusher lets in who pushes to the group with these labels, job among them, or deletes it, or
// returns an *Error. The credential is that of Client. It is to be asked before the body is
// read.
func (g *Guard) Pusher(r *http.Request, group map[string]string) error {
	_, err := g.admit(FacePusher, r, "Authorization", toGroup(group))
	return err
}

// PusherToAll lets in, as Pusher does, who may push to every group that there can be.
func (g *Guard) PusherToAll(r *http.Request) error {
	_, err := g.admit(FacePusher, r, "Authorization", toAll{})
	return err
}

// PusherToSome lets in, as Pusher does, who may push to some groups, and returns what tells to
// which ones. That is for the time of the request, and counts nobody as refused.
func (g *Guard) PusherToSome(r *http.Request) (may func(group map[string]string) bool, err error) {
	if _, err := g.admit(FacePusher, r, "Authorization", anything{}); err != nil {
		return nil, err
	}
	s := g.rules.Load().section(FacePusher)
	return func(group map[string]string) bool {
		if s.open {
			return true
		}
		_, reason := s.admit(r.Header["Authorization"], r.TLS, toGroup(group))
		return reason == ""
	}, nil
}

func (g *Guard) admit(face Face, r *http.Request, header string, w wish) (Grant, error) {
	s := g.rules.Load().section(face)
	if s.open {
		return Grant{face: face}, nil
	}
	grant, reason := Grant{}, ReasonClosed
	if !s.closed() {
		grant, reason = s.admit(r.Header[header], r.TLS, w)
	}
	if reason == "" {
		grant.face = face
		return grant, nil
	}
	g.metrics.failures.WithLabelValues(string(face), string(reason)).Inc()
	e := &Error{Face: face, Status: statusOf(face, reason), Reason: reason, Name: w.String(), Identity: grant.Identity()}
	// A right credential is never asked for the limit: one address may be a whole site's.
	if !g.failed.allow(remote(r.RemoteAddr), time.Now()) {
		e.Status = http.StatusTooManyRequests
	}
	return Grant{}, e
}

// Valid tells whether the credential that gave the grant would give it now, after reloads
// and with its certificate's time running out: what lives long, a line or a tunnel, has to
// end when it would not. Name is that of the client, and means nothing with other grants.
// It takes well under a microsecond with a token.
func (g *Guard) Valid(grant Grant, name string) bool {
	if grant.face == "" {
		return false
	}
	s := g.rules.Load().section(grant.face)
	if s.open || grant.entry == nil {
		return s.open && grant.entry == nil
	}
	w := wish(anything{})
	if grant.face == FaceClient {
		w = asClient(name)
	}
	now, reason := (*entry)(nil), Reason("")
	if grant.token != nil {
		now, reason = s.byToken(grant.token.digest, w)
	} else {
		now, reason = s.byCertificate(grant.certificate, w)
	}
	return reason == "" && now.identity == grant.entry.identity && now.username == grant.entry.username
}

// Grant is what somebody was let in with. It takes four words, and holds no secret. Whether
// two are of the same caller is for Identity to say: a grant of the same token, from before
// a reload or from another connection, need not be equal. The zero Grant is valid nowhere.
type Grant struct {
	face Face
	// entry is nil where the face is open.
	entry *entry
	// Either of the two let the caller in.
	token       *token
	certificate *x509.Certificate
}

// Identity is the identity of the entry in the file, and "" where the face is open.
func (g Grant) Identity() string {
	if g.entry == nil {
		return ""
	}
	return g.entry.identity
}

// OnChange sets what is called after each reload that changed the file's content. It must
// not call Reload, and OnChange not be called after Run or Reload.
func (g *Guard) OnChange(f func()) { g.onChange = f }

// admit returns the grant of the first that will do of the header and the certificate, or
// why none does, with the grant of what is right but not for this wish.
func (s *section) admit(header []string, state *tls.ConnectionState, w wish) (Grant, Reason) {
	grant, reason := Grant{}, ReasonMissing
	if len(header) > 0 {
		if grant, reason = s.admitHeader(header, w); reason == "" {
			return grant, ""
		}
	}
	if state == nil || len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return grant, reason
	}
	certificate := state.VerifiedChains[0][0]
	e, why := s.byCertificate(certificate, w)
	if why == "" || reason == ReasonMissing {
		return Grant{entry: e, certificate: certificate}, why
	}
	return grant, reason
}

func (s *section) admitHeader(header []string, w wish) (Grant, Reason) {
	c, ok := parse(header)
	if !ok {
		return Grant{}, ReasonMalformed
	}
	t := s.find(sha256.Sum256([]byte(c.token)))
	if t == nil {
		return Grant{}, ReasonToken
	}
	grant := Grant{entry: t.entry, token: t}
	switch want := t.entry.username; {
	case want != "" && c.basic && c.username != want: // The token is right: this tells nobody anything.
		return grant, ReasonUsername
	case !w.allowed(t.entry, nil):
		return grant, w.reason()
	}
	return grant, ""
}

// Run looks at the file again and again until ctx ends, when it returns nil, and reloads it
// when its content is another one: by a write, by a rename, by a link that now leads
// elsewhere, as Kubernetes does it.
func (g *Guard) Run(ctx context.Context) error {
	if g.path == "" {
		<-ctx.Done()
		return nil
	}
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	var before contentID
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		// Twice the same is a file that nobody is in the middle of writing: the half of a
		// file may well be another file without fault, which lets nobody in.
		now := fingerprint(g.read())
		if now == before && now != g.last() {
			_ = g.Reload() // Logged and counted there.
		}
		before = now
	}
}
