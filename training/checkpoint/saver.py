"""Checkpoints written behind training: it stands still only while its state is copied."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from localopt.collective import Collective
from localopt.faults import control

from ..config import PER_HOST, Config
from ..distributed import PATIENCE
from ..engine import ReplicaOptimizer
from ..evaluate import Statistics
from ..methods import Ema
from . import files


class SaveError(OSError):
    """The last checkpoint could not be written."""


class Stateful(Protocol):
    """What is saved with model and optimizer, where a run has it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Recording(Stateful, Protocol):
    """What counts in its state what it has written to a file."""

    def sync(self) -> None:
        """Have that written to the disk."""


@dataclass(frozen=True)
class State:
    """All that changes in training on one rank; ``scaler`` and ``ema`` where the run has them.

    ``centre`` says whether the consensus is kept in the optimizer's state; ``statistics`` are those
    of the models evaluated last.
    """

    model: nn.Module
    optimizer: ReplicaOptimizer
    centre: bool = False
    scaler: Stateful | None = None
    ema: Ema | None = None
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What is saved with model and optimizer, by its key in the file."""
        optional = {"scaler": self.scaler, "ema": self.ema}
        return {key: part for key, part in optional.items() if part is not None}


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread.

    Ranks say through the store when their files are written; one rank of each host, for
    hosts that share no disk, then writes the manifest and gives the folder its name. Where a rank
    can't write, nothing gets the name, one line says so, and training goes on.

    Args:
        publishes: whether this rank is the one of its host.
        versions: what the manifest says of the software.
        saved_at: the step after which a checkpoint is there already.
    """

    def __init__(
        self, folder: Path, config: Config, collective: Collective, *,
        publishes: bool, versions: dict[str, Any], saved_at: int | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._config, self._collective = folder, config, collective
        self._publishes, self._versions = publishes, versions
        self._board = control.Board(collective, "checkpoint")
        self._thread: Thread | None = None
        self._problem: str | None = None
        self._bug: BaseException | None = None
        self._saves = 0
        self._copy: dict[str, Any] = {}
        self.saved_at = saved_at

    def save(self, step: int, state: State, recorder: Recording, score: dict[str, float]) -> None:
        """Copy what the checkpoint after ``step`` steps holds, and have it written.

        All ranks call it at the same steps; no collective. Waits for the save before. ``score`` is
        the newest evaluation.

        Raises:
            NonFiniteError: if this replica holds NaN or infinity.
        """
        self.wait()
        self._saves += 1
        self.saved_at = step
        content = self._content(step, state, recorder)
        self._thread = Thread(
            target=self._run,
            args=(self._saves, step, content, score, recorder.sync),
            name="save",
            daemon=True,
        )
        self._thread.start()

    def _content(self, step: int, state: State, recorder: Stateful) -> dict[str, Any]:
        saved: dict[str, Any] = {
            "place": files.identity(step, self._collective.rank, self._collective.world_size),
            "model": state.model.state_dict(),
            "rng": torch.get_rng_state(),
            "recorder": recorder.state_dict(),
        }
        if evaluated := state.statistics.after(step):
            saved["statistics"] = evaluated
        if torch.accelerator.is_available():
            saved["cuda_rng"] = torch.get_device_module().get_rng_state()  # of any accelerator
        if self._config.save_opt:
            saved["optimizer"] = state.optimizer.state_dict()
        else:
            saved["centre"] = state.centre  # what is missing of the consensus
        saved |= {key: part.state_dict() for key, part in state.parts.items()}
        self._copy = copied(saved, self._copy)
        return self._copy

    def wait(self) -> None:
        """Wait until this rank's part of the save before is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    def finish(self) -> None:
        """Wait until the last checkpoint is whole on all hosts, or raise SaveError on all ranks."""
        self.wait()
        problems = control.gather(self._collective, self._problem or "", PATIENCE)
        if problem := next(filter(None, problems), None):
            raise SaveError(problem)

    def _run(
        self,
        number: int,
        step: int,
        content: dict[str, Any],
        score: dict[str, float],
        sync: Callable[[], None],
    ) -> None:
        try:
            sync()  # before the checkpoint that says how much was recorded
            self._problem = self._written(number, step, content, score)
            if self._problem and self._publishes:
                last = max(files.found(self._folder), default=None)
                left = "there is none yet" if last is None else f"the newest is that of step {last}"
                tqdm.write(f"main.py: {self._problem} ({left})", file=sys.stderr)
        except BaseException as error:  # raised again where training looks next
            self._bug = error

    def _written(
        self, number: int, step: int, content: dict[str, Any], score: dict[str, float]
    ) -> str | None:
        """Write this rank's file and, where it is to, publish; return what went wrong."""
        final = files.folder_of(self._folder, step)
        draft = files.draft_of(final)
        rank, ranks = self._collective.rank, range(self._collective.world_size)
        where, problem = f"rank {rank} on {socket.gethostname()}", None
        try:
            written = files.write_rank(draft, rank, content)
        except OSError as error:
            problem = f"cannot save step {step}: {where}: {draft}: {error.strerror or error}"
            written = {"problem": problem}
        self._board.put(f"{number}/{rank}", json.dumps(written))
        if not self._publishes:
            return problem
        notes = self._board.get([f"{number}/{other}" for other in ranks], PATIENCE)
        parts = {files.rank_file(other): json.loads(notes[other]) for other in ranks}
        problems = [part["problem"] for part in parts.values() if "problem" in part]
        if not problems:
            manifest = {
                "step": step,
                "world_size": len(ranks),
                # Alike on all hosts, whose paths differ: ranks compare manifests to resume.
                "config": {k: v for k, v in self._config.as_dict().items() if k not in PER_HOST},
                "versions": self._versions,
                "evaluation": score,
                "files": parts,
            }
            try:
                files.publish(draft, final, manifest)
            except OSError as error:
                problems = [f"cannot save step {step}: {where}: {final}: {error.strerror or error}"]
        if problems:
            shutil.rmtree(draft, ignore_errors=True)
            return problems[0]
        files.prune(self._folder, self._config.save_keep)
        return None


def copied(value: Any, spare: Any = None) -> Any:
    """``value`` with every tensor copied to the host: training changes it, and a view would drag
    its whole flat buffer into the file.

    Args:
        value: a tree of dictionaries, lists and tensors.
        spare: what this has returned before and nobody needs any more. Its memory is used again:
            to be given new memory takes longer than to copy.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        fits = isinstance(spare, Tensor) and (spare.shape, spare.dtype, spare.stride()) == (
            value.shape, value.dtype, value.stride(),
        )  # fmt: skip
        if not fits:
            spare = torch.empty_like(value, device="cpu", pin_memory=value.device.type != "cpu")
        return spare.copy_(value)
    if isinstance(value, dict):
        old = spare if isinstance(spare, dict) else {}
        return {key: copied(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        old = spare if isinstance(spare, (list, tuple)) else ()
        return type(value)(
            copied(item, was) for item, was in zip_longest(value, old[: len(value)])
        )
    return value
