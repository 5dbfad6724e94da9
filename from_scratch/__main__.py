"""The command. See `python -m from_scratch --help`."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import data_parallel, ddp, param_server, processes, ring_all_reduce
from .report import Report
from .task import digits_task

STRATEGIES = {
    "param_server": param_server,
    "ring_all_reduce": ring_all_reduce,
    "data_parallel": data_parallel,
    "ddp": ddp,
}
BUILT_IN = ("data_parallel", "ddp")  # what they send is not for us to see


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"from_scratch: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The flags; each with underscores instead of dashes too."""
    parser = _Parser(
        prog="python -m from_scratch",
        description="Train a small network on handwritten digits, data-parallel, with plain SGD.",
        allow_abbrev=False,
    )
    parser.add_argument("--strategy", required=True, choices=STRATEGIES)
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--n-gpus", "--n_gpus", type=_count, metavar="N",
        help="processes, param_server's server included; each takes a GPU where there are any",
    )  # fmt: skip
    number.add_argument(
        "--workers", type=_count, metavar="N", help="the same, on CPUs only; the default, with 2"
    )
    parser.add_argument(
        "--batch-size", "--batch_size", type=_count, default=64, metavar="B",
        help="images per update, over all processes together (the joint batch), so that all "
        "strategies and numbers of processes see the same data in each update; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=_count, default=10, metavar="E", help="default %(default)s"
    )
    parser.add_argument(
        "--lr", type=_rate, default=0.2, help="learning rate of SGD; default %(default)s"
    )
    parser.add_argument(
        "--train-size", "--train_size", type=_count, metavar="S",
        help="how many images to train on; default: all 1438",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=_seed, default=0,
        help="decides the first weights, the order of the data and, with --train-size, which "
        "images; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="a new file for the figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when a process failed; 2 for bad flags; 130 after Ctrl-C."""
    flags = parser()
    options = flags.parse_args(arguments)
    try:
        return _run(flags, options)
    except processes.WorkerError as error:
        print(f"from_scratch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("from_scratch: stopped", file=sys.stderr)
        return 130


def _run(flags: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    strategy = STRATEGIES[options.strategy]
    n = options.n_gpus or options.workers or 2
    gpus = torch.accelerator.device_count() if options.n_gpus else 0
    try:
        if options.strategy == "data_parallel" and options.workers:
            raise ValueError("data_parallel has no processes on CPUs: say --n-gpus, not --workers")
        if options.out and not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        if options.out and options.out.is_dir():
            raise ValueError(f"--out {options.out}: this is a folder, and a file is wanted")
        if options.out and options.out.exists():
            raise ValueError(f"--out {options.out}: it is there already; name another file")
        peers = strategy.peers(n)
        processes.start_server(*(module.__name__ for module in STRATEGIES.values()))
        task = digits_task(
            train_size=options.train_size, batch_size=options.batch_size, epochs=options.epochs,
            lr=options.lr, seed=options.seed,
        )  # fmt: skip
    except ValueError as error:
        flags.error(str(error))
    report = Report(task, list(peers), options.strategy not in BUILT_IN)
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "CPUs"
    print(
        f"{options.strategy}: {len(peers)} process{'es' * (len(peers) > 1)} on {where}, "
        f"{len(task.images)} images, {task.batch_size} per update, {task.updates} updates per epoch"
    )
    report.heading()
    weights = processes.run(strategy.train, task, peers, gpus=gpus, report=report.add)
    figures = report.end(weights)
    if options.out:
        settings = {"strategy": options.strategy, "n": n, "train_size": len(task.images)} | {
            name: getattr(options, name) for name in ("batch_size", "lr", "seed")
        }
        options.out.write_text(json.dumps(settings | figures, indent=1) + "\n")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the others too
    sys.exit(main())
