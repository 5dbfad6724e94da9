"""A small language model with DiLoCo: AdamW inside, an outer step every 25 steps.

    torchrun --nproc-per-node 2 examples/language_model.py --folder lm

It reads the documentation that Python's help() shows, with bytes for tokens; nothing is downloaded.
`lm` gets `consensus.pt`, the weights to use, and one file per rank. With `--stop 90` it stops after
90 steps; the first command goes on from there, bit for bit as if it had not been stopped.

Source: Douillard et al., arXiv 2311.08105.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from localopt import Constant, DiLoCo, LocalAdamW

STEPS, H, BATCH = 200, 25, 16
CONTEXT, WIDTH, HEADS, LAYERS = 32, 64, 4, 2


class Block(nn.Module):
    """Causal attention, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))  # (B, T, 3, HEADS, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, HEADS, T, D)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, 256)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:  # (B, CONTEXT + 1)
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=Path, required=True, help="saves here, goes on from here")
parser.add_argument("--stop", type=int, default=STEPS, help="stop after so many steps")
options = parser.parse_args()

on_gpu = torch.accelerator.is_available()
device = torch.device(int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group(dist.get_default_backend_for_device(device))
rank, replicas = dist.get_rank(), dist.get_world_size()

text = "\n".join(topics[name] for name in sorted(topics)).encode()
tokens = torch.tensor(list(text), device=device)
split = len(tokens) * 9 // 10
share = tokens[:split].chunk(replicas)[rank]  # each replica has its own part of the text
test = tokens[split:].unfold(0, CONTEXT + 1, CONTEXT)  # (B, CONTEXT + 1)

torch.manual_seed(0)
model = LanguageModel().to(device)
optimizer = LocalAdamW(
    model.parameters(),
    lr=6e-3,
    weight_decay=0.1,
    period=Constant(H, total_steps=STEPS),
    sync=DiLoCo(lr=0.7, momentum=0.9),
    model=model,
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

options.folder.mkdir(parents=True, exist_ok=True)
mine = options.folder / f"rank{rank}.pt"
first = 0
if mine.exists():
    saved = torch.load(mine, map_location=device)
    first = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])

for step in range(first, options.stop):
    # What a step sees depends on its number alone, so that a resumed run sees the same.
    generator = torch.Generator().manual_seed(step * replicas + rank)
    starts = torch.randint(len(share) - CONTEXT, (BATCH,), generator=generator)
    windows = torch.stack([share[i : i + CONTEXT + 1] for i in starts.tolist()])
    loss_of(model, windows).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of this replica's own gradients
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()

step = max(first, options.stop)
if step == STEPS:
    optimizer.finish()  # the replicas agree
state = {
    "step": step,
    "model": model.state_dict(),
    "optimizer": optimizer.state_dict(),
    "scheduler": scheduler.state_dict(),
}
torch.save(state, mine)
with optimizer.consensus(), torch.no_grad():  # in the middle of a round: the mean of the replicas
    losses = [loss_of(model, windows) * len(windows) for windows in test.split(64)]
    if rank == 0:
        torch.save(model.state_dict(), options.folder / "consensus.pt")
if rank == 0:
    loss = float(sum(losses) / len(test))
    traffic = optimizer.traffic
    print(
        f"step {step}: test loss {loss:.3f}, {loss / math.log(2):.2f} bits per byte, "
        f"{traffic.syncs} synchronisations, {traffic.bytes / 1e6:.1f} MB sent per replica"
    )
dist.barrier()
dist.destroy_process_group()
