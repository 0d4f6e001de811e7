package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHostID(t *testing.T) {
	file := filepath.Join(t.TempDir(), "machine-id")
	defer func(before string) { machineIDFile = before }(machineIDFile)
	machineIDFile = file
	if got := hostID(); got != "" {
		t.Errorf("without a file: %q", got)
	}
	for content, want := range map[string]string{
		// What systemd-id128 prints with --app-specific, worked out from its manual page.
		"0123456789abcdef0123456789abcdef\n": "f410a9702e094e989cfca27c6c3d323c",
		" 0123456789abcdef0123456789abcdef ": "f410a9702e094e989cfca27c6c3d323c",
		"":                                   "",
		"uninitialized\n":                    "",
		"0123456789abcdef0123456789abcde\n":  "",
		"0123456789ABCDEF0123456789ABCDEF\n": "",
		strings.Repeat("0", 64):              "",
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := hostID(); got != want {
			t.Errorf("%q: %q, want %q", content, got, want)
		}
	}
}
