"""Rank, device and process group of this process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from . import launchers, meeting_point
from .config import Config
from .values import ConfigError

# How far replicas may be apart in time at the end of a round of thousands of steps.
PATIENCE = timedelta(hours=1)
# How long the first waits for the last at the start.
ARRIVAL = timedelta(minutes=5)


@dataclass(frozen=True)
class Process:
    """This process: its rank among the replicas and on its host, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def join(config: Config) -> Process:
    """Join the process group that the launcher describes; alone without a launcher.

    GPUs talk through NCCL, one replica each. More replicas than GPUs share them through gloo,
    and so do replicas on CPUs.

    Raises:
        ConfigError: if GPUs are asked for and there are none, or the launcher's hostfile is
            missing, or some replicas do not come.
        AbsentRankError: if one has died before it came.
    """
    launchers.check()
    gpus = torch.accelerator.device_count()
    if config.device == "cuda" and not gpus:
        raise ConfigError("device is cuda: this host has no GPU that torch can use")
    _default_environment(config.local_rank)
    if config.deterministic:
        use_deterministic_kernels()
    local_rank = int(os.environ["LOCAL_RANK"])
    replicas_here = launchers.replicas_here()
    if gpus and config.device != "cpu":
        device = torch.device(local_rank % gpus)
        torch.accelerator.set_device_index(device.index)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // replicas_here))
    own_gpu = device.type != "cpu" and replicas_here <= gpus
    _meet(dist.get_default_backend_for_device(device) if own_gpu else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), local_rank, device)


def use_deterministic_kernels() -> None:
    """From now on the same inputs give the same bits; an operator that cannot raises.

    Before the first use of a GPU, whose matrix products read the environment then.
    """
    set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and for debugging
    torch.backends.cudnn.benchmark = False


def _meet(backend: str) -> None:
    """Meet the other replicas, which after `ARRIVAL` have failed to come."""
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = meeting_point.met(rank, world_size, ARRIVAL)
    store.set_timeout(PATIENCE)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE
    )


def _default_environment(local_rank: int) -> None:
    """What a launcher would say for one replica, where none has spoken."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ.update(alone)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


def set_default(name: str, value: str) -> None:
    """Set a variable for libraries that are imported or used later, if the user has not."""
    os.environ.setdefault(name, value)


def leave() -> None:
    """Leave the process group together: gloo aborts ranks that leave one by one."""
    dist.barrier()
    dist.destroy_process_group()
