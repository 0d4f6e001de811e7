package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	propertyRow = regexp.MustCompile(`^\| ([SRWG][0-9]+) `)
	namedTest   = regexp.MustCompile("`(?:([a-z0-9/]+): )?((?:Test|Fuzz)[A-Za-z0-9]+|[a-z0-9]+\\.txtar|make lint)`")
)

// TestSecurityPage checks that each property in docs/security.md names tests, and that there
// are such tests.
func TestSecurityPage(t *testing.T) {
	root := filepath.Join("..", "..")
	page, err := os.ReadFile(filepath.Join(root, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	without := map[string]bool{"S30": true, "S37": true} // Nothing here can show them.
	tests := make(map[string]string)
	rows := 0
	for line := range strings.Lines(string(page)) {
		row := propertyRow.FindStringSubmatch(line)
		if row == nil {
			continue
		}
		rows++
		cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(line), "|"), " | ")
		named := namedTest.FindAllStringSubmatch(cells[len(cells)-1], -1)
		if len(named) == 0 && !without[row[1]] {
			t.Errorf("%s names no test", row[1])
		}
		for _, name := range named {
			dir := name[1]
			switch {
			case name[2] == "make lint":
			case strings.HasSuffix(name[2], ".txtar"):
				if _, err := os.Stat(filepath.Join("testdata", name[2])); err != nil {
					t.Errorf("%s: %v", row[1], err)
				}
			default:
				if dir == "" {
					dir = "reverse"
				}
				if _, ok := tests[dir]; !ok {
					tests[dir] = readTests(t, filepath.Join(root, dir))
				}
				if !strings.Contains(tests[dir], "func "+name[2]+"(") {
					t.Errorf("%s: %s has no %s", row[1], dir, name[2])
				}
			}
		}
	}
	if rows < 55 {
		t.Errorf("%d rows", rows)
	}
}

func readTests(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	return all.String()
}
