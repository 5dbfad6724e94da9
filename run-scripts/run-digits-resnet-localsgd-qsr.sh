#!/usr/bin/env bash
# recipe/digits-resnet-localsgd-qsr.yml on two replicas. Arguments go to main.py.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" recipe/digits-resnet-localsgd-qsr.yml "$@"
