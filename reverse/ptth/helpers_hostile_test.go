package ptth_test

import (
	"net/url"
	"testing"
)

func mustURL(tb testing.TB) *url.URL {
	tb.Helper()
	u, err := url.Parse("http://proxy.example:1")
	if err != nil {
		tb.Fatal(err)
	}
	return u
}
