package safeurl

import "strings"

// MaxShown is the length in bytes from which on Cut and CutError cut: that of a line of a log.
const MaxShown = 300

// Cut returns the first MaxShown bytes of a text, with "..." behind them where there are more. It
// is for texts that quote what another program sent, which can be of any length. Valid UTF-8 stays
// valid.
func Cut(s string) string {
	if len(s) <= MaxShown {
		return s
	}
	return strings.ToValidUTF8(s[:MaxShown], "") + "..."
}

// CutError returns err with its text cut by Cut. It wraps err. A nil error stays nil.
func CutError(err error) error {
	if err == nil || len(err.Error()) <= MaxShown {
		return err
	}
	return &cutError{err}
}

type cutError struct{ error }

func (e *cutError) Error() string { return Cut(e.error.Error()) }

func (e *cutError) Unwrap() error { return e.error }
