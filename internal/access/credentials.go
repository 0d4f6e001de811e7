package access

import (
	"encoding/base64"
	"strings"
)

// maxHeader is the length up to which a header is looked at, in bytes. Tokens of machines
// that others issue, as JWTs, take one or two thousand.
const maxHeader = 8 << 10

// credential is what a header holds.
type credential struct {
	// basic tells that there is a username.
	basic           bool
	username, token string
}

// parse reads an Authorization or Proxy-Authorization header, Bearer or Basic (RFC 6750,
// 7617). Whatever else there is, also a second header, is not ok: two ends may not read the
// same in it.
func parse(header []string) (c credential, ok bool) {
	if len(header) != 1 || len(header[0]) > maxHeader {
		return credential{}, false
	}
	scheme, rest, _ := strings.Cut(header[0], " ")
	rest = strings.Trim(rest, " ")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		c.token = rest
	case strings.EqualFold(scheme, "Basic"):
		b, err := base64.StdEncoding.DecodeString(rest)
		if err != nil {
			return credential{}, false
		}
		c.basic = true
		c.username, c.token, _ = strings.Cut(string(b), ":")
	}
	return c, c.token != ""
}
