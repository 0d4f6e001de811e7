package access

import (
	"crypto/sha256"
	"hash/maphash"
	"testing"
)

// Tokens whose digests have one hash are told apart by the digests.
func TestS25DigestsAreCompared(t *testing.T) {
	one, two := &token{digest: sha256.Sum256([]byte("one"))}, &token{digest: sha256.Sum256([]byte("two"))}
	key := maphash.Bytes(seed, two.digest[:])
	s := &section{tokens: map[uint64][]*token{key: {one, two, one}}}
	if got := s.find(two.digest); got != two {
		t.Errorf("found %v, want the second", got)
	}
	s.tokens[key] = []*token{one}
	if got := s.find(two.digest); got != nil {
		t.Errorf("found %v, which only has the same hash", got)
	}
}
