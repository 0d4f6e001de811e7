# Each target installs what it needs into .tools; `rm -r .tools` undoes all of it.

# go.mod names the Go release that everything is built with, for its security fixes. Some
# distributions switch that off by GOTOOLCHAIN=local, in their go.env.
export GOTOOLCHAIN ?= auto

TOOLS := $(CURDIR)/.tools
BIN   := $(TOOLS)/bin

# The version in a tool's file name is its stamp: a new version is a new file.
GOTESTSUM     := $(BIN)/gotestsum-v1.13.0
GOLANGCI_LINT := $(BIN)/golangci-lint-v2.15.0
GOVULNCHECK   := $(BIN)/govulncheck-v1.9.0
NODE_EXPORTER := $(BIN)/node_exporter-v1.12.1
EXPORTER      := $(if $(NODE_EXPORTER_BIN),,$(NODE_EXPORTER))

# Build information, as `promferry --version` and promferry_build_info show it. The
# date is the commit's, so that one commit makes one binary.
VERSION  ?= $(or $(patsubst v%,%,$(shell git describe --tags --always --dirty 2>/dev/null)),unknown)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)
BRANCH   ?= $(shell git rev-parse --abbrev-ref HEAD 2>/dev/null)
DATE     ?= $(shell git log -1 --format=%cI 2>/dev/null)
X        := github.com/prometheus/common/version
LDFLAGS   = -s -w -X $X.Version=$(VERSION) -X $X.Revision=$(REVISION) -X $X.Branch=$(BRANCH) -X $X.BuildDate=$(DATE)

# The race detector needs cgo: a C compiler with its headers.
RACE = $(shell printf '\043include <stdlib.h>\nint main(void) { return 0; }\n' | $$(go env CC) -x c -o /dev/null - 2>/dev/null && echo -race)

.DEFAULT_GOAL := help
.PHONY: build test e2e upgrade browser lint vulndb fmt docs bench demo image tools clean help

build: ## build ./promferry, one static binary
	CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags '$(LDFLAGS)' -o promferry ./cmd/promferry

test: $(GOTESTSUM) ## unit tests, with the race detector where there is a C compiler
	$(GOTESTSUM) --format pkgname-and-test-fails -- $(RACE) -timeout 5m ./...

e2e: $(GOTESTSUM) tools ## end-to-end tests against real Prometheus, Pushgateway, node_exporter, systemd
	@tools/programs.sh $(TOOLS) nginx
	$(GOTESTSUM) --format testname -- -tags e2e -count=1 -timeout 20m ./e2e/...

# The version whose state directories and peers this one has to get along with.
PREVIOUS := ad8335220f2d706a40cad7b8c4b2a5ed17a4640d
MIXED    := ^Test(Forward|OnStop|Once|TypeClash|Batch.*|PushContract|Owner.*|NodeCut.*|Expire(AgentStops|GatewayRestart|Forgets|Once)|GatewayWithPrometheus|GatewayRestart|GatewayPair|Pull.*)$$

upgrade: $(GOTESTSUM) tools ## nodes of the previous version with hubs of this one, and the other way round
	@tools/previous.sh $(PREVIOUS) $(BIN)/promferry-$(PREVIOUS)
	for old in agent,run,record,push,delete,flush proxy,gateway,expire; do \
		OLD_BIN=$(BIN)/promferry-$(PREVIOUS) OLD_COMMANDS=$$old \
		$(GOTESTSUM) --format testname -- -tags e2e -count=1 -timeout 20m -run '$(MIXED)' ./e2e || exit; \
	done

browser: $(GOTESTSUM) ## the web pages in a real Chromium; SCREENSHOTS=dir keeps what they look like
	@tools/programs.sh $(TOOLS) chromium
	cd e2e/browser && $(GOTESTSUM) --format testname -- -tags e2e -count=1 -timeout 5m ./...

lint: $(GOLANGCI_LINT) $(GOVULNCHECK) ## go vet, golangci-lint, govulncheck, shellcheck, promtool, go.mod tidy
	@tools/programs.sh $(TOOLS) shellcheck promtool
	PATH="$(BIN):$$PATH" shellcheck .ci/run $$(find . -name '*.sh' -not -path './.tools/*')
	PATH="$(BIN):$$PATH"; promtool=$${PROMTOOL_BIN:-promtool}; \
	$$promtool check rules monitoring/alerts.yml && $$promtool test rules monitoring/*_test.yml
	go mod tidy -diff
	go vet -tags e2e,bench ./...
	cd e2e/browser && go mod tidy -diff && go vet -tags e2e ./... && $(GOLANGCI_LINT) run
	$(GOLANGCI_LINT) config verify
	$(GOLANGCI_LINT) run
	cd tools/vulndb && go mod download golang.org/x/vulndb
	$(GOVULNCHECK) -db "file://$$(cd tools/vulndb && go list -m -f '{{.Dir}}' golang.org/x/vulndb)/data/osv" ./...

vulndb: ## check against the newest database of known vulnerabilities from now on
	cd tools/vulndb && go get golang.org/x/vulndb@latest

fmt: $(GOLANGCI_LINT) ## format the Go code
	$(GOLANGCI_LINT) fmt

docs: ## write docs/configuration.md anew
	WRITE_DOCS=1 go test -count=1 -run TestConfigurationPage ./cmd/promferry

bench: build tools ## measure every figure that the README claims
	@tools/programs.sh $(TOOLS) nginx
	go run -tags bench ./bench

demo: build $(EXPORTER) ## the main job on this machine, until Ctrl-C
	@go build -buildvcs=false -o $(BIN)/demo ./e2e/demo
	@$(BIN)/demo -promferry ./promferry

image: ## build the container image and run it
	docker/image.sh

tools: $(EXPORTER) ## install the real programs that e2e and bench run
	@tools/programs.sh $(TOOLS)

clean: ## remove what the other targets made
	rm -rf .tools promferry dist

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(GOTESTSUM):
	@tools/go-install.sh gotest.tools/gotestsum v1.13.0 $@

$(GOLANGCI_LINT):
	@tools/go-install.sh github.com/golangci/golangci-lint/v2/cmd/golangci-lint v2.15.0 $@

$(GOVULNCHECK):
	@tools/go-install.sh golang.org/x/vuln/cmd/govulncheck v1.9.0 $@

# Tests look for the plain name. Debian's older one does where this one cannot be built.
$(NODE_EXPORTER):
	@if tools/go-install.sh github.com/prometheus/node_exporter v1.12.1 $@; \
	then ln -sf $(@F) $(BIN)/node_exporter; \
	else tools/programs.sh $(TOOLS) node_exporter; fi
