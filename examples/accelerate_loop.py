"""LocalAdamW with QSR in a loop of Accelerate's.

    pip install -e '.[examples]'
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --folder teacher

Accelerate gives each replica its device and its share of the data; model, optimizer and scheduler
are not prepared. `teacher` gets `consensus.pt`, the weights to use, and one file per rank. With
`--stop 200` it stops after 200 steps; the first command goes on from there, bit for bit as if it
had not been stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from localopt import QSR, LocalAdamW

EPOCHS, BATCH, IMAGES = 8, 32, 4096

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=Path, required=True, help="saves here, goes on from here")
parser.add_argument("--stop", type=int, help="stop after so many steps")
options = parser.parse_args()

accelerator = Accelerator(
    cpu=not torch.accelerator.is_available(),
    # The order of an epoch's data depends on the seed and the epoch alone.
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
device, rank = accelerator.device, accelerator.process_index

torch.manual_seed(0)
inputs = torch.randn(IMAGES + 1024, 32)
labels = nn.Linear(32, 10)(inputs).argmax(1)  # a teacher stands for your labels
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)

training = TensorDataset(inputs[:IMAGES], labels[:IMAGES])
loader = accelerator.prepare(DataLoader(training, BATCH, shuffle=True))
steps = EPOCHS * len(loader)

optimizer = LocalAdamW(
    model.parameters(),
    lr=3e-3,
    weight_decay=0.05,
    period=QSR(alpha=6e-3, base=4, total_steps=steps),
    model=model,
)
# Once prepared, it would make a step for every replica, and decay that much faster.
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

options.folder.mkdir(parents=True, exist_ok=True)
mine = options.folder / f"rank{rank}.pt"
step = 0
if mine.exists():
    saved = torch.load(mine, map_location=device.type)
    step = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])

stop = options.stop or steps
while step < stop:
    loader.set_epoch(step // len(loader))
    for batch, target in accelerator.skip_first_batches(loader, step % len(loader)):
        accelerator.backward(cross_entropy(model(batch), target))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)  # of this replica's own gradients
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        if step == stop:
            break

if step == steps:
    optimizer.finish()  # the replicas agree
state = {
    "step": step,
    "model": model.state_dict(),
    "optimizer": optimizer.state_dict(),
    "scheduler": scheduler.state_dict(),
}
torch.save(state, mine)
with optimizer.consensus(), torch.no_grad():  # in the middle of a round: the mean of the replicas
    guesses = model(inputs[IMAGES:].to(device)).argmax(1)
    if accelerator.is_main_process:
        torch.save(model.state_dict(), options.folder / "consensus.pt")
accuracy = (guesses == labels[IMAGES:].to(device)).float().mean().item()
traffic = optimizer.traffic
accelerator.print(
    f"step {step}: accuracy {accuracy:.1%}, {traffic.syncs} synchronisations, "
    f"{traffic.bytes / 1e6:.2f} MB sent per replica"
)
accelerator.end_training()
