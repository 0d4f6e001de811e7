// A module of its own, so that the browser's driver is no dependency of the product.
module github.com/promferry/promferry/e2e/browser

go 1.26.0

replace github.com/promferry/promferry => ../..

require (
	github.com/chromedp/cdproto v0.159.0
	github.com/chromedp/chromedp v0.22.1
	github.com/promferry/promferry v0.0.0-00010101000000-000000000000
)

require (
	github.com/go-json-experiment/json v0.0.0-20260213210345-44df1a37e875 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.1 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)
