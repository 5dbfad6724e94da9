#!/usr/bin/env bash
# recipe/digits-vit-adamw.yml on two replicas. Arguments go to main.py.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" recipe/digits-vit-adamw.yml "$@"
