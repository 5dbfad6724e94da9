"""Ports that nobody else takes between being chosen and being listened on."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

# Below those that the system gives out by itself, to whoever connects or asks for any port.
FIRST, LAST = 20_000, 30_000


def free_port() -> int:
    """A port of this machine that no other caller has had lately."""
    with Path(tempfile.gettempdir(), f"localopt-ports-{os.getuid()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or FIRST)
        while True:
            port = port + 1 if port < LAST else FIRST
            with socket.socket() as found:
                try:
                    found.bind(("127.0.0.1", port))
                except OSError:
                    continue
            break
        file.truncate(0)
        file.write(str(port))
    return port
