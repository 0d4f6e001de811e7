package access

import (
	"crypto/sha256"
	"fmt"
	"os"
	"time"
)

// lookEvery is how often Run looks at the file. A change is in use within two looks: soon
// for somebody who takes a leaked token away, and nothing to read that often.
const lookEvery = 3 * time.Second

// contentID tells one content of the file, or one fault of reading it, from another.
type contentID [sha256.Size]byte

func fingerprint(content []byte, err error) contentID {
	if err != nil {
		content = []byte("error: " + err.Error())
	}
	return sha256.Sum256(content)
}

func (g *Guard) last() contentID {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tried
}

func (g *Guard) read() ([]byte, error) { return os.ReadFile(g.path) }

func (g *Guard) parse(content []byte) (rules, error) {
	next, err := parseFile(g.role, content)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", g.path, err)
	}
	return next, nil
}

// Reload reads the file now. With a bad one all stays as it was, which the log and the
// metrics say as well as the error.
func (g *Guard) Reload() error {
	if g.path == "" {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	content, err := g.read()
	g.tried = fingerprint(content, err)
	var next rules
	if err == nil {
		next, err = g.parse(content)
	}
	if err != nil {
		g.metrics.reloaded.Set(0)
		g.logger.Error("Auth file not used, all stays as it was", "err", err)
		return err
	}
	g.metrics.reloaded.Set(1)
	if g.tried == g.used {
		return nil
	}
	g.used = g.tried
	g.use(next)
	sizes := []any{"file", g.path}
	for _, face := range g.role.faces {
		sizes = append(sizes, sectionOf(face), next.section(face).size())
	}
	g.logger.Info("Auth file in use", sizes...)
	if g.onChange != nil {
		g.onChange()
	}
	return nil
}
