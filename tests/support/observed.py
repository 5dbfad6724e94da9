"""Run a program and write down what its rank draws, and the collectives of others.

    observed.py LOG PROGRAM FLAGS...

``LOG.<rank>.json`` has, for each data set by its size, the numbers of the samples that were drawn,
in their order; and how many collectives were called, by the module that called.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.utils.data._utils.fetch import _MapDatasetFetcher

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
    "broadcast_object_list", "barrier",
)  # fmt: skip


def observe(drawn: dict[int, list[int]], called: Counter[str]) -> None:
    """Have everything that is drawn and called from now on written into these."""
    fetch = _MapDatasetFetcher.fetch

    def fetched(self: Any, indices: Any) -> Any:
        drawn[len(self.dataset)] += indices
        return fetch(self, indices)

    _MapDatasetFetcher.fetch = fetched

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            by = sys._getframe(1).f_globals.get("__name__", "")
            if by.split(".")[0] not in ("localopt", "torch"):
                called[by] += 1
            return collective(*arguments, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name)))


if __name__ == "__main__":
    log, program, *flags = sys.argv[1:]
    drawn: dict[int, list[int]] = defaultdict(list)
    called: Counter[str] = Counter()
    observe(drawn, called)
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")
    with open(f"{log}.{os.environ['RANK']}.json", "w") as file:
        json.dump({"drawn": drawn, "called": called}, file)
