package access_test

import (
	"encoding/base64"
	"net/http/httptest"
	"strings"
	"testing"
)

func basic(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }

func TestHeader(t *testing.T) {
	for _, tc := range []struct {
		header  []string
		outcome string
	}{
		{[]string{"Bearer list-token"}, "identity sd"},
		{[]string{"bearer list-token"}, "identity sd"},
		{[]string{"BEARER   list-token "}, "identity sd"},
		{[]string{basic("sd:list-token")}, "identity sd"},
		{[]string{strings.ToUpper("basic") + basic("sd:list-token")[5:]}, "identity sd"},
		{[]string{basic(":list-token")}, "identity sd"},
		{[]string{basic("sd:list-token ")}, "401 unknown_token"},
		{[]string{basic("sd:more:list-token")}, "401 unknown_token"},
		{[]string{"Bearer list-token,"}, "401 unknown_token"},
		{[]string{"Bearer\tlist-token"}, "401 malformed"},
		{[]string{"Bearer"}, "401 malformed"},
		{[]string{"Bearer "}, "401 malformed"},
		{[]string{""}, "401 malformed"},
		{[]string{" "}, "401 malformed"},
		{[]string{"list-token"}, "401 malformed"},
		{[]string{"Digest list-token"}, "401 malformed"},
		{[]string{basic("list-token")}, "401 malformed"},
		{[]string{basic("list-token:")}, "401 malformed"},
		{[]string{"Basic sd:list-token"}, "401 malformed"},
		{[]string{"Basic " + strings.TrimRight(base64.StdEncoding.EncodeToString([]byte("d:list-token")), "=") + "A"}, "401 malformed"},
		{[]string{"Bearer list-token", "Bearer list-token"}, "401 malformed"},
		{[]string{"Bearer list-token", "Basic x"}, "401 malformed"},
		{[]string{"Bearer list-token" + strings.Repeat(" ", 8<<10)}, "401 malformed"},
		{[]string{}, "401 missing"},
	} {
		g := newGuard(t, example)
		grant, err := g.lister(caller{raw: tc.header})
		want(t, strings.Join(tc.header, " and "), tc.outcome, grant, err)
	}
}

// Whatever the header holds, it lets in with the token in the right place, and with
// nothing else. What net/http reads as Basic, we read the same way.
func FuzzHeader(f *testing.F) {
	for _, s := range []string{
		"Bearer list-token", "bearer  list-token ", "Basic Og==", basic("a:list-token"), basic("list-token:list-token"),
		basic("list-token"), "Basic =", "Basic YQ==\r\n", "list-token", "Bearer\x00list-token", "Bearer Bearer list-token",
	} {
		f.Add(s)
	}
	g := newGuard(f, example)
	f.Fuzz(func(t *testing.T, header string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["Authorization"] = []string{header}
		_, err := g.Lister(r)
		_, password, isBasic := r.BasicAuth()
		scheme, token, _ := strings.Cut(header, " ")
		right := isBasic && password == "list-token" ||
			strings.EqualFold(scheme, "bearer") && strings.Trim(token, " ") == "list-token"
		if right && len(header) <= 8<<10 && err != nil {
			t.Errorf("refused: %v", err)
		}
		// Spaces around base64 are let pass, which net/http does not.
		if b, e := base64.StdEncoding.DecodeString(strings.Trim(token, " ")); e == nil && strings.EqualFold(scheme, "basic") {
			_, password, _ = strings.Cut(string(b), ":")
			right = right || password == "list-token"
		}
		if !right && err == nil {
			t.Errorf("let in with %q", header)
		}
		for _, name := range []string{"web-1.example.org", "db-1.example.org", ""} {
			if _, err := g.Client(r, name); err == nil && !strings.Contains(header, "web-") && !isBasic {
				t.Errorf("client %q let in with %q", name, header)
			}
		}
	})
}
