#!/usr/bin/env bash
# What only a GPU can show, in five minutes of one card each, the most wanted first:
#
#     benchmarks/on_gpu.sh tests [FOLDER]    that it is right there
#     benchmarks/on_gpu.sh speed [FOLDER]    how fast it is, as tables
#
# Each part has its own time limit, and its output is kept in FOLDER (.localopt/gpu). At the end a line
# for each part: its seconds, and why it failed if so. Exit status 1 if one did.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:-} folder=${2:-.localopt/gpu}
python=.venv/bin/python
[[ -x $python ]] || { echo "on_gpu.sh: no .venv: run run-scripts/setup.sh first" >&2; exit 2; }
case $what in tests | speed) ;; *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
mkdir -p "$folder" || exit 2
export OMP_WAIT_POLICY=PASSIVE
failed=0 summary=()

# part NAME SECONDS COMMAND …
part() {
    local name=$1 limit=$2 started=$SECONDS status why=""
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.txt" 2>&1
    status=$?
    if ((status)); then
        failed=1
        ((status == 124 || status == 137)) && why="not through in $limit s" || why="exit status $status"
        why+=": $(grep -E "Error|FAILED|^main.py:" "$folder/$name.txt" | tail -n 1 | cut -c 1-200)"
    fi
    [[ $what == speed ]] && grep -E "^\||, torch " "$folder/$name.txt"
    [[ $what == tests ]] && grep -E "^(FAILED|ERROR)|(passed|failed).* in " "$folder/$name.txt"
    summary+=("$(printf '%-24s %4d s  %s' "$name" $((SECONDS - started)) "${why:-ok}")")
}

test_() { # NAME SECONDS ARGUMENTS …
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider -rfE "$@"
}

{
    git log -1 --format="commit %h" 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
        echo "no GPU: this shows only that the parts run"
    "$python" -c 'import platform, torch; print("Python", platform.python_version(), "torch",
        torch.__version__, "CUDA", torch.version.cuda, "cores", __import__("os").cpu_count())'
} | tee "$folder/machine.txt"

if [[ $what == tests ]]; then
    test_ randaugment 20 -m gpu tests/data/test_randaugment_triton.py tests/data/test_randaugment.py
    test_ rules 55 -n auto tests/gpu/test_rules.py
    test_ program 55 -n 4 tests/gpu/test_program.py
    test_ watch 40 -n 6 tests/gpu/test_watch.py
    test_ compression-scaling 45 -n auto tests/gpu/test_compression.py tests/gpu/test_grad_scaler.py
    test_ host-synchronisations 25 -n 2 tests/gpu/test_host_synchronisations.py
    test_ from-scratch 25 -n 6 tests/gpu/test_from_scratch.py
    test_ fast-tests 35 -n auto -m "not slow" tests
else
    part throughput 100 "$python" -m benchmarks.throughput
    part fed 60 "$python" -m benchmarks.fed --models resnet50
    part profile 35 "$python" -m benchmarks.throughput --profile
    part randaugment 15 "$python" -m benchmarks.randaugment
    part deterministic 50 "$python" -m benchmarks.throughput --deterministic
    part loader 40 "$python" -m benchmarks.data_path --short
fi
printf '%s\n' "" "${summary[@]}" | tee "$folder/$what.txt"
exit $failed
