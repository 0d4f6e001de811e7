package safeurl_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/promferry/promferry/internal/safeurl"
)

func TestCut(t *testing.T) {
	short := strings.Repeat("x", safeurl.MaxShown)
	for s, want := range map[string]string{
		"":                                   "",
		short:                                short,
		short + "y":                          short + "...",
		short[1:] + "é" + "and what follows": short[1:] + "...", // No half of a character.
	} {
		if got := safeurl.Cut(s); got != want || !utf8.ValidString(got) {
			t.Errorf("%d bytes became %q", len(s), got)
		}
	}
}

func TestLineIsCut(t *testing.T) {
	got := safeurl.Line(strings.Repeat("x", 1<<20) + " Bearer secret")
	if len(got) != safeurl.MaxShown+len("...") {
		t.Errorf("a line of %d bytes", len(got))
	}
	got = safeurl.Line(strings.Repeat("x", safeurl.MaxShown-10) + " Bearer secret")
	if strings.Contains(got, "sec") {
		t.Errorf("the credential is shown: %s", got)
	}
}

func TestCutError(t *testing.T) {
	if err := safeurl.CutError(nil); err != nil {
		t.Errorf("nil became %v", err)
	}
	if err := safeurl.CutError(io.EOF); err != io.EOF { //nolint:errorlint // The same, not one that wraps it.
		t.Errorf("a short error became %v", err)
	}
	long := fmt.Errorf("%s: %w", strings.Repeat("x", 1<<20), io.EOF)
	if err := safeurl.CutError(long); !errors.Is(err, io.EOF) || len(err.Error()) != safeurl.MaxShown+len("...") {
		t.Errorf("a long error became one of %d bytes", len(err.Error()))
	}
}
