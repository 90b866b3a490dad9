# Everything runs in .venv, on the installed package: what is tested is what a user gets.

PYTHON ?= python3
MODEL ?= convnet
BIN := .venv/bin
CODE := src callbacks tests $(wildcard benchmarks examples)
# Folders too, so that a deleted file counts as a change.
SOURCES := $(shell find src/gradiometer callbacks -not -name '__pycache__' -not -name '*.pyc')

.DEFAULT_GOAL := help
.PHONY: help install demo dashboard test lint format docs-tables benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/package ## create .venv with the pinned dependencies and install the package in it

demo: .venv/package ## train a small model under the instruments: MODEL=convnet (default) or MODEL=gpt
	$(BIN)/gradiometer demo --model $(MODEL)

dashboard: .venv/package ## show runs/ in TensorBoard
	$(BIN)/tensorboard --logdir runs

test: lint ## lint, types, tests, doctests, a wheel
	$(BIN)/pytest
	$(BIN)/pytest --doctest-modules --pyargs gradiometer gradiometer.callbacks
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

lint: .venv/package ## style and types, nothing is changed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy -p gradiometer

format: .venv/package ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs-tables: .venv/package ## write the tables of docs/observables.md from the words in the code
	$(BIN)/python docs/tables.py

benchmark: .venv/package ## run every script in benchmarks/
	set -e; for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script; done

clean: ## remove .venv and everything built; runs/ is kept
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src callbacks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The dependencies, when their list has changed.
.venv/dependencies: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt setuptools wheel
	rm -rf build
	$(BIN)/pip install -c constraints.txt --no-build-isolation '.[all]'
	touch $@

# The package alone, when a source file has changed; build/ may hold files that are gone.
.venv/package: .venv/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@
