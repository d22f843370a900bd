# make demo | test | check | bench | setup: each sets up what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := align shards eval pipelines benchmarks tests

.PHONY: demo test check format lint types layers setup bench clean

demo: $(READY)
	$(BIN)/align demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

check: format lint types layers test

format: $(READY)
	$(BIN)/ruff format --check $(SOURCES)

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)

types: $(READY)
	$(BIN)/pyright

layers: $(READY)
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.kill
	$(BIN)/python -m benchmarks.embed
	$(BIN)/python -m benchmarks.index
	$(BIN)/python -m benchmarks.serve

setup: $(READY)

# The interpreter is checked first: pip's own message about it comes late and long.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with PYTHON=..., as in: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
