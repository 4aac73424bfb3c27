# Every target works on a fresh clone: it makes .venv, installs what it needs, builds, and runs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCE := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
DATA   ?=

.PHONY: help demo test lint bench fuzz crash soak docs examples format clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/built ## Send a series through a node to a second one; DATA=<folder> for your own files
	$(BIN)/dicomnode demo $(if $(DATA),"$(DATA)")

test: $(VENV)/developed ## Run all tests, Rust and Python
	. $(BIN)/activate && cargo test --workspace --quiet
	$(BIN)/python -m pytest

lint: $(VENV)/developed docs ## Check format, types, imports, the stub and the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest dicomnode._core
	$(BIN)/lint-imports
	cargo fmt --all --check
	. $(BIN)/activate && cargo clippy --workspace --all-targets --quiet -- -D warnings

bench: $(VENV)/benched ## Measure speed beside the peers and print a table
	. $(BIN)/activate && cargo build --release --quiet --package dicomnode-core --example receive_floor
	$(BIN)/python -m benchmarks

fuzz: $(VENV)/fuzzed ## Fuzz each target for SECONDS (600), or only TARGET
	. $(BIN)/activate && python -m tests.fuzz --seconds $(or $(SECONDS),600) $(if $(TARGET),--target $(TARGET))

crash: $(VENV)/developed ## Kill a node ROUNDS times (200) under load, and look for what is lost
	$(BIN)/python -m tests.faults.crash --rounds $(or $(ROUNDS),200)

soak: $(VENV)/developed ## Load a node for SECONDS (1800); what it uses has to come back
	$(BIN)/python -m tests.faults.soak --seconds $(or $(SECONDS),1800)

docs: $(VENV)/developed ## Build the documentation into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

examples: $(VENV)/developed ## Run every example against real associations
	$(BIN)/python -m pytest tests/e2e/test_examples.py

format: $(VENV)/developed ## Format all code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

clean: ## Delete what was built
	rm -rf $(VENV) target docs/_build demo-output python/dicomnode/*.so

$(VENV)/bin/maturin:
	$(PYTHON) -m venv $(VENV)
	# The C++ codecs are built with cmake and ninja, which come as wheels.
	$(BIN)/python -m pip install --quiet --upgrade pip maturin cmake ninja

$(VENV)/built: $(VENV)/bin/maturin pyproject.toml $(SOURCE)
	. $(BIN)/activate && maturin develop --release --quiet
	@touch $@

$(VENV)/developed: $(VENV)/built
	. $(BIN)/activate && maturin develop --release --quiet --extras test,lint,docs
	@touch $@

$(VENV)/benched: $(VENV)/built
	. $(BIN)/activate && maturin develop --release --quiet --extras bench
	@touch $@

$(VENV)/fuzzed: $(VENV)/developed
	. $(BIN)/activate && maturin develop --release --quiet --extras fuzz
	@touch $@
