package outbox

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/promferry/promferry/internal/statedir"
)

// header is the first line of an entry's file; the body follows.
type header struct {
	// Version is 1. A reader that knows no other sets what is newer aside.
	Version     int               `json:"version"`
	Op          Op                `json:"op"`
	Gateway     string            `json:"gateway"`
	Job         string            `json:"job"`
	Labels      map[string]string `json:"labels,omitempty"`
	At          time.Time         `json:"at"`
	ContentType string            `json:"content_type,omitempty"`
	// SHA256 is the body's. A file that was whole once can still be damaged by its disk.
	SHA256 string `json:"sha256"`
}

func headerOf(e *Entry) header {
	sum := sha256.Sum256(e.Body)
	return header{
		Version: 1, Op: e.Op, Gateway: e.Gateway, Job: e.Job, Labels: e.Labels, At: e.At,
		ContentType: e.ContentType, SHA256: hex.EncodeToString(sum[:]),
	}
}

// maxFile is up to which size a file is read, in bytes. What we write is smaller by far.
const maxFile = 256 << 20

// read reads an entry. For one that is not as it was written the error is a
// *RejectedError; one that is gone is fs.ErrNotExist.
func (o *Outbox) read(dir *statedir.Dir, n name) (*Entry, error) {
	b, err := readAll(dir, n.String())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if errors.Is(err, statedir.ErrNotRegular) {
		return nil, &RejectedError{err}
	}
	if err != nil {
		return nil, fmt.Errorf("read what waits: %w", err)
	}
	line, body, ok := bytes.Cut(b, []byte{'\n'})
	var h header
	if err := json.Unmarshal(line, &h); !ok || err != nil || h.Version == 0 {
		return nil, damaged(dir, n, "no header")
	}
	if h.Version != 1 {
		return nil, &RejectedError{fmt.Errorf("%s: written in version %d of the format, which only a newer promferry reads", dir.Path(n.String()), h.Version)}
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != h.SHA256 {
		return nil, damaged(dir, n, "not what its checksum says")
	}
	e := &Entry{Op: h.Op, Gateway: h.Gateway, Job: h.Job, Labels: h.Labels, At: h.At, ContentType: h.ContentType, Body: body}
	if e.Op != n.op || e.Group() != n.group {
		return nil, damaged(dir, n, "not what its name says")
	}
	return e, nil
}

func damaged(dir *statedir.Dir, n name, how string) error {
	return &RejectedError{fmt.Errorf("%s: damaged: %s", dir.Path(n.String()), how)}
}

func readAll(dir *statedir.Dir, name string) ([]byte, error) {
	f, err := dir.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: above %d bytes", dir.Path(name), maxFile)
	}
	return b, err
}
