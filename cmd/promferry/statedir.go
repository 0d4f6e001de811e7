package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/promferry/promferry/internal/statedir"
)

// openState opens the state directory of a daemon.
func openState(s *setting[string]) (*statedir.Dir, error) {
	dir, err := statedir.Open(s.value)
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		err = fmt.Errorf("%w; another user than root needs another directory", err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name(), err)
	}
	return dir, nil
}
