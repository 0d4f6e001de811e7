package httpclient

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"html"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/common/config"
	"golang.org/x/net/http/httpproxy"

	"github.com/promferry/promferry/internal/safeurl"
)

const (
	// minSecret is how long a credential must be to be looked for in what is shown, in bytes.
	// A shorter one stands in any text by chance.
	minSecret = 4
	// minBegin is how much of the begin of a longer one is enough.
	minBegin = 8
	// maxLooked is how much of a server's text is looked at, in bytes.
	maxLooked = 64 << 10
	// hidden stands where a credential stood.
	hidden = "..."
)

// Shown returns the beginning of text, which is of resp, as one line that may be shown: the
// credentials that the request was sent with are hidden, those of its http_config file and
// those in its URL, as they are, in the Basic form, percent-encoded, or escaped as in HTML, JSON
// and Go. Of less than 4 bytes they are not. Resp is of a Client, or of one without credentials.
func Shown(resp *http.Response, text string) string {
	if resp.Request == nil {
		return shown(text, nil)
	}
	l, _ := resp.Request.Context().Value(loadedKey{}).(*loaded)
	return shown(text, l.secrets(resp.Request))
}

// Shown returns the beginning of text, which is of an answer from u, as Shown does for a
// response.
func (c *Client) Shown(u *url.URL, text string) string {
	return shown(text, c.current.Load().secrets(&http.Request{URL: u}))
}

// Hide returns text, which may quote an answer of long ago, without the credentials that the
// http_config file has now.
func (c *Client) Hide(text string) string {
	return hide(text, c.current.Load().secrets(&http.Request{URL: &url.URL{}}))
}

func shown(text string, secrets []string) string {
	return safeurl.Line(hide(text[:min(len(text), maxLooked)], secrets))
}

// shownError is an error with a text that may be shown.
type shownError struct {
	text string
	err  error
}

func (e *shownError) Error() string { return e.text }

func (e *shownError) Unwrap() error { return e.err }

// showable returns err, of a request, with a text that may be shown: net/http quotes what the
// server sent, and an OAuth 2 token's error has the whole answer.
func (l *loaded) showable(req *http.Request, err error) error {
	text := shown(err.Error(), l.secrets(req))
	if text == err.Error() {
		return err
	}
	return &shownError{text, err}
}

// secrets returns the values that nobody must see of those that req was sent with. They are
// read when they are wanted: requests read their files anew as well.
func (l *loaded) secrets(req *http.Request) []string {
	values := sentSecrets(req)
	if l == nil {
		return values
	}
	file := func(inline config.Secret, name string) string {
		if inline != "" || name == "" {
			return string(inline)
		}
		content, _ := os.ReadFile(name) // Without it, nothing was sent.
		return strings.TrimSpace(string(content))
	}
	proxy := func(p *config.ProxyConfig) {
		values = append(values, userInfo(p.ProxyURL.URL)...)
		if p.ProxyFromEnvironment {
			environment := httpproxy.FromEnvironment()
			for _, text := range []string{environment.HTTPProxy, environment.HTTPSProxy} {
				if !strings.Contains(text, "://") {
					text = "http://" + text
				}
				u, _ := url.Parse(text) // nil: it is not used either.
				values = append(values, userInfo(u)...)
			}
		}
		for _, secrets := range p.ProxyConnectHeader {
			for _, secret := range secrets {
				values = append(values, string(secret))
			}
		}
	}
	proxy(&l.cfg.ProxyConfig)
	if b := l.cfg.BasicAuth; b != nil {
		values = append(values, basic(file(config.Secret(b.Username), b.UsernameFile), file(b.Password, b.PasswordFile))...)
	}
	if a := l.cfg.Authorization; a != nil {
		values = append(values, file(a.Credentials, a.CredentialsFile))
	}
	if o := l.cfg.OAuth2; o != nil {
		values = append(values, file(o.ClientSecret, o.ClientSecretFile))
		values = append(values, l.tokens.secrets()...)
		proxy(&o.ProxyConfig)
	}
	if h := l.cfg.HTTPHeaders; h != nil {
		for _, header := range h.Headers {
			for _, secret := range header.Secrets {
				values = append(values, string(secret))
			}
			for _, name := range header.Files {
				values = append(values, file("", name))
			}
		}
	}
	return values
}

// sentSecrets returns the secrets in a request itself.
func sentSecrets(req *http.Request) []string {
	values := userInfo(req.URL)
	if _, credentials, ok := strings.Cut(req.Header.Get("Authorization"), " "); ok {
		values = append(values, credentials)
	}
	if user, password, ok := req.BasicAuth(); ok {
		values = append(values, basic(user, password)...)
		// OAuth 2 encodes them before.
		if decoded, err := url.QueryUnescape(password); err == nil {
			values = append(values, decoded)
		}
	}
	return values
}

