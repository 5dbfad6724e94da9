"""Where the replicas find each other at the start: the store that rank 0 keeps."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from localopt.errors import AbsentRankError, ranks_text

from . import launchers
from .values import ConfigError

_LOOK = 0.1  # seconds between looks for those that have not come


def met(rank: int, world_size: int, patience: timedelta) -> dist.Store:
    """The store, once all replicas have come to it.

    Args:
        rank: this one's.
        world_size: how many there are.
        patience: how long the first waits for the last.

    Raises:
        ConfigError: if some do not come, or rank 0 cannot keep the store.
        AbsentRankError: if rank 0 has died before all had come.
    """
    arrival = _Arrival(rank, world_size, patience)
    store = arrival.store()
    arrival.wait(store)
    return store


class _Arrival:
    """One rank's way to the others."""

    def __init__(self, rank: int, world_size: int, patience: timedelta) -> None:
        self._rank, self._world_size, self._patience = rank, world_size, patience
        self._host, self._port = launchers.meeting_point()
        self._began = time.monotonic()

    def store(self) -> dist.Store:
        """The store; torchrun's own, where there is one."""
        keeps = self._rank == 0 and not launchers.keeps_the_store()
        listener = self._listener() if keeps else self._reached()
        try:
            return dist.TCPStore(
                self._host, self._port, self._world_size, keeps, self._patience,
                wait_for_workers=False, multi_tenant=True,
                master_listen_fd=listener.detach() if listener else None,
            )  # fmt: skip
        except RuntimeError as error:  # of which the store's own are
            if "EADDRINUSE" in str(error):
                raise self._in_use() from None
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"no store at {self._host}:{self._port}: {reason}") from None

    def _listener(self) -> socket.socket | None:
        """A socket at the address that the others use, and at no other of this host's.

        None where that address is none of this host's own: then the store listens on all.
        """
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError:
            return None
        for family, *_, where in sorted(found, key=lambda info: info[0] != socket.AF_INET):
            loops = ipaddress.ip_address(where[0].partition("%")[0]).is_loopback
            if loops and launchers.replicas_here() < self._world_size:
                continue  # what the host's own name leads to on Debian; not to others
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
                listener.listen(4096)
            except OSError as error:
                listener.close()
                if error.errno == errno.EADDRINUSE:
                    raise self._in_use() from None
            else:
                return listener
        return None

    def _in_use(self) -> ConfigError:
        return ConfigError(
            f"port {self._port}, at which the replicas are to meet, is in use on "
            f"{socket.gethostname()}, perhaps by another run: give deepspeed or torchrun another "
            "one with --master_port"
        )

    def _reached(self) -> None:
        """Wait until rank 0 listens."""
        reason = ""
        while True:
            try:
                socket.create_connection((self._host, self._port), 5).close()
                return
            except OSError as error:
                reason = f"{self._host}:{self._port}: {error.strerror or error}"
            self._look([0], reason)

    def wait(self, store: dist.Store) -> None:
        """Wait until all have come."""
        start = launchers.restarts()  # torchrun may keep its store from one to the next
        keys = [f"localopt/arrived/{start}/{rank}" for rank in range(self._world_size)]
        try:
            store.set(keys[self._rank], "")
            while not store.check(keys):
                absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
                if absent:
                    self._look(absent, f"at {self._host}:{self._port}")
        except RuntimeError as error:
            if isinstance(error, AbsentRankError):
                raise
            reason = str(error).partition("\n")[0]
            raise AbsentRankError(
                f"rank 0, or a launcher, has died before all had come ({reason})"
            ) from None

    def _look(self, absent: list[int], where: str) -> None:
        """Raise if those that are absent have been waited for too long."""
        waited = time.monotonic() - self._began
        if waited > self._patience.total_seconds():
            raise ConfigError(
                f"not all {self._world_size} replicas met: {ranks_text(absent)} did not come "
                f"within {waited:.0f} s ({where}): see docs/cluster.md, and --master_addr and "
                "--master_port of the launcher"
            )
        time.sleep(_LOOK)
