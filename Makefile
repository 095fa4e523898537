# `make` lists what there is. Everything that needs the environment makes it first; once it is there, that takes no time.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests

.DEFAULT_GOAL := help
.PHONY: help setup clients serve test compose-test dashboard lint format bench bench-peers bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make .venv with every pinned package

$(VENV)/ready: pyproject.toml constraints.txt .ci/setup.py
	@test -n "$(PYTHON)" || { echo "setup: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }
	@$(PYTHON) .ci/setup.py $(VENV)

# Other projects' clients in an environment of their own: they want older versions of the same packages.
CLIENTS := runs/clients

clients: $(CLIENTS)/ready ## make the environment of Triton's and KServe's clients, for the tests

$(CLIENTS)/ready: .ci/clients.txt .ci/clients.py
	@test -n "$(PYTHON)" || { echo "clients: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }
	@$(PYTHON) .ci/clients.py $(CLIENTS)

serve: $(VENV)/ready ## serve on port 8000 with the adapters of the zoo (settings: IDSPAM_*, see README)
	$(BIN)/python -m service

test: $(VENV)/ready $(CLIENTS)/ready ## every test; TESTS=tests/adapters/test_prompt.py for some
	$(BIN)/python -m pytest $(TESTS)

# Needs Docker and Python alone: no prerequisite.
compose-test: ## build and run deploy/compose.yaml on this machine's Docker, and take it down again: docs/operate.md
	@test -n "$(PYTHON)" || { echo "compose-test: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }
	@$(PYTHON) deploy/compose_test.py

dashboard: $(VENV)/ready ## make the Grafana dashboard from deploy/panels.py
	$(BIN)/python -m deploy.dashboard

lint: $(VENV)/ready ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/ready ## let ruff format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Other projects' servers in an environment of their own: they want other versions of the same packages.
PEERS := runs/peers

bench: $(VENV)/ready ## benchmarks of a CPU: under 12 minutes on two cores, tables and runs/benchmarks/cpu/*.json
	@test -x $(PEERS)/bin/python || echo "bench: there is no $(PEERS), so the step 'peers' will fail: make bench-peers"
	$(BIN)/python -m benchmarks sets cpu

bench-peers: ## make the environment of Infinity and LitServe, for bench's last step
	@test -n "$(PYTHON)" || { echo "bench-peers: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q torch==2.13.0 "infinity-emb[server,torch]==0.0.78" litserve==0.2.19

# No prerequisite: a machine with a GPU may have torch of its own. BENCH_PYTHON=python3 uses it.
BENCH_PYTHON ?= $(BIN)/python

bench-gpu: ## benchmarks of one H100 with 16 cores: under 25 minutes; BENCH_PYTHON=... to run them with
	$(BENCH_PYTHON) -m benchmarks sets gpu

clean: ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
