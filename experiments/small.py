"""A small problem that the studies train on: a few handwritten digits, some with wrong labels.

Four replicas, a process each, in one process group for all runs of a study. scikit-learn's digits,
8 × 8 pixels; those that are not trained on are the test images. Runs of one seed start from the
same weights, see the same batches and have the same labels wrong.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, multiprocessing, nn
from torch.nn.functional import cross_entropy

from experiments.rows import append, read
from experiments.statistics import difference, interval
from localopt import LocalSGD, Period, Rule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
REPLICAS = 4

Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share.

    Attributes:
        images: trained on.
        noise: share of them whose label is replaced by another one.
        steps, warmup: of the learning rate: up in a line, down by a cosine.
        peak_lr, momentum, weight_decay: of the inner SGD.
        batch: images per replica and step.
    """

    images: int = 400
    noise: float = 0.2
    steps: int = 3000
    warmup: int = 100
    peak_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 8

    def lr(self, step: int) -> float:
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 1e-6 + (self.peak_lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * done))

    def told(self) -> str:
        return (
            f"{self.images} images, {self.noise:.0%} wrong labels, {self.steps:,} steps of "
            f"{REPLICAS} × {self.batch} images, peak rate {self.peak_lr:g}"
        )


Runs = dict[str, dict[str, str]]  # rows by seed


def parser(description: str, out: Path, seeds: int) -> argparse.ArgumentParser:
    """The flags that every study has: seeds, the setting's, and where its rows go."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    for name, value in asdict(Setting()).items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    made.add_argument("--out", type=Path, default=out)
    return made


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that the flags ask for."""
    return Setting(**{name: getattr(options, name) for name in asdict(Setting())})


# What a study runs: a period and a rule, from the name in its table; and on which of the images
# that are not trained on it is looked at, all by default.
Make = Callable[[Setting, str], tuple[Period, Rule | None] | tuple[Period, Rule | None, slice]]


def run_missing(
    setting: Setting, make: Make, wanted: Sequence[tuple[str, int]], out: Path
) -> list[dict[str, str]]:
    """Make the runs (name, seed) whose rows ``out`` does not have; return this setting's rows."""
    done = {(row["name"], int(row["seed"])) for row in rows_of(out, setting)}
    missing = [run for run in wanted if run not in done]
    if missing:
        with tempfile.TemporaryDirectory() as meeting:
            given = (setting, make, missing, out, f"file://{meeting}/store")
            multiprocessing.spawn(_replica, given, nprocs=REPLICAS)
    return rows_of(out, setting)


def _replica(
    rank: int, setting: Setting, make: Make, missing: list[tuple[str, int]], out: Path, store: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, rank=rank, world_size=REPLICAS)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for done, (name, seed) in enumerate(missing):
        found = train(setting, seed, rank, *make(setting, name))
        if rank == 0:
            append(out, {"name": name, "seed": seed, **found, **asdict(setting), "commit": commit})
            print(f"\r{done + 1}/{len(missing)} ", end="", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def train(
    setting: Setting,
    seed: int,
    rank: int,
    period: Period,
    rule: Rule | None,
    seen: slice = slice(None),
) -> Row:
    """Train once; what came of it, of the consensus."""
    images, labels, test_images, test_labels = split(setting, seed)
    torch.manual_seed(seed)
    model = network()
    optimizer = LocalSGD(
        model.parameters(), lr=setting.lr(0), momentum=setting.momentum,
        weight_decay=setting.weight_decay, period=period, sync=rule, track_drift=True,
    )  # fmt: skip
    drifts, longest = [], 0
    for step, batch in zip(range(setting.steps), batches(setting, seed, rank), strict=False):
        optimizer.param_groups[0]["lr"] = setting.lr(step)
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.record_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        longest = max(longest, optimizer.h)
        if optimizer.synced and optimizer.drift is not None:
            drifts.append(optimizer.drift)
    traffic = optimizer.traffic
    counted = {"syncs": traffic.syncs, "sent": traffic.bytes}
    optimizer.finish()
    with torch.no_grad():
        loss = float(cross_entropy(model(images), labels))
        right = float((model(test_images[seen]).argmax(1) == test_labels[seen]).float().mean())
    drift = math.sqrt(sum(d * d for d in drifts) / len(drifts)) if drifts else math.nan
    return {"top1": right, "train_loss": loss, "drift": drift, "longest": longest, **counted}


def network() -> nn.Module:
    """64 pixels to ten classes; 26 thousand parameters."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def batches(setting: Setting, seed: int, rank: int) -> Iterator[Tensor]:
    """This replica's images of each step, for ever; an epoch's incomplete last batch is left out.
    """
    generator, whole = torch.Generator().manual_seed(seed), setting.batch * REPLICAS
    while True:
        order = torch.randperm(setting.images, generator=generator)
        for step in range(setting.images // whole):
            yield order[step * whole :][rank * setting.batch :][: setting.batch]


def split(setting: Setting, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, some of them wrong, and to test on."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16 - 0.3, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_, test = places[: setting.images], places[setting.images :]
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.rand(len(train_), generator=generator) < setting.noise
    others = (labels[train_] + torch.randint(1, 10, (len(train_),), generator=generator)) % 10
    return images[train_], torch.where(wrong, others, labels[train_]), images[test], labels[test]


def rows_of(path: Path, setting: Setting) -> list[dict[str, str]]:
    """The rows so far that are of this setting."""
    rows = read(path)
    return [row for row in rows if all(row[k] == str(v) for k, v in asdict(setting).items())]


def by_name(rows: Sequence[Mapping[str, str]], names: Iterable[str]) -> dict[str, Runs]:
    """The runs of each name that has any."""
    found = {name: {r["seed"]: dict(r) for r in rows if r["name"] == name} for name in names}
    return {name: runs for name, runs in found.items() if runs}


def heading(setting: Setting, found: Mapping[str, Runs]) -> str:
    """The line above a table: the setting, and how many seeds each line has."""
    counts = sorted({len(runs) for runs in found.values()}) or [0]
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return f"{setting.told()}; {several} seeds"


def compared(runs: Runs, base: Runs) -> str:
    """Two cells of a table: test accuracy, and by how much it is above that of the same seeds."""
    mean = interval([100 * float(row["top1"]) for row in runs.values()], ".2f")
    return f"{mean} | {'' if runs is base else difference(runs, base)}"
