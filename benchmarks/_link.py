"""Two hosts on one machine: network namespaces with a capped link between them. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A namespace, its interface and its address."""

    namespace: str
    interface: str
    address: str

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on this host."""
        prefix = ["ip", "netns", "exec", self.namespace]
        return subprocess.Popen([*prefix, *command], text=True, **options)  # type: ignore[call-overload]


@contextmanager
def capped_link(megabits: float) -> Iterator[list[Host]]:
    """Two hosts whose link carries at most ``megabits`` per second each way; removed at the end.

    Raises:
        SystemExit: without the rights or the programs (iproute2).
    """
    tag, subnet = f"lo{os.getpid() % 100_000}", f"10.213.{os.getpid() % 250}"
    hosts = a, b = [Host(f"{tag}n{i}", f"{tag}v{i}", f"{subnet}.{i + 1}") for i in (0, 1)]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", a.interface, "type", "veth", "peer", "name", b.interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.namespace)
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/30", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
            # The bucket holds 20 ms at full rate: the kernel's timer needs some, no sync fits in.
            burst = max(int(megabits * 1e6 / 8 * 0.02), 16_000)
            _run(
                "tc", "-n", host.namespace, "qdisc", "add", "dev", host.interface, "root", "tbf",
                "rate", f"{megabits}mbit", "burst", str(burst), "latency", "200ms",
            )  # fmt: skip
        yield hosts
    finally:
        for host in hosts:
            with suppress(SystemExit):
                _ip("netns", "del", host.namespace)


def run_on(
    hosts: Sequence[Host], module: str, *arguments: str, timeout: float, port: int = 29_400
) -> str:
    """Run ``python -m module`` as one gloo rank per host; return what rank 0 printed.

    Raises:
        SystemExit: if a rank fails, or ``timeout`` seconds pass.
    """
    processes = []
    for rank, host in enumerate(hosts):
        place = {
            "RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0",
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # the addresses have no names
        }  # fmt: skip
        processes.append(
            host.start(
                [sys.executable, "-m", module, *arguments],
                env=os.environ | place, stdout=subprocess.PIPE if rank == 0 else None,
            )
        )  # fmt: skip
    try:
        told, _ = processes[0].communicate(timeout=timeout)
        codes = [process.wait(timeout=30) for process in processes]
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{module}: not finished within {timeout:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"{module}: ranks ended with {codes}")
    return told


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is missing: install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)}: {error.stderr.strip()} (needs root)") from None
