package httpclient_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/promferry/promferry/internal/httpclient"
)

// secret has all that may be written in another way: spaces, a quote, signs of URLs, HTML and Go.
const secret = `canary a+b/c%41&d"\e=ü`

// encodings are the ways in which a server may show what it was sent.
var encodings = map[string]func(string) string{
	"as it is":        func(s string) string { return s },
	"query":           url.QueryEscape,
	"path":            url.PathEscape,
	"lower case":      func(s string) string { return hex.ReplaceAllStringFunc(url.QueryEscape(s), strings.ToLower) },
	"all of it":       func(s string) string { return "%" + strings.ReplaceAll(fmt.Sprintf("% X", s), " ", "%") },
	"HTML":            html.EscapeString,
	"JSON":            func(s string) string { b, _ := json.Marshal(s); return string(b) },
	"Go":              func(s string) string { return fmt.Sprintf("%q", s) },
	"ASCII":           func(s string) string { return fmt.Sprintf("%+q", s) },
	"split":           func(s string) string { return s[:len(s)/2] + "\r\n " + s[len(s)/2:] },
	"one space":       func(s string) string { return strings.Join(strings.Fields(s), "\u00a0") },
	"invisible":       func(s string) string { return s[:5] + "\u200b\x00" + s[5:] },
	"with neighbours": func(s string) string { return "x" + s + s + "x" },
}

var hex = regexp.MustCompile(`%..`)

// sends are the ways in which a client sends a secret, and what a server sees of it. QUOTED is the
// secret in YAML.
var sends = map[string]struct {
	config string
	seen   func(r *http.Request) string
}{
	"basic_auth": {"basic_auth: {username: me, password: QUOTED}", func(r *http.Request) string {
		_, password, _ := r.BasicAuth()
		return password
	}},
	"the Basic form": {"basic_auth: {username: me, password: QUOTED}", func(r *http.Request) string {
		return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
	}},
	"the Basic form of a short password": {"basic_auth: {username: me, password: abc}", func(r *http.Request) string {
		return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
	}},
	"the Basic form, for URLs": {"basic_auth: {username: me, password: QUOTED}", func(*http.Request) string {
		return base64.URLEncoding.EncodeToString([]byte("me:" + secret))
	}},
	"password_file": {"basic_auth: {username: me, password_file: secret}", func(r *http.Request) string {
		_, password, _ := r.BasicAuth()
		return password
	}},
	"a user without a password": {"basic_auth: {username: QUOTED}", func(r *http.Request) string {
		user, _, _ := r.BasicAuth()
		return user
	}},
	"authorization": {"authorization: {credentials: QUOTED}", func(r *http.Request) string {
		return strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	}},
	"authorization of another type": {"authorization: {type: Token, credentials_file: secret}", func(r *http.Request) string {
		return strings.TrimPrefix(r.Header.Get("Authorization"), "Token ")
	}},
	"http_headers":    {"http_headers: {X-Key: {secrets: [QUOTED]}}", func(r *http.Request) string { return r.Header.Get("X-Key") }},
	"a header's file": {"http_headers: {X-Key: {files: [secret]}}", func(r *http.Request) string { return r.Header.Get("X-Key") }},
	"OAuth 2": {"oauth2: {client_id: me, client_secret: QUOTED, token_url: TOKENS}", func(r *http.Request) string {
		return strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	}},
	"an OAuth 2 client's secret": {"oauth2: {client_id: me, client_secret_file: secret, token_url: TOKENS}", func(*http.Request) string { return secret }},
	"its Basic form": {"oauth2: {client_id: me, client_secret_file: secret, token_url: TOKENS}", func(*http.Request) string {
		return base64.StdEncoding.EncodeToString([]byte("me:" + url.QueryEscape(secret)))
	}},
	"user-info of the egress proxy": {"proxy_url: PROXY", func(*http.Request) string { return secret }},
}

// client returns a client for a config of sends.
func client(t *testing.T, config, tokens, proxy string) *httpclient.Client {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), secret+"\n")
	quoted, err := json.Marshal(secret) // YAML has the same escapes.
	if err != nil {
		t.Fatal(err)
	}
	withUser, _ := url.Parse(proxy)
	withUser.User = url.UserPassword("me", secret)
	file := filepath.Join(dir, "http.yml")
	write(t, file, strings.NewReplacer("QUOTED", string(quoted), "TOKENS", tokens, "PROXY", fmt.Sprintf("%q", withUser)).Replace(config))
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tokenServer answers with a token that is as hard to find as the secret.
func tokenServer(t *testing.T) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"access_token":"tok-canary+/%41=","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(s.Close)
	return s
}

