.DEFAULT_GOAL := help
.PHONY: help setup test test-fast lint bench

PYTHON := .venv/bin/python
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

setup:  ## make .venv, or bring it up to date
	@run-scripts/setup.sh

test:  ## lint and run all tests
	@run-scripts/test.sh

test-fast:  ## lint and the tests that need one process
	@run-scripts/test.sh -m "not slow" -n $$(nproc)

lint: setup  ## ruff, mypy, and shellcheck where it is installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	if command -v shellcheck >/dev/null; then shellcheck run-scripts/*.sh tests/*.sh .ci/run; fi

bench: setup  ## every benchmark in its short form
	@$(if $(BENCHMARKS),,echo "no benchmarks in benchmarks/")
	@set -e; for file in $(BENCHMARKS); do \
	    module=$${file%.py}; echo "== $$file"; $(PYTHON) -m "$$(echo "$$module" | tr / .)" --short; \
	done
