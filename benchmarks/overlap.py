"""What overlapped rules leave of the waiting, over a slow link between two hosts.

    python -m benchmarks.overlap            # 100 Mbit/s, needs root for the namespaces
    python -m benchmarks.overlap --short

A round's compute is longer than its communication. Prints, for each rule, the seconds per
synchronisation in which training stood still, and their ratio to blocking Average at the same H.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks._link import capped_link, run_on
from localopt import EASGD, Average, CoCoDSGD, Constant, LocalSGD, OverlapLocalSGD, Rule, Streaming

RULES: dict[str, Callable[[], Rule]] = {
    "Average": Average,
    "Average, again": Average,
    "EASGD": EASGD,
    "OverlapLocalSGD": OverlapLocalSGD,
    "CoCoDSGD": CoCoDSGD,
    "Streaming, 4 fragments": lambda: Streaming(4, overlap=True),
}
WIDTH = 1024
STEP_SECONDS = 0.05  # the batch is chosen for this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, default=100.0)
    parser.add_argument("--h", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="two repeats of three rounds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.repeats, options.rounds = 2, 3
    if options.worker:
        worker(options)
        return
    flags = ["--worker", "--h", str(options.h), "--rounds", str(options.rounds)]
    flags += ["--repeats", str(options.repeats)]
    seconds = options.repeats * options.rounds * len(RULES) * options.h * STEP_SECONDS
    with capped_link(options.megabits) as hosts:
        told = run_on(hosts, "benchmarks.overlap", *flags, timeout=120 + 6 * seconds)
    print(report(json.loads(told), options))


def worker(options: argparse.Namespace) -> None:
    """One rank: every rule in turn, several times over."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = calibrated_batch(network(), WIDTH, STEP_SECONDS)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in RULES}
    for _ in range(options.repeats):
        for name, rule in RULES.items():
            seen[name].append(measure(rule(), batch, options))
    if dist.get_rank() == 0:
        print(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def network() -> nn.Sequential:
    """1.1 million parameters, 4.2 MB."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def calibrated_batch(model: nn.Module, width: int, step_seconds: float) -> int:
    """Inputs (n, width) per step so that it takes about ``step_seconds`` on the slower rank."""
    size = 256
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(5):
            model(torch.randn(size, width)).sum().backward()
        size = max(16, int(size * step_seconds / ((time.perf_counter() - started) / 5)))
    smallest = torch.tensor(size)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def measure(rule: Rule, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Figures per synchronisation, the first round apart: there nothing has been launched yet."""
    model = network()
    optimizer = LocalSGD(model.parameters(), lr=1e-3, period=Constant(options.h), sync=rule)
    inputs = torch.randn(batch, WIDTH)

    def rounds(count: int) -> None:
        for _ in range(count * options.h):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    rounds(1)
    dist.barrier()
    before, started = vars(optimizer.traffic).copy(), time.perf_counter()
    rounds(options.rounds)
    seconds, traffic = time.perf_counter() - started, optimizer.traffic
    result = {
        "exposed": (traffic.exposed - before["exposed"]) / options.rounds,
        "hidden": (traffic.hidden - before["hidden"]) / options.rounds,
        "round": seconds / options.rounds,
        "bytes": (traffic.bytes - before["bytes"]) / options.rounds,
    }
    optimizer.finish()
    return result


def report(seen: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    def median(name: str, figure: str) -> float:
        return statistics.median(row[figure] for row in seen[name])

    payload = median("Average", "bytes")
    lines = [
        f"{options.megabits:g} Mbit/s, two hosts, H = {options.h}, {payload / 1e6:.1f} MB sent per "
        f"synchronisation and replica ({payload * 8 / options.megabits / 1e6:.2f} s at full rate); "
        f"medians of {options.repeats}",
        "",
        "| rule | exposed per sync | hidden per sync | round | exposed / Average's |",
        "|---|---|---|---|---|",
    ]
    for name, rows in seen.items():
        ratios = [
            row["exposed"] / base["exposed"]
            for row, base in zip(rows, seen["Average"], strict=True)
        ]
        lines.append(
            f"| {name} | {median(name, 'exposed') * 1e3:.1f} ms | "
            f"{median(name, 'hidden') * 1e3:.0f} ms | {median(name, 'round'):.2f} s | "
            f"{statistics.median(ratios):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
