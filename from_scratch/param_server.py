"""A parameter server: one process holds the model, the others compute gradients for it.

                 server
             ↗↙    ↑↓    ↖↘        ↓ weights w, ↑ gradients g_r
        worker 1  worker 2  worker 3

Each update:

1. the server sends w to every worker;
2. worker r computes the gradient g_r of its shard of the batch at w, and sends it back;
3. the server averages, g = 1/R Σ_r g_r over the R workers, and steps, w ← w − γ g.

This is SGD on the joint batch (`Replica.batches` says why, where shards differ in size). Everything
goes through the server: with P bytes of weights it sends R·P and receives R·P per update, and its
link is what limits the number of workers. While workers compute it idles, and the other way round.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import torch

from .meter import Meter
from .processes import Peer, context
from .task import Replica, Task


def peers(n: int) -> dict[str, Any]:
    """The server, which gets one end of every worker's pipe, and n − 1 workers.

    Raises:
        ValueError: nobody would be left to work.
    """
    if n < 2:
        raise ValueError(f"param_server needs at least 2 processes, a server and a worker; got {n}")
    pipes = [context.Pipe() for _ in range(1, n)]
    workers = {f"worker {r}": theirs for r, (_, theirs) in enumerate(pipes, start=1)}
    return {"server (process 0)": [ours for ours, _ in pipes]} | workers


def train(peer: Peer, task: Task, link: Any) -> torch.Tensor:
    """Be the server, or one of its workers."""
    return serve(peer, task, link) if peer.rank == 0 else work(peer, task, link)


def serve(peer: Peer, task: Task, workers: list[Connection]) -> torch.Tensor:
    """Hand out weights, gather gradients, step.

    Nobody waits in a circle: a worker sends its gradient only after it has read all the weights, so
    while the server is still sending weights, those it sends to are reading.
    """
    replica = Replica(task, peer.device)
    arrived = torch.empty_like(replica.gradient)
    for _ in peer.epochs(replica):
        for _ in range(task.updates):
            for worker in workers:
                send(replica.weights, worker, peer.meter)
            replica.gradient.zero_()
            for worker in workers:  # in one order always: a sum of floats depends on it
                receive(arrived, worker, peer.meter)
                replica.gradient += arrived
            replica.gradient /= len(workers)
            replica.step()
    for worker in workers:  # so that all end with the same model
        send(replica.weights, worker, peer.meter)
    return replica.weights


def work(peer: Peer, task: Task, server: Connection) -> torch.Tensor:
    """Receive weights, send back a gradient."""
    replica = Replica(task, peer.device, shard=peer.rank - 1, shards=peer.world_size - 1)
    for epoch in peer.epochs(replica):
        for batch in replica.batches(epoch):
            receive(replica.weights, server, peer.meter)
            replica.differentiate(batch)
            send(replica.gradient, server, peer.meter)
    receive(replica.weights, server, peer.meter)
    return replica.weights


def send(vector: torch.Tensor, pipe: Connection, meter: Meter) -> None:
    """Send a vector, through the host's memory; returns when the pipe has taken all of it."""
    message = vector.cpu().numpy()
    with meter.sending():
        pipe.send_bytes(message)
    meter.bytes += message.nbytes


def receive(vector: torch.Tensor, pipe: Connection, meter: Meter) -> None:
    """Overwrite a vector with the one that arrives."""
    host = vector.cpu()  # the vector itself, unless it lies on a GPU
    with meter.waiting():
        pipe.recv_bytes_into(host.numpy())
    vector.copy_(host)
