"""Rules by name: what a recipe may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localopt import BMUF, Rule
from localopt.sync import RULES
from training import settings
from training.config import Config
from training.optimizers import rule
from training.values import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def wanted(sync: str, settings: dict[str, Any] | None = None, **others: Any) -> Config:
    return Config(**{"alpha": 1.0, "sync": sync, "sync_settings": settings or {}, **others})


RECIPES = [
    path for path in (ROOT / "recipe").glob("digits-resnet-*.yml")
    if path.stem.removeprefix("digits-resnet-") in RULES
]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_rule_of_its_name(path: Path) -> None:
    loaded = settings.load(["--recipe-pth", str(path)])
    assert path.stem == f"digits-resnet-{loaded.sync}"
    assert isinstance(rule(loaded), Rule)


def test_recipes_were_found() -> None:
    assert len(RECIPES) >= 9


def test_settings_take_the_types_of_the_rule() -> None:
    """YAML reads 1e-1 as text and 1 as an integer."""
    easgd = rule(wanted("easgd", {"alpha": "1e-1", "beta": 1, "overlap": None}))
    assert (easgd.alpha, easgd.beta, easgd.overlap) == (0.1, 1.0, None)
    assert isinstance(easgd.beta, float)
    average = rule(wanted("average", {"state_fields": ["exp_avg"]}))
    assert average.state_fields == ("exp_avg",)
    assert isinstance(rule(wanted("bmuf", {"nesterov": True, "lr": 1})), BMUF)


@pytest.mark.parametrize(
    ("sync", "settings", "parts"),
    [
        ("easgd", {"aplha": 0.1}, ["'aplha'", "easgd has alpha, beta, pull, overlap"]),
        ("cocod", {"alpha": 0.1}, ["'alpha'", "cocod has no settings"]),
        ("easgd", {"alpha": "x"}, ["alpha is 'x'", "a number"]),
        ("easgd", {"alpha": -0.5}, ["alpha is -0.5", "positive"]),
        ("easgd", {"overlap": 3}, ["overlap is 3", "true or false"]),
        ("easgd", {"pull": None}, ["pull is None", "a number"]),
        ("overlap", {"alpha": 1}, ["alpha is 1.0", "[0, 1)"]),
        ("slowmo", {}, ["slowmo needs beta"]),
        ("hierarchical", {}, ["needs group_size and global_every"]),
        ("hierarchical", {"group_size": 1.5, "global_every": 2}, ["group_size is 1.5", "integer"]),
        ("lsgd", {"group_size": 2}, ["group_size is 2", "two levels need both"]),
        ("bmuf", {"momentum": 1.0}, ["momentum is 1.0", "[0, 1)"]),
        ("diloco", {"lr": 1.5}, ["learning rate is 1.5", "long rounds diverge"]),
        ("streaming", {"fragments": 2, "outer": "Adam"}, ["must be a function", "'Adam'"]),
        ("average", {"state_fields": "exp_avg"}, ["state_fields is 'exp_avg'", "a list"]),
        ("average", {"state_fields": ["momentum_buffer"]}, ["'momentum_buffer'", "exp_avg_sq"]),
        ("average", {"reset_fields": ["step"]}, ["reset_fields names 'step'", "exp_avg"]),
    ],
)
def test_an_impossible_setting_is_named(sync: str, settings: dict[str, Any], parts: list) -> None:
    with pytest.raises(ConfigError) as caught:
        rule(wanted(sync, settings))
    message = str(caught.value)
    assert "\n" not in message and "sync_settings" in message
    assert all(part in message for part in parts), message


def test_an_optimizer_without_momentum_has_nothing_to_average() -> None:
    settings = {"state_fields": ["momentum_buffer"]}
    assert rule(wanted("average", settings, optimizer="localsgd")).state_fields
    with pytest.raises(ConfigError, match="nothing to average"):
        rule(wanted("average", settings, optimizer="localsgd", momentum=0.0))
