package page

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The limits of a request, far from what a person types.
const (
	maxQuery   = 4 << 10 // bytes, of all parameters as they stand in the URL
	maxSearch  = 200     // characters
	minRefresh = 5       // seconds
	maxRefresh = 3600    // seconds
)

// refreshOffered is after how many seconds the page comes again for who follows its link.
const refreshOffered = 15

// Parameters are those that a page has beside refresh.
type Parameters struct {
	// States are the values that state may have; nil: there is neither state nor search.
	States []string
	// Sorts are the values that sort may have; nil: there is no such parameter.
	Sorts []string
}

// Query is what a request asks for, and how it is written in a link.
type Query struct {
	Search, State, Sort string
	// Refresh is after how many seconds the browser asks again; zero means never.
	Refresh int
}

// parse reads the parameters of a page. Those that the page does not have are ignored.
func (p Parameters) parse(raw string) (Query, error) {
	if len(raw) > maxQuery {
		return Query{}, fmt.Errorf("the query is longer than %d bytes", maxQuery)
	}
	values, err := url.ParseQuery(raw)
	if err != nil {
		return Query{}, errors.New("the query is not written as a URL's")
	}
	q := Query{}
	if seconds := values.Get("refresh"); seconds != "" {
		if q.Refresh, err = strconv.Atoi(seconds); err != nil || q.Refresh < minRefresh || q.Refresh > maxRefresh {
			return Query{}, fmt.Errorf("refresh: want %d to %d seconds", minRefresh, maxRefresh)
		}
	}
	if p.States == nil {
		return q, nil
	}
	q.Search, q.State = strings.TrimSpace(values.Get("q")), values.Get("state")
	if p.Sorts != nil {
		q.Sort = values.Get("sort")
	}
	if !utf8.ValidString(q.Search) || utf8.RuneCountInString(q.Search) > maxSearch {
		return Query{}, fmt.Errorf("q: want UTF-8, at most %d characters", maxSearch)
	}
	if q.State != "" && !slices.Contains(p.States, q.State) {
		return Query{}, fmt.Errorf("state: want one of %s", strings.Join(p.States, ", "))
	}
	if q.Sort != "" && !slices.Contains(p.Sorts, q.Sort) {
		return Query{}, fmt.Errorf("sort: want one of %s", strings.Join(p.Sorts, ", "))
	}
	return q, nil
}

// Link returns the reference to the page that q asks for, from the same page.
func (q Query) Link() string {
	values := url.Values{}
	if q.Search != "" {
		values.Set("q", q.Search)
	}
	if q.State != "" {
		values.Set("state", q.State)
	}
	if q.Sort != "" {
		values.Set("sort", q.Sort)
	}
	if q.Refresh > 0 {
		values.Set("refresh", strconv.Itoa(q.Refresh))
	}
	return "?" + values.Encode()
}

// With returns the same query for another state.
func (q Query) With(state string) Query {
	q.State = state
	return q
}

// All returns the same query for everything.
func (q Query) All() Query { return Query{Sort: q.Sort, Refresh: q.Refresh} }

// Narrowed tells that not everything was asked for.
func (q Query) Narrowed() bool { return q.Search != "" || q.State != "" }

// refreshing returns the same query with the browser's asking again turned on, or off when
// it is on.
func (q Query) refreshing() Query {
	if q.Refresh > 0 {
		q.Refresh = 0
	} else {
		q.Refresh = refreshOffered
	}
	return q
}

// Search finds values by words, whatever their case. It is for one request.
type Search struct {
	Words [][]byte
	hay   []byte
}

// NewSearch returns a search for the words of q.
func NewSearch(q string) *Search {
	s := &Search{}
	for word := range strings.FieldsSeq(strings.ToLower(q)) {
		s.Words = append(s.Words, []byte(word))
	}
	return s
}

// Clear takes away the values in which was searched.
func (s *Search) Clear() { s.hay = s.hay[:0] }

// Put adds values in which to search. No word has a line feed in it, so none is found across
// two of them.
func (s *Search) Put(values ...string) {
	for _, value := range values {
		s.hay = append(s.hay, strings.ToLower(value)...)
		s.hay = append(s.hay, '\n')
	}
}

// Has tells whether a word stands in one of the values.
func (s *Search) Has(word []byte) bool { return bytes.Contains(s.hay, word) }

// HasAll tells whether each word stands in one of the values.
func (s *Search) HasAll() bool {
	return !slices.ContainsFunc(s.Words, func(word []byte) bool { return !s.Has(word) })
}