// TestShown has a server that shows each secret in each way: in its answer's body, as Shown
// shows it, and in one that is not HTTP, as the error does. What is left must have none of it,
// read in any way.
func TestShown(t *testing.T) {
	tokens := tokenServer(t)
	for how, send := range sends {
		for in, encode := range encodings {
			t.Run(how+", "+in, func(t *testing.T) {
				var shows string
				server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					shows = send.seen(r)
					if len(shows) < 8 {
						t.Errorf("the server sees %q", shows)
					}
					text := encode(shows)
					if r.URL.Path == "/broken" {
						conn, _, err := w.(http.Hijacker).Hijack()
						if err != nil {
							return
						}
						_, _ = io.WriteString(conn, "HTTP/1.1 "+strings.NewReplacer("\r", "", "\n", " ").Replace(text)+"\r\n\r\n")
						_ = conn.Close()
						return
					}
					w.WriteHeader(http.StatusBadRequest)
					_, _ = io.WriteString(w, "before "+text+" after")
				}))
				defer server.Close()
				c := client(t, send.config, tokens.URL, server.URL)
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil {
					t.Fatal(err)
				}
				got := httpclient.Shown(resp, string(b))
				checkHidden(t, got, shows)
				if !strings.HasPrefix(got, "before ") || !strings.HasSuffix(got, " after") {
					t.Errorf("the rest of the text is not there: %q", got)
				}
				req, err = http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/broken", strings.NewReader("x"))
				if err != nil {
					t.Fatal(err)
				}
				if resp, err = c.Do(req); err == nil {
					_ = resp.Body.Close()
					t.Fatalf("no error, status %d", resp.StatusCode)
				}
				checkHidden(t, err.Error(), shows)
			})
		}
	}
}

// checkHidden checks that a text has no four bytes in a row of a secret that tell something.
func checkHidden(t *testing.T, text, secret string) {
	t.Helper()
	for in, encode := range encodings {
		if in == "split" || in == "invisible" {
			continue
		}
		if s := encode(secret); strings.Contains(text, s) {
			t.Errorf("%q shows the secret (%s)", text, in)
		}
	}
	for _, part := range []string{"canary", "anar", secret[:6], secret[2:8]} {
		if strings.Contains(strings.ToLower(text), strings.ToLower(part)) {
			t.Errorf("%q shows %q", text, part)
		}
	}
}

// TestShownWhereItIsCut has the secret at the end of what is looked at and of what is shown.
func TestShownWhereItIsCut(t *testing.T) {
	c := client(t, "authorization: {credentials: canary-0123456789}", "", "http://x")
	u, _ := url.Parse("http://h")
	for before := 280; before < 305; before++ {
		got := c.Shown(u, strings.Repeat("x", before)+"canary-0123456789")
		if strings.Contains(got, "cana") || len(got) > 303 {
			t.Errorf("%d bytes before: %q", before, got[max(0, before-5):])
		}
	}
	// Spaces take no room on a line: the end of what is looked at is shown.
	for cut := 1; cut <= 20; cut++ {
		got := c.Shown(u, "a"+strings.Repeat(" ", 64<<10-1-cut)+"canary-0123456789 z")
		if strings.Contains(got, "cana") || strings.Contains(got, "0123") {
			t.Errorf("cut after %d bytes: %q", cut, got)
		}
		// So is the end of what the caller has read.
		got = c.Shown(u, "a "+"canary-0123456789"[:min(cut, 17)])
		if strings.Contains(got, "cana") {
			t.Errorf("%d bytes read: %q", cut, got)
		}
	}
	if got := c.Shown(u, strings.Repeat("canary-0123456789", 1<<20)); len(got) > len("...")+3 {
		t.Errorf("17 MiB of it: %q", got)
	}
}

// TestShownShort has passwords that are in any text.
func TestShownShort(t *testing.T) {
	u, _ := url.Parse("http://h")
	for password, want := range map[string]string{
		"e": "node 1 metric refused", "1": "node 1 metric refused", "ode": "node 1 metric refused",
		"node": "... 1 metric refused", "": "node 1 metric refused",
	} {
		c := client(t, fmt.Sprintf("basic_auth: {username: me, password: %q}", password), "", "http://x")
		if got := c.Shown(u, "node 1 metric refused"); got != want {
			t.Errorf("password %q: got %q, want %q", password, got, want)
		}
	}
	// Not secrets.
	c := client(t, "http_headers: {X-Scope-OrgID: {values: [tenant]}}\nbasic_auth: {username: promferry, password: canary}", "", "http://x")
	if got := c.Shown(u, "tenant promferry unknown"); got != "tenant promferry unknown" {
		t.Errorf("got %q", got)
	}
}

