# Every task that a person runs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PROVIDER ?= local
# One node is enough to look around; the tests cut a second one off.
NODES ?=
export PROVIDER

# Built with the features of the whole workspace, as the tests are: then one build serves all.
E2E := $(or $(CARGO_TARGET_DIR),target)/debug/ticketwave-e2e
# The benchmark is a workspace of its own.
BENCH_TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/bench
# The compiler that rust-toolchain.toml names is installed where it is missing. Where it cannot be had, the stable one builds.
PINNED := $(shell sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
ifneq ($(shell command -v rustup 2>/dev/null),)
ifeq ($(filter $(PINNED)-%,$(shell rustup toolchain list 2>/dev/null)),)
ifneq ($(shell rustup toolchain install $(PINNED) --profile minimal --component clippy,rustfmt --no-self-update >&2 && echo installed),installed)
$(warning Rust $(PINNED) cannot be installed; building with the stable toolchain)
export RUSTUP_TOOLCHAIN := stable
endif
endif
endif

# A shell with Rust on its PATH, also right after rustup was installed.
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: help
help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: e2e-tool ## Show the whole loop on a real cluster, with what is missing installed first
	$(E2E) demo --nodes $(or $(NODES),1)

.PHONY: run
run: e2e-tool ## Run all services on this machine, without Kubernetes, until Ctrl-C: FIRST_PORT=8080
	cargo build --workspace --bins
	$(E2E) run

.PHONY: demo-down
demo-down: cluster-down ## Remove what the demo left running

.PHONY: check
check: prerequisites ## The inner loop: format, lints, unit and property tests, docs, charts, benches that compile
	cargo fmt --all --check
	cargo fmt --check --manifest-path ticketing-workloads/bench/Cargo.toml
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --workspace --all-targets -- --deny warnings
	cargo test --workspace --lib --bins --examples --test generated --test bounds --test fuzz --test protocol_model --test charts --test docs --test makefile
	cargo test --workspace --doc
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --document-private-items
	CARGO_TARGET_DIR=$(BENCH_TARGET) cargo check --locked --manifest-path ticketing-workloads/bench/Cargo.toml

.PHONY: check-msrv
check-msrv: ## Build with the oldest compiler that is supported: rust-version in Cargo.toml
	version=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) && \
	rustup toolchain install "$$version" --profile minimal --no-self-update && \
	CARGO_TARGET_DIR=$(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/msrv cargo "+$$version" check --workspace --all-targets --locked

.PHONY: test
test: check test-flags test-services test-controllers e2e-tool ## Everything: check, services against PostgreSQL, controllers against an API server, scenarios on a cluster
	if [ "$(PROVIDER)" = local ]; then $(E2E) cluster up --nodes 1 && $(E2E) cluster down && cargo test --workspace --test local_cluster -- --test-threads=1; fi
	$(MAKE) e2e NODES=$(or $(NODES),2)

.PHONY: test-flags
test-flags: prerequisites ## Our evaluation of flags beside flagd's evaluators for Node and Python, which it installs
	cargo test --workspace --test flag_reference

.PHONY: fuzz
fuzz: prerequisites ## Fuzz what reads flags, contexts, OFREP bodies and sync messages; with cargo-fuzz where nightly Rust is: FUZZ_SECONDS=60 TARGET=
	if rustup toolchain list 2>/dev/null | grep -q ^nightly; then \
	  { command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz; } && \
	  for target in $(or $(TARGET),flag_documents contexts ofrep_bodies sync_messages); do \
	    found=$(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/fuzz-found/$$target && mkdir -p "$$found" && \
	    cargo +nightly fuzz run --fuzz-dir fuzz "$$target" "$$found" "fuzz/corpus/$$target" -- \
	      -max_total_time=$(or $(FUZZ_SECONDS),60) -max_len=16384 -timeout=5 -rss_limit_mb=1024 || exit 1; \
	  done; \
	else FUZZ_INPUTS=200000 cargo test --package resilience-operator --test fuzz; fi

.PHONY: test-services
test-services: e2e-tool ## The services against PostgreSQL, and all of them together on this machine
	$(E2E) packages
	# They wait more than they work, so more of them than there are cores at once.
	cargo test --workspace --test admin --test buyers --test server --test with_postgres -- --test-threads=$$(( $$(nproc) * 2 ))
	cargo build --workspace --bins
	cargo test --workspace --test local_stack -- --nocapture

.PHONY: test-controllers
test-controllers: e2e-tool ## The controllers against a real API server
	$(E2E) packages
	# They wait more than they work, so more of them than there are cores at once.
	cargo test --workspace --test bare_api_server --test controllers -- --test-threads=$$(( $$(nproc) * 3 / 2 ))

.PHONY: e2e
e2e: e2e-tool ## The scenarios on a real cluster: PROVIDER=local|kind|existing NODES=1..3
	cargo build --workspace --bins
	$(E2E) cluster down
	trap '$(E2E) cluster down' EXIT; NODES=$(or $(NODES),2) cargo test --workspace --test scenarios -- --test-threads=1 --nocapture

.PHONY: e2e-upgrade
e2e-upgrade: e2e-tool ## helm upgrade from version 0.1, built from git, while a recovery is in flight: PROVIDER=local|kind
	$(E2E) cluster down
	trap '$(E2E) cluster down' EXIT; NODES=$(or $(NODES),1) cargo test --workspace --test upgrade -- --test-threads=1 --nocapture

.PHONY: soak
soak: soak-services soak-operator soak-recovery ## All soaks: the services' memory under load, the operator killed at random, faults at random

.PHONY: soak-services
soak-services: e2e-tool release-services ## Load all services while things fail, and see whether they keep their memory: MINUTES=10
	$(E2E) soak --minutes $(or $(MINUTES),10)

.PHONY: soak-operator
soak-operator: e2e-tool ## Kill the operator 50 times at random, and judge from outside what it did: KILLS=50
	cargo build --workspace --bins
	$(E2E) cluster down
	trap '$(E2E) cluster down' EXIT; NODES=$(or $(NODES),2) KILLS=$(or $(KILLS),50) cargo test --workspace --test scenarios -- --test-threads=1 --nocapture an_operator_that_is_killed

.PHONY: soak-recovery
soak-recovery: e2e-tool ## Faults at random: each recovered as the policy says or explained, none twice, the operator's memory flat: MINUTES=30 SEED=
	cargo build --workspace --bins
	$(E2E) cluster down
	trap '$(E2E) cluster down' EXIT; NODES=$(or $(NODES),2) MINUTES=$(or $(MINUTES),30) cargo test --workspace --test scenarios -- --test-threads=1 --nocapture faults_at_random

.PHONY: bench
bench: bench-layers bench-flags bench-ofrep bench-goodput bench-mail bench-scale bench-recovery e2e-tool ## All figures: layers, flags, OFREP, goodput, mail, scale, recovery, how long a change of a policy takes to reach 20 pods
	$(E2E) bench

.PHONY: bench-layers
bench-layers: prerequisites ## What each layer costs per call, beside hand-written floors and other crates
	CARGO_TARGET_DIR=$(BENCH_TARGET) cargo run --release --quiet --manifest-path ticketing-workloads/bench/Cargo.toml

.PHONY: bench-flags
bench-flags: prerequisites ## What an evaluation of a flag costs, beside flagd's evaluator in Node
	mkdir -p $(BENCH_TARGET)/reference && cp e2e/clients/flagd-core-node/package*.json e2e/clients/flagd-core-node/flagd_core_bench.mjs $(BENCH_TARGET)/reference
	cd $(BENCH_TARGET)/reference && npm ci --no-audit --no-fund --ignore-scripts --silent
	CARGO_TARGET_DIR=$(BENCH_TARGET) FLAGD_CORE=$(BENCH_TARGET)/reference cargo run --release --quiet --manifest-path ticketing-workloads/bench/Cargo.toml -- flags

.PHONY: bench-ofrep
bench-ofrep: prerequisites ## How many flags the operator answers over OFREP, beside flagd's evaluator in Node, and how soon 1,000 clients hear of a change: FLAGD=path CASE_SECONDS=10
	cargo build --release --package e2e --bin ticketwave-e2e
	$(or $(CARGO_TARGET_DIR),target)/release/ticketwave-e2e ofrep

.PHONY: bench-goodput
bench-goodput: e2e-tool ## What the patterns are worth to a sale: ONLY=providers,hot,pods,finishing CASE_SECONDS=20
	cargo build --release --package ticketing-services --bin ticketing --package e2e --bin ticketwave-e2e
	$(or $(CARGO_TARGET_DIR),target)/release/ticketwave-e2e goodput $(if $(ONLY),--only $(ONLY)) $(if $(CASE_SECONDS),--case-seconds $(CASE_SECONDS))

.PHONY: bench-scale
bench-scale: prerequisites ## The operator with 1,000 and 10,000 fake pods: PEER='command' OPERATOR=path POLICIES=100,1000 QUICK=1
	cargo build --release --package e2e --bin ticketwave-e2e
	$(or $(CARGO_TARGET_DIR),target)/release/ticketwave-e2e scale $(if $(QUICK),--quick) $(if $(EVENTS),--events)

.PHONY: bench-recovery
bench-recovery: e2e-tool ## How long faults last with the operator and with a liveness probe alone, and what each restarts in vain
	$(E2E) cluster down
	trap '$(E2E) cluster down' EXIT; $(E2E) bench-recovery

.PHONY: bench-mail
bench-mail: e2e-tool ## How long two processes take for 20,000 mails, and that a minute of refusals loses none: MAILS=20000
	$(E2E) packages
	MAILS=$(or $(MAILS),20000) cargo test --package ticketing-services --test with_postgres -- --nocapture many_mails_are_sent
	MAILS=$(or $(MAILS),20000) REFUSE_SECONDS=60 cargo test --package ticketing-services --test with_postgres -- --nocapture many_mails_are_sent

.PHONY: release-services
release-services: prerequisites
	cargo build --release --package ticketing-services --bin ticketing

.PHONY: cluster-up
cluster-up: e2e-tool ## Bring up a real Kubernetes: PROVIDER=local (no Docker) or kind, NODES=1..3
	$(E2E) cluster up --nodes $(or $(NODES),1)

.PHONY: cluster-down
cluster-down: e2e-tool ## Take it down; nothing is left behind
	$(E2E) cluster down

.PHONY: cluster-status
cluster-status: e2e-tool ## Show the cluster, and where its logs and its kubeconfig are
	$(E2E) cluster status

.PHONY: dev
dev: e2e-tool ## Run the operator from the working tree against the running cluster
	cargo build --workspace --bin resilience-operator
	KUBECONFIG=$$($(E2E) cluster kubeconfig) && export KUBECONFIG && \
	kubectl=$$($(E2E) tool-path kubectl) && \
	"$$kubectl" apply --server-side --force-conflicts -f crds/yaml && \
	if "$$kubectl" get -n resilience-system deployment/resilience-operator >/dev/null 2>&1; then \
	  echo "scaling the installed operator to 0, so that this one leads" >&2; \
	  "$$kubectl" scale -n resilience-system deployment/resilience-operator --replicas=0; \
	else "$$kubectl" create namespace resilience-system --dry-run=client -o yaml | "$$kubectl" apply -f -; fi && \
	exec $(or $(CARGO_TARGET_DIR),target)/debug/resilience-operator --namespace resilience-system --listen 127.0.0.1:8080 --identity dev

.PHONY: images
images: e2e-tool ## Build the images without Docker, and load them into the cluster if it is up
	$(E2E) images

.PHONY: generate
generate: ## Write crds/yaml and the chart's copy from the Rust types
	cargo run --quiet --package crds --bin crdgen

.PHONY: audit
audit: ## Licences, advisories and bans (installs cargo-deny; needs a public network)
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check

.PHONY: e2e-tool
e2e-tool: prerequisites
	cargo build --workspace --bin ticketwave-e2e

# What is missing is installed, and said.
.PHONY: prerequisites
prerequisites:
	@command -v cargo >/dev/null || { echo "Rust is missing: install it from https://rustup.rs, then run make again" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "installing gcc, which Rust links with" >&2; \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev; \
	  else echo "not root: run  sudo apt-get install gcc libc6-dev" >&2; exit 1; fi; }
