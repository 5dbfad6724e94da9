"""A synchronisation and a local step of this checkout, beside those of another one.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.against /tmp/before                  # ViT-B/16, two ranks
    python -m benchmarks.against /tmp/before --numbers 25000000 --short

Three sets of ranks live at the same time, two of the other checkout and one of this; in each pair
they are used in turn, the order changing, while the others sleep. Printed are geometric means of
the ratios over the pairs, with 95 % intervals (Student's t on the logarithms): this checkout to
the other, and the other to itself (A/A), which shows what the machine adds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Two-sided 95 % points of Student's t; beyond 60 degrees of freedom that of 60 is a little wide.
_T = {5: 2.571, 10: 2.228, 20: 2.086, 29: 2.045, 30: 2.042, 40: 2.021, 60: 2.0}
SIDES = ("before", "again", "after")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    here = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "other", type=Path, nargs="?", default=here,
        help="folder of the other checkout (default: this one, which shows the noise)",
    )  # fmt: skip
    parser.add_argument("--numbers", type=int, default=86_567_656, help="parameters (ViT-B/16's)")
    parser.add_argument("--tensors", type=int, default=152)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--short", action="store_true", help="6 pairs")
    options = parser.parse_args(arguments)
    if not (options.other / "localopt").is_dir():
        sys.exit(f"benchmarks.against: {options.other} has no folder localopt")
    pairs = 6 if options.short else options.pairs
    checkouts = {"before": options.other, "again": options.other, "after": here}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            side: [
                subprocess.Popen(
                    [sys.executable, __file__, folder, side, str(rank), str(options.ranks),
                     str(options.numbers), str(options.tensors)],
                    env={**os.environ, "PYTHONPATH": str(checkouts[side]), "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
                )
                for rank in range(options.ranks)
            ]
            for side in SIDES
        }  # fmt: skip
        try:
            for ranks in sides.values():
                _ask(ranks)  # warm up
            taken = [_pair(sides, number) for number in range(pairs)]
        finally:
            for ranks in sides.values():
                for process in ranks:
                    process.kill()
                    process.wait()
    print(f"{options.numbers} parameters in {options.tensors} tensors, {options.ranks} ranks, "
          f"{pairs} pairs\n")  # fmt: skip
    print("| what | before, ms | after / before | A/A |\n|---|---|---|---|")
    for what in taken[0]["before"]:
        times = {side: [pair[side][what] for pair in taken] for side in SIDES}
        base = statistics.median(times["before"]) * 1e3
        ratios = [_interval(times[side], times["before"]) for side in ("after", "again")]
        print(f"| {what} | {base:.4g} | {ratios[0]} | {ratios[1]} |")


def _pair(
    sides: dict[str, list[subprocess.Popen[str]]], number: int
) -> dict[str, dict[str, float]]:
    order = SIDES[number % 3 :] + SIDES[: number % 3]
    if number % 2:
        order = order[::-1]
    return {side: _ask(sides[side]) for side in order}


def _ask(ranks: Sequence[subprocess.Popen[str]]) -> dict[str, float]:
    """Seconds, those of the slowest rank."""
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = []
    for process in ranks:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit("benchmarks.against: a rank has ended; what it said is above")
        told.append(json.loads(line))
    return {what: max(each[what] for each in told) for what in told[0]}


def _interval(after: Sequence[float], before: Sequence[float]) -> str:
    logs = [math.log(a / b) for a, b in zip(after, before, strict=True)]
    freedom = len(logs) - 1
    t = _T[max((f for f in _T if f <= freedom), default=5)]
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    low, middle, high = (math.exp(mean + d) for d in (-half, 0.0, half))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _rank(folder: str, side: str, rank: int, ranks: int, numbers: int, tensors: int) -> None:
    """In a process of its own: at each line on the standard input, seconds as JSON."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from localopt import QSR, Constant, LocalAdamW, LocalSGD

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{side}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    size = max(1, numbers // tensors)
    params = [nn.Parameter(torch.ones(size)) for _ in range(tensors)]
    few = [nn.Parameter(torch.ones(16)) for _ in range(4)]
    large = LocalSGD(params, lr=0.1, period=Constant(1), auto=False)
    small = LocalSGD(few, lr=0.1, period=Constant(1), auto=False)
    local = LocalAdamW(
        [nn.Parameter(torch.ones(16)) for _ in range(tensors)], lr=0.1,
        period=QSR(alpha=1.0, base=10**9),
    )  # fmt: skip
    for _ in sys.stdin:
        seconds = {}
        for what, optimizer, calls in (("synchronisation", large, 3), ("of 64 numbers", small, 30)):
            each = []
            for _ in range(calls):
                for p in optimizer.param_groups[0]["params"]:
                    p.detach().fill_(1.0 + rank)
                dist.barrier()
                started = time.perf_counter()
                optimizer.average()
                each.append(time.perf_counter() - started)
            seconds[what] = statistics.median(each)
        each = []
        for _ in range(300):
            started = time.perf_counter()
            local.step()
            each.append(time.perf_counter() - started)
        seconds["local step"] = statistics.median(each)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 7 and sys.argv[2] in SIDES:
        _rank(*sys.argv[1:3], *(int(number) for number in sys.argv[3:]))
    else:
        main()
