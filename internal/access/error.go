package access

import (
	"fmt"
	"net/http"
)

// A Reason says why somebody was not let in.
type Reason string

// The reasons of an Error.
const (
	// ReasonClosed: the file lets nobody in through this face.
	ReasonClosed Reason = "closed"
	// ReasonMissing: neither a header with a credential nor a verified certificate.
	ReasonMissing Reason = "missing"
	// ReasonMalformed: a header that is neither Bearer nor Basic with a token, or two of them.
	ReasonMalformed Reason = "malformed"
	// ReasonToken: the token is nobody's; or somebody's, but for another face.
	ReasonToken Reason = "unknown_token"
	// ReasonUsername: the token is right, the username with it is not.
	ReasonUsername Reason = "wrong_username"
	// ReasonCertificate: the certificate is verified, and nobody's.
	ReasonCertificate Reason = "unknown_certificate"
	// ReasonExpired: the certificate's time has run out since the connection was made.
	ReasonExpired Reason = "expired_certificate"
	// ReasonName: the credential is right, but for clients of other names.
	ReasonName Reason = "wrong_name"
	// ReasonGroup: the credential is right, but for other groups.
	ReasonGroup Reason = "wrong_group"
)

// reasons are those of all faces, for a metric that has one series for each.
var reasons = []Reason{
	ReasonClosed, ReasonMissing, ReasonMalformed, ReasonToken, ReasonUsername, ReasonCertificate, ReasonExpired,
}

// Error is what is returned for who is not let in. It holds nothing of the credential.
type Error struct {
	// Face is where.
	Face Face
	// Status is the HTTP status to answer with: 401, 407 for who scrapes, 403 when no other
	// credential of the caller would help; or 429 after too many failures from one address,
	// whatever the reason. One with 429 need not be logged.
	Status int
	// Reason is why.
	Reason Reason
	// Name is that of the client, as the request had it, or the labels of the group; "" on other
	// faces.
	Name string
	// Identity is whose credential it was, where the reason is ReasonName, ReasonGroup or
	// ReasonUsername.
	Identity string
}

// Error is for the operator's log. Text is for the caller.
func (e *Error) Error() string {
	s := "admit " + string(e.Face)
	switch {
	case e.Name == "":
	case e.Face == FacePusher: // Its values are quoted.
		s += fmt.Sprintf(" to %.200s", e.Name)
	default:
		s += fmt.Sprintf(" %.60q", e.Name)
	}
	s += ": " + sentences[e.Reason]
	if e.Identity != "" {
		s += fmt.Sprintf(", it is of identity %q", e.Identity)
	}
	return s
}

var sentences = map[Reason]string{
	ReasonClosed:      "the auth file lets nobody in here",
	ReasonMissing:     "no credentials",
	ReasonMalformed:   "credentials not understood, want one header, Bearer or Basic",
	ReasonToken:       "unknown token",
	ReasonUsername:    "the token goes with another username",
	ReasonCertificate: "unknown certificate",
	ReasonExpired:     "the certificate has expired",
	ReasonName:        "the credential is for other names",
	ReasonGroup:       "the credential is for other groups",
}

// Text is the body of the answer, one sentence. It is the same for an unknown token and an
// unknown certificate, and says nothing about which names or identities there are.
func (e *Error) Text() string {
	switch e.Status {
	case http.StatusTooManyRequests:
		return "Too many failed attempts from this address."
	case http.StatusForbidden:
		switch e.Reason {
		case ReasonName:
			return "These credentials are for clients of other names."
		case ReasonGroup:
			return "These credentials are for other groups."
		}
		return "Nobody may do this here."
	}
	return "Credentials are missing or wrong."
}

// SetHeader sets what HTTP wants beside the status (RFC 9110, 11.6 and 11.7; RFC 6585, 4).
func (e *Error) SetHeader(h http.Header) {
	const challenge = `Basic realm="promferry"`
	switch e.Status {
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", challenge)
	case http.StatusProxyAuthRequired:
		h.Set("Proxy-Authenticate", challenge)
	case http.StatusTooManyRequests:
		h.Set("Retry-After", "1")
	}
}

func statusOf(face Face, reason Reason) int {
	switch {
	case reason == ReasonClosed || reason == ReasonName || reason == ReasonGroup:
		return http.StatusForbidden
	case face == FaceScraper:
		return http.StatusProxyAuthRequired
	}
	return http.StatusUnauthorized
}
