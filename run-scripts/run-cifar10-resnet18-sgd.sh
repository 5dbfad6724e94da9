#!/usr/bin/env bash
# recipe/cifar10-resnet18-sgd.yml on this host's replicas. Arguments go to main.py.
# CIFAR-10 has to be there: python -m data.write cifar10 --folder FOLDER --out .localopt/data/cifar10
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" recipe/cifar10-resnet18-sgd.yml "$@"
