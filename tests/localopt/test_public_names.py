"""The public face: the names that users, tests and benchmarks rely on, by keyword."""

from __future__ import annotations

import inspect

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
