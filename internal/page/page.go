// Package page is what the web pages of the roles have in common: plain HTML from a snapshot,
// which works without scripts.
//
// Most of what stands on a page was sent by clients, and is taken for hostile: html/template
// escapes it, characters that cannot be seen are spelled out, and long values are cut. Should
// something slip through all the same, the Content-Security-Policy lets no script run and
// nothing be loaded.
package page

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"time"
)

var (
	//go:embed common.html
	common string
	//go:embed style.css
	style string
)

// MaxRows is how many rows a page shows at most: more would be slow to draw, and nobody
// reads them.
const MaxRows = 500

// Pages are the pages of a role.
type Pages struct {
	templates *template.Template
	policy    string
}

// New returns pages of the templates *.html in files, which may use those of common.html, and
// of the style sheet style.css there, which is added to the one of all pages. It panics when
// they are wrong: they are part of the program.
func New(files fs.FS) *Pages {
	own, err := fs.ReadFile(files, "style.css")
	if err != nil {
		panic(err)
	}
	sheet := style + string(own)
	templates := template.New("").Funcs(template.FuncMap{
		"style": func() template.CSS { return template.CSS(sheet) }, //nolint:gosec // It is ours.
	})
	template.Must(templates.Parse(common))
	template.Must(templates.ParseFS(files, "*.html"))
	// The one style sheet that stands in the page is allowed, by its hash, and the empty icon
	// that keeps browsers from asking for /favicon.ico.
	sum := sha256.Sum256([]byte(sheet))
	return &Pages{templates, "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"}
}

// Handler answers GET and HEAD of any path with a page: its template, and the data for it.
func (p *Pages) Handler(name string, parameters Parameters, data func(Query) any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", p.policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
			return
		}
		q, err := parameters.parse(r.URL.RawQuery)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var b bytes.Buffer
		if err := p.templates.ExecuteTemplate(&b, name, data(q)); err != nil {
			panic(err) // Templates of ours into memory.
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Length", strconv.Itoa(b.Len()))
		if r.Method == http.MethodGet {
			_, _ = io.Copy(w, &b) // Fails when the browser is gone.
		}
	})
}

// Head is what all pages begin with.
type Head struct {
	Title, Program string
	// Name is the program's own, "" when it has none.
	Name         Text
	Version      Text
	Now          Moment
	Query        Query
	RefreshLink  string
	RefreshEvery int
	Links        []Link
}

// Link leads to another page of the program.
type Link struct{ Address, Text string }

// NewHead returns the head of a page of a program, with links beside those that all have.
func NewHead(program, version string, now time.Time, q Query, links ...Link) Head {
	return Head{
		Title: program, Program: program,
		Version:     Short(version),
		Now:         MomentOf(now, now),
		Query:       q,
		RefreshLink: q.refreshing().Link(), RefreshEvery: refreshOffered,
		Links: append(links, Link{"metrics", "Metrics"}, Link{"-/healthy", "Health"}, Link{"-/ready", "Readiness"}),
	}
}
