"""Bytes that a synchronisation puts on the wire, by the kernel's own count.

    python -m benchmarks.wire                  # root, for the namespaces of two of the tables
    python -m benchmarks.wire --short

Ranks on this machine: all that they send passes through the loopback interface, and what a rank
sends is its share. Two hosts with two ranks each: what leaves through the link between them. A
figure is the mean over the rounds; `traffic` is what the optimizer has counted. For fragments it is
the greatest within one step of rounds of eight: what the link has to carry at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks._link import Here, run_on, two_hosts, wire_bytes
from localopt import BMUF, Average, Constant, HierarchicalAverage, LocalSGD, Rule, Streaming

RULES: dict[str, Callable[[], Rule]] = {
    "Average": Average,
    "Average, bf16": lambda: Average(compress="bf16"),
    "Average, int8": lambda: Average(compress="int8"),
    "BMUF": BMUF,
    "BMUF, bf16": lambda: BMUF(compress="bf16"),
    "BMUF, int8": lambda: BMUF(compress="int8"),
}
TWO_LEVELS: dict[str, Callable[[], Rule]] = {
    "Average": Average,
    "HierarchicalAverage, all meet every round": lambda: HierarchicalAverage(2, 1),
    "HierarchicalAverage, every 4th": lambda: HierarchicalAverage(2, 4),
    "Average, int8": lambda: Average(compress="int8"),
}
FRAGMENTS: dict[str, Callable[[], Rule]] = {
    "Average": Average,
    "Streaming, 2 fragments": lambda: Streaming(2),
    "Streaming, 4 fragments": lambda: Streaming(4),
    "Streaming, 8 fragments": lambda: Streaming(8),
}
TABLES = {"one": (RULES, 1), "two": (TWO_LEVELS, 1), "peak": (FRAGMENTS, 8)}  # rules, H


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=float, default=5.0, help="parameters")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--short", action="store_true", help="half a million, four rounds")
    parser.add_argument("--worker", choices=TABLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.million, options.rounds = 0.5, 4
    if options.worker:
        worker(options)
        return
    flags = ["--million", str(options.million), "--rounds", str(options.rounds)]
    for ranks in (2, 4):
        told = run_on([Here()] * ranks, "benchmarks.wire", "--worker", "one", *flags, timeout=600)
        print(report(json.loads(told), f"{ranks} ranks, sent by each", options), "\n")
    told = run_on([Here()] * 2, "benchmarks.wire", "--worker", "peak", *flags, timeout=600)
    title = "2 ranks, rounds of 8 steps, sent by each within a step at most"
    print(report(json.loads(told), title, options), "\n")
    with two_hosts() as (a, b):
        told = run_on([a, a, b, b], "benchmarks.wire", "--worker", "two", *flags, timeout=600)
    print(report(json.loads(told), "two hosts of two ranks, sent by a host to the other", options))


def worker(options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rules, h = TABLES[options.worker]
    senders = 1 if options.worker == "two" else dist.get_world_size()
    seen = {}
    for name, rule in rules.items():
        p = nn.Parameter(torch.randn(int(options.million * 1e6)))
        optimizer = LocalSGD([p], lr=1e-2, period=Constant(h), sync=rule())
        greatest = []
        for _ in range(options.rounds):
            wires = []
            for _ in range(h):
                p.grad = torch.randn_like(p)
                dist.barrier()
                before = wire_bytes()
                optimizer.step()
                dist.barrier()
                wires.append((wire_bytes() - before) / senders)
            greatest.append(max(wires))
        seen[name] = (sum(greatest) / len(greatest), optimizer.traffic.bytes / options.rounds)
    if dist.get_rank() == 0:
        print(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def report(seen: dict[str, tuple[float, float]], title: str, options: argparse.Namespace) -> str:
    base = seen["Average"][0]
    lines = [
        f"{options.million:g} M parameters of 32 bits; {title}",
        "",
        "| rule | MB on the wire | / Average's | traffic.bytes of a round, rank 0, MB |",
        "|---|---|---|---|",
    ]
    for name, (wire, traffic) in seen.items():
        lines.append(f"| {name} | {wire / 1e6:.3f} | {wire / base:.4f} | {traffic / 1e6:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
