"""Run a function on real processes that form a gloo group; a deadlock is a failure."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from .patience import PATIENCE

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.preload"])


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


# NCCL refuses a GPU twice on one host: each rank says that it is another, reached over loopback.
ONE_CARD = {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}  # fmt: skip


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = PATIENCE,
    on: str = "cpu",
) -> list[Any]:
    """Return ``[function(rank, world_size, *args) for each rank]``, each run in its own process.

    ``function`` must be defined at the top of a module. Raises `RankError` with every failing
    rank's traceback, or when ``timeout`` seconds have passed. ``on``: "cpu", where no GPU is seen,
    or "gloo" or "nccl", where all ranks have one GPU, and talk so.
    """
    outcomes = outcomes_of(function, world_size, *args, timeout=timeout, on=on)
    failed = [f"rank {r}: {o}" for r, (ok, o) in enumerate(outcomes) if not ok]
    if failed:
        raise RankError("\n".join(failed))
    return [outcome for _, outcome in outcomes]


def outcomes_of(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = PATIENCE,
    on: str = "cpu",
) -> list[tuple[bool, Any]]:
    """As `run`, but returns ``(True, result)`` or ``(False, traceback)`` for each rank."""
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(function, rank, world_size, f"{folder}/store", sender, args, on)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return [_receive(pipe, deadline) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def backend(on: str, rank: int) -> str:
    """Let a rank's process see what `run` says; returns the name of how it talks."""
    import torch

    if on == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "gloo"
    os.environ.update(ONE_CARD, NCCL_HOSTID=f"rank{rank}")
    torch.cuda.set_device(0)
    return on


def _receive(pipe: Connection, deadline: float) -> tuple[bool, Any]:
    if not wait([pipe], max(0.0, deadline - time.monotonic())):
        return False, "not finished in time: deadlock?"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "died without a word"


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    pipe: Connection,
    args: tuple[Any, ...],
    on: str,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend(on, rank),
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=PATIENCE),
        )
        dist.barrier()  # none leaves before all have connected
        outcome = True, function(rank, world_size, *args)
    except BaseException:
        outcome = False, traceback.format_exc()
    # Plain pickle: multiprocessing's would share tensors' memory with a process that has gone.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    # gloo's threads may abort at a normal exit; everything has been sent.
    os._exit(0)
