"""What else users would take, each as its own documentation starts it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_kept: list = []  # servers end with their objects


def _nothing() -> None:
    pass


def deepspeed(model: nn.Module) -> tuple[nn.Module, Callable[[], Any], Callable[[], Any], Any]:
    """DeepSpeed at stage 0: its gradient all-reduce follows the backward pass."""
    from training.deepspeed_settings import deepspeed as package

    if not package.comm.is_initialized():
        package.init_distributed(dist_backend="gloo", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
                "zero_optimization": {"stage": 0}}  # fmt: skip
    engine, *_ = package.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine, engine.step, _nothing, None


def torchft(
    model: nn.Module, optimizer: torch.optim.Optimizer, h: int
) -> tuple[nn.Module, Callable[[], Any], Callable[[], Any], Any]:
    """torchft's LocalSGD, each rank a replica group of its own, with its lighthouse on rank 0."""
    from torchft.local_sgd import LocalSGD

    local = LocalSGD(torchft_manager(), model, optimizer, sync_every=h)
    local.__enter__()
    return model, optimizer.step, _nothing, None


def torchft_manager() -> Any:
    """The manager that this process has."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    for thing in _kept:
        if isinstance(thing, Manager):
            return thing
    rank, m = dist.get_rank(), dist.get_world_size()
    here = _own_address()
    told: list[str | None] = [None]
    if rank == 0:
        house = LighthouseServer(bind="0.0.0.0:0", min_replicas=m, join_timeout_ms=10_000)
        _kept.append(house)
        told = [f"http://{here}:{house.address().rpartition(':')[2]}"]
    dist.broadcast_object_list(told)
    store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
    patience = timedelta(seconds=300)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=patience), min_replica_size=m, use_async_quorum=False,
        load_state_dict=lambda state: None, state_dict=dict, init_sync=False,
        timeout=patience, quorum_timeout=patience, rank=0, world_size=1,
        store_addr=here, store_port=store.port, lighthouse_addr=told[0],
        replica_id=f"replica{rank}", hostname=here,
    )  # fmt: skip
    _kept.extend([store, manager])
    return manager


def _own_address() -> str:
    """That of the interface that ranks meet through."""
    import os

    import psutil

    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return next(a.address for a in psutil.net_if_addrs()[interface] if a.family.name == "AF_INET")
