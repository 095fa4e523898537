# `make` lists what there is. Everything that needs the environment makes it first; once it is there, that takes no time.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make .venv with every pinned package

$(VENV)/ready: pyproject.toml constraints.txt .ci/setup.py
	@test -n "$(PYTHON)" || { echo "setup: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }
	@$(PYTHON) .ci/setup.py $(VENV)

serve: $(VENV)/ready ## serve on port 8000 with the adapters of the zoo (settings: IDSPAM_*, see README)
	$(BIN)/python -m service

test: $(VENV)/ready ## every test; TESTS=tests/test_prompt.py for some
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/ready ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/ready ## let ruff format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
