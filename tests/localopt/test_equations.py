"""The rules' equations by themselves, against NumPy in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from localopt.flat import pull_
from localopt.outer import Outer
from localopt.sync.average import follow_
from localopt.sync.cocod import correction_
from localopt.sync.easgd import move_centre_
from localopt.sync.overlap import move_anchor_


def draws(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(11, generator=generator, dtype=torch.float64).to(dtype) for n in names}


def near(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-15) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=tolerance, atol=tolerance)


def test_elastic_averaging() -> None:
    """x ← x - α (x - z);  z ← z + β (x̄ - z)."""
    given = draws("x", "z", "mean")
    x, z, mean = (given[n].numpy().copy() for n in ("x", "z", "mean"))
    pull_([given["x"]], [given["z"]], 0.3)
    move_centre_([given["z"]], [given["mean"]], 0.45)
    near(given["x"], x - 0.3 * (x - z))
    near(given["z"], z + 0.45 * (mean - z))


def test_a_pull_towards_a_wider_type() -> None:
    """Parameters of 16 bits: rounded once, at the end."""
    x, z = draws("x", dtype=torch.bfloat16)["x"], draws("x", "z")["z"].float()
    wanted = x.float().lerp(z, 0.25).to(torch.bfloat16)
    pull_([x], [z], 0.25)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("gamma", [1.0, 0.05])
def test_the_overlapped_anchor(gamma: float) -> None:
    """v ← β v + (x̄ - z)/γ;  z ← z + γ v."""
    given = draws("z", "v", "mean")
    z, v, mean = (given[n].numpy().copy() for n in ("z", "v", "mean"))
    move_anchor_([given["z"]], [given["v"]], [given["mean"]], 0.7, gamma)
    v = 0.7 * v + (mean - z) / gamma
    near(given["v"], v, 1e-14)
    near(given["z"], z + gamma * v, 1e-14)


def test_the_correction_of_cocod() -> None:
    """x_i ← mean(s) + (x_i - s_i)."""
    given = draws("x", "s", "mean")
    x, s, mean = (given[n].numpy().copy() for n in ("x", "s", "mean"))
    correction_([given["s"]], [given["mean"]])
    near(given["x"] + given["s"], mean + (x - s), 1e-14)


def test_following_the_mean_change() -> None:
    """z ← z - Δ, x ← z."""
    given = draws("x", "z")
    change, z = given["x"].numpy().copy(), given["z"].numpy().copy()
    follow_([given["x"]], [given["z"]])
    near(given["z"], z - change)
    assert torch.equal(given["x"], given["z"])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("gamma", [None, 0.05])
def test_the_outer_step(nesterov: bool, gamma: float | None) -> None:
    """v ← η v + Δ/γ;  z ← z - ζ γ v, or with Nesterov momentum z ← z - ζ γ (Δ/γ + η v)."""
    eta, zeta = 0.6, 0.7
    z = draws("z", "a", "b")
    make = partial(torch.optim.SGD, lr=zeta, momentum=eta, nesterov=nesterov)
    outer = Outer(make, normalize_by_lr=gamma is not None)
    wanted, v = z["z"].numpy().copy(), 0.0
    outer.attach({"p": z["z"]}, world_size=2)
    for name in ("a", "b"):
        delta, unit = z[name].numpy().copy(), gamma or 1.0
        outer.step({"p": z[name].clone()}, unit)
        v = eta * v + delta / unit
        wanted = wanted - zeta * unit * (delta / unit + eta * v if nesterov else v)
    near(z["z"], wanted, 1e-14)
    assert outer.groups()[0]["lr"] == zeta
