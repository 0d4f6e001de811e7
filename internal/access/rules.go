package access

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"hash/maphash"
	"path"
	"slices"
	"time"

	"github.com/promferry/promferry/internal/labelmatch"
)

// rules are what a file says. They do not change.
type rules map[Face]*section

// section returns that of a face; nobody is let in through a face that there is not.
func (r rules) section(face Face) *section {
	if s := r[face]; s != nil {
		return s
	}
	return &section{}
}

// section is what the file says of one face. The zero section lets nobody in.
type section struct {
	// open lets everybody in.
	open bool
	// entries are in the order of the file.
	entries []*entry
	// tokens are by the hash of their digests. Its seed is this process's secret, so that
	// how long a look-up takes says nothing about a digest; what is found under a hash is
	// compared in constant time. To compare with each of 10,000 tokens would take each poll
	// some 100 µs.
	tokens map[uint64][]*token
}

// seed is that of all tables.
var seed = maphash.MakeSeed()

// entry is one of the file's.
type entry struct {
	identity string
	// names are globs of clients' names. A certificate needs none: it gives its own names.
	names []string
	// groups select the groups that pushers may push to. A certificate needs none, as above.
	groups []labelmatch.Matchers
	// san are globs of a certificate's names.
	san []string
	// username goes with its tokens in Basic; "" is any.
	username string
}

// token is one of an entry's.
type token struct {
	digest [sha256.Size]byte
	entry  *entry
}

func (s *section) closed() bool { return !s.open && len(s.entries) == 0 }

// size is how many entries there are, -1 when the face is open.
func (s *section) size() int {
	if s.open {
		return -1
	}
	return len(s.entries)
}

func (s *section) add(t *token) {
	if s.tokens == nil {
		s.tokens = make(map[uint64][]*token)
	}
	key := maphash.Bytes(seed, t.digest[:])
	s.tokens[key] = append(s.tokens[key], t)
}

// find returns the token with a digest, nil when there is none.
func (s *section) find(digest [sha256.Size]byte) *token {
	var found *token
	for _, t := range s.tokens[maphash.Bytes(seed, digest[:])] {
		if subtle.ConstantTimeCompare(t.digest[:], digest[:]) == 1 {
			found = t
		}
	}
	return found
}

func (s *section) byToken(digest [sha256.Size]byte, w wish) (*entry, Reason) {
	t := s.find(digest)
	switch {
	case t == nil:
		return nil, ReasonToken
	case !w.allowed(t.entry, nil):
		return t.entry, w.reason()
	}
	return t.entry, ""
}

// byCertificate returns the first entry that takes the certificate for this wish; or the
// first that takes it for others, with the reason.
func (s *section) byCertificate(certificate *x509.Certificate, w wish) (*entry, Reason) {
	if time.Now().After(certificate.NotAfter) {
		return nil, ReasonExpired
	}
	have := namesOf(certificate)
	var other *entry
	for _, e := range s.entries {
		var own []string
		for _, h := range have {
			if matchesAny(e.san, h) {
				own = append(own, h)
			}
		}
		switch {
		case own == nil:
		case w.allowed(e, own):
			return e, ""
		case other == nil:
			other = e
		}
	}
	if other != nil {
		return other, w.reason()
	}
	return nil, ReasonCertificate
}

func matchesAny(globs []string, s string) bool {
	return slices.ContainsFunc(globs, func(glob string) bool {
		ok, err := path.Match(glob, s)
		return ok && err == nil
	})
}

// namesOf returns the subject alternative names, or the common name when there are none.
func namesOf(certificate *x509.Certificate) []string {
	names := slices.Concat(certificate.DNSNames, certificate.EmailAddresses)
	for _, ip := range certificate.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range certificate.URIs {
		names = append(names, u.String())
	}
	if len(names) == 0 && certificate.Subject.CommonName != "" {
		names = append(names, certificate.Subject.CommonName)
	}
	return names
}
