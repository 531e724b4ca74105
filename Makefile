# make quickstart | make test: both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2

.PHONY: quickstart test lint

quickstart: $(VENV)/.installed
	$(BIN)/paretoray search configs/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not alone" --numprocesses=$(TEST_WORKERS) --dist=loadfile
	$(BIN)/python -m pytest -m alone

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
