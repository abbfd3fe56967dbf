# `make test` alone sets everything up, from a clean checkout: Python 3.11 or later, a C compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

MODEL ?=

.PHONY: install serve test check format clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quire needs Python 3.11 or later: make install PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# the model in the package answers at http://127.0.0.1:8000; another one: make serve MODEL=name-or-directory
serve: install
	$(BIN)/quire serve $(MODEL)

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
