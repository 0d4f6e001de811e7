//go:build e2e

package e2e

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/snappy"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
)

// intent is what docs/gateway.md says about a push.
type intent struct {
	differs []string // of gatewayDifferences
	refused bool     // we refuse it, whatever the Pushgateway does
	// theirs is what the Pushgateway is sent in its place, so that what differs as intended
	// is the same again.
	theirs  oraclePush
	unknown bool // the Pushgateway's verdict depends on more than the push
	rewrite bool // theirs gets the families as they are in the end, in protobuf
}

func (i *intent) instead(name string) {
	i.differ(name)
	i.rewrite = true
}

func (i *intent) differ(name string) { i.differs = append(i.differs, name) }

func (i *intent) refuse(name string) {
	i.differ(name)
	i.refused = true
}

// intended returns in what a push differs as the documentation says. It knows nothing of the
// code of the gateway.
func intended(p oraclePush) *intent {
	i := &intent{theirs: p}
	labels := i.key()
	if i.refused {
		return i
	}
	body, ok := i.unpack()
	if !ok || i.refused {
		return i
	}
	typ, params, err := mime.ParseMediaType(p.typ)
	if err == nil && typ == "application/vnd.google.protobuf" && params["encoding"] == "delimited" && params["proto"] == "io.prometheus.client.MetricFamily" {
		families, err := readDelimited(body)
		if err != nil {
			i.refuse("cut")
			return i
		}
		i.families(families, labels)
		return i
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil && strings.Contains(err.Error(), "negative ") {
		i.refuse("negative")
	}
	if err == nil {
		var families []*dto.MetricFamily
		for _, name := range slices.Sorted(maps.Keys(byName)) {
			families = append(families, byName[name])
		}
		if quotesNames(string(body)) {
			i.instead("names")
		}
		if gaugeHistogramType.Match(body) { // Without series: with one it is refused.
			i.instead("gaugehisto")
		}
		i.families(families, labels)
	}
	return i
}

func readDelimited(body []byte) ([]*dto.MetricFamily, error) {
	var families []*dto.MetricFamily
	r := bytes.NewReader(body)
	for {
		family := &dto.MetricFamily{}
		err := protodelim.UnmarshalFrom(r, family)
		if errors.Is(err, io.EOF) {
			return families, nil
		}
		if err != nil {
			return nil, err
		}
		families = append(families, family)
	}
}

// key returns the labels of the path, as far as they can be read.
func (i *intent) key() map[string]string {
	path, _, _ := strings.Cut("job"+i.theirs.key, "?")
	segments := strings.Split(path, "/")
	if slices.Contains(segments, "") {
		i.refuse("segments")
		return nil
	}
	labels := make(map[string]string)
	wrong := len(segments)%2 != 0
	for pair := range slices.Chunk(segments, 2) {
		for n, s := range pair {
			s, _ = url.PathUnescape(s)
			if strings.Contains(s, "/") {
				i.differ("slash")
				wrong = wrong || n == 0
			}
			if s == "." || s == ".." {
				i.differ("segments")
				wrong = wrong || n == 0
			}
			pair[n] = s
		}
		if len(pair) < 2 {
			break
		}
		name, isBase64 := strings.CutSuffix(pair[0], "@base64")
		value := pair[1]
		if isBase64 {
			decoded, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(value, "="))
			if err != nil && len(labels) == 0 {
				i.refuse("base64")
				return nil
			}
			wrong = wrong || err != nil
			value = string(decoded)
		}
		wrong = wrong || !regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`).MatchString(name) || strings.HasPrefix(name, "__")
		if !utf8.ValidString(value) {
			i.refuse("utf8")
			return nil
		}
		if value == "" && len(labels) > 0 {
			i.differ("empty")
		}
		if name != "job" || len(labels) == 0 {
			labels[name] = value
		}
	}
	if wrong {
		i.refused = len(i.differs) > 0
		return nil
	}
	if len(i.differs) > 0 {
		encode := func(name string) string {
			return "@base64/" + base64.RawURLEncoding.EncodeToString([]byte(labels[name])) + "="
		}
		i.theirs.key = encode("job")
		for name, value := range labels {
			if name != "job" && value != "" {
				i.theirs.key += "/" + name + encode(name)
			}
		}
	}
	return labels
}

// unpack returns the body as it was before it was packed, and whether it can be unpacked.
func (i *intent) unpack() ([]byte, bool) {
	packed := strings.NewReader(i.theirs.body)
	var r io.Reader
	encoding := strings.ToLower(i.theirs.encoding)
	switch encoding {
	case "gzip":
		if i.theirs.encoding != encoding {
			i.differ("snappy")
			i.theirs.encoding = encoding
		}
		// Unlike the standard library's, this reader refuses flags that there are not, and takes
		// a second member that is cut in the name of its header for none.
		z, err := gzip.NewReader(packed)
		if err != nil {
			i.refuse("cut")
			return nil, false
		}
		r = z
	case "snappy":
		i.differ("snappy")
		r = snappy.NewReader(packed)
	default:
		return []byte(i.theirs.body), true
	}
	body, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if encoding == "snappy" {
		i.refused = err != nil
		i.theirs.encoding, i.theirs.body = "", string(body)
	} else if err != nil {
		i.refuse("cut")
	}
	return body, err == nil
}

var (
	gaugeHistogramType = regexp.MustCompile(`(?mi)^[ \t]*#[ \t]*TYPE[ \t].*gauge_?histogram`)
	seriesSuffix       = regexp.MustCompile(`_(sum|count|bucket)$`)
	ownFamilies        = regexp.MustCompile(`^(go|process|promhttp|pushgateway|promferry)_`)
)

// families finds what differs in the families of a body. Where something does that the
// Pushgateway can be told in another way, it gets these families in protobuf.
func (i *intent) families(families []*dto.MetricFamily, labels map[string]string) {
	byName := make(map[string]*dto.MetricFamily)
	var kept []*dto.MetricFamily
	for _, family := range families {
		name := family.GetName()
		if name == "push_time_seconds" || name == "push_failure_time_seconds" {
			i.instead("own")
			continue
		}
		if ownFamilies.MatchString(name) {
			i.differ("own")
			i.unknown = true
		}
		switch {
		case name == "":
			i.refuse("nameless")
		case !utf8.ValidString(name) || strings.ContainsFunc(name, isControl):
			i.refuse("names")
		case !model.LegacyValidation.IsValidMetricName(name):
			i.instead("names")
			family.Name = new(legacyName(name))
		}
		if _, ok := dto.MetricType_name[int32(family.GetType())]; !ok || family.GetType() == dto.MetricType_GAUGE_HISTOGRAM {
			i.refuse("gaugehisto")
		}
		if !utf8.ValidString(family.GetHelp()) {
			i.instead("help")
			family.Help = nil
		}
		if first := byName[name]; first == nil {
			byName[name] = family
			kept = append(kept, family)
		} else {
			i.instead("merged")
			first.Metric = append(first.Metric, family.GetMetric()...)
			i.refused = i.refused || first.GetType() != family.GetType()
		}
		for _, m := range family.GetMetric() {
			i.series(m, family.GetType(), labels)
		}
	}
	// Families without series collide with others there. A POST needs them: they replace.
	kept = slices.DeleteFunc(kept, func(family *dto.MetricFamily) bool {
		if len(family.GetMetric()) > 0 {
			return false
		}
		i.instead("empty push")
		family.Type = dto.MetricType_UNTYPED.Enum()
		i.unknown = i.unknown || seriesSuffix.MatchString(family.GetName())
		return i.theirs.method == http.MethodPut
	})
	if i.rewrite {
		i.theirs.typ, i.theirs.encoding, i.theirs.body = protobufType, "", delimited(kept...)
	}
}

func (i *intent) series(m *dto.Metric, typ dto.MetricType, labels map[string]string) {
	isHistogram, isSummary := typ == dto.MetricType_HISTOGRAM, typ == dto.MetricType_SUMMARY
	if isHistogram && labels["le"] != "" {
		i.refuse("le")
	}
	var have []*dto.LabelPair
	for _, l := range m.GetLabel() {
		name := l.GetName()
		if isHistogram && name == "le" && l.GetValue() != "" {
			i.refuse("le")
		}
		if strings.ContainsFunc(name, isControl) {
			i.refuse("names")
		}
		if name != "" && utf8.ValidString(name) && !strings.HasPrefix(name, "__") && !strings.Contains(name, ":") && !model.LegacyValidation.IsValidLabelName(name) {
			i.instead("names")
			l.Name = new(legacyName(name))
		}
		if l.GetValue() == "" && model.LegacyValidation.IsValidLabelName(l.GetName()) && !strings.HasPrefix(name, "__") {
			i.instead("empty")
		} else {
			have = append(have, l)
		}
	}
	m.Label = have
	seen := make(map[string]bool)
	twice := func(v float64) {
		text := strconv.FormatFloat(v, 'g', -1, 64)
		if v == 0 {
			text = "0" // -0 as well.
		}
		if seen[text] {
			i.refuse("twice")
		}
		seen[text] = true
	}
	if isHistogram {
		if m.Histogram != nil && m.Histogram.SampleCountFloat != nil {
			i.differ("fractions")
		}
		for _, b := range m.GetHistogram().GetBucket() {
			twice(b.GetUpperBound())
			if b.CumulativeCountFloat != nil {
				i.differ("fractions")
			}
		}
	}
	if isSummary {
		for _, q := range m.GetSummary().GetQuantile() {
			twice(q.GetQuantile())
		}
	}
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// legacyName writes a name with letters, digits and _ only. It keeps suffixes.
func legacyName(name string) string {
	var b strings.Builder
	for i, r := range name {
		if model.LegacyValidation.IsValidLabelName(string(r)) || i > 0 && r >= '0' && r <= '9' {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "x%xx", r)
		}
	}
	return b.String()
}

// quotesNames tells whether a text has names in quotes: strings that do not follow a =.
func quotesNames(text string) bool {
	for line := range strings.Lines(text) {
		line = strings.TrimLeft(line, " \t")
		if strings.HasPrefix(line, "#") {
			fields := strings.Fields(line[1:])
			if len(fields) > 1 && (fields[0] == "HELP" || fields[0] == "TYPE") && strings.HasPrefix(fields[1], `"`) {
				return true
			}
			continue
		}
		before, within := byte(0), false
		for n := 0; n < len(line); n++ {
			switch c := line[n]; {
			case within && c == '\\':
				n++
			case c == '"' && within:
				within, before = false, c
			case c == '"' && before != '=':
				return true
			case c == '"':
				within = true
			case !within && c != ' ' && c != '\t':
				before = c
			}
		}
	}
	return false
}
