#!/usr/bin/env bash
# Lint, then the tests; sets up first if that is missing. Arguments go to pytest:
#
#   run-scripts/test.sh
#   run-scripts/test.sh tests/unit -k period
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
run-scripts/setup.sh
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest "$@"
