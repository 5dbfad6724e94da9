#!/usr/bin/env bash
# The main job, from nothing to a result: two replicas of a small ViT learn the digits with
# LocalAdamW and QSR. Sets up and writes the data first if they are missing. Needs no GPU, and uses
# those there are. Arguments go to main.py; relative paths count from the repository's root:
#
#   run-scripts/quickstart.sh
#   run-scripts/quickstart.sh --seed 1 --h-base 8
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
grace=60 # seconds between the first signal and the last: ranks may end their round and save
settings=(--recipe-pth recipe/digits-vit-localadamw-qsr.yml "$@")

if grep -qvE '^(#|(localhost|127\.0\.0\.1)([[:space:]]|$)|[[:space:]]*$)' hostfile; then
    echo "quickstart.sh: hostfile lists other hosts, this script is for one; where ssh reaches" \
        "them, run: .venv/bin/deepspeed --hostfile hostfile main.py $*" >&2
    exit 2
fi

run-scripts/setup.sh

# Where main.py will look for its data set. Asking also finds a wrong flag now, not later once per
# rank. The answer comes through descriptor 3, since --help writes to standard output; then there is
# none.
ask='
import os, sys
from training.config import ConfigError, absolute, load
try:
    config = load(sys.argv[1:])
    os.write(3, os.fsencode(absolute(config.data_pth) / config.data))
except ConfigError as problem:
    print(f"quickstart.sh: {problem}", file=sys.stderr)
    sys.exit(2)'
data=$("$python" -c "$ask" "${settings[@]}" 3>&1 >&2) || exit
[[ -n $data ]] || exit 0
[[ $data != */digits ]] || "$python" -m data.write digits --out "$data"

# DeepSpeed's launcher starts one process per slot. The shipped two slots are right for up to three
# GPUs (on one, both replicas share it); a hostfile that was edited is left alone. More are used in
# powers of two, which divide the batch.
launch=(--quiet --hostfile hostfile)
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true
if ((gpus > 3)) && [[ $(<hostfile) == "localhost slots=2" ]]; then
    hostfile=$(mktemp)
    echo "localhost slots=$gpus" >"$hostfile"
    # With a hostfile the launcher overwrites this variable, so its choice is passed as a flag.
    IFS=, read -ra ids <<<"${CUDA_VISIBLE_DEVICES:-$(seq --separator=, 0 $((gpus - 1)))}"
    count=1
    while ((count * 2 <= ${#ids[@]} && count < 32)); do count=$((count * 2)); done
    chosen=$(IFS=,; echo "${ids[*]:0:count}")
    launch=(--quiet --hostfile "$hostfile" --include "localhost:$chosen")
fi

# Told so, DeepSpeed's launcher doesn't warn that there is none.
((gpus)) || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

# A port that is free, so that two runs on one machine don't collide.
port=$("$python" -c 'import socket
print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
launch+=(--no_ssh_check --master_addr 127.0.0.1 --master_port "$port")

# DeepSpeed's runner passes no signal on, and its ranks would train without it. So it gets a process
# group of its own (set -m), and this script ends the group; $! is its number.
signal() { kill "-$1" -- "-$!" 2>/dev/null || true; }

running() { # is a process left in the group? Zombies don't count: a container may keep them
    local stat line fields
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        read -ra fields <<<"${line##*) }" # state, parent, process group
        [[ ${fields[2]} != "$!" || ${fields[0]} == Z ]] || return 0
    done
    return 1
}

finish() { # STATUS: leave once no rank is left
    local deadline=$((SECONDS + grace))
    while running; do
        ((SECONDS < deadline)) || signal KILL
        ((SECONDS < deadline + 10)) || break
        sleep 0.2
    done
    exit "$1"
}

stop() { # STATUS
    trap 'signal KILL' INT TERM HUP # the second time, at once
    signal TERM
    finish "$1"
}

trap 'rm -f ${hostfile:+"$hostfile"}' EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
set -m
.venv/bin/deepspeed "${launch[@]}" main.py "${settings[@]}" &
set +m
status=0
wait "$!" || status=$?
# The runner reports success even when the process under it was killed. Ranks still at work tell.
if ((status == 0)) && running && sleep 10 && running; then
    echo "quickstart.sh: the launcher died and its ranks train on: ending them; run this again" >&2
    stop 1
fi
finish "$status"
