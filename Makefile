# One virtual environment, .venv; stamp files in it remember which extras it holds.
PYTHON ?= python3
# torch runs its own threads: with 2 workers on 2 cores, 1 each. Stolen work keeps the tests of a file in one worker,
# which makes what they share once.
PYTEST_ARGS ?= -n 2 --dist worksteal
PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test soak check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

quickstart: .venv/.run ## install, then shrink a small network on handwritten digits
	.venv/bin/gmn meta-train quickstart --resume

test: .venv/.test ## install with the test extras, then the whole test suite
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(PYTEST_ARGS)

soak: .venv/.test ## the long tests: runs that are killed again and again, thousands of changed files; 40 minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m soak $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz/soak.py --cases 400

check: .venv/.dev ## formatting, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.dev ## rewrite the code as ruff likes it
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml | .venv/bin/python
	$(PIP) install -e .
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(PIP) install -e '.[test]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(PIP) install -e '.[dev]'
	touch $@
