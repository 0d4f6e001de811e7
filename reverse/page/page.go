// Package page writes the web pages of the proxy and of the agent: plain HTML from a
// snapshot, which works without scripts.
//
// Most of what stands on the proxy's page was sent by clients, and is taken for hostile:
// html/template escapes it, characters that cannot be seen are spelled out, and long values
// are cut. Should something slip through all the same, the Content-Security-Policy lets no
// script run and nothing be loaded.
package page

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

var (
	//go:embed style.css
	style string
	//go:embed *.html
	files     embed.FS
	templates = template.Must(template.ParseFS(files, "*.html"))
)

// policy allows the one style sheet that stands in the page, by its hash, and the empty icon
// that keeps browsers from asking for /favicon.ico.
var policy = func() string {
	sum := sha256.Sum256([]byte(style))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
}()

// The limits of a request, far from what a person types.
const (
	maxQuery   = 4 << 10 // bytes, of all parameters as they stand in the URL
	maxSearch  = 200     // characters
	minRefresh = 5       // seconds
	maxRefresh = 3600    // seconds
)

// refreshOffered is after how many seconds the page comes again for who follows its link.
const refreshOffered = 15

// query is what a request asks for, and how it is written in a link.
type query struct {
	Search, State string
	// Refresh is after how many seconds the browser asks again; zero means never.
	Refresh int
}

// parseQuery reads the parameters of a page; states are the values that state may have, nil
// on a page without search. Parameters that a page does not have are ignored.
func parseQuery(raw string, states []string) (query, error) {
	if len(raw) > maxQuery {
		return query{}, fmt.Errorf("the query is longer than %d bytes", maxQuery)
	}
	values, err := url.ParseQuery(raw)
	if err != nil {
		return query{}, errors.New("the query is not written as a URL's")
	}
	q := query{}
	if seconds := values.Get("refresh"); seconds != "" {
		if q.Refresh, err = strconv.Atoi(seconds); err != nil || q.Refresh < minRefresh || q.Refresh > maxRefresh {
			return query{}, fmt.Errorf("refresh: want %d to %d seconds", minRefresh, maxRefresh)
		}
	}
	if states == nil {
		return q, nil
	}
	q.Search, q.State = strings.TrimSpace(values.Get("q")), values.Get("state")
	if !utf8.ValidString(q.Search) || utf8.RuneCountInString(q.Search) > maxSearch {
		return query{}, fmt.Errorf("q: want UTF-8, at most %d characters", maxSearch)
	}
	if q.State != "" && !slices.Contains(states, q.State) {
		return query{}, fmt.Errorf("state: want one of %s", strings.Join(states, ", "))
	}
	return q, nil
}

// Link returns the reference to the page that q asks for, from the same page.
func (q query) Link() string {
	values := url.Values{}
	if q.Search != "" {
		values.Set("q", q.Search)
	}
	if q.State != "" {
		values.Set("state", q.State)
	}
	if q.Refresh > 0 {
		values.Set("refresh", strconv.Itoa(q.Refresh))
	}
	return "?" + values.Encode()
}

// with returns the same query for another state.
func (q query) with(state string) query {
	q.State = state
	return q
}

// refreshing returns the same query with the browser's asking again turned on, or off when
// it is on.
func (q query) refreshing() query {
	if q.Refresh > 0 {
		q.Refresh = 0
	} else {
		q.Refresh = refreshOffered
	}
	return q
}

// head is what both pages begin with.
type head struct {
	Title, Program string
	// Name is the program's own, "" when it has none.
	Name         text
	Version      text
	Style        template.CSS
	Now          moment
	Query        query
	RefreshLink  string
	RefreshEvery int
	Links        []link
}

type link struct{ Address, Text string }

func newHead(program, version string, now time.Time, q query, links ...link) head {
	return head{
		Title: program, Program: program,
		Version:     short(version),
		Style:       template.CSS(style), //nolint:gosec // It is ours.
		Now:         momentOf(now, now),
		Query:       q,
		RefreshLink: q.refreshing().Link(), RefreshEvery: refreshOffered,
		Links: append(links, link{"metrics", "Metrics"}, link{"-/healthy", "Health"}, link{"-/ready", "Readiness"}),
	}
}

// handler answers with a page: its template, and the data for it.
func handler(name string, states []string, data func(query) any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
			return
		}
		q, err := parseQuery(r.URL.RawQuery, states)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var b bytes.Buffer
		if err := templates.ExecuteTemplate(&b, name, data(q)); err != nil {
			panic(err) // Templates of ours into memory.
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Length", strconv.Itoa(b.Len()))
		if r.Method == http.MethodGet {
			_, _ = io.Copy(w, &b) // Fails when the browser is gone.
		}
	})
}
