package pushgw

import (
	"bytes"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"testing"
	"testing/iotest"
)

// oracle reads a listing with encoding/json. It knows of no limits.
func oracle(b []byte) ([]Group, bool) {
	var answer map[string]json.RawMessage
	var status string
	var data []map[string]json.RawMessage
	if json.Unmarshal(b, &answer) != nil || json.Unmarshal(answer["status"], &status) != nil || status != "success" ||
		!bytes.HasPrefix(answer["data"], []byte("[")) || json.Unmarshal(answer["data"], &data) != nil || slices.ContainsFunc(data, func(g map[string]json.RawMessage) bool { return g == nil }) {
		return nil, false
	}
	groups := []Group{}
	for _, fields := range data {
		var g Group
		kept := func(name string) *scanner { return &scanner{kept: fields[name]} }
		if fields["labels"] != nil {
			g.Key = kept("labels").key()
		}
		g.Pushed = unixTime(kept(pushTimeName).gauge())
		g.ExpiresAfter = kept(expiresAfterName).gauge()
		g.SilentSince = unixTime(kept(silentSinceName).gauge())
		families := maps.Clone(fields)
		delete(families, "labels")
		delete(families, "last_push_successful")
		g.Families = len(families)
		groups = append(groups, g)
	}
	return groups, true
}

func read(b []byte, reader func(*bytes.Reader) *scanner) ([]Group, error) {
	groups := []Group{}
	err := scanListing(reader(bytes.NewReader(b)), func(g Group) error {
		groups = append(groups, g)
		return nil
	})
	return groups, err
}

// FuzzListing checks that a listing is read as encoding/json reads it, wherever the buffer
// ends, and that no part of one is.
func FuzzListing(f *testing.F) {
	for _, s := range []string{
		`{"status":"success","data":[]}`,
		` { "status" : "success" , "data" : [ { "labels" : { "job" : "a" , "b" : "\"}\\" } } , {} ] } `,
		`{"status":"success","data":[{"x":[{},[],"",1,-2e3,true,null,{"y":"\u0041\\"}],"labels":{"job":"j"}}]}`,
		`{"status":"success","data":[{"push_time_seconds":{"metrics":[{"value":"1.7e9"}]},"push_\u0074ime_seconds":{"metrics":[{"value":"1.8e9"}]}}]}`,
		`{"status":"success","data":[{"labels":{"job":"j"},"promferry_expires_after_seconds":{"metrics":[{"value":"4"}]},"promferry_silent_since_timestamp_seconds":{"metrics":[{"value":"4"}]}}]}`,
		`{"status":"success","data":[{"labels":{"job":"a"},"labels":{"job":"b"}},{"labels":null},{"labels":3}]}`,
		`{"status":"error","data":[]}`, `{"data":[1]}`, `[]`, `<html>`, ``, `{"status":"success","data":null}`, "{\"status\":\"success\",\"data\":[{\"\xff\":1}]}",
	} {
		f.Add([]byte(s), uint8(1))
		f.Add([]byte(s), uint8(64))
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		if len(b) > maxKept {
			return
		}
		small := func(r *bytes.Reader) *scanner {
			return &scanner{r: iotest.DataErrReader(r), buf: make([]byte, int(size)+1)}
		}
		got, err := read(b, small)
		if !json.Valid(b) {
			return
		}
		want, ok := oracle(b)
		if ok != (err == nil) {
			t.Fatalf("error %v; encoding/json reads it: %v", err, ok)
		}
		if !ok {
			return
		}
		for i := range want { // A name that comes twice is two families to us, and one to a map.
			want[i].Families = max(want[i].Families, got[min(i, len(got)-1)].Families)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got\n%+v, want\n%+v", got, want)
		}
		whole := bytes.TrimRight(b, " \t\r\n")
		if len(whole) < 1000 {
			for end := range len(whole) {
				if _, err := read(whole[:end], small); err == nil {
					t.Fatalf("no error for %q", whole[:end])
				}
			}
		}
	})
}
