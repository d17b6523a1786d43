# `make serve` and `make test` work on a machine with Python 3.11+, pip, make and gcc, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test test-rest test-pylate test-all test-clients clients fuzz soak check audit lock bench bench-peers clean

# Versions and hashes of `make lock`, and nothing that these do not name. torch comes in many builds of a version, so it
# has no hash: the machine's index decides, CPU or CUDA.
PIP := $(BIN)/python -m pip install --quiet
LOCKED := $(PIP) --require-hashes --no-deps --requirement

$(VENV)/.serve: pyproject.toml constraints.txt requirements/serve.txt
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements/serve.txt
	$(PIP) --constraint constraints.txt torch
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.serve requirements/dev.txt
	$(LOCKED) requirements/dev.txt
	touch $@

# Serve the embedded all-MiniLM-L6-v2 on 127.0.0.1:8000. Other models: make serve ARGS="PATH_OR_HUB_ID --port 9000".
serve: $(VENV)/.serve
	$(BIN)/cenote serve $(ARGS)

# A process more than two cores have, as tests of servers wait for other processes. One thread each: the models are so
# small that threads would only wait for each other. Where a test takes more of them, those that wait sleep: spinning,
# they take the processor from those that they wait for. Bytecode is kept, whatever the environment says: these processes
# and a hundred that they start would compile the same files again and again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Bodies and answers of all dialects, and every figure against the reference by one kernel path: that of CENOTE_ISA, or the
# fastest here.
test: $(VENV)/.dev
	$(PYTEST) -m "not full and not pylate" $(ARGS)

# The rest: the other kernel paths that this processor has, and figures over more text.
test-rest: $(VENV)/.dev
	$(PYTEST) -m full $(ARGS)

# PyLate pins older releases of what .venv has; its packages lie over .venv's in the process that runs it.
.pylate/.installed: .ci/pylate.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --upgrade --target .pylate --no-deps --requirement .ci/pylate.txt
	touch $@

# ColBERT folders as PyLate itself runs them.
test-pylate: .pylate/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pylate tests/models/test_pylate.py $(ARGS)

# Packages of the clients, by environments in which they can be installed together. Those of `heavy` lie over .venv's.
.clients/one/.installed .clients/two/.installed .clients/misc/.installed .clients/heavy/.installed: \
.clients/%/.installed: clients/requirements/%.txt $(VENV)/.dev
	$(PYTHON) -m venv .clients/$*
	test $* != heavy || ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages \
		> "$$(echo .clients/heavy/lib/python3*/site-packages)/over.pth"
	.clients/$*/bin/python -m pip install --quiet --require-hashes --no-deps --requirement $<
	touch $@

clients/js/node_modules/.package-lock.json: clients/js/package-lock.json
	npm ci --prefix clients/js --omit=dev --no-audit --no-fund
	touch $@

# Real clients against real servers, of those that are quick to install; a machine without node fails.
LIGHT := .clients/one/.installed .clients/two/.installed clients/js/node_modules/.package-lock.json
test-clients: $(LIGHT)
	OMP_NUM_THREADS=1 $(BIN)/python -m clients one two js

# All of them, and the page docs/clients.md.
clients: $(LIGHT) .clients/misc/.installed .clients/heavy/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m clients

# The whole test suite.
test-all: test test-rest test-pylate test-clients

# Generated requests, others each time; a failure names its seed.
fuzz: REQUESTS ?= 10000
fuzz: SEED ?= $(shell date +%s)
fuzz: $(VENV)/.dev
	FUZZ_REQUESTS=$(REQUESTS) FUZZ_SEED=$(SEED) $(PYTEST) -n 0 -s --show-capture=no tests/server/test_fuzz.py $(ARGS)

# A server under mixed load: memory, descriptors, threads and latencies must stay flat. 20 minutes; fewer than 12
# (ARGS="--minutes 12") are too few to tell.
soak: $(VENV)/.dev
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Lint, formatting, types, how much a reader must hold in mind, and licences.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python checks/reading.py
	$(BIN)/python checks/environment.py

# The locked packages against the published advisories. Needs an index that serves them: a package without an answer fails.
audit: $(VENV)/.dev
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	.audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements/serve.txt $(ARGS)
	.audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements/dev.txt $(ARGS)

# Write requirements/ by constraints.txt and what the installed packages require, after either has changed; those of the
# clients by their `.in`, where versions stay that fit. What lies over .venv (`heavy`) is listed by hand.
lock: $(VENV)/.dev
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python checks/environment.py --lock
	for name in one two misc; do $(BIN)/uv pip compile clients/requirements/$$name.in --quiet --generate-hashes \
		--python-version 3.11 --no-annotate --no-header --output-file clients/requirements/$$name.txt || exit 1; done

# Embedding, forwards, fewer bits, reranking, search and serving. Minutes each; run on a quiet machine.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.embed $(ARGS)
	$(BIN)/python -m benchmarks.forward $(ARGS)
	$(BIN)/python -m benchmarks.quantize $(ARGS)
	$(BIN)/python -m benchmarks.rerank $(ARGS)
	$(BIN)/python -m benchmarks.search $(ARGS)
	$(BIN)/python -m benchmarks.serve $(ARGS)

# Cenote beside other engines, each in an environment of its own under .bench/ (some 10 GB, made once).
# ARGS="--quick" proves that it runs; ARGS="--peers vllm infinity --workloads mixed" takes a part.
bench-peers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.peers $(ARGS)

clean:
	rm -rf $(VENV) .clients clients/js/node_modules .audit .bench .pylate .pytest_cache .mypy_cache .ruff_cache
