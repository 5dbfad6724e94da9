#!/usr/bin/env bash
# Train by a recipe, on the hosts of the file hostfile. Sets up first if that is missing. Arguments
# after the recipe go to main.py; relative paths count from the repository's root:
#
#   run-scripts/run.sh recipe/digits-resnet-sgd.yml --seed 1
#   run-scripts/run.sh recipe/vit-b-localadamw-cosine.yml --plan    # what it would cost; trains nothing
#
# HOSTFILE=file names another hostfile. RESTARTS=n starts a run that has crashed again, from its newest
# checkpoint, up to n times. REPORT=1 draws the run when it is over, and says where the page is.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
grace=60 # seconds between the first signal and the last
hostfile=${HOSTFILE:-hostfile}
restarts=${RESTARTS:-0}
started=$EPOCHSECONDS
die() { echo "run.sh: $*" >&2; exit 2; }

[[ $# -gt 0 && $1 != -* ]] || die "give a recipe first, such as recipe/digits-resnet-sgd.yml"
[[ -f $1 ]] || die "recipe $1 is missing"
[[ -f $hostfile ]] || die "hostfile $hostfile is missing: write one line per host, such as" \
    "'localhost slots=2'"
[[ $restarts =~ ^[0-9]{1,6}$ ]] || die "RESTARTS is '$restarts': it must be a number, such as 3"
settings=(--recipe-pth "$@")

run-scripts/setup.sh

# DeepSpeed's launcher starts one process per slot. The shipped two slots are right for up to three
# GPUs (on one, both replicas share it); a hostfile that was edited is left alone. More are used in
# powers of two, which divide the batch.
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true
chosen=()
if ((gpus > 3)) && [[ $(<"$hostfile") == "localhost slots=2" ]]; then
    # With a hostfile the launcher overwrites this variable, so its choice is passed as a flag.
    IFS=, read -ra chosen <<<"${CUDA_VISIBLE_DEVICES:-$(seq --separator=, 0 $((gpus - 1)))}"
    count=1
    while ((count * 2 <= ${#chosen[@]} && count < 32)); do count=$((count * 2)); done
    chosen=("${chosen[@]:0:count}")
fi

plan=(--plan-hostfile "$hostfile" ${chosen:+--plan-gpus "${#chosen[@]}"})
for flag in "$@"; do
    case $flag in
        --help | -h) exec "$python" main.py --help ;;
        --plan*) exec "$python" main.py "${plan[@]}" "${settings[@]}" ;;
    esac
done

# Where main.py will look for its data set, where it will put the run, and on which hosts. Asking also
# finds a wrong flag or hostfile now, before anything is started by it.
ask='
import sys
from training.hostfile import slots
from training.settings import load
from training.values import ConfigError, absolute
try:
    hosts = slots(sys.argv[1])
    config = load(sys.argv[2:])
    print(absolute(config.data_pth) / config.data, absolute(config.log_pth), *hosts, sep="\n")
except ConfigError as problem:
    print(f"run.sh: {problem}", file=sys.stderr)
    sys.exit(2)'
places=$("$python" -c "$ask" "$hostfile" "${settings[@]}") || exit
{ IFS= read -r data && IFS= read -r runs && mapfile -t hosts; } <<<"$places"
[[ $data != */digits || -e $data/dataset.json ]] || "$python" -m data.write digits --out "$data"

launch=(--quiet --hostfile "$hostfile")

if grep -qvxE 'localhost|127\.0\.0\.1' <<<"$(printf '%s\n' "${hosts[@]}")"; then
    launch+=(--master_addr "${hosts[0]#*@}") # docs/cluster.md
else
    launch+=(--no_ssh_check --master_addr 127.0.0.1)
    if ((${#chosen[@]})); then
        temporary=$(mktemp)
        echo "localhost slots=$gpus" >"$temporary"
        launch+=(--hostfile "$temporary" --include "localhost:$(IFS=,; echo "${chosen[*]}")")
    fi
fi

# Told so, DeepSpeed's launcher doesn't warn that there is none.
((gpus)) || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

# DeepSpeed's runner passes no signal on, and its ranks would train without it. So it gets a process
# group of its own (set -m), and this script ends the group; $! is its number.
signal() { kill "-$1" -- "-$!" 2>/dev/null || true; }

group() { # its processes. Zombies don't count: a container may keep them
    local stat line fields
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        read -ra fields <<<"${line##*) }" # state, parent, process group
        [[ ${fields[2]} != "$!" || ${fields[0]} == Z ]] || echo "${stat//[!0-9]/}"
    done
}

running() { # is one left?
    [[ -n $(group) ]]
}

interrupt() { # the ranks, before the launcher passes it on as SIGTERM; it would show its Python
    local process words
    for process in $(group); do
        { mapfile -d '' -t words <"/proc/$process/cmdline"; } 2>/dev/null || continue
        [[ " ${words[*]:1:2} " != *" main.py "* ]] || kill -INT "$process" 2>/dev/null || true
    done
}

end() { # wait until no rank is left
    local deadline=$((SECONDS + grace))
    while running; do
        ((SECONDS < deadline)) || signal KILL
        ((SECONDS < deadline + 10)) || break
        sleep 0.2
    done
}

stop() { # STATUS
    trap 'signal KILL' INT TERM HUP # the second time, at once
    (($1 != 130)) || interrupt
    signal TERM
    end
    exit "$1"
}

draw() { # whatever comes of it, the run has succeeded
    local run
    trap 'exit 0' HUP INT TERM
    run=$(find "$runs" -mindepth 2 -maxdepth 2 -name summary.json -newermt "@$started" \
        -printf '%T@ %h\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-) || true
    [[ -z $run ]] || timeout --foreground --kill-after=5 60 "$python" -m training.report "$run" ||
        echo "run.sh: no report of $run, whose training has succeeded" >&2
}

trap 'rm -f ${temporary:+"$temporary"}' EXIT
while :; do
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    # A port that is free here, so that two runs on one machine don't collide; none of those that the
    # system gives out by itself, which somebody may have taken when the replicas meet.
    port=$("$python" -c 'import random, socket
for port in random.sample(range(20_000, 30_000), 1_000):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break')
    set -m
    .venv/bin/deepspeed "${launch[@]}" --master_port "$port" main.py "${settings[@]}" &
    set +m
    status=0
    wait "$!" || status=$?
    # The runner reports success even when the process under it was killed. Ranks at work tell.
    if ((status == 0)) && running && sleep 10 && running; then
        echo "run.sh: the launcher died and its ranks train on: ending them" >&2
        status=1
    fi
    ((status == 0)) || signal TERM
    end
    ((status)) || [[ -z ${REPORT-} ]] || draw
    # 2: a setting that cannot be; 130, 143: it was asked to stop.
    case $status in 0 | 2 | 130 | 143) exit "$status" ;; esac
    ((restarts-- > 0)) || exit "$status"
    echo "run.sh: the run ended with status $status: starting it again from its newest checkpoint" \
        "($restarts restarts left)" >&2
    [[ " ${settings[*]} " == *" --resume auto "* ]] || settings+=(--resume auto)
done
