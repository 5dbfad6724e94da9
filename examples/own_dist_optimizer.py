"""A rule of one's own, as a subclass of SDTL's DistOptimizer.

    torchrun --nproc-per-node 2 examples/own_dist_optimizer.py

Here the center is a running mean of the replicas, and a replica is pulled to it the harder the more
its gradients have varied lately, as an example of what `dist_train_step` is for.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from localopt import CommOptimizer, DistOptimizer

STEPS = 400


class Cautious(DistOptimizer):
    """z ← (z + x̄)/2;  x ← x + c s (z - x), s ≤ 1 the gradient norms' coefficient of variation."""

    def attach(self, replica) -> None:
        super().attach(replica)
        self.norms: list[Tensor] = []

    def dist_train_step(self) -> None:
        grads = [p.grad for group in self.local_optimizer.param_groups for p in group["params"]]
        self.norms.append(nn.utils.get_total_norm([g for g in grads if g is not None]))

    def comm_train_step(self) -> None:
        norms = torch.stack(self.norms)
        self.norms.clear()
        for center, mean in zip(self.center, self.mean(), strict=True):
            center.lerp_(mean, 0.5)
        spread = float((norms.std() / norms.mean()).nan_to_num(0.0).clamp(max=1.0))
        self.pull(self.center, self.dist_pulling_strength * spread)


on_gpu = torch.accelerator.is_available()
device = torch.device(int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group(dist.get_default_backend_for_device(device))

torch.manual_seed(0)
teacher = nn.Linear(32, 10).to(device)  # stands for your labels
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
torch.manual_seed(1 + dist.get_rank())  # stands for your loader: each replica has its own data

optimizer = CommOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    Cautious,
    comm_period=8,
    dist_pulling_strength=0.9,
    model=model,
)
for _ in range(STEPS):
    inputs = torch.randn(64, 32, device=device)
    optimizer.zero_grad()
    cross_entropy(model(inputs), teacher(inputs).argmax(1)).backward()
    optimizer.step()
optimizer.finish()

with torch.no_grad():
    torch.manual_seed(0)
    inputs = torch.randn(10_000, 32, device=device)
    accuracy = (model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean().item()
if dist.get_rank() == 0:
    print(f"accuracy {accuracy:.1%}, {optimizer.traffic.syncs} synchronisations")
dist.barrier()
dist.destroy_process_group()
