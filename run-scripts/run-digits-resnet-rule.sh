#!/usr/bin/env bash
# recipe/digits-resnet-RULE.yml on two replicas:
#
#   run-scripts/run-digits-resnet-rule.sh easgd
#   run-scripts/run-digits-resnet-rule.sh overlap --track-replicas
#
# Arguments after the rule's name go to main.py.
set -euo pipefail

folder=$(dirname "${BASH_SOURCE[0]}")
recipe="recipe/digits-resnet-${1:-}.yml"
if [[ ! -f "$folder/../$recipe" ]]; then
    names=$(cd "$folder/../recipe" && printf '%s ' digits-resnet-*.yml | sed 's/digits-resnet-//g; s/\.yml//g')
    echo "run-digits-resnet-rule.sh: no rule '${1:-}': give one of $names" >&2
    exit 2
fi
exec "$folder/run.sh" "$recipe" "${@:2}"