func userInfo(u *url.URL) []string {
	if u == nil || u.User == nil {
		return nil
	}
	password, _ := u.User.Password()
	return basic(u.User.Username(), password)
}

// basic returns what is secret of a user's name and password. A name without a password is
// a token.
func basic(user, password string) []string {
	both := []byte(user + ":" + password)
	return []string{cmp.Or(password, user), base64.RawStdEncoding.EncodeToString(both), base64.RawURLEncoding.EncodeToString(both)}
}

// hide returns text without secrets. Spaces in between do not keep them from being found. The
// begin of one is enough: a server, or net/http, may have cut it, as may an end of the text.
func hide(text string, secrets []string) string {
	at := make([]bool, len(text)) // what is hidden
	forms := forms(secrets)
	// What stands before a secret may look like the begin of an escape.
	for _, t := range []decoded{decode(text, asItIs), decode(text, unescape)} {
		for _, secret := range forms {
			t.find(secret, func(from, to int) {
				for i := from; i < to; i++ {
					at[i] = true
				}
			})
		}
	}
	var out strings.Builder
	for i := range len(text) {
		switch {
		case !at[i]:
			out.WriteByte(text[i])
		case i == 0 || !at[i-1]:
			out.WriteString(hidden)
		}
	}
	return out.String()
}

// forms returns how secrets look in a text that is decoded: as they are, and decoded, should
// one look as if it were encoded. Each word of one counts, as net/http quotes some words only.
func forms(secrets []string) [][]byte {
	var forms [][]byte
	for _, secret := range secrets {
		for _, s := range append(strings.Fields(secret), secret, strings.ReplaceAll(secret, " ", "+")) {
			for _, form := range [][]byte{decode(s, asItIs).bytes, decode(s, unescape).bytes} {
				if len(form) >= minSecret && !slices.ContainsFunc(forms, func(other []byte) bool { return bytes.Equal(form, other) }) {
					forms = append(forms, form)
				}
			}
		}
	}
	return forms
}

// decoded is a text without spaces, of which what is escaped may have been decoded.
type decoded struct {
	bytes []byte
	// from and to tell where each byte stood in the text.
	from, to []int
}

// decode returns a text as one, which returns what its first n bytes stand for, decodes it.
// A secret is looked for as if spaces, and what cannot be seen, were not there.
func decode(text string, one func(text string) (s string, n int)) decoded {
	var d decoded
	for i := 0; i < len(text); {
		s, n := one(text[i:])
		if r, _ := utf8.DecodeRuneInString(s); !unicode.IsSpace(r) && (unicode.IsPrint(r) || r == utf8.RuneError) {
			for j := range len(s) {
				d.bytes, d.from, d.to = append(d.bytes, s[j]), append(d.from, i), append(d.to, i+n)
			}
		}
		i += n
	}
	return d
}

// find calls found with where secret, or the begin of it, stands in the text.
func (d decoded) find(secret []byte, found func(from, to int)) {
	begin := secret[:min(len(secret), minBegin)]
	for i := 0; ; i++ {
		next := bytes.Index(d.bytes[i:], begin)
		if next < 0 {
			break
		}
		i += next
		n := len(begin)
		for n < len(secret) && i+n < len(d.bytes) && d.bytes[i+n] == secret[n] {
			n++
		}
		found(d.from[i], d.to[i+n-1])
	}
	for n := min(len(begin)-1, len(d.bytes)); n >= minSecret; n-- {
		if bytes.HasSuffix(d.bytes, begin[:n]) {
			found(d.from[len(d.bytes)-n], d.to[len(d.bytes)-1])
			break
		}
	}
}

// asItIs decodes nothing.
func asItIs(text string) (s string, n int) {
	_, n = utf8.DecodeRuneInString(text)
	return text[:n], n
}

// unescape decodes what is percent-encoded, or escaped as in HTML, JSON or Go.
func unescape(text string) (s string, n int) {
	switch text[0] {
	case '%':
		if len(text) >= 3 {
			if b, err := strconv.ParseUint(text[1:3], 16, 8); err == nil {
				return string([]byte{byte(b)}), 3
			}
		}
	case '&':
		if end := strings.IndexByte(text[:min(len(text), 12)], ';'); end > 0 {
			if s := html.UnescapeString(text[:end+1]); s != text[:end+1] {
				return s, end + 1
			}
		}
	case '\\':
		if len(text) > 1 && (text[1] == '/' || text[1] == '\'') {
			return text[1:2], 2
		}
		if r, wide, tail, err := strconv.UnquoteChar(text, '"'); err == nil {
			if !wide {
				return string([]byte{byte(r & 0xff)}), len(text) - len(tail)
			}
			return string(r), len(text) - len(tail)
		}
	}
	return asItIs(text)
}