// TestReload shows neither the secret that a request was sent with, nor the one that its file
// has by then.
func TestShownAfterReload(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
	}))
	defer server.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "http.yml")
	write(t, file, "authorization:\n  credentials_file: secret\n")
	write(t, filepath.Join(dir, "secret"), "canary-one")
	c, err := httpclient.New("push", file)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	write(t, filepath.Join(dir, "secret"), "canary-two")
	use, err := c.Load()
	if err != nil {
		t.Fatal(err)
	}
	use()
	if got := httpclient.Shown(resp, "canary-one, canary-two"); strings.Contains(got, "canary") {
		t.Errorf("got %q", got)
	}
}

// rawServer answers each connection, after the header of a request, with what answer makes of
// that header.
func rawServer(t *testing.T, answer func(header http.Header) string) string {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
				_, _ = io.WriteString(conn, answer(req.Header))
			}
			_ = conn.Close()
		}
	}()
	return listener.Addr().String()
}

// TestErrorsShowNoSecret has what net/http quotes in its errors.
func TestErrorsShowNoSecret(t *testing.T) {
	const config = "authorization: {credentials: canary-token}"
	for name, tc := range map[string]struct{ answer, want string }{
		"no HTTP":             {"AUTH\r\n\r\n", "malformed HTTP"},
		"a status":            {"HTTP/1.1 AUTH\r\n\r\n", "malformed HTTP status code"},
		"a version":           {"HTTP/AUTH 200 OK\r\n\r\n", "malformed HTTP"},
		"a header":            {"HTTP/1.1 200 OK\r\nAUTH\r\n\r\n", "malformed MIME header"},
		"a length":            {"HTTP/1.1 200 OK\r\nContent-Length: AUTH\r\n\r\n", "bad Content-Length"},
		"an encoding":         {"HTTP/1.1 200 OK\r\nTransfer-Encoding: AUTH\r\n\r\n", "unsupported transfer encoding"},
		"a redirect":          {"HTTP/1.1 307 Go\r\nLocation: http://[AUTH\r\n\r\n", "Location"},
		"a trailer":           {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nAUTH\r\n\r\n", "malformed MIME header"},
		"a line without end":  {"HTTP/1.1 200 " + strings.Repeat("AUTH", 1<<20), ""},
		"an encoded redirect": {"HTTP/1.1 302 Go\r\nLocation: http://a b/canary%2Dtoken\r\n\r\n", "Location"},
	} {
		t.Run(name, func(t *testing.T) {
			address := rawServer(t, func(h http.Header) string { return strings.ReplaceAll(tc.answer, "AUTH", h.Get("Authorization")) })
			c := client(t, config, "", "http://x")
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+address, strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.Do(req)
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				_ = resp.Body.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "token") {
				t.Errorf("got %v", err)
			}
			if len(err.Error()) > 303 {
				t.Errorf("%d bytes", len(err.Error()))
			}
		})
	}
}

// TestEgressProxyShowsNoSecret has a proxy that answers a CONNECT with the credentials that it
// was sent, and with those of the server, should it ever have seen them.
func TestEgressProxyShowsNoSecret(t *testing.T) {
	address := rawServer(t, func(h http.Header) string {
		if h.Get("Authorization") != "" {
			return "HTTP/1.1 599 the server's credentials\r\n\r\n"
		}
		return "HTTP/1.1 407 " + h.Get("Proxy-Authorization") + " " + h.Get("X-Key") + "\r\n\r\n"
	})
	c := client(t, "proxy_url: http://me:canary@"+address+"\nproxy_connect_header: {X-Key: [canary-key]}\nbasic_auth: {username: me, password: other}", "", "http://x")
	got := answer(t, c, "https://127.0.0.1:1")
	if strings.Contains(got, "canary") || strings.Contains(got, "bWU6Y2FuYXJ5") || strings.Contains(got, "599") || !strings.HasPrefix(got, "Basic ...") {
		t.Errorf("got %q", got)
	}
}

