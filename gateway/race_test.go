//go:build race

package gateway

// With the race detector a sync.Pool forgets some of what is put into it.
func init() { poolsForget = true }
