# `make` lists the targets. A target that needs the environment makes it first; after that it takes no time.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests
# Files of tests that run side by side: they wait for processes more than they compute. A file's tests share
# its services, so they stay together.
JOBS ?= 3
FIND_PYTHON = test -n "$(PYTHON)" || { echo "$@: found no Python 3.11 or newer: install one, or set PYTHON=..."; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup clients serve test quick example-files docs-examples api-fuzz chaos chaos-replicas replicas-test soak compose-test kubernetes-test ray ray-setup ray-test dashboard docs docs-serve diagrams fuzz lint format lock sbom bench bench-peers bench-vllm bench-gpu bench-tables clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make .venv with every pinned package

$(VENV)/ready: requirements/all.txt .ci/setup.py
	@$(FIND_PYTHON)
	@$(PYTHON) .ci/setup.py $(VENV)

serve: $(VENV)/ready ## serve the adapters of the zoo on port 8000 (settings: docs/settings.md)
	$(BIN)/python -m service serve

# Other projects' clients need older versions of our packages, so they get an environment of their own.
CLIENTS := runs/clients

clients: $(VENV)/ready ## make the environment of Triton's and KServe's clients, which some tests run
	@$(BIN)/python .ci/clients.py $(CLIENTS)

# Where promtool, nginx, chromium or the clients cannot be had, their tests are skipped; with CI=true they fail.
test: $(VENV)/ready ## run all tests, 20 to 40 minutes on two cores; TESTS=tests/adapters runs some
	@.ci/promtool || true
	@.ci/nginx || true
	@.ci/chromium || true
	@$(BIN)/python .ci/clients.py $(CLIENTS) || echo "clients: the tests of other projects' clients are skipped"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

quick: $(VENV)/ready ## run the tests that are not slow, about two minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(TESTS)

example-files: $(VENV)/ready ## write the files that examples of the pages read into this folder
	$(BIN)/python -m tests.support.example_files .

docs-examples: $(VENV)/ready ## run every example of every page, with thirty tasks for docs/tutorial.md
	DOCS_EXAMPLES=all $(BIN)/python -m pytest tests/docs/test_examples.py
	$(BIN)/python -m tests.support.page_examples

api-fuzz: $(VENV)/ready ## test the OpenAPI document with new requests, about ten minutes: docs/api.md
	API_FUZZ_EXAMPLES=400 API_FUZZ_WORKERS=2 $(BIN)/python -m pytest tests/http/test_openapi.py

chaos: $(VENV)/ready ## inject every fault into a running service, under eight minutes on two cores
	$(BIN)/python -m chaos

chaos-replicas: $(VENV)/ready ## break replicas and the store that they share, about eight minutes on two cores: docs/replicas.md
	$(BIN)/python -m chaos.replicas

replicas-test: $(VENV)/ready ## two replicas as processes, stopped and killed, about a minute: docs/replicas.md
	REPLICAS_TEST=1 $(BIN)/python -m pytest tests/replicas

soak: $(VENV)/ready ## ten minutes of uploads and predictions; memory, descriptors and latency must stay flat
	$(BIN)/python -m chaos.soak --plot runs/soak.svg

# No prerequisite: it needs only Docker and Python.
compose-test: ## build and run deploy/compose.yaml with this machine's Docker, test it, and remove it: docs/operate.md
	@$(FIND_PYTHON)
	@$(PYTHON) deploy/compose_test.py

# checkov and the schemas of other projects need other versions of our packages, so they get an environment of their own.
KUBERNETES := runs/kubernetes

kubernetes-test: ## render deploy/kubernetes and check it against schemas and policies, without a cluster: docs/kubernetes.md
	@$(FIND_PYTHON)
	@test -x $(KUBERNETES)/bin/checkov || { $(PYTHON) -m venv $(KUBERNETES) && $(KUBERNETES)/bin/pip install -q \
		kubernetes-validate==1.37.0 checkov==3.3.30 cloudcoil-models-prometheus-operator==0.80.1.0; }
	@$(KUBERNETES)/bin/python deploy/kubernetes_test.py

# Ray brings thirty packages that nothing else needs, so it gets an environment on top of .venv.
RAY := runs/ray
RAY_CONFIG ?= deploy/ray/serve.yaml

ray-setup: $(VENV)/ready ## make the environment of deploy/ray
	@$(BIN)/python .ci/ray_environment.py $(RAY) $(VENV)

ray: ray-setup ## serve on Ray Serve, on this machine, port 8000: docs/ray.md; RAY_CONFIG=... is another file
	$(RAY)/bin/python -m deploy.ray $(RAY_CONFIG)

ray-test: ray-setup ## faults on a Ray cluster of several nodes on this machine, about ten minutes: docs/ray.md
	$(BIN)/python -m pytest tests/deploy/test_ray_live.py tests/deploy/test_ray_batch.py
	$(RAY)/bin/python -m chaos.ray_cluster

dashboard: $(VENV)/ready ## write the Grafana dashboard from deploy/panels.py
	$(BIN)/python -m deploy.dashboard

docs: $(VENV)/ready ## build the documentation as a site, which needs no network to read: runs/site/index.html
	@$(BIN)/python -m docs.build

DOCS_ADDRESS ?= 127.0.0.1:8001

docs-serve: $(VENV)/ready ## show the site on port 8001 and build it again when a page changes; DOCS_ADDRESS=...
	@$(BIN)/python -m docs.build --serve $(DOCS_ADDRESS)

diagrams: $(VENV)/ready ## draw docs/diagrams/*.svg from docs/diagrams/draw.py
	@$(BIN)/python -m docs.diagrams.draw

# Not a dependency: it has wheels for few versions of Python.
FUZZ_RUNS ?= 1000000

fuzz: $(VENV)/ready ## fuzz the readers of what strangers send, under ten minutes; FUZZ_RUNS=... each: docs/hostile-input.md
	$(BIN)/pip install -q atheris==3.0.0
	for name in adapter_file spec request; do $(BIN)/python -m tests.fuzz $$name --runs $(FUZZ_RUNS) || exit 1; done

lint: $(VENV)/ready ## check style, types (mypy strict) and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/ready ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Other projects' servers need other versions of our packages, so they get an environment of their own.
PEERS := runs/peers

bench: $(VENV)/ready ## run the CPU benchmarks, under 12 minutes on two cores; writes runs/benchmarks/cpu/*.json
	@test -x $(PEERS)/bin/python || echo "bench: there is no $(PEERS), so the step 'peers' will fail: make bench-peers"
	$(BIN)/python -m benchmarks sets cpu

bench-peers: ## make the environment of Infinity and LitServe, which the last step of bench needs
	@$(FIND_PYTHON)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q torch==2.13.0 "infinity-emb[server,torch]==0.0.78" litserve==0.2.19

bench-vllm: ## make the environment of vLLM on a CPU, for `python -m benchmarks vllm`
	@$(FIND_PYTHON)
	.ci/vllm $(PYTHON)

# No prerequisite: a machine with a GPU may have its own torch. BENCH_PYTHON=python3 uses it.
BENCH_PYTHON ?= $(BIN)/python

bench-gpu: ## run the GPU benchmarks, under 25 minutes on one H100 with 16 cores; BENCH_PYTHON=... runs them
	$(BENCH_PYTHON) -m benchmarks sets gpu

bench-tables: $(VENV)/ready ## write the tables of docs/benchmarks.md from the files of bench and bench-gpu
	@$(BIN)/python -m benchmarks tables

sbom: $(VENV)/ready ## write runs/sbom.cdx.json, the packages of .venv as a CycloneDX document
	@mkdir -p runs
	@$(BIN)/python .ci/sbom.py $(VENV) runs/sbom.cdx.json

lock: ## write requirements/*.txt, every package with its hashes, after a change of constraints.txt or pyproject.toml
	@$(FIND_PYTHON)
	$(PYTHON) .ci/lock.py

clean: ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
