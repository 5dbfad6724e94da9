#!/usr/bin/env bash
# recipe/digits-resnet-sgd.yml on two replicas, as quickstart.sh runs its own. Arguments go to main.py.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh" --recipe-pth recipe/digits-resnet-sgd.yml "$@"
