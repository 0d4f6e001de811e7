package reverse

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/promferry/promferry/internal/safeurl"
)

// redirected returns a failure for an answer to a scrape of asked that sends the scraper to another
// client or port: the scraper may follow, with its own credentials. Any other answer is nil.
func redirected(asked *url.URL, resp *http.Response) *failure {
	if resp.StatusCode/100 != 3 {
		return nil
	}
	locations := resp.Header["Location"]
	if len(locations) == 0 || len(locations) == 1 && stays(asked, locations[0]) {
		return nil
	}
	// Its user-info and query may be secret.
	shown := safeurl.Line(safeurl.Text(strings.Join(locations, ", ")))
	return &failure{
		status: http.StatusBadGateway, result: "redirect",
		text: fmt.Sprintf("redirect to %.200q refused, it leaves client %.60q, port %d: make the URL that it leads to a pull target of its own",
			shown, asked.Hostname(), portOf(asked)),
	}
}

// stays tells whether a Location leads to the client and port of asked, however it is read.
func stays(asked *url.URL, location string) bool {
	ref, err := url.Parse(location)
	switch {
	case err != nil || strings.Contains(location, `\`):
		return false
	case ref.Host == "" && (ref.Scheme != "" || strings.HasPrefix(ref.Path, "//")): // Browsers read http:/host and ///host.
		return false
	}
	to := asked.ResolveReference(ref)
	return (to.Scheme == "http" || to.Scheme == "https") && to.User == nil && to.Hostname() == asked.Hostname() && portOf(to) == portOf(asked)
}
