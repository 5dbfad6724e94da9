"""The two hosts of benchmarks/_link.py with a disk each and sshd, and launchers started on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks._link import Host, two_hosts

from .patience import PATIENCE
from .program import ROOT

DISK = Path("/run")  # on each host a disk of its own, in memory


@contextmanager
def hosts_with_disks() -> Iterator[list[Host]]:
    """Two hosts; each has a copy of the repository at its place, and `DISK`, which starts empty.

    Nothing that is written there is seen by another host, or left when they are gone.

    Raises:
        SystemExit: without the rights or the programs.
    """
    with two_hosts() as hosts:
        for host in hosts:
            host.run("mount", "-t", "tmpfs", "tmpfs", str(DISK))
            host.run("mkdir", f"{DISK}/changes", f"{DISK}/work")
            layers = f"lowerdir={ROOT},upperdir={DISK}/changes,workdir={DISK}/work"
            host.run("mount", "-t", "overlay", "overlay", "-o", layers, str(ROOT))
            write(host, DISK / "hostfile", "hosta slots=1\nhostb slots=1\n")
        yield hosts


def seen(host: Host, path: Path) -> Path:
    """Where this process finds the file that ``host`` has at ``path``."""
    return Path(f"/proc/{host.keeper}/root", path.relative_to("/"))


def write(host: Host, path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file on ``host``, with the folders above it."""
    file = seen(host, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def serve_ssh(hosts: Sequence[Host]) -> None:
    """Let root on each host log in to all of them with a new key."""
    folder, (first, *_) = DISK / "ssh", hosts
    for host in hosts:
        write(host, folder / "config", f"""
            Host *
                IdentityFile {folder}/key
                StrictHostKeyChecking accept-new
                UserKnownHostsFile {folder}/known
            """, 0o644)  # fmt: skip
        write(host, folder / "sshd", f"""
            HostKey {folder}/hostkey
            AuthorizedKeysFile {folder}/key.pub
            PasswordAuthentication no
            PidFile none
            StrictModes no
            """)  # fmt: skip
        for name in ("key", "hostkey"):
            host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}")
        for name in ("key", "key.pub"):
            write(host, folder / name, seen(first, folder / name).read_text())
        host.run("mount", "--bind", f"{folder}/config", "/etc/ssh/ssh_config")
        own = Path("~root/.ssh").expanduser()
        if own.is_dir():  # its settings would come first
            host.run("mount", "-t", "tmpfs", "tmpfs", str(own))
        host.run("mkdir", f"{DISK}/sshd")  # sshd wants it
        host.run(_sshd(), "-f", f"{folder}/sshd")  # returns when it listens


def lacks_ssh() -> list[str]:
    """The Debian packages without which there is no launching by pdsh and ssh."""
    found = {
        "pdsh": shutil.which("pdsh"),
        "openssh-client": shutil.which("ssh"),
        "openssh-server": shutil.which(_sshd()),
    }
    return [package for package, program in found.items() if program is None]


def _sshd() -> str:
    return shutil.which("sshd") or "/usr/sbin/sshd"  # not on everybody's PATH


def launch(
    commands: Mapping[Host, Sequence[str]],
    environment: Mapping[str, str],
    logs: Path,
    seconds: float = PATIENCE,
) -> dict[str, tuple[int, str]]:
    """Run a command on each host, in the repository; return exit status and output, by host.

    What is not finished after ``seconds`` has status -1; the end of the hosts ends it.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    place = inherited | {"HOME": str(DISK)} | environment
    processes, ended = {}, {}
    for host, command in commands.items():
        with (logs / f"{host.name}.log").open("w") as log:
            processes[host] = host.start(
                command, ROOT, env=place,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
    deadline = time.monotonic() + seconds
    for host, process in processes.items():
        status = -1
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(max(0.0, deadline - time.monotonic()))
        ended[host.name] = (status, (logs / f"{host.name}.log").read_text())
    return ended
