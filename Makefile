# Everything runs inside .venv, which .ci/environment.py creates and refreshes. Paths are relative throughout, so that
# the folder may have any name. `make help` lists the targets.

PYTHON ?= python3
# One more than cores: some tests wait for other processes.
WORKERS ?= 3
ARGS ?=

RUN := .venv/bin/python -m

# One thread per process: the suite keeps every core busy by itself.
export OMP_NUM_THREADS := 1
export MPLBACKEND := Agg
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types imports suite long coverage smoke format goldens bench wheel clean distclean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

env: ## create or refresh .venv (does nothing when it is current)
	@"$(PYTHON)" .ci/environment.py

demo: env ## train, upcycle, prove and compare on 8x8 digits; writes demo/
	OMP_NUM_THREADS=2 .venv/bin/python examples/digits.py --out demo $(ARGS)

test: lint types imports suite ## lint, types, import contracts and the test-suite

lint: env ## ruff check and ruff format --check
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: env ## mypy --strict on moefx, passes and codegen
	$(RUN) mypy

imports: env ## import contracts: who may import whom
	.venv/bin/lint-imports --no-logo --no-cache

suite: env ## the test-suite (ARGS="-k name" for a part)
	$(RUN) pytest -n $(WORKERS) $(ARGS)

long: env ## every recipe on every tiny denoiser, each exported and compiled whole, before a release
	MOEFX_LONG=1 $(RUN) pytest -n $(WORKERS) tests/test_recipe_contract.py tests/backend_grid.py $(ARGS)

coverage: env ## the test-suite with coverage, which takes longer
	$(RUN) pytest -n $(WORKERS) --cov --cov-report=term:skip-covered $(ARGS)

smoke: env ## the tests that pre-commit runs, under 20 s
	$(RUN) pytest -q -p no:cacheprovider tests/test_smoke.py

format: env ## format and fix what ruff can fix
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

goldens: env ## write tests/goldens/ anew; review the difference with git diff
	$(RUN) pytest -q --update-goldens $(ARGS)

bench: env ## run every script in benchmarks/
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; .venv/bin/python "$$script" $(ARGS); done

wheel: env ## build dist/*.whl and dist/*.tar.gz
	$(RUN) build --no-isolation

clean: ## remove what builds, tests and the demo leave behind
	rm -rf build dist demo moefx.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find moefx passes codegen tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv
