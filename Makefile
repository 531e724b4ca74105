# make quickstart   a first search, a few minutes
# make test         what to run after a change: one of each kind of thing
# make test-slow    whole runs, kills, clusters; CI runs both
# make test-soak    the longest of these, which CI has no time for: before a release
# make lint         ruff and mypy
# All of them create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest

.PHONY: quickstart test test-slow test-soak lint

quickstart: $(VENV)/.installed
	$(BIN)/paretoray search configs/quickstart.yaml

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not soak and not alone" --numprocesses=$(TEST_WORKERS) --dist=loadfile
	$(PYTEST) -m "not slow and not soak and alone"

test-slow: $(VENV)/.installed
	$(PYTEST) -m "slow and not alone" --numprocesses=$(TEST_WORKERS) --dist=loadfile
	$(PYTEST) -m "slow and alone" || [ $$? -eq 5 ]  # there may be none

test-soak: $(VENV)/.installed
	$(PYTEST) -m soak

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
