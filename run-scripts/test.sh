#!/usr/bin/env bash
# Lint and types, then the tests, several at a time. Sets up first if that is missing. Arguments go
# to pytest:
#
#   run-scripts/test.sh
#   run-scripts/test.sh -m "not slow"
#   run-scripts/test.sh tests/localopt -k period
#   run-scripts/test.sh tests/localopt/test_period.py -n 0    # in this one process
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
run-scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
# A thousand processes would each compile what they import.
unset PYTHONDONTWRITEBYTECODE
# Many tests wait more than they compute: twice as many as cores, up to eight.
cores=$(nproc)
exec .venv/bin/python -m pytest -n "$((cores < 4 ? 2 * cores : 8))" --dist worksteal "$@"
