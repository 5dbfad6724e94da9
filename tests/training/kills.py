"""Kill training runs at random moments, continue them, and compare with one that was left alone.

    python -m tests.training.kills --kills 60

For each rule a run of two replicas that saves every few steps is killed (SIGKILL, both ranks or
one of them) again and again and started anew with `--resume auto`, until it is through. Its
weights, optimizer states and metrics, apart from wall-clock fields, must then equal, bit for bit,
those of the run that nobody killed. Prints where the kills fell.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.program import Running

RECIPES = ("digits-vit-localadamw-qsr", "digits-resnet-overlap", "digits-resnet-lsgd")
TIMED = (
    "seconds", "eval_seconds", "exposed_seconds", "hidden_seconds", "waits", "train_seconds",
    "images_per_second", "wait",
)  # fmt: skip
RUN = (
    "--epochs", "4", "--steps-per-epoch", "8", "--log-freq", "5", "--save-steps", "3",
    "--save-keep", "3", "--bn-batches", "4", "--resume", "auto", "--device", "cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """Where one fell: seconds after the start; the newest checkpoint's step; whether in a save."""

    seconds: float
    step: int
    saving: bool
    ranks: tuple[int, ...]


class Runs:
    """Runs of one recipe with the same settings, in folders of their own."""

    def __init__(self, recipe: str, data: str, folder: Path, rng: random.Random) -> None:
        self.recipe, self.data, self.folder, self.rng = recipe, data, folder, rng
        folder.mkdir(parents=True)
        self.kills: list[Kill] = []
        started = time.monotonic()
        self.whole = self._finished(self._start(folder / "whole"))
        self.length = time.monotonic() - started

    def _start(self, folder: Path) -> Running:
        recipe = ("--recipe-pth", f"recipe/{self.recipe}.yml")
        places = ("--data-pth", self.data, "--log-pth", str(folder))
        tracked = ("--track-replicas", "--eval-on-start")
        return Running(*recipe, *places, *tracked, *RUN)

    def _finished(self, running: Running) -> Path:
        outcome = running.ended(120)
        assert outcome.codes == [0, 0], outcome.errors
        return outcome.folder

    def killed(self, kills: int) -> Path:
        """A run that was killed so often; its folder."""
        folder = self.folder / f"killed-{len(self.kills)}"
        done = 0
        while done < kills:
            running = self._start(folder)
            kill = self._kill(running, folder)
            if kill is None:  # it was through before
                shutil.rmtree(folder)
            else:
                self.kills.append(kill)
                done += 1
        return self._finished(self._start(folder))

    def _kill(self, running: Running, folder: Path) -> Kill | None:
        """Kill it at a random moment, every third time as soon then as it is saving."""
        started = time.monotonic()
        moment = started + self.rng.uniform(0, self.length)
        while time.monotonic() < moment and running.alive():
            time.sleep(0.002)
        if self.rng.random() < 0.4:
            while running.alive() and not _drafts(folder):
                pass
            time.sleep(self.rng.uniform(0, 0.01))
        ranks = self.rng.choice([(0, 1), (0,), (1,)])
        alive = running.alive()
        running.signal(signal.SIGKILL, ranks)
        seconds, saving = time.monotonic() - started, bool(_drafts(folder))
        outcome = running.ended(5)  # as a launcher does with those that are left
        if not alive or outcome.codes == [0, 0]:
            return None
        steps = [int(path.name[5:]) for path in folder.glob("*/checkpoints/step-*[0-9]")]
        return Kill(seconds, max(steps, default=0), saving, ranks)

    def compare(self, folder: Path) -> None:
        """Raise AssertionError unless the run in ``folder`` equals the one left alone."""
        assert list(_records(folder)) == list(_records(self.whole))
        names = [sorted(os.listdir(place / "checkpoints")) for place in (folder, self.whole)]
        assert names[0] == names[1]
        for name in names[0]:
            for rank in (0, 1):
                mine, theirs = (
                    torch.load(place / "checkpoints" / name / f"rank-{rank:04d}.pt")
                    for place in (folder, self.whole)
                )
                assert _bits(mine) == _bits(theirs), (name, rank)


def _drafts(folder: Path) -> list[Path]:
    return list(folder.glob("*/checkpoints/.step-*.tmp"))


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").open():
        record = json.loads(line)
        yield {key: value for key, value in record.items() if key not in TIMED}


def _bits(saved: dict[str, Any]) -> str:
    """All that is saved but seconds, as a text."""

    def told(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.reshape(-1).view(torch.uint8).tolist()
        if isinstance(value, dict):
            return {str(k): told(v) for k, v in value.items() if k not in _SECONDS}
        return [told(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)

    return json.dumps(told(saved), sort_keys=True)


_SECONDS = {
    "seconds", "paused", "exposed_before", "hidden_before", "file", "exposed", "hidden", "wait",
    "waits", "other_seconds",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="over all rules (default 60)")
    parser.add_argument("--each", type=int, default=4, help="kills of one run (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    kills: dict[str, list[Kill]] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        for number, recipe in enumerate(RECIPES):
            rng = random.Random(settings.seed * 1000 + number)
            runs = Runs(recipe, str(Path(place, "data")), Path(place, recipe), rng)
            while len(runs.kills) < -(-settings.kills // len(RECIPES)):
                runs.compare(runs.killed(settings.each))
                print(f"{recipe}: {len(runs.kills)} kills, all equal", flush=True)
            kills[recipe] = runs.kills
    report(kills)
    return 0


def report(kills: dict[str, list[Kill]]) -> None:
    """Print where the kills fell."""
    print("| recipe | kills | in a save | of both ranks | of rank 0 | of rank 1 |")
    print("|---|---|---|---|---|---|")
    for recipe, some in kills.items():
        ranks = Counter(kill.ranks for kill in some)
        saving = sum(kill.saving for kill in some)
        fell = len(some), saving, *(ranks[place] for place in ((0, 1), (0,), (1,)))
        print(f"| {recipe} | {' | '.join(map(str, fell))} |")
    both = [kill for some in kills.values() for kill in some]
    print("\nseconds after the start:")
    for second, count in sorted(Counter(int(kill.seconds) for kill in both).items()):
        print(f"{second:3d} {'#' * count} {count}")
    print("\nnewest checkpoint (step):")
    for step, count in sorted(Counter(kill.step for kill in both).items()):
        print(f"{step:3d} {'#' * count} {count}")


if __name__ == "__main__":
    sys.exit(main())
