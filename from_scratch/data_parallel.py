"""For comparison: torch's DataParallel, one process with several GPUs.

Each update the first GPU sends the weights and a part of the batch to the others, and adds up the
gradients that come back: a parameter server within one process, which computes as well.
"""

from __future__ import annotations

import torch
from torch import nn

from .processes import Peer
from .task import Replica, Task


def peers(n: int) -> dict[str, int]:
    """One process, which gets n GPUs.

    Raises:
        ValueError: they aren't there.
    """
    found = torch.accelerator.device_count()
    if found < n:
        raise ValueError(
            f"data_parallel needs a GPU for each of {n} replicas, and there are {found}; "
            "on CPUs take param_server, ring_all_reduce or ddp"
        )
    return {f"worker 0, with {n} GPUs": n}


def train(peer: Peer, task: Task, gpus: int) -> torch.Tensor:
    """The only process computes whole batches."""
    replica = Replica(task, peer.device)
    model = nn.DataParallel(replica.model, device_ids=list(range(gpus)))
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    for epoch in peer.epochs(replica):
        for batch in replica.batches(epoch):
            optimizer.zero_grad()
            replica.loss(model, batch).backward()
            optimizer.step()
    return replica.weights
