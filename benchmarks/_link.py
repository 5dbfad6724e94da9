"""Two hosts on one machine: namespaces with a link between them, capped if asked. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

# What keeps a host: the first process of its namespaces, until its standard input ends. When it
# goes, also because this program was killed, the kernel ends the others, and all else goes with
# them. A first process has to collect orphans that have ended; bash does.
_KEEPER = (
    'hostname "$1" && ip link set lo up && mount --bind "$2" /etc/hosts && echo ready && read -r _'
)
_NAMESPACES = {"net": "net", "uts": "uts", "mount": "mnt", "pid": "pid_for_children"}
_ADDRESSES = ("10.213.0.1", "10.213.0.2")  # seen by these two hosts only


@dataclass(frozen=True)
class Host:
    """A name, a network, mounts and processes of its own, which the process ``keeper`` holds."""

    name: str
    interface: str
    address: str
    keeper: int

    def command(self, command: Sequence[str], folder: Path | None = None) -> list[str]:
        """The line that runs ``command`` on this host, in ``folder`` or the current one."""
        enter = [f"--{kind}=/proc/{self.keeper}/ns/{file}" for kind, file in _NAMESPACES.items()]
        # The folder is the one that the host sees: something else may be mounted there.
        return ["nsenter", *enter, "--", "env", f"--chdir={folder or Path.cwd()}", *command]

    def start(
        self, command: Sequence[str], folder: Path | None = None, **options: object
    ) -> subprocess.Popen[str]:
        """Start a command on this host; what is left of it ends with the host."""
        line = self.command(command, folder)
        return subprocess.Popen(line, text=True, **options)  # type: ignore[call-overload]

    def run(self, *command: str) -> None:
        """Run a command on this host to its end.

        Raises:
            SystemExit: if it fails.
        """
        _run(self.command(command))


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts with a link between them; at the end they are gone, with all that runs on them.

    As Debian sets hosts up, each knows its own name as 127.0.1.1 and the other's as its address.

    Raises:
        SystemExit: without the rights or the programs (iproute2, util-linux).
    """
    names = ("hosta", "hostb")
    with ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory())
        hosts = []
        for name, address in zip(names, _ADDRESSES, strict=True):
            others = [f"{a} {n}" for n, a in zip(names, _ADDRESSES, strict=True) if n != name]
            known = Path(folder, name)
            known.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
            hosts.append(Host(name, "eth0", address, ends.enter_context(_kept(name, known))))
        a, b = hosts
        _run(
            ["ip", "link", "add", a.interface, "netns", str(a.keeper), "type", "veth",
             "peer", b.interface, "netns", str(b.keeper)]
        )  # fmt: skip
        for host in hosts:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", host.interface, "up")
        yield hosts


@contextmanager
def _kept(name: str, known: Path) -> Iterator[int]:
    """Keep the namespaces of a new host, with ``known`` as its /etc/hosts; yield the keeper."""
    new = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        keeper = subprocess.Popen(
            ["unshare", *new, "bash", "-c", _KEEPER, "bash", name, str(known)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise SystemExit("unshare is missing: install util-linux") from None
    with keeper:  # ends its standard input, and waits
        if keeper.stdout.readline() != "ready\n":
            raise SystemExit(f"{name}: {keeper.stderr.read().strip()} (needs root)")
        yield keeper.pid


@contextmanager
def capped_link(megabits: float) -> Iterator[list[Host]]:
    """Two hosts whose link carries at most ``megabits`` per second each way; removed at the end.

    Raises:
        SystemExit: without the rights or the programs (iproute2, util-linux).
    """
    with two_hosts() as hosts:
        for host in hosts:
            # The bucket holds 20 ms at full rate: the kernel's timer needs some, no sync fits in.
            burst = max(int(megabits * 1e6 / 8 * 0.02), 16_000)
            host.run(
                "tc", "qdisc", "add", "dev", host.interface, "root", "tbf",
                "rate", f"{megabits}mbit", "burst", str(burst), "latency", "200ms",
            )  # fmt: skip
        yield hosts


@dataclass(frozen=True)
class Here:
    """This machine, as a host of ranks that meet over loopback."""

    interface = "lo"
    address = "127.0.0.1"

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload]


def run_on(
    hosts: Sequence[Host | Here], module: str, *arguments: str, timeout: float, port: int = 29_400
) -> str:
    """Run ``python -m module`` as one gloo rank per host; return what rank 0 printed.

    Raises:
        SystemExit: if a rank fails, or ``timeout`` seconds pass.
    """
    processes = []
    for rank, host in enumerate(hosts):
        place = {
            "RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(len(hosts)),  # they share this machine's cores
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # no name leads back to a host's own address
            "RUST_LOG": "error",  # torchft tells of every quorum
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


def wire_bytes(interface: str | None = None) -> int:
    """Bytes that have left through an interface, by the kernel's count; by default gloo's."""
    wanted = interface or os.environ["GLOO_SOCKET_IFNAME"]
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == wanted:
            return int(counts.split()[8])
    raise SystemExit(f"there is no interface {wanted}")


def _run(line: Sequence[str]) -> None:
    try:
        subprocess.run(line, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{line[0]} is missing: install iproute2, util-linux") from None
    except subprocess.CalledProcessError as error:
        command = " ".join(line[line.index("--") + 1 :] if "--" in line else line)
        raise SystemExit(f"{command}: {error.stderr.strip()} (needs root)") from None
