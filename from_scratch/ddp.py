"""For comparison: torch's DistributedDataParallel, over gloo or, with a GPU for each, NCCL.

The same shards of the same batches as in the other strategies, which is what a DistributedSampler
is for. DDP gathers gradients in buckets, and averages a bucket by an all-reduce as soon as the
backward pass has filled it, while the pass goes on.
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from .processes import Peer
from .task import Replica, Task


def peers(n: int) -> dict[str, None]:
    """n workers, who find each other through a file in the run's folder."""
    return dict.fromkeys(f"worker {r}" for r in range(n))


def train(peer: Peer, task: Task, link: None) -> torch.Tensor:
    """What every worker does."""
    own_gpu = peer.device.type != "cpu" and peer.world_size <= torch.accelerator.device_count()
    dist.init_process_group(
        dist.get_default_backend_for_device(peer.device) if own_gpu else "gloo",
        init_method=f"file://{peer.folder}/store",
        rank=peer.rank,
        world_size=peer.world_size,
    )
    replica = Replica(task, peer.device, shard=peer.rank, shards=peer.world_size)
    model = DistributedDataParallel(replica.model)
    bucket = _LastBucket(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    for epoch in peer.epochs(replica):
        for batch in replica.batches(epoch):
            optimizer.zero_grad()
            replica.loss(model, batch).backward()
            peer.meter.wait += bucket.seconds_ago()
            optimizer.step()
    return replica.weights


class _LastBucket:
    """When the last bucket of gradients was full.

    What the backward pass takes from there on is waiting for communication. (Not so on GPUs, which
    work behind Python's back: there it comes out as nothing.)
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._full = 0.0
        model.register_comm_hook(None, self._all_reduce)

    def _all_reduce(
        self, group: dist.ProcessGroup | None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        self._full = time.perf_counter()
        return allreduce_hook(group, bucket)  # what DDP does without a hook

    def seconds_ago(self) -> float:
        return time.perf_counter() - self._full
