#!/usr/bin/env bash
# Makes .venv at the repository's root with everything the project needs, and the system packages
# under it. Run it as often as you like: it does what is missing, in under a second when nothing is.
#
#   run-scripts/setup.sh
#   PYTHON=/path/to/python3.12 run-scripts/setup.sh
#
# Which build of torch comes (CPU or CUDA) is pip's own configuration: its index and find-links.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/.venv/bin/python
stamp=$root/.venv/setup.sha256

say() { printf 'setup.sh: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# The path is part of it: what pip installs from this folder doesn't survive a move.
fingerprint() {
    { printf '%s\n' "$root"; cat requirements*.txt pyproject.toml run-scripts/setup.sh; } | sha256sum
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

up_to_date() {
    [[ -x $python && -f $stamp && $(<"$stamp") == "$(fingerprint)" ]] || return 1
    [[ -z ${PYTHON-} || $(version_of "$PYTHON") == "$(version_of "$python")" ]]
}

# The first Python that numba and torch have wheels for. Printing nothing means there is none.
find_python() {
    local candidate
    local candidates=("$python" python3.11 python3.12 python3 /usr/bin/python3)
    [[ -z ${PYTHON-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        case $(version_of "$candidate") in
            # Not the venv's own: that one may have to be made again.
            3.11 | 3.12) "$candidate" -c 'import sys; print(sys._base_executable)'; return ;;
        esac
    done
}

# Debian's names of what is not there. It looks for the thing and not for the package, so an OpenCV
# or a Python that was built by hand counts.
missing_packages() {
    local base=$1 version=
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    if [[ -z $base ]]; then
        printf '%s\n' python3 python3-venv python3-dev
        return
    fi
    version=$(version_of "$base")
    "$base" -c 'import ensurepip' 2>/dev/null || echo "python$version-venv"
    "$base" -c 'import os, sysconfig
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
        echo "python$version-dev"
}

install_packages() {
    local install=(apt-get install --no-install-recommends "$@")
    command -v apt-get >/dev/null ||
        die "these are missing (by Debian's names): $*; install what your system calls them"
    ((EUID == 0)) || die "system packages are missing; run this first: sudo ${install[*]}"
    say "installing system packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    # A package list that is absent or too old is the usual reason for the first try to fail.
    "${install[@]}" -y || { apt-get update && "${install[@]}" -y; } ||
        die "apt-get could not install: $*; its message is above"
}

make_venv() {
    local base=$1
    [[ $(version_of "$python") != "$(version_of "$base")" ]] ||
        ! "$python" -m pip --version &>/dev/null || return 0
    # venv keeps what it finds, also links to a Python that has gone and a pip that is half there.
    rm -rf .venv/bin/python* .venv/lib/python*/site-packages/pip-*.dist-info
    "$base" -m venv .venv
}

up_to_date && exit

base=$(find_python)
[[ -n $base || -z ${PYTHON-} ]] || die "PYTHON=$PYTHON is not a Python 3.11 or 3.12"
mapfile -t missing < <(missing_packages "$base")
((${#missing[@]} == 0)) || install_packages "${missing[@]}"
base=$(find_python)
[[ -n $base ]] || die "no Python 3.11 or 3.12; install one and name it: PYTHON=/path/to/python3.11"

mkdir -p .localopt
exec 9>.localopt/setup.lock
flock -n 9 || { say "another set-up is running in $root: waiting for it"; flock 9; }
up_to_date && exit

make_venv "$base"
# One command, so that torch is chosen together with everything that depends on it. FFCV comes as
# source: --use-pep517 builds it the same way with every version of pip. --no-compile: of all that
# comes little is ever imported; what is, Python compiles then, and keeps.
"$python" -m pip install --disable-pip-version-check --use-pep517 --no-compile \
    -r requirements.txt -e .
"$python" -m pip install --disable-pip-version-check --no-deps -r requirements-no-deps.txt
# -P: find localopt where pip put it, not in this folder. torchvision is left out: with a CPU-only
# torch it imports only after the repair in training/torchvision_repair.py.
modules='cv2, deepspeed, einops, ffcv, localopt, numba, PIL, pytest, scipy, sklearn, torch, wandb, yaml'
"$python" -P -c "import $modules" ||
    die "installed, but an import fails (above); remove $root/.venv and run this again"
# pip wrote this folder's path into the script's first line, which the kernel cuts at a space.
cat >.venv/bin/deepspeed <<'END'
#!/bin/sh
exec "${0%/*}/python" -m deepspeed.launcher.runner "$@"
END
fingerprint >"$stamp"
say "ready: $("$python" --version) in $root/.venv"
