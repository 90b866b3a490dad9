# Everything runs in .venv. The package is installed there as links to the sources, so that an edit needs no
# new install; a test compares the wheel, which is what a user gets, with the sources.

PYTHON ?= python3
MODEL ?= convnet
BIN := .venv/bin
CODE := src callbacks tests $(wildcard benchmarks examples)
# Folders, since a file that comes or goes changes its folder.
FOLDERS := $(shell find src/gradiometer callbacks -type d -not -name '__pycache__')
# Two processes of one thread: faster here than one process of two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo dashboard quick test lint format docs-tables benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/all ## create .venv with the pinned dependencies and the package in it

demo: .venv/demo ## train a small model under the instruments: MODEL=convnet (default) or MODEL=gpt
	$(BIN)/gradiometer demo --model $(MODEL)

dashboard: .venv/demo ## show runs/ in TensorBoard
	$(BIN)/tensorboard --logdir runs

quick: lint ## lint, types, and the quick tests of the folders you changed and of those above them
	$(PYTEST) -m "not slow" $$($(BIN)/python tests/quick.py)

test: lint ## lint, types, every test, doctests, a wheel
	$(PYTEST)
	$(PYTEST) --doctest-modules --pyargs gradiometer gradiometer.callbacks
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel --no-isolation

lint: .venv/all ## style and types, nothing is changed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy -p gradiometer

format: .venv/all ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs-tables: .venv/all ## write the tables of docs/observables.md and docs/limits.md from the code
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/limits.py

benchmark: .venv/all ## run every script in benchmarks/
	set -e; for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script; done

clean: ## remove .venv and everything built; runs/ is kept
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src callbacks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The package with one of its sets of dependencies, again when their list or the list of files has changed.
.venv/demo .venv/all: setup.cfg pyproject.toml constraints.txt $(FOLDERS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	rm -rf build
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation \
	    --editable '.[$(@F)]' --config-settings editable_mode=strict
	touch $@
