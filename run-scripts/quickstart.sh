#!/usr/bin/env bash
# The main job, from nothing to a result: two replicas of a small ViT learn the digits with
# LocalAdamW and QSR, and a page draws what they did. Sets up and writes the data first if they are
# missing. Needs no GPU, and uses those there are. Arguments go to main.py:
#
#   run-scripts/quickstart.sh
#   run-scripts/quickstart.sh --seed 1 --h-base 8
set -euo pipefail
export REPORT=1
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" recipe/digits-vit-localadamw-qsr.yml "$@"
