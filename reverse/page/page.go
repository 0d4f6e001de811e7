// Package page writes the web pages of the proxy and of the agent.
package page

import (
	"embed"

	"github.com/promferry/promferry/internal/page"
)

//go:embed *.html style.css
var files embed.FS

var pages = page.New(files)
