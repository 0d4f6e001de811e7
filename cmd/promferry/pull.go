package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/version"
	"golang.org/x/sync/errgroup"

	"github.com/promferry/promferry/internal/httpclient"
	"github.com/promferry/promferry/reverse"
	"github.com/promferry/promferry/reverse/link"
	"github.com/promferry/promferry/reverse/page"
)

// tunnelIdle is how long a CONNECT passes no byte before the agent closes it: longer than
// Prometheus keeps a connection that is idle, and than the proxy does by default.
const tunnelIdle = 6 * time.Minute

// deadProxy is after how long a connection to a proxy that is not heard of breaks, where
// no heartbeat tells sooner: a poll at PushProx's.
const deadProxy = 30 * time.Second

// pull lets proxies scrape targets here.
type pull struct {
	name   string
	client *reverse.Client
	links  []*link.Link
	// clients are what reads files that settings name.
	clients []*httpclient.Client
}

// newPull returns the part of the agent that is for reverse pull; nil when no proxy is set.
func newPull(s *agentSettings, scrape *httpclient.Client, logger *slog.Logger, r prometheus.Registerer) (*pull, error) {
	if len(s.ProxyUrls.value) == 0 {
		return nil, nil
	}
	toProxy, err := httpclient.NewWithDial("proxy", s.ProxyHTTPConfig.value, httpclient.DialContext(deadProxy))
	if err != nil {
		return nil, usageError{s.ProxyHTTPConfig.fault(err)}
	}
	// The credentials of the file are for the targets, the rest of it is for whatever is scraped.
	own, err := httpclient.NewWithDial("scrape", s.ScrapeHTTPConfig.value, dialOwn)
	if err != nil {
		return nil, usageError{s.ScrapeHTTPConfig.fault(err)}
	}
	targets := pullTargets(s)
	p := &pull{name: s.Fqdn.value, clients: []*httpclient.Client{toProxy, own}}
	p.client = reverse.NewClient(reverse.ClientConfig{
		Name: s.Fqdn.value, Targets: targets, Allow: s.PullAllows.value,
		HTTP: scrape, OwnHTTP: own.WithoutCredentials(), Dial: (&net.Dialer{}).DialContext, DialOwn: dialOwn,
		MaxBytes: int64(s.PullMaxBytes.value), TunnelIdle: tunnelIdle, Logger: logger, Registerer: r,
	})
	header := http.Header{}
	header.Set(reverse.HeaderClient, s.Fqdn.value)
	header.Set(reverse.HeaderSession, rand.Text())
	header.Set(reverse.HeaderVersion, version.Version)
	header.Set(reverse.HeaderAnnounce, announcement(s).String())
	metrics := link.NewMetrics(r)
	for _, u := range s.ProxyUrls.value {
		p.links = append(p.links, link.New(link.Config{
			URL: u.URL, HTTP: toProxy, Header: header, Targets: len(targets), Handler: p.client, Drain: shutdownBudget,
			Logger: logger, Metrics: metrics,
		}))
	}
	return p, nil
}

// announcement returns what the agent announces to proxies.
func announcement(s *agentSettings) *reverse.Announcement {
	labels := make(map[string]string)
	for _, l := range s.PushLabels.value {
		labels[l.name] = l.value
	}
	a := reverse.Announce(s.Instance.value, labels, pullTargets(s))
	a.HostID = hostID()
	return a
}

func pullTargets(s *agentSettings) []reverse.PullTarget {
	var targets []reverse.PullTarget
	for _, t := range s.PullTargets.value {
		targets = append(targets, reverse.PullTarget{Job: t.Job, URL: t.URL})
	}
	return targets
}

// status returns what the agent's page shows.
func (p *pull) status(instance, forwarding string) page.AgentStatus {
	status := page.AgentStatus{Name: instance, Forwarding: forwarding, Version: version.Version, Now: time.Now()}
	if p == nil {
		return status
	}
	status.Name = p.name
	status.Targets = p.client.Status()
	for _, l := range p.links {
		status.Lines = append(status.Lines, l.Status())
	}
	return status
}

// sentence says how it is to the proxies, for systemd; "" without any.
func (p *pull) sentence() string {
	if p == nil {
		return ""
	}
	connected := 0
	for _, l := range p.links {
		if l.Status().Lines > 0 {
			connected++
		}
	}
	return fmt.Sprintf("Connected to %d of %d proxies; ", connected, len(p.links))
}

// Run keeps the lines open until ctx ends.
func (p *pull) Run(ctx context.Context) error {
	var group errgroup.Group
	for _, l := range p.links {
		group.Go(func() error { return l.Run(ctx) })
	}
	return group.Wait()
}

// dialOwn connects to this host, and to no other, whatever a name resolves to: to those of
// the name's addresses that are this host's, or else to loopback.
func dialOwn(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	ips, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", host) // A host need not know its own name.
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, ip := range append(ips, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()) {
		ip = ip.Unmap()
		mine := ip.IsLoopback()
		for _, a := range own {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(net.IP(ip.AsSlice())) && !ip.IsLinkLocalUnicast() {
				mine = true
			}
		}
		if !mine {
			continue
		}
		conn, dialErr := (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
		if dialErr == nil {
			return conn, nil
		}
		if err == nil {
			err = dialErr // The first says most.
		}
	}
	return nil, err
}

// load reads the files again; use takes them into use.
func (p *pull) load() (use func(), err error) {
	if p == nil {
		return func() {}, nil
	}
	var uses []func()
	for _, c := range p.clients {
		u, loadErr := c.Load()
		err = errors.Join(err, loadErr)
		uses = append(uses, u)
	}
	return func() {
		for _, u := range uses {
			u()
		}
	}, err
}
