"""Who started this process: one entry per launcher."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .values import ConfigError, shortened


@dataclass(frozen=True)
class Launcher:
    """A program that starts the replicas."""

    commands: tuple[str, ...] = ()  # among the first words of its own processes' command lines
    over_ssh: str = ""  # those of the process that it starts on other hosts through ssh
    hostfile_flags: tuple[str, ...] = ()  # for a host file, which may be missing for all it cares
    count: str = ""  # variable with the number of processes, if it gives them no RANK


LAUNCHERS = {
    "deepspeed": Launcher(
        ("deepspeed",), over_ssh="deepspeed.launcher.launch", hostfile_flags=("-H", "--hostfile")
    ),
    "torchrun": Launcher(commands=("torchrun", "torch.distributed.run")),
    "srun": Launcher(count="SLURM_STEP_NUM_TASKS"),
    "mpirun": Launcher(count="OMPI_COMM_WORLD_SIZE"),
    "mpiexec": Launcher(count="PMI_SIZE"),
}


def rank() -> int:
    """This process's rank, as the launcher says."""
    return int(os.environ.get("RANK", "0"))


def replicas() -> int:
    """How many processes the launcher has started on all hosts."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def replicas_here() -> int:
    """How many of them are on this host, as far as the launcher says."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def ranks_here() -> range:
    """Those of this host: launchers count through the hosts."""
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + replicas_here())


def meeting_point() -> tuple[str, int]:
    """Host and port at which the replicas meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def keeps_the_store() -> bool:
    """Whether the launcher itself keeps the store there: torchrun does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> str:
    """How often torchrun has started this process again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def below_one() -> bool:
    """Whether a launcher has started this process itself."""
    _, arguments, _ = next(_processes_above(), (0, [], Path()))
    return _launcher(arguments) is not None


def remark() -> str:
    """What a user may not have meant: no launcher, or one that knows of this host only; or ""."""
    start = "`deepspeed --hostfile hostfile main.py` starts one replica per slot"
    if "RANK" not in os.environ:
        return f"started without a launcher, this process trains alone; {start}"
    for _, arguments, _ in _processes_above():
        launcher = _launcher(arguments)
        # Its runner, and not what that starts on each host, has the flag.
        if launcher and launcher.hostfile_flags and launcher.over_ssh not in " ".join(arguments):
            names = {argument.partition("=")[0] for argument in arguments}
            if names.isdisjoint((*launcher.hostfile_flags, *_ELSEWHERE)):
                return f"deepspeed was given no --hostfile, and uses this host alone; {start}"
    return ""


_ELSEWHERE = ("--num_gpus", "--num_nodes", "--include", "-i", "--launcher")


def check() -> None:
    """Refuse a start that would leave replicas out, or let each train alone.

    Raises:
        ConfigError: if a launcher's host file is missing, it gives its processes no ranks, or says
            only a part of what they need to find each other.
    """
    _check_environment()
    for _, arguments, folder in _processes_above():
        if launcher := _launcher(arguments):
            _require_hostfile(launcher, arguments, folder)
    if "RANK" in os.environ:
        return
    for launcher in LAUNCHERS.values():
        if launcher.count and int(os.environ.get(launcher.count, "1")) > 1:
            raise ConfigError(
                f"{launcher.count} is {os.environ[launcher.count]}, but RANK is not set: every "
                "process would train alone; start main.py with deepspeed or torchrun"
            )


_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _check_environment() -> None:
    """Refuse what no launcher says."""
    given = {name: os.environ[name] for name in _NEEDED if os.environ.get(name)}
    missing = [name for name in _NEEDED if name not in given]
    advice = "start main.py with deepspeed or torchrun, which set them all; or unset {} to train "
    advice += "with one replica"
    if "RANK" in os.environ and missing:
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"RANK is {shortened(os.environ['RANK'])}, and {', '.join(missing)} {are} not set: "
            + advice.format("RANK")
        )
    if "RANK" not in os.environ and given.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"WORLD_SIZE is {shortened(given['WORLD_SIZE'])}, and RANK is not set: "
            + advice.format("WORLD_SIZE")
        )
    if "RANK" not in os.environ:
        return
    size = given["WORLD_SIZE"]
    last = int(size) - 1 if size.isdecimal() and len(size) < 10 else 0
    limits = {
        "WORLD_SIZE": (1, 10**6), "RANK": (0, last), "MASTER_PORT": (1, 65_535),
        "LOCAL_RANK": (0, 10**6),
    }  # fmt: skip
    for name, (least, most) in limits.items():
        text = os.environ.get(name, "0")
        if not (text.isdecimal() and least <= int(text) <= most):
            raise ConfigError(
                f"{name} is {shortened(text)}: it must lie between {least} and {most}; "
                "a launcher sets it"
            )


def _require_hostfile(launcher: Launcher, arguments: list[str], folder: Path) -> None:
    """DeepSpeed only warns of a missing one, and trains on fewer replicas.

    It does not pass the flag on, so it is looked for in the processes above this one.
    """
    for flag, value in itertools.pairwise(arguments):
        name, _, joined = flag.partition("=")
        hostfile = folder / (joined or value)
        if name in launcher.hostfile_flags and not hostfile.is_file():
            raise ConfigError(
                f"hostfile {hostfile} is missing: write one line per host, such as "
                "`localhost slots=2`"
            )


def processes() -> list[int]:
    """The processes above this one that launched it: without them nobody waits for the run.

    They are a launcher's own, or the ssh session through which it has started one on this host.
    """
    found: list[int] = []
    remote = False
    for pid, arguments, _ in _processes_above():
        if launcher := _launcher(arguments):
            remote = bool(launcher.over_ssh) and launcher.over_ssh in " ".join(arguments[:4])
            found.append(pid)
        elif remote and arguments[0].startswith("sshd"):
            return [*found, pid]
    return found


def _launcher(arguments: list[str]) -> Launcher | None:
    """Whose process has this command line."""
    words = " ".join(arguments[:4])
    fitting = (one for one in LAUNCHERS.values() if any(name in words for name in one.commands))
    return next(fitting, None)


def _processes_above() -> Iterator[tuple[int, list[str], Path]]:
    """Number, command line and working directory of this process's ancestors, where visible."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while pid > 1:
            process = Path("/proc", str(pid))
            arguments = (process / "cmdline").read_text().split("\0")
            yield pid, arguments, (process / "cwd").readlink()
            # "pid (name) state parent …": the name may hold spaces.
            pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
