"""Ranks under a watch: processes that a test sends signals to, and what they have said since."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localopt import Watch
from localopt.collective import Collective
from localopt.traffic import synchronised_clock
from tests.support.patience import PATIENCE
from tests.support.ports import free_port
from tests.support.ranks import backend, context

# Seconds. A busy machine may keep a process waiting for more than one.
BEAT, DEAD_AFTER, STALL_AFTER = 0.1, 4.0, 4.0
SLACK = 20.0  # for a machine that does other things; what else would end a rank takes far longer
H = 5  # steps between collectives
KILL, STOP, TERM, INT = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT
ADVICE = "resume from the newest checkpoint"


class Rank:
    """What a test's function finds on its rank."""

    def __init__(self, rank: int, folder: Path, device: str) -> None:
        self.rank, self._log = rank, folder / f"{rank}.log"
        self.collective = Collective()
        self._tensor = torch.ones(3, device=device)

    def say(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{text}\n")

    def watch(self, **settings: Any) -> Watch:
        return Watch(self.collective, **{"beat": BEAT, "dead_after": DEAD_AFTER, **settings})

    def meet(self) -> None:
        self.collective.sum_([self._tensor])
        synchronised_clock(self._tensor.device)

    def train(self, watch: Watch, seconds: float = 0.01, steps: int = 10**9, h: int = H) -> int:
        """Make steps and meet the other ranks after every ``h``; return how many were made."""
        step = 0
        while step < steps and watch.begin(step):
            time.sleep(seconds)
            step += 1
            if step % h == 0:
                self.meet()
            self.say(f"step {step}")
        self.say(f"end {step}")
        return step


def _main(
    function: Callable[..., None],
    rank: int,
    m: int,
    port: int,
    folder: Path,
    args: tuple[Any, ...],
    on: str,
) -> None:
    """A rank's process: as a program would, it says its failures itself, in one line."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend(on, rank), init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=m,
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip
    dist.barrier()
    code, mine = 0, Rank(rank, folder, "cpu" if on == "cpu" else "cuda")
    try:
        function(mine, *args)
    except BaseException as error:
        os.write(2, f"raised {type(error).__name__}: {error}\n".encode())
        code = 1
    os._exit(code)


class Run:
    """Processes that form a group whose store rank 0 keeps."""

    def __init__(self, processes: list[Any], folder: Path) -> None:
        self.processes, self.folder = processes, folder
        self._hit = 0.0

    def said(self, rank: int) -> str:
        path = self.folder / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    def errors(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def wait_for(self, text: str, *ranks: int) -> None:
        deadline = time.monotonic() + PATIENCE
        for rank in ranks or range(len(self.processes)):
            while f"{text}\n" not in self.said(rank):
                assert time.monotonic() < deadline, f"rank {rank} never said {text!r}"
                time.sleep(0.005)

    def send(self, rank: int, number: int) -> None:
        self._hit = time.monotonic()
        os.kill(self.processes[rank].pid, number)

    def codes(self, *besides: int, timeout: float = PATIENCE) -> list[int | None]:
        """Exit codes of all ranks but ``besides``, which may go on; None where one does."""
        for rank, process in enumerate(self.processes):
            if rank not in besides:
                process.join(timeout)
        self.seconds = time.monotonic() - self._hit
        return [process.exitcode for process in self.processes]

    def verdicts(self) -> list[str]:
        """The lines that say why the run is over, of all ranks."""
        text = "".join(self.errors(rank) for rank in range(len(self.processes)))
        return [line for line in text.splitlines() if line.endswith(ADVICE)]


@contextmanager
def ranks(function: Callable[..., None], m: int, *args: Any, on: str = "cpu") -> Iterator[Run]:
    """``on``: as for `tests.support.ranks.run`."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_main, args=(function, rank, m, port, folder, args, on))
            for rank in range(m)
        ]
        for process in processes:
            process.start()
        run = Run(processes, folder)
        try:
            yield run
        except AssertionError:
            for rank in range(m):
                print(f"--- rank {rank}: {run.said(rank)[-200:]}\n{run.errors(rank)[-3000:]}")
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()
