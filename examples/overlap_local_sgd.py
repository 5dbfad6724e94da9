"""Overlap-Local-SGD in the explicit style of its authors' loop: step, zero_grad, average.

    torchrun --nproc-per-node 2 examples/overlap_local_sgd.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from localopt import Constant, LocalSGD, OverlapLocalSGD

STEPS = 400

on_gpu = torch.accelerator.is_available()
device = torch.device(int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group(dist.get_default_backend_for_device(device))

torch.manual_seed(0)
teacher = nn.Linear(32, 10).to(device)  # stands for your labels
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
torch.manual_seed(1 + dist.get_rank())  # stands for your loader: each replica has its own data

optimizer = LocalSGD(
    model.parameters(),
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    period=Constant(2),
    sync=OverlapLocalSGD(alpha=0.6, beta=0.7),
    model=model,
    auto=False,  # average() is called below, not by step()
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

for _ in range(STEPS):
    inputs = torch.randn(64, 32, device=device)
    cross_entropy(model(inputs), teacher(inputs).argmax(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.average()  # every second time: pull to the anchor, launch its next mean, go on
    scheduler.step()
optimizer.finish()  # waits for what is in flight, and makes the replicas equal to their mean

with torch.no_grad():
    torch.manual_seed(0)
    inputs = torch.randn(10_000, 32, device=device)
    accuracy = (model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean().item()
traffic = optimizer.traffic
if dist.get_rank() == 0:
    print(
        f"accuracy {accuracy:.1%}, {traffic.syncs} synchronisations, "
        f"{traffic.exposed:.2f} s exposed, {traffic.hidden:.2f} s hidden"
    )
dist.barrier()
dist.destroy_process_group()
