.DEFAULT_GOAL := help
.PHONY: help setup test test-fast test-frameworks lint bench

PYTHON := .venv/bin/python
FRAMEWORKS := .localopt/frameworks
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## make .venv, or bring it up to date
	@run-scripts/setup.sh

test:  ## lint and run all tests
	@run-scripts/test.sh

test-fast:  ## lint and the tests that need one process
	@run-scripts/test.sh -m "not slow" -n $$(nproc)

# A venv of its own over .venv: what .venv has is not installed again, and nothing in it changes.
test-frameworks: setup  ## the tests with Accelerate, Lightning and transformers, which it installs
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -c 'import site, sys; \
	    open(site.getsitepackages()[0] + "/below.pth", "w").write(sys.argv[1])' \
	    "$$($(PYTHON) -c 'import site; print(site.getsitepackages()[0])')"
	$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check -e '.[examples]'
	$(FRAMEWORKS)/bin/python -m pytest -n 0 -m frameworks

lint: setup  ## ruff, mypy, and shellcheck where it is installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	if command -v shellcheck >/dev/null; then shellcheck run-scripts/*.sh tests/*.sh .ci/run; fi

bench: setup  ## every benchmark in its short form
	@$(if $(BENCHMARKS),,echo "no benchmarks in benchmarks/")
	@set -e; for file in $(BENCHMARKS); do \
	    module=$${file%.py}; echo "== $$file"; $(PYTHON) -m "$$(echo "$$module" | tr / .)" --short; \
	done
