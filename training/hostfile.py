"""DeepSpeed's hostfile, read strictly: ``python -m training.hostfile FILE`` prints its hosts.

DeepSpeed passes a host's name on to ssh and to shells as it stands, and ssh takes one that begins
with a hyphen for an option. So whoever starts something by a hostfile has it read here first.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .settings import text_of
from .values import ConfigError, absolute, shortened

MOST = 100_000  # replicas

_LINE = re.compile(r"(\S+)\s+slots=0*([1-9]\d{0,5})", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# RFC 1123's, and underscores, which container networks put into names.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+")  # `ipaddress` takes anything for an IPv6 scope


def slots(hostfile: str) -> dict[str, int]:
    """The slots of each host, in their order.

    Raises:
        ConfigError: if the file cannot be read, or a line is not like ``node1 slots=8``.
    """
    path = absolute(hostfile)
    try:
        lines = text_of(path).split("\n")
        if lines[0].startswith("\ufeff"):
            raise ConfigError("it begins with a byte order mark (BOM): save it as plain UTF-8")
    except ConfigError as error:
        raise ConfigError(f"hostfile {path}: {error}") from None
    found: dict[str, int] = {}
    for line in lines:
        line = line.partition("#")[0].strip()
        if not line:
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ConfigError(f"hostfile {path}: {shortened(line)} is not like `node1 slots=8`")
        if not is_host(parts[1]):
            raise ConfigError(
                f"hostfile {path}: {shortened(line)}: {shortened(parts[1])} is neither a host's "
                "name (letters, digits, hyphens and dots, such as node1.cluster) nor an IP address"
            )
        if parts[1] in found:
            raise ConfigError(f"hostfile {path}: {shortened(line)} names {parts[1]} a second time")
        found[parts[1]] = int(parts[2])
    if not found:
        raise ConfigError(
            f"hostfile {path}: it lists no host: write one line per host, such as "
            "`localhost slots=2`"
        )
    if sum(found.values()) > MOST:
        raise ConfigError(f"hostfile {path}: {sum(found.values())} slots, more than {MOST}")
    return found


def is_host(text: str) -> bool:
    """Whether it is the name or the address of a host, perhaps with a ``user@`` before it."""
    user, at, host = text.rpartition("@")
    if at and not _USER.fullmatch(user):
        return False
    if _ADDRESS.fullmatch(host):
        try:
            ipaddress.ip_address(host)
            return True
        except ValueError:
            if ":" in host or host.replace(".", "").isdecimal():
                return False
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints a host on each line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if len(given) != 1:
            raise ConfigError("give one file: python -m training.hostfile FILE")
        hosts = slots(str(Path(given[0]).absolute()))
    except ConfigError as error:
        print(f"training.hostfile: {error}", file=sys.stderr)
        return 2
    print(*hosts, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
