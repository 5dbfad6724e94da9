"""The tables: a line per epoch while it goes on, and who spent what at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .processes import Row
from .task import Task

HEADS = ("epoch", "accuracy", "loss", "seconds", "compute", "send", "wait", "MB sent")
FORM = "{:>5}  {:>8}  {:>7}  {:>7}  {:>7}  {:>6}  {:>6}  {:>7}"


class Report:
    """Prints, and collects what `--out` writes.

    Args:
        task: what is trained.
        names: of the processes, by rank.
        counts_bytes: whether the strategy knows what it sends.
    """

    def __init__(self, task: Task, names: Sequence[str], counts_bytes: bool) -> None:
        self._task = task
        self._rows: dict[str, list[Row]] = {name: [] for name in names}
        self._counts_bytes = counts_bytes
        self.epochs: list[dict[str, Any]] = []

    def heading(self) -> None:
        print("seconds: of the slowest process; compute, send, wait, MB: means over the processes")
        print(FORM.format(*HEADS))

    def add(self, name: str, row: Row) -> None:
        """A process has finished an epoch; when all have, print what it was like."""
        self._rows[name].append(row)
        if all(len(rows) > row.epoch for rows in self._rows.values()):
            self._epoch([rows[row.epoch] for rows in self._rows.values()])

    def _epoch(self, rows: list[Row]) -> None:
        self.epochs.append({
            "epoch": rows[0].epoch + 1,
            "accuracy": rows[0].accuracy,
            "loss": sum(row.loss for row in rows) / len(self._task.images),
            "seconds": max(row.seconds for row in rows),
            **self._spent(rows, len(rows)),
        })  # fmt: skip
        last = self.epochs[-1]
        print(FORM.format(
            last["epoch"], f"{last['accuracy']:.2%}", f"{last['loss']:.4f}",
            f"{last['seconds']:.3f}", *_figures(last),
        ), flush=True)  # fmt: skip

    def _spent(self, rows: Sequence[Row], share: int = 1) -> dict[str, float | None]:
        """Seconds and bytes of several rows together, divided by `share`."""
        return {
            "compute": sum(row.compute for row in rows) / share,
            "send": sum(row.send for row in rows) / share,
            "wait": sum(row.wait for row in rows) / share,
            "bytes": sum(row.bytes for row in rows) / share if self._counts_bytes else None,
        }

    def end(self, weights: Sequence[np.ndarray]) -> dict[str, Any]:
        """Print what each process spent, and the result; return all figures."""
        spent = {name: self._spent(rows) for name, rows in self._rows.items()}
        width = max(map(len, spent))
        form = f"{{:<{width}}}  {{:>7}}  {{:>6}}  {{:>6}}  {{:>7}}"
        print("\nin all:\n" + form.format("process", *HEADS[-4:]))
        for name, figures in spent.items():
            print(form.format(name, *_figures(figures)))
        result = {
            "accuracy": self.epochs[-1]["accuracy"],
            "seconds": sum(epoch["seconds"] for epoch in self.epochs),
            "updates": self._task.epochs * self._task.updates,
            "replicas_equal": len({replica.tobytes() for replica in weights}) == 1,
        }
        told = "equal, bit for bit" if result["replicas_equal"] else "NOT equal"
        print(
            f"\naccuracy {result['accuracy']:.2%} after {result['updates']} updates in "
            f"{result['seconds']:.2f} s; the processes' weights are {told}"
        )
        return result | {"epochs": self.epochs, "processes": spent}


def _figures(spent: dict[str, Any]) -> list[str]:
    sent = "-" if spent["bytes"] is None else f"{spent['bytes'] / 1e6:.2f}"
    return [f"{spent['compute']:.3f}", f"{spent['send']:.3f}", f"{spent['wait']:.3f}", sent]
