"""How the cost of a synchronisation grows: with size, with ranks, with the slowness of the link.

    python -m benchmarks.growth                # root, for the namespaces; some minutes
    python -m benchmarks.growth --short

Seconds of one synchronisation under Average, beside a bare ``dist.all_reduce`` of as many bytes,
for 1 MB to 1 GB of parameters; for 2 to 8 ranks; and between two hosts over capped links. To what
two ranks take is fitted t = α + β b, b the bytes that a rank sends, by least squares of the
relative errors. Memory is what rank 0 holds: of the parameters, once they are flat, and at most in
a synchronisation beyond that. With ``--plot FILE`` a picture of it (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks._link import Here, capped_link, run_on
from benchmarks.sync import Way, held, peak, timed, trim
from localopt import Constant, LocalSGD

OURS, BARE = "localopt, Average", "bare all_reduce"
PIECE = 4_000_000  # bytes of a parameter at most

Seen = dict[str, dict[str, float]]  # by megabytes: seconds of each way, and MB of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 16, 64, 256, 1024],
                        metavar="MB")  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--ranks-size", type=float, default=64, metavar="MB")
    parser.add_argument("--megabits", type=float, nargs="+", default=[100.0, 1000.0])
    parser.add_argument("--link-seconds", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8, 1.6],
                        metavar="S", help="sizes, as what a link carries meanwhile")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--short", action="store_true", help="small sizes, three repeats")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.sizes, options.ranks, options.ranks_size = [1, 4], [2, 4], 1
        options.megabits, options.link_seconds, options.repeats = [1000.0], [0.1, 0.2], 3
    if options.worker:
        worker(options)
        return
    here = on([Here()] * 2, options.sizes, options.repeats)
    print(f"Two ranks on this machine; medians of {options.repeats}, of more below 64 MB\n")
    print(by_size(here), "\n")
    print(f"{options.ranks_size:g} MB, by ranks on this machine's {os.cpu_count()} cores\n")
    print(by_ranks(options), "\n")
    links = {"this machine": here}
    for megabits in options.megabits:
        with capped_link(megabits) as hosts:
            sizes = [megabits / 8 * seconds for seconds in options.link_seconds]
            links[f"{megabits:g} Mbit/s"] = on(hosts, sizes, options.repeats)
    print("t = α + β b over two ranks, b bytes sent by each\n")
    print(fits(links))
    if options.plot:
        plot(links, options.plot)


def on(hosts: Sequence, sizes: Sequence[float], repeats: int) -> Seen:
    flags = ["--worker", "--repeats", str(repeats), "--sizes", *map(str, sizes)]
    return json.loads(run_on(hosts, "benchmarks.growth", *flags, timeout=1800).splitlines()[-1])


def worker(options: argparse.Namespace) -> None:
    """One rank: every size, both ways in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen: Seen = {}
    for megabytes in options.sizes:
        elements = int(megabytes * 1e6 / 4)
        trim()
        before = held("VmRSS")
        parameters = [
            nn.Parameter(torch.ones(n)) for n in pieces(elements, min(PIECE // 4, elements // 4))
        ]
        optimizer = LocalSGD(parameters, period=Constant(1))
        trim()
        flat = held("VmRSS") - before
        bare = torch.ones(elements)
        ways = {
            BARE: Way(lambda bare=bare: dist.all_reduce(bare), [bare]),
            OURS: Way(optimizer.average, parameters),
        }
        growth = {}
        for name, way in ways.items():  # the first time is for warming up
            way.touch()
            way.run()
            growth[name] = peak(way)
        repeats = max(options.repeats, int(200 / megabytes))
        seconds = {name: [timed(way) for _ in range(repeats)] for name, way in ways.items()}
        seen[f"{megabytes:g}"] = {
            **{name: statistics.median(values) for name, values in seconds.items()},
            "flat": flat / 1024, "peak": growth[OURS], "peak, bare": growth[BARE],
        }  # fmt: skip
    if dist.get_rank() == 0:
        print(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def pieces(elements: int, most: int) -> list[int]:
    """Sizes of parameters that make up ``elements``."""
    whole, rest = divmod(elements, most)
    return [most] * whole + [rest] * bool(rest)


def by_size(seen: Seen) -> str:
    lines = [
        "| MB | bare all_reduce, s | Average, s | / bare | MB sent per second | parameters hold, "
        "MiB | at most beyond, MiB | bare's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, row in seen.items():
        lines.append(
            f"| {size} | {row[BARE]:.4f} | {row[OURS]:.4f} | {row[OURS] / row[BARE]:.2f} | "
            f"{float(size) / row[OURS]:.0f} | {row['flat']:.0f} | {row['peak']:.1f} | "
            f"{row['peak, bare']:.1f} |"
        )
    return "\n".join(lines)


def by_ranks(options: argparse.Namespace) -> str:
    lines = [
        "| ranks | bare all_reduce, s | Average, s | / bare | MB sent by each | "
        "s per MB sent by all |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in options.ranks:
        ((_, row),) = on([Here()] * ranks, [options.ranks_size], options.repeats).items()
        sent = 2 * (ranks - 1) / ranks * options.ranks_size
        lines.append(
            f"| {ranks} | {row[BARE]:.4f} | {row[OURS]:.4f} | {row[OURS] / row[BARE]:.2f} | "
            f"{sent:.0f} | {row[OURS] / (sent * ranks):.5f} |"
        )
    return "\n".join(lines)


def fitted(megabytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """α in seconds and β in seconds per MB of t = α + β b, least squares of (fit - t) / t.

    α is not negative: where the best one were, t is proportional to b.
    """
    b, t = np.asarray(megabytes, float), np.asarray(seconds, float)
    (alpha, beta), *_ = np.linalg.lstsq(
        np.stack([1 / t, b / t], axis=1), np.ones_like(t), rcond=None
    )
    if alpha < 0:
        alpha, beta = 0.0, float((b / t).sum() / ((b / t) ** 2).sum())
    return float(alpha), float(beta)


def fits(links: dict[str, Seen]) -> str:
    lines = [
        "| link | way | α, ms | β, ms per MB | 1/β, Mbit/s | greatest error of the fit |",
        "|---|---|---|---|---|---|",
    ]
    for link, seen in links.items():
        sizes = [float(size) for size in seen]  # between two ranks, each sends what there is
        for way in (BARE, OURS):
            seconds = [row[way] for row in seen.values()]
            alpha, beta = fitted(sizes, seconds)
            error = max(
                abs((alpha + beta * b) / t - 1) for b, t in zip(sizes, seconds, strict=True)
            )
            lines.append(
                f"| {link} | {way} | {alpha * 1e3:.2f} | {beta * 1e3:.3f} | {8 / beta:.0f} | "
                f"{error:.0%} |"
            )
    return "\n".join(lines)


def plot(links: dict[str, Seen], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for (link, seen), colour in zip(links.items(), ("#0072b2", "#d55e00", "#009e73"), strict=False):
        sizes = [float(size) for size in seen]
        ours = [row[OURS] for row in seen.values()]
        alpha, beta = fitted(sizes, ours)
        line = np.geomspace(min(sizes), max(sizes))
        text = f"{link}: {1e3 * alpha:.1f} ms + size / ({1 / beta:,.0f} MB/s)"
        axes.plot(line, alpha + beta * line, color=colour, linewidth=1, label=text)
        axes.plot(sizes, ours, "o", color=colour)
        axes.plot(sizes, [row[BARE] for row in seen.values()], "x", color=colour)
    axes.plot([], [], "o", color="grey", label="Average")
    axes.plot([], [], "x", color="grey", label="a bare all_reduce")
    axes.set(xscale="log", yscale="log", xlabel="parameters, MB", ylabel="one synchronisation, s")
    axes.grid(True, linewidth=0.3)
    axes.set_title("Two ranks; lines are fitted to Average", fontsize=10, loc="left")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
