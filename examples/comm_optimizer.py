"""EASGD and LSGD in SDTL's words: one line around the optimizer.

    torchrun --nproc-per-node 2 examples/comm_optimizer.py --dist-optim-name EASGD
    torchrun --nproc-per-node 2 examples/comm_optimizer.py --dist-optim-name LSGD
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from localopt import CommOptimizer

parser = argparse.ArgumentParser()
parser.add_argument("--dist-optim-name", choices=["EASGD", "LSGD", "none"], default="EASGD")
parser.add_argument("--steps", type=int, default=400)
options = parser.parse_args()

on_gpu = torch.accelerator.is_available()
device = torch.device(int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group(dist.get_default_backend_for_device(device))

torch.manual_seed(0)
teacher = nn.Linear(32, 10).to(device)  # stands for your labels
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
torch.manual_seed(1 + dist.get_rank())  # stands for your loader: each replica has its own data

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
optimizer = CommOptimizer(
    optimizer,
    dist_optim_name=None if options.dist_optim_name == "none" else options.dist_optim_name,
    world_size=dist.get_world_size(),
    comm_period=4,
    dist_pulling_strength=0.5,
    local_pulling_strength=0.1,
    model=model,
)

for _ in range(options.steps):
    inputs = torch.randn(64, 32, device=device)
    loss = cross_entropy(model(inputs), teacher(inputs).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.record_loss(loss)  # LSGD follows the replica with the lowest
    optimizer.step()
    scheduler.step()

with optimizer.consensus(), torch.no_grad():  # EASGD: the centre; LSGD: the mean
    torch.manual_seed(0)
    inputs = torch.randn(10_000, 32, device=device)
    accuracy = (model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean().item()
if dist.get_rank() == 0:
    print(
        f"{options.dist_optim_name}: accuracy {accuracy:.1%}, {optimizer.traffic.syncs} "
        f"synchronisations, {optimizer.traffic.exposed:.2f} s exposed"
    )
dist.barrier()
dist.destroy_process_group()
