// Pins the database of known vulnerabilities that make lint checks against, and nothing is
// built of it: `make vulndb` takes the newest one. As a Go module it comes through the module
// proxy and is checked against the checksum database.
module github.com/promferry/promferry/tools/vulndb

go 1.26.0

require golang.org/x/vulndb v0.0.0-20261105234957-e22db6528018
