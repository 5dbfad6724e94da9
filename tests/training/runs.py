"""Short runs of main.py, and what is read from them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.program import Outcome

# Bits are compared, on a GPU too.
SHORT = (
    "--epochs", "2", "--steps-per-epoch", "6", "--warmup-epochs", "0", "--log-freq", "1",
    "--deterministic",
)  # fmt: skip


def weights(folder: Path, rank: int, step: int = 12) -> dict[str, list]:
    """A replica's parameters and buffers, as its checkpoint has them."""
    file = folder / f"checkpoints/step-{step:08d}/rank-{rank:04d}.pt"
    state = torch.load(file, weights_only=True)["model"]
    return {name: tensor.tolist() for name, tensor in state.items()}


def one_line(outcome: Outcome, rank: int = 0) -> str:
    """The one line with which a rank of a run that failed complains."""
    assert all(code != 0 for code in outcome.codes), outcome
    (line,) = outcome.complaints(rank)
    assert "Traceback" not in outcome.errors[rank], outcome.errors[rank]
    return line