// TestCertificateShowsNoSecret has a server whose certificate is for a name that is the token.
func TestCertificateShowsNoSecret(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"canary-token"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(nil)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.StartTLS()
	defer server.Close()
	c := client(t, "authorization: {credentials: canary-token}", "", "http://x")
	if got := answer(t, c, strings.Replace(server.URL, "127.0.0.1", "localhost", 1)); strings.Contains(got, "canary") || !strings.Contains(got, "certificate is valid for ..., not localhost") {
		t.Errorf("got %q", got)
	}
}

// TestTokenErrorsShowNoSecret has a token's URL that answers with all that it was sent.
func TestTokenErrorsShowNoSecret(t *testing.T) {
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		_, password, _ := r.BasicAuth()
		w.WriteHeader(http.StatusBadRequest)
		_, _ = fmt.Fprintln(w, "sent:", r.Header.Get("Authorization"), password, r.Form, r.Form.Encode())
	}))
	defer tokens.Close()
	for _, config := range []string{
		"oauth2: {client_id: me, client_secret: QUOTED, token_url: TOKENS}",
		"oauth2: {client_id: me, client_secret_file: secret, token_url: TOKENS, endpoint_params: {password: canary-param}}",
	} {
		got := answer(t, client(t, config, tokens.URL, "http://x"), "http://127.0.0.1:1")
		if !strings.Contains(got, "400") || !strings.Contains(got, "sent:") {
			t.Errorf("got %q", got)
		}
		checkHidden(t, got, secret)
		checkHidden(t, got, base64.StdEncoding.EncodeToString([]byte("me:"+url.QueryEscape(secret))))
	}
}

// TestTokenIsNotSentElsewhere has a token's URL that redirects: neither the client's secret nor
// the request that needs the token gets anywhere.
func TestTokenIsNotSentElsewhere(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		var asked []string
		elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			asked = append(asked, fmt.Sprint(r.Method, r.Header, string(b)))
		}))
		tokens := httptest.NewServer(http.RedirectHandler(elsewhere.URL, status))
		got := answer(t, client(t, "oauth2: {client_id: me, client_secret: canary, token_url: TOKENS}", tokens.URL, "http://x"), elsewhere.URL)
		tokens.Close()
		elsewhere.Close()
		if len(asked) != 0 || !strings.Contains(got, fmt.Sprint(status)) {
			t.Errorf("%d: got %q, asked elsewhere: %q", status, got, asked)
		}
	}
}

// TestTokenHasADeadline asks a token's URL that never answers.
func TestTokenHasADeadline(t *testing.T) {
	done := make(chan struct{})
	asked := make(chan struct{}, 10)
	tokens := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-done
	}))
	defer tokens.Close()
	c := client(t, "oauth2: {client_id: me, client_secret: canary, token_url: TOKENS}", tokens.URL, "http://x")
	// Another request, which has more time, is not waited for.
	var other sync.WaitGroup
	defer other.Wait()
	defer close(done)
	ended := make(chan struct{})
	other.Go(func() {
		defer close(ended)
		if req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://127.0.0.1:1", nil); err == nil {
			if resp, err := c.Do(req); err == nil {
				_ = resp.Body.Close()
			}
		}
	})
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://127.0.0.1:1", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err == nil {
		_ = resp.Body.Close()
	}
	if !httpclient.IsTimeout(ctx, err) {
		t.Errorf("got %v", err)
	}
	select {
	case <-ended:
		t.Error("it waited for the other request")
	default:
	}
}

// FuzzShown embeds a secret, encoded in each way, in a text that does not make another escape of
// its begin.
func FuzzShown(f *testing.F) {
	f.Add("canary", "before ", " after")
	f.Add(secret, "", "&amp;")
	f.Add("\\x41\\", "", "%41")
	f.Add("a b c d", "a", "d")
	f.Fuzz(func(t *testing.T, secret, before, after string) {
		if len(strings.Join(strings.Fields(secret), "")) < 4 || strings.Contains(secret, ".") || strings.ContainsAny(before, `%&\`) || len(before)+2*len(secret)+len(after) > 200 {
			return
		}
		b, err := json.Marshal(secret)
		if err != nil || strings.ContainsFunc(secret, func(r rune) bool { return r < ' ' || r > '~' }) || strings.TrimSpace(secret) != secret {
			return // No header could have it.
		}
		c := client(t, "authorization: {credentials: "+string(b)+"}", "", "http://x")
		for in, encode := range encodings {
			if in == "split" || in == "invisible" {
				continue
			}
			if got := c.Shown(&url.URL{}, before+encode(secret)+after); strings.Contains(got, encode(secret)) {
				t.Errorf("%s: %q shows %q", in, got, encode(secret))
			}
		}
	})
}
