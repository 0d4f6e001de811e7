// Package pagetest reads web pages for tests.
package pagetest

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// Node is an element of a page. The templates write HTML that is XML as well, so that the
// tests need no parser of their own: a tag or quote too many is an error.
type Node struct {
	Name     string
	Attrs    map[string]string
	Children []*Node
	Text     string // when it is no element
}

// Parse reads a page.
func Parse(t *testing.T, page string) *Node {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(page))
	d.Entity = xml.HTMLEntity
	root := &Node{}
	open := []*Node{root}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return root
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, page)
		}
		top := open[len(open)-1]
		switch token := token.(type) {
		case xml.StartElement:
			n := &Node{Name: token.Name.Local, Attrs: map[string]string{}}
			for _, a := range token.Attr {
				n.Attrs[a.Name.Local] = a.Value
			}
			top.Children = append(top.Children, n)
			open = append(open, n)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			top.Children = append(top.Children, &Node{Text: string(token)})
		case xml.Comment:
			t.Errorf("a comment: %s", token)
		}
	}
}

// All returns the elements below n for which good is true, in order.
func (n *Node) All(good func(*Node) bool) []*Node {
	var found []*Node
	for _, c := range n.Children {
		if c.Name != "" && good(c) {
			found = append(found, c)
		}
		found = append(found, c.All(good)...)
	}
	return found
}

// Named is true of elements of a name, for All.
func Named(name string) func(*Node) bool { return func(n *Node) bool { return n.Name == name } }

// Class is true of elements of a class, for All.
func Class(name string) func(*Node) bool {
	return func(n *Node) bool { return slices.Contains(strings.Fields(n.Attrs["class"]), name) }
}

// Says returns the text of n, with single spaces.
func (n *Node) Says() string {
	var b strings.Builder
	var walk func(*Node)
	walk = func(n *Node) {
		b.WriteString(n.Text)
		for _, c := range n.Children {
			walk(c)
		}
		if slices.Contains([]string{"td", "th", "span", "strong", "em", "p"}, n.Name) {
			b.WriteString(" ")
		}
	}
	walk(n)
	return strings.Join(strings.Fields(b.String()), " ")
}

// Saying returns the text of each of the nodes.
func Saying(nodes []*Node) []string {
	var texts []string
	for _, n := range nodes {
		texts = append(texts, n.Says())
	}
	return texts
}

// Get asks a handler for a page.
func Get(t *testing.T, h http.Handler, target string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, target, nil))
	return w
}

// Show asks a handler for a page that must be there, and reads it.
func Show(t *testing.T, h http.Handler, target string) *Node {
	t.Helper()
	w := Get(t, h, target)
	if w.Code != http.StatusOK {
		t.Fatalf("%s: %d %s", target, w.Code, w.Body)
	}
	return Parse(t, w.Body.String())
}

// Skeleton returns the elements below n and their attributes, without what is a client's: the
// text, and the values of those attributes that hold it.
func (n *Node) Skeleton() string {
	var b strings.Builder
	for _, n := range n.All(func(*Node) bool { return true }) {
		var attrs []string
		for name, value := range n.Attrs {
			switch {
			case name == "title":
				continue // where a value is cut
			case name == "value" || name == "href" || n.Name == "time":
				value = "" // holds the client's
			}
			attrs = append(attrs, name+"="+value)
		}
		slices.Sort(attrs)
		fmt.Fprintln(&b, n.Name, attrs)
	}
	return b.String()
}

// Hostile are values that must be text on a page, and nothing else.
var Hostile = []string{
	`<script>alert(1)</script>`,
	`"><img src=x onerror=alert(1)>`,
	`' onmouseover='alert(1)' x='`,
	"` onload=alert(1)",
	`</td></table></style></title></textarea><svg onload=alert(1)>`,
	`<!-- -->`,
	`]]>`,
	`&lt;script&gt;&#x3c;`,
	`javascript:alert(1)`,
	`{{.}}{{template "head"}}`,
	`?q=&state=away#x`,
	"\u00e4\u4e16",
}

// Guarded checks that the answers of a handler have the headers that keep a browser from
// running and loading anything, and returns its page.
func Guarded(t *testing.T, h http.Handler) *Node {
	t.Helper()
	for _, target := range []string{"/", "/?refresh=never"} {
		header := Get(t, h, target).Header()
		for key, want := range map[string]string{
			"X-Content-Type-Options": "nosniff",
			"Referrer-Policy":        "no-referrer",
			"Cache-Control":          "no-store",
		} {
			if got := header.Get(key); got != want {
				t.Errorf("%s: %s %q, want %q", target, key, got, want)
			}
		}
		for _, part := range []string{"default-src 'none'", "style-src 'sha256-", "form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
			if csp := header.Get("Content-Security-Policy"); !strings.Contains(csp, part) || strings.Contains(csp, "unsafe") || strings.Contains(csp, "script-src") {
				t.Errorf("%s: policy %q, want %s in it", target, csp, part)
			}
		}
	}
	if got := Get(t, h, "/").Header().Get("Content-Type"); got != "text/html; charset=utf-8" {
		t.Errorf("type %q", got)
	}
	page := Show(t, h, "/")
	var style strings.Builder
	for _, text := range page.All(Named("style"))[0].Children {
		style.WriteString(text.Text)
	}
	sum := sha256.Sum256([]byte(style.String()))
	if hash, csp := base64.StdEncoding.EncodeToString(sum[:]), Get(t, h, "/").Header().Get("Content-Security-Policy"); !strings.Contains(csp, "'sha256-"+hash+"'") {
		t.Errorf("policy %q, want the hash %s of the style sheet in it", csp, hash)
	}
	// Not a single attribute is left for the policy to refuse.
	if n := page.All(func(n *Node) bool { return n.Attrs["style"] != "" || n.Name == "script" }); len(n) > 0 {
		t.Errorf("inline: %v", n)
	}
	return page
}
