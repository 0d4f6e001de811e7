package access

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v2"

	"github.com/promferry/promferry/internal/labelmatch"
	"github.com/promferry/promferry/internal/safeyaml"
)

// file is what stands in the file.
type file interface{ sections() []fileSection } // In the order of the role's faces.

type proxyFile struct {
	Clients  fileSection `yaml:"clients"`
	Scrapers fileSection `yaml:"scrapers"`
	Listers  fileSection `yaml:"listers"`
}

func (f *proxyFile) sections() []fileSection { return []fileSection{f.Clients, f.Scrapers, f.Listers} }

type gatewayFile struct {
	Pushers fileSection `yaml:"pushers"`
	Readers fileSection `yaml:"readers"`
}

func (f *gatewayFile) sections() []fileSection { return []fileSection{f.Pushers, f.Readers} }

// fileSection is a list of entries, or the word anyone.
type fileSection struct {
	word    string
	entries []fileEntry
}

const anyone = "anyone"

// UnmarshalYAML takes both forms.
func (s *fileSection) UnmarshalYAML(unmarshal func(any) error) error {
	if err := unmarshal(&s.word); err == nil {
		return nil
	}
	return unmarshal(&s.entries)
}

// fileEntry is one entry. Its faults of form do not end the reading of it, so that it
// keeps its place in the list.
type fileEntry struct {
	fileFields
	faults []string
	there  bool
}

type fileFields struct {
	Identity string     `yaml:"identity"`
	Names    []fileText `yaml:"names"`
	Groups   []fileText `yaml:"groups"`
	SAN      []fileText `yaml:"san"`
	Username string     `yaml:"username"`
	Tokens   []fileText `yaml:"token_sha256"`
}

// UnmarshalYAML reads an entry.
func (e *fileEntry) UnmarshalYAML(unmarshal func(any) error) error {
	e.there = true
	err := unmarshal(&e.fileFields)
	if te, ok := errors.AsType[*yaml.TypeError](err); ok {
		e.faults = te.Errors
		return nil
	}
	return err
}

// fileText is one of a list of texts; "" when it is something else.
type fileText string

// UnmarshalYAML reads a text.
func (t *fileText) UnmarshalYAML(unmarshal func(any) error) error {
	var s string
	if unmarshal(&s) == nil {
		*t = fileText(s)
	}
	return nil
}

// parseFile reads a file. Its error tells all faults, one on a line, and shows nothing of
// what stands there but identities.
func parseFile(role *role, content []byte) (rules, error) {
	c := &checker{role: role}
	f := role.newFile()
	d := yaml.NewDecoder(bytes.NewReader(content))
	d.SetStrict(true)
	switch err := d.Decode(f); {
	case errors.Is(err, io.EOF): // Empty, which is said below.
	case err != nil:
		te, ok := errors.AsType[*yaml.TypeError](err)
		if !ok {
			return nil, safeyaml.Syntax(err)
		}
		for _, s := range te.Errors {
			c.fault("", c.form(s))
		}
	default:
		if err := d.Decode(&struct{}{}); !errors.Is(err, io.EOF) {
			c.fault("", "want one YAML document, there is more")
		}
	}
	r := make(rules)
	closed := true
	for i, s := range f.sections() {
		face := role.faces[i]
		r[face] = c.section(face, s, r[role.faces[0]])
		closed = closed && r[face].closed()
	}
	if len(c.faults) == 0 && closed {
		c.fault("", "lets nobody do anything: want "+role.sections("or"))
	}
	if err := errors.Join(c.faults...); err != nil {
		return nil, err
	}
	return r, nil
}

// place names an element of a list, for faults.
func place(list string, i int) string { return list + "[" + strconv.Itoa(i) + "]" }

// checker turns what stands in the file into rules, and gathers its faults.
type checker struct {
	role   *role
	faults []error
}

func (c *checker) fault(where, what string) {
	if where != "" {
		what = where + ": " + what
	}
	c.faults = append(c.faults, errors.New(what))
}

// section checks one section. First is the first one of the file, that of clients or of pushers,
// and nil when this is the one.
func (c *checker) section(face Face, f fileSection, first *section) *section {
	name := sectionOf(face)
	switch {
	case f.word == anyone:
		return &section{open: true}
	case f.word != "":
		c.fault(name, "want a list of entries, or the word "+anyone)
	}
	s := &section{}
	identities := make(map[string]bool, len(f.entries))
	for i, fe := range f.entries {
		where := place(name, i)
		if !fe.there {
			c.fault(where, "want an entry, there is nothing")
			continue
		}
		if fault := validateIdentity(fe.Identity); fault != "" {
			c.fault(where, "identity: "+fault)
		} else {
			where += " (" + fe.Identity + ")"
			if identities[fe.Identity] {
				c.fault(where, "identity: another entry of "+name+" has it")
			}
			identities[fe.Identity] = true
		}
		for _, fault := range fe.faults {
			c.fault(where, c.form(fault))
		}
		e := &entry{
			identity: fe.Identity, username: fe.Username,
			names: c.globs(where, "names", fe.Names), groups: c.groups(where, fe.Groups), san: c.globs(where, "san", fe.SAN),
		}
		s.entries = append(s.entries, e)
		for j, text := range fe.Tokens {
			t, fault := c.token(text, s, first)
			if fault != "" {
				c.fault(where, place("token_sha256", j)+": "+fault)
				continue
			}
			t.entry = e
			s.add(t)
		}
		// A field that was not understood is not one that is missing.
		if len(fe.faults) == 0 {
			c.combination(where, fe, face)
		}
	}
	return s
}

