package outbox_test

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/promferry/promferry/outbox"
)

// FuzzRoundTrip checks that whatever is added comes back as it was, or is refused when it
// is added.
func FuzzRoundTrip(f *testing.F) {
	f.Add("http://pgw:9091", "backup", "instance", "web-1", "text/plain", []byte("a 1\n"))
	f.Add("", "a b/ü\n", "", "<&>\u2028", "", []byte{0, 0x1f, '\n'})
	f.Fuzz(func(t *testing.T, gateway, job, name, value, contentType string, body []byte) {
		for _, s := range []string{gateway, job, name, value, contentType} {
			if !utf8.ValidString(s) {
				return // pushgw.GroupingKey refuses it before.
			}
		}
		o := open(t, t.TempDir())
		want := &outbox.Entry{
			Op: outbox.Add, Gateway: gateway, Job: job, Labels: map[string]string{name: value},
			At: time.Unix(1790000000, 1).UTC(), ContentType: contentType, Body: append([]byte{}, body...),
		}
		add(t, o, want)
		waiting, err := o.Waiting(t.Context(), gateway)
		if err != nil || len(waiting) != 1 {
			t.Fatalf("%v, %v", waiting, err)
		}
		var got *outbox.Entry
		d, err := o.Deliver(t.Context(), waiting[0], time.Second, func(_ context.Context, e *outbox.Entry) error {
			got = e
			return nil
		})
		if err != nil || len(d.Rejected) != 0 || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v, %v\nwant %+v", got, d.Rejected, err, want)
		}
	})
}

// FuzzFile checks that a file with whatever in it is delivered as it says, or set aside,
// and stops nothing.
func FuzzFile(f *testing.F) {
	f.Add([]byte("{\"version\":1}\nbody"))
	f.Add([]byte("{}\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		o := open(t, dir)
		add(t, o, entry(outbox.Add, "a", "1"))
		if err := os.WriteFile(only(t, filepath.Join(dir, "outbox", "0*")), content, 0o600); err != nil {
			t.Fatal(err)
		}
		add(t, o, entry(outbox.Add, "a", "2"))
		sent, rejected := deliver(t, o, nil)
		if len(sent) == 0 || sent[len(sent)-1] != "a add 2" || len(sent)+rejected != 2 {
			t.Errorf("sent %q, %d rejected", sent, rejected)
		}
	})
}
