package gateway

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"

	"github.com/promferry/promferry/pushgw"
)

const base64Suffix = "@base64"

// maxKeyBytes is how long a grouping key may be in a path. All its labels stand in each series.
const maxKeyBytes = 4096

// escapedPath returns the path as it came. URL.EscapedPath escapes one anew that has a byte
// which the client should have escaped, and a slash that was escaped is then one like others.
func escapedPath(u *url.URL) string { return cmp.Or(u.RawPath, u.EscapedPath()) }

// isGroupPath tells whether an escaped path is that of a group: it begins with
// /metrics/job/ or /metrics/job@base64/. Some clients escape the @.
func isGroupPath(path string) bool {
	rest, ok := strings.CutPrefix(path, "/metrics/")
	name, _, hasValue := strings.Cut(rest, "/")
	name, err := url.PathUnescape(name)
	return ok && hasValue && err == nil && strings.TrimSuffix(name, base64Suffix) == model.JobLabel
}

// parseKey returns the grouping key that an escaped path names, which begins with /job/ or
// /job@base64/. A label that comes twice has its last value. A label without a value is, as
// everywhere in Prometheus, no label. Errors are *Refusal.
func parseKey(path string) (pushgw.GroupingKey, error) {
	if len(path) > maxKeyBytes {
		return pushgw.GroupingKey{}, &Refusal{
			Status: http.StatusRequestURITooLong, Reason: reasonPath,
			Text: fmt.Sprintf("the grouping key has %d bytes in the path, and may have %d", len(path), maxKeyBytes),
		}
	}
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(segments)%2 != 0 {
		return pushgw.GroupingKey{}, badPath("odd number of components in label string %.200q: want name/value pairs, as in /job/backup/instance/web-1", "/"+strings.Join(segments[min(2, len(segments)):], "/"))
	}
	for i := 0; i < len(segments); i += 2 {
		name, err := url.PathUnescape(segments[i])
		if err != nil {
			return pushgw.GroupingKey{}, badPath("%v", err)
		}
		segments[i] = name
	}
	job, err := segmentValue(model.JobLabel, segments[0], segments[1])
	if err != nil {
		return pushgw.GroupingKey{}, err
	}
	if job == "" {
		return pushgw.GroupingKey{}, badPath("job name is required: want /metrics/job/NAME")
	}
	labels := make(map[string]string)
	for i := 2; i < len(segments); i += 2 {
		name := strings.TrimSuffix(segments[i], base64Suffix)
		if !validLabel(name) || !model.LegacyValidation.IsValidLabelName(name) {
			return pushgw.GroupingKey{}, badPath("improper label name %.200q: letters, digits and _ make one, a digit not at the begin, nor two _", name)
		}
		if segments[i+1] == "" {
			return pushgw.GroupingKey{}, badPath("label %.200s: an empty path segment; an empty value is written %.200s%s/=", name, name, base64Suffix)
		}
		if labels[name], err = segmentValue(name, segments[i], segments[i+1]); err != nil {
			return pushgw.GroupingKey{}, err
		}
	}
	delete(labels, model.JobLabel) // The one at the begin wins.
	maps.DeleteFunc(labels, func(_, value string) bool { return value == "" })
	return pushgw.GroupingKey{Job: job, Labels: labels}, nil
}

// segmentValue returns the value of a label that is written in a segment, whose name ends with
// @base64 where it is written so.
func segmentValue(label, name, value string) (string, error) {
	value, err := url.PathUnescape(value)
	if err != nil {
		return "", badPath("label %.200s: %v", label, err)
	}
	if strings.HasSuffix(name, base64Suffix) {
		decoded, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(value, "="))
		if err != nil {
			return "", badPath("label %.200s: invalid base64 encoding %.200q: want that for URLs, with - and _ for + and /", label, value)
		}
		value = string(decoded)
	}
	if !utf8.ValidString(value) {
		return "", badPath("label %.200s: the value %.200q is not UTF-8", label, value)
	}
	return value, nil
}

func badPath(format string, args ...any) error {
	return &Refusal{Status: http.StatusBadRequest, Reason: reasonPath, Text: fmt.Sprintf(format, args...)}
}

// groupPath returns the path of a group as pushgw writes it, below /metrics or /groups.
func groupPath(key pushgw.GroupingKey) string { return strings.TrimPrefix(key.Path(), "/metrics") }
