package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/promferry/promferry/internal/faultlog"
	"github.com/promferry/promferry/internal/safeurl"
	"github.com/promferry/promferry/target"
)

// site refuses requests that a page of another site makes a browser send to a port of ours. That
// includes DNS rebinding: the other site's own name leads to our address, so that the browser takes
// both for one site. Only a request's host name differs then. It is safe for concurrent use.
type site struct {
	names   []string // that are ours, besides localhost and IP addresses
	cross   *http.CrossOriginProtection
	local   bool // The port listens on loopback only.
	refused faultlog.Log
}

// newSite returns the check for a port. external is what browsers and reverse proxies call it; it
// may have no URL.
func newSite(address net.Addr, external siteURL, logger *slog.Logger) *site {
	s := &site{names: hostNames(), cross: http.NewCrossOriginProtection(), refused: faultlog.Log{Logger: logger}}
	if a, ok := address.(*net.TCPAddr); ok {
		s.local = a.IP.IsLoopback()
	}
	if external.URL != nil {
		s.names = append(s.names, strings.TrimSuffix(external.Hostname(), "."))
		_ = s.cross.AddTrustedOrigin(external.origin()) // A URL with scheme and host is one.
	}
	return s
}

// protect lets requests through to next that no other site can have made a browser send.
func (s *site) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reason := s.refuse(r)
		if reason == "" {
			next.ServeHTTP(w, r)
			return
		}
		s.refused.Failed(r.Context(), "Request refused", fmt.Errorf("from %s: %s", r.RemoteAddr, reason))
		// The body is not read, however slowly it comes.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(10 * time.Second))
		w.Header().Set("Connection", "close")
		http.Error(w, reason, http.StatusForbidden)
	})
}

// refuse returns why a request is refused, "" when it is not. A browser sends the host name that its
// user or a page has typed as Host, and with all that may change something the site of the page as
// Origin. Other programs send no Origin and call us by any name: on a port that others can reach
// they are never refused. X-Forwarded-Host counts for nothing, because any page can set it.
func (s *site) refuse(r *http.Request) string {
	if s.local && r.Host != "" && !s.isOurs((&url.URL{Host: r.Host}).Hostname()) {
		return fmt.Sprintf("Host %.100q is unknown to this server: use an IP address or localhost, or set its --web.external-url.", r.Host)
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return ""
	}
	if s.cross.Check(r) != nil {
		return fmt.Sprintf("The request comes from a page of another site, Origin %.100q. If that is a URL of this server, set its --web.external-url.", r.Header.Get("Origin"))
	}
	for _, origin := range r.Header["Origin"] {
		if u, err := url.Parse(origin); err != nil || !s.isOurs(u.Hostname()) {
			return fmt.Sprintf("Origin %.100q is unknown to this server: use an IP address or localhost, or set its --web.external-url.", origin)
		}
	}
	return ""
}

// isOurs tells whether a name cannot be that of another site: ours, or one that no DNS server is
// asked for.
func (s *site) isOurs(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if domain := name[strings.LastIndexByte(name, '.')+1:]; strings.EqualFold(domain, "localhost") {
		return true
	}
	for _, ours := range s.names {
		if strings.EqualFold(name, ours) && name != "" {
			return true
		}
	}
	_, err := netip.ParseAddr(name)
	return err == nil
}

// hostNames returns this host's name, its short form and its fully qualified one, as far as
// /etc/hosts has it: no DNS server is asked, which could take long.
func hostNames() []string {
	hostname, err := os.Hostname()
	if err != nil || hostname == "" {
		return nil
	}
	short, _, _ := strings.Cut(hostname, ".")
	return []string{hostname, short, hostFQDN(&net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("only /etc/hosts is read")
	}})}
}

// siteURL is the URL that browsers and reverse proxies call a port. Its URL may be nil.
type siteURL struct{ *url.URL }

func (u siteURL) String() string {
	if u.URL == nil {
		return ""
	}
	return u.URL.String()
}

// origin returns what a browser sends as the Origin of the URL's pages (RFC 6454, 6.2).
func (u siteURL) origin() string {
	host := u.Host
	if u.Scheme == "http" && u.Port() == "80" || u.Scheme == "https" && u.Port() == "443" {
		host = strings.TrimSuffix(host, ":"+u.Port())
	}
	return u.Scheme + "://" + strings.ToLower(strings.TrimSuffix(host, ":"))
}

func externalURL() *setting[siteURL] {
	return &setting[siteURL]{
		flag: "web.external-url",
		help: "URL by which browsers and reverse proxies reach this server. Its host name is accepted like localhost, an IP address or the name of this host: as the Origin of PUT, POST and DELETE, and as the Host of all requests where a port listens on loopback only.",
		parse: func(s string) (siteURL, error) {
			u, err := target.ParseURL(s)
			if err != nil {
				return siteURL{}, fmt.Errorf("%q: %w", safeurl.Text(s), err)
			}
			if u.RawQuery != "" || u.Fragment != "" {
				return siteURL{}, fmt.Errorf("%q: want a URL without a query, as in https://hub.example.org", safeurl.Text(s))
			}
			return siteURL{u}, nil
		},
	}
}

func enableLifecycle() *setting[bool] {
	return toggle("web.enable-lifecycle", "Let a POST or PUT to /-/reload do what SIGHUP does: read the files that settings name again.")
}
