package statedir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
)

// Version is that of the state directories that this promferry reads and writes.
const Version = 1

// versionFile holds the version. Without it the version is 1, as of directories that were
// written before there was such a file.
const versionFile = "version"

// VersionError is the error for a state directory that a newer version of promferry wrote.
type VersionError struct {
	// Path is the directory.
	Path string
	// Version is the directory's version.
	Version int
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("the state directory %s has version %d, and this promferry reads up to version %d: install the newer promferry that wrote it, or name another directory", e.Path, e.Version, Version)
}

// CheckVersion returns a *VersionError when a newer version of promferry wrote the state
// directory.
func (d *Dir) CheckVersion() error {
	f, err := d.OpenFile(versionFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, 100))
	if err != nil {
		return err
	}
	text := strings.TrimSpace(string(b))
	if text == "" { // Whoever made it was killed before it wrote.
		return nil
	}
	version, err := strconv.Atoi(text)
	if err != nil || version < 1 {
		return fmt.Errorf("%s: %q is not a version: write the number %d into it if this promferry wrote the directory", d.Path(versionFile), text, Version)
	}
	if version > Version {
		return &VersionError{Path: d.path, Version: version}
	}
	return nil
}

// writeVersion makes the version file where there is none. That it cannot be made, as on a
// full disk, is not an error: without it the version is the same.
func (d *Dir) writeVersion() {
	if d.Has(versionFile) {
		return
	}
	f, err := d.create(versionFile)
	if err != nil {
		return
	}
	_ = f.Chmod(0o644) // Other users may work in the directory, too.
	_, _ = fmt.Fprintln(f, Version)
	_ = f.Close()
}