func (c *checker) combination(where string, fe fileEntry, face Face) {
	if len(fe.Tokens) == 0 && len(fe.SAN) == 0 {
		c.fault(where, "want token_sha256, san or both")
	}
	if len(fe.Names) > 0 && face != FaceClient {
		c.fault(where, "names: only for clients")
	}
	if len(fe.Groups) > 0 && face != FacePusher {
		c.fault(where, "groups: only for pushers")
	}
	switch {
	case face == FaceClient && len(fe.Tokens) > 0 && len(fe.Names) == 0:
		c.fault(where, "names: a token needs them, as it has no name of its own")
	case face == FacePusher && len(fe.Tokens) > 0 && len(fe.Groups) == 0:
		c.fault(where, "groups: a token needs them, as it has no name of its own; '{}' is every group")
	}
	if face == c.role.faces[0] {
		if fe.Username != "" {
			c.fault(where, "username: not for "+sectionOf(face))
		}
		return
	}
	if fe.Username != "" && len(fe.Tokens) == 0 {
		c.fault(where, "username: goes with token_sha256, which is missing")
	}
	if strings.ContainsFunc(fe.Username, func(r rune) bool { return r == ':' || unicode.IsControl(r) }) {
		c.fault(where, "username: has a colon or a control character, which Basic cannot carry")
	}
}

func validateIdentity(s string) string {
	const most = 128 // bytes, to be read in logs
	switch {
	case s == "":
		return "is missing"
	case len(s) > most:
		return fmt.Sprintf("more than %d bytes", most)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "has characters that cannot be printed"
	}
	return ""
}

func (c *checker) globs(where, field string, texts []fileText) []string {
	var globs []string
	for i, t := range texts {
		if _, err := path.Match(string(t), ""); err != nil || t == "" {
			c.fault(where, place(field, i)+": want a text, with *, ? and [...] for unknown characters")
			continue
		}
		globs = append(globs, string(t))
	}
	return globs
}

// groups parses matchers. No text but {} selects every group, so that it is meant.
func (c *checker) groups(where string, texts []fileText) []labelmatch.Matchers {
	var groups []labelmatch.Matchers
	for i, t := range texts {
		m, err := labelmatch.Parse(string(t))
		if err != nil || m.All() && t != "{}" {
			c.fault(where, place("groups", i)+`: want matchers in quotes, as '{job="node",instance=~"web-.*"}', or '{}' for every group`)
			continue
		}
		groups = append(groups, m)
	}
	return groups
}

// emptyTokens are the digests of what a wrong command hashes instead of a token.
var emptyTokens = [][sha256.Size]byte{sha256.Sum256(nil), sha256.Sum256([]byte("\n"))}

// token returns the token with the digest in text, or what is wrong with that. A token is for
// one entry; and of a client or a pusher for nothing else.
func (c *checker) token(text fileText, section, first *section) (*token, string) {
	t := &token{}
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != sha256.Size {
		return nil, "want the SHA-256 of a token, 64 hexadecimal digits"
	}
	copy(t.digest[:], b)
	if slices.Contains(emptyTokens, t.digest) {
		return nil, "is the SHA-256 of an empty token"
	}
	if other := section.find(t.digest); other != nil {
		return nil, fmt.Sprintf("stands there before, for identity %q", other.entry.identity)
	}
	if first != nil {
		if other := first.find(t.digest); other != nil {
			return nil, fmt.Sprintf("is that of the %s' identity %q: %s", sectionOf(c.role.faces[0]), other.entry.identity, c.role.apart)
		}
	}
	return t, ""
}

var wantedForms = map[string]string{
	"into []access.fileEntry": "want a list of entries, or the word " + anyone,
	"into access.fileFields":  "want an entry, which has fields",
	"into []access.fileText":  "want a list of texts",
}

// form returns what can be shown of a fault that yaml.v2 found.
func (c *checker) form(fault string) string {
	return safeyaml.Form(fault, func(end string) string {
		switch end {
		case "into access.proxyFile", "into access.gatewayFile":
			return "want " + c.role.sections("and")
		case "not found in type access.proxyFile", "not found in type access.gatewayFile":
			return "unknown field: want " + c.role.sections("and")
		case "not found in type access.fileFields":
			return "unknown field: an entry has identity, " + c.role.scope + ", san, username and token_sha256"
		default:
			return wantedForms[end]
		}
	})
}
