#!/usr/bin/env bash
# Runs commands from a copy of this repository in a Debian that has nothing installed yet. As root:
#
#   debootstrap --variant=minbase bookworm /tmp/bare
#   tests/bare_system.sh /tmp/bare run-scripts/setup.sh
#   tests/bare_system.sh /tmp/bare run-scripts/quickstart.sh
#   AS=nobody tests/bare_system.sh /tmp/bare run-scripts/setup.sh
#
# The root keeps what the commands install. Not part of CI: it downloads a system and takes minutes.
#   BINDS  files and folders of this host to show inside at the same path, separated by spaces, such
#          as its apt sources and certificates, or a folder of wheels that PIP_FIND_LINKS names
#   AS     the user to run as; root if not given
# Variables named PIP_* and SSL_CERT_FILE are passed on; nothing else of this host's environment is.
set -euo pipefail

if (($# < 2 || EUID != 0)); then
    echo "bare_system.sh: run it as root: tests/bare_system.sh ROOT COMMAND [ARGUMENT…]" >&2
    exit 2
fi
# In mount and process-id namespaces of its own, mounts and stray processes end with the command.
if [[ -z ${BARE_SYSTEM_INSIDE-} ]]; then
    export BARE_SYSTEM_INSIDE=1
    exec unshare --mount --pid --fork --kill-child --propagation private "$0" "$@"
fi

bare=$(realpath "$1")
shift
if [[ ! -x $bare/bin/bash ]]; then
    echo "bare_system.sh: no system in $bare; make one with debootstrap" >&2
    exit 2
fi

show() { # PATH: folders are bound for reading; files are copied, so that a package may replace them
    if [[ -d $1 ]]; then
        mkdir -p "$bare$1"
        mount --bind "$1" "$bare$1"
        mount -o remount,bind,ro "$bare$1"
    else
        mkdir -p "$bare${1%/*}"
        cp -L "$1" "$bare$1"
    fi
}
mount -t proc proc "$bare/proc"
mount --rbind /dev "$bare/dev"
mount --rbind /sys "$bare/sys"
for path in /etc/resolv.conf /etc/hosts ${BINDS-}; do show "$path"; done

# The files git would take, without the history, .venv and data of this checkout.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$bare/srv/localopt"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from - |
    tar --extract --no-same-owner --directory "$bare/srv/localopt"

environment=(HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8)
mapfile -t -O ${#environment[@]} environment < <(env | grep -E '^(PIP_|SSL_CERT_FILE=)')
as_user=()
[[ -z ${AS-} ]] || as_user=(setpriv "--reuid=$AS" --clear-groups)
time chroot "$bare" /usr/bin/env -i --chdir=/srv/localopt "${environment[@]}" "${as_user[@]}" "$@"
