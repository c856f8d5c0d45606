# Everything a checkout can do. `make demo` and `make test` are all a newcomer needs; both imply `make setup`.

PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(CURDIR)/build/tools/bin
export PATH
BIN := .venv/bin
STAMPS := build/stamps
RUST_SOURCES := $(shell find native -name '*.rs' -not -path '*/fuzz/*' -o -name Cargo.toml) Cargo.toml Cargo.lock
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo         the main job on two real VMs: boots them, runs fio and a kernel build, prints a table'
	@echo 'make test         every test but the long ones'
	@echo 'make test-long    the tests that run for many minutes'
	@echo 'make check        formatters, linters, type checkers'
	@echo 'make fuzz         every fuzz target for SECONDS=60 each; `make fuzz/store/arena` runs one'
	@echo 'make bench-NAME   a benchmark: store, transport, fairness, fs, swap'
	@echo 'make setup        install what is missing (the others imply it)'
	@echo 'make clean        remove build products; VM images are kept, `make distclean` removes them too'

.PHONY: setup
setup: $(STAMPS)/venv

$(STAMPS)/packages: host/setup.sh
	@mkdir -p $(STAMPS)
	@host/setup.sh packages
	@touch $@

$(STAMPS)/rust: host/setup.sh $(STAMPS)/packages
	@host/setup.sh rust
	@touch $@

$(STAMPS)/venv: pyproject.toml $(RUST_SOURCES) $(STAMPS)/rust
	@host/setup.sh venv
	@touch $@

$(STAMPS)/conformance: $(STAMPS)/rust
	@host/setup.sh conformance
	@touch $@

$(STAMPS)/peers: $(STAMPS)/rust
	@host/setup.sh peers
	@touch $@

$(STAMPS)/deny: $(STAMPS)/rust
	@host/setup.sh deny
	@touch $@

.PHONY: demo
demo: setup
	$(BIN)/python -m tmem_host.demo

.PHONY: test test-rust test-python test-long
test: test-rust test-python

test-rust: setup
	cargo test --profile test-fast --workspace --exclude tmem-py
	RUSTFLAGS='--cfg shuttle' cargo test --target-dir target/shuttle -p tmem-store --test shuttle
	RUSTFLAGS='--cfg shuttle' cargo test --target-dir target/shuttle -p tmem-guest --lib in_any_order

test-python: setup
	$(PYTEST) tests -m 'not long'

test-long: setup $(STAMPS)/conformance
	cargo test --profile test-fast --workspace --exclude tmem-py -- --ignored
	$(PYTEST) tests -m long --timeout 7200

.PHONY: check
check: setup $(STAMPS)/deny
	$(BIN)/ruff format --check host guest tests bench
	$(BIN)/ruff check host guest tests bench
	$(BIN)/mypy
	PYTHONPATH=host:guest $(BIN)/lint-imports
	cargo fmt --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	shellcheck host/setup.sh .ci/run $(shell git ls-files '*.sh')
	$(BIN)/ansible-lint -q --offline ansible
	cargo deny -L error check bans licenses sources

# Every crate with a fuzz/ directory, by its name below native/, and what stands in its fuzz_targets/.
FUZZ_TARGETS := $(patsubst native/%.rs,fuzz/%,$(subst /fuzz/fuzz_targets,,$(wildcard native/*/fuzz/fuzz_targets/*.rs)))
SECONDS ?= 60

$(STAMPS)/fuzz: $(STAMPS)/rust
	@host/setup.sh fuzz
	@touch $@

.PHONY: fuzz $(FUZZ_TARGETS)
fuzz: $(FUZZ_TARGETS)

# What libFuzzer finds goes to fuzz/corpus, which is not kept; seeds/ is, and is run by the crate's tests.
$(FUZZ_TARGETS): fuzz/%: $(STAMPS)/fuzz
	@mkdir -p native/$(*D)/fuzz/corpus/$(*F) native/$(*D)/fuzz/seeds/$(*F)
	cargo +nightly fuzz run --fuzz-dir native/$(*D)/fuzz --target-dir target/fuzz $(*F) \
		native/$(*D)/fuzz/corpus/$(*F) native/$(*D)/fuzz/seeds/$(*F) -- -max_total_time=$(SECONDS) -print_final_stats=1

bench-%: setup
	@host/setup.sh packages bench
	$(BIN)/python bench/$*.py

# The peer of tmemd's vsock device takes minutes to build, and nobody else is measured against it.
bench-transport: $(STAMPS)/peers

.PHONY: clean distclean
clean:
	rm -rf target build/stamps build/demo build/bench
distclean: clean
	rm -rf build .venv
