"""The public face: the names that users, tests and benchmarks rely on, by keyword."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import localopt
from localopt import QSR, SWAP, Average, Constant, PostLocal, PowerRule
from tests.support.small_network import network

PERIODS = {cls.__name__ for cls in (Constant, PowerRule, QSR, PostLocal, SWAP)}
SIGNATURES: dict[str, list[str]] = {
    "LocalOptimizer": [
        "inner", "period", "sync", "model", "buffers", "process_group", "auto", "track_drift",
    ],
    "Constant": ["h"],
    "PowerRule": ["alpha", "base", "power"],
    "QSR": ["alpha", "base"],
    "PostLocal": ["switch_step", "h"],
    "SWAP": ["switch_step"],
    "Average": ["state_fields"],
    "BlockMomentum": ["outer", "normalize_by_lr"],
    "BMUF": ["momentum", "lr", "nesterov"],
    "SlowMo": ["beta", "lr"],
    "DiLoCo": ["lr", "momentum"],
    "EASGD": ["alpha", "beta", "pull"],
    "OverlapLocalSGD": ["alpha", "beta"],
    "CoCoDSGD": [],
    "LSGD": ["c", "p", "group_size"],
    "HierarchicalAverage": ["group_size", "global_every"],
}  # fmt: skip


def test_public_names() -> None:
    """The names that users, tests and benchmarks rely on, by keyword."""
    for name, keywords in SIGNATURES.items():
        accepted = inspect.signature(getattr(localopt, name)).parameters
        common = ["warmup_steps", "total_steps", "h_max"] if name in PERIODS else []
        assert set(keywords + common) <= set(accepted), name
    for name in ("LocalSGD", "LocalAdamW"):
        optimizer = getattr(localopt, name)(
            params=network().parameters(), lr=0.1, weight_decay=0.1, period=Constant(h=2),
            sync=Average(state_fields=()), model=None, buffers="keep", process_group=None,
            auto=True, track_drift=False,
        )  # fmt: skip
        assert type(optimizer) is getattr(localopt, name)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        for attribute in ("step", "average", "record_loss", "finish", "consensus", "synced", "h",
                          "round", "traffic", "drift"):  # fmt: skip
            assert hasattr(optimizer, attribute), attribute
    assert set(localopt.__all__) >= {*SIGNATURES, "LocalSGD", "LocalAdamW"}
    assert all(hasattr(localopt, name) for name in localopt.__all__)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_settings_are_torchs_and_ours(name: str) -> None:
    """By place and by keyword, with the same defaults: all of both signatures, and no more."""
    seen = dict(inspect.signature(getattr(localopt, f"Local{name}")).parameters)
    of_torch = dict(inspect.signature(getattr(torch.optim, name)).parameters)
    ours = dict(inspect.signature(localopt.LocalOptimizer).parameters)
    ours.pop("inner")
    assert seen.keys() == of_torch.keys() | ours.keys()
    for key, parameter in seen.items():
        wanted = (of_torch | ours)[key]
        assert parameter.default == wanted.default, key
        kind = wanted.kind if key in of_torch else parameter.KEYWORD_ONLY
        assert parameter.kind == kind, key


@pytest.mark.parametrize(("name", "given"), [
    ("SGD", {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.125, "maximize": True}),
    ("SGD", {"momentum": 0.5, "nesterov": True, "foreach": True, "differentiable": False}),
    ("SGD", {"fused": True}),
    ("AdamW", {"betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5, "amsgrad": True}),
    ("AdamW", {"maximize": True, "foreach": True, "capturable": False}),
    ("AdamW", {"fused": True}),
])  # fmt: skip
def test_settings_reach_torchs_optimizer(name: str, given: dict[str, Any]) -> None:
    make = getattr(localopt, f"Local{name}")
    optimizer = make(network().parameters(), period=Constant(2), **given)
    bare = getattr(torch.optim, name)(network().parameters(), **given)
    assert optimizer.defaults == bare.defaults


def test_our_settings_reach_local_optimizer() -> None:
    for make in (localopt.LocalSGD, localopt.LocalAdamW):
        model = network()
        optimizer = make(
            model.parameters(), period=Constant(2), sync=localopt.DiLoCo(), model=model,
            buffers="average", auto=False, track_drift=True, check_finite=False, alone=True,
        )  # fmt: skip
        assert isinstance(optimizer.sync, localopt.DiLoCo)
        layout, meeting = optimizer._layout, optimizer._replica.meeting
        assert (layout._model, layout._policy, optimizer.auto) == (model, "average", False)
        assert (meeting.check_finite, meeting.track_drift) == (False, True)
