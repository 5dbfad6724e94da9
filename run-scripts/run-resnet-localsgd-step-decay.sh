#!/usr/bin/env bash
# recipe/resnet152-localsgd-step.yml on the hosts of the file hostfile. Arguments go to main.py; --plan only tells what
# it would cost.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" recipe/resnet152-localsgd-step.yml "$@"
