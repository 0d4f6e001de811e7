package access

import (
	"maps"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// What may fail from one address before it is told to slow down. A node that restarts
// with a wrong token stays below, a program that tries tokens does not.
const (
	failuresAtOnce    = 10
	failuresPerSecond = 1
	// maxAddresses bounds the table, which takes some 200 bytes for each address. Those
	// that find no room share one limit.
	maxAddresses = 4096
)

// limiter limits failures from each address. The zero limiter is ready.
type limiter struct {
	mu        sync.Mutex
	addresses map[netip.Addr]*rate.Limiter
	swept     time.Time
}

// allow takes one failure down, and tells whether it is within the limit.
func (l *limiter) allow(from netip.Addr, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.addresses == nil {
		l.addresses = make(map[netip.Addr]*rate.Limiter)
	}
	// The sweep goes through the whole table: once a second is enough, since none is free
	// again in less.
	if len(l.addresses) >= maxAddresses && now.Sub(l.swept) >= time.Second {
		l.swept = now
		maps.DeleteFunc(l.addresses, func(_ netip.Addr, r *rate.Limiter) bool {
			return r.TokensAt(now) >= failuresAtOnce
		})
	}
	r := l.addresses[from]
	if r == nil {
		if len(l.addresses) >= maxAddresses {
			from = netip.Addr{}
			r = l.addresses[from]
		}
		if r == nil {
			r = rate.NewLimiter(failuresPerSecond, failuresAtOnce)
			l.addresses[from] = r
		}
	}
	return r.AllowN(now, 1)
}

// remote returns the address that an http.Request came from. Of IPv6 it is the network of 64
// bits, all of which one host may have. What is no IP address is the zero address.
func remote(s string) netip.Addr {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.Addr{}
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip
	}
	return netip.PrefixFrom(ip, 64).Masked().Addr()
}
