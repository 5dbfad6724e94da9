"""What runs are called: by how their replicas meet, and by the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]

_OPTIMIZERS = {
    "localsgd": "LocalSGD", "localadamw": "LocalAdamW",
    "sgd": "data-parallel SGD", "adamw": "data-parallel AdamW",
}  # fmt: skip
# Where a run ran and what it left, not what it did.
_SURROUNDINGS = {
    "data_pth", "log_pth", "local_rank", "nw", "resume", "resume_pth", "loggers", "wandb", "device",
}  # fmt: skip
_AT_MOST = 2  # settings added to a label


def labels(runs: Sequence[tuple[str, Settings]]) -> list[str]:
    """A short label for each (name, settings), no two the same."""
    method = [_method(settings) or name for name, settings in runs]
    differing = [_differing([s for _, s in runs], method, label) for label in method]
    longer = [
        ", ".join([label, *(f"{key} {runs[at][1].get(key, '–')}" for key in differing[at])])
        for at, label in enumerate(method)
    ]
    count = Counter(longer)
    return [
        f"{label} ({longer[: at + 1].count(label)})" if count[label] > 1 else label
        for at, label in enumerate(longer)
    ]


def rule(settings: Settings) -> str:
    """How replicas synchronise."""
    if not settings.get("optimizer"):
        return "–"
    if not _local(settings):
        return "data-parallel"
    given = settings.get("sync_settings")
    given = given if isinstance(given, dict) else {}
    words = [str(settings.get("sync", "average")), *(f"{k} {v}" for k, v in given.items())]
    return ", ".join(words)


def period(settings: Settings) -> str:
    """When replicas synchronise."""
    if not settings.get("optimizer"):
        return "–"
    if not _local(settings):
        return "every step"
    kind, alpha, base = (settings.get(key, "?") for key in ("period", "alpha", "h_base"))
    switch = settings.get("switch_step", "?")
    given = settings.get("period_settings")
    further = [f"{k} {v}" for k, v in given.items()] if isinstance(given, dict) else []
    words = {
        "qsr": f"QSR, α {alpha}, H ≥ {base}",
        "power": f"power {settings.get('power', '?')}, α {alpha}, H ≥ {base}",
        "constant": f"H = {base}",
        "post-local": f"H = {base} from step {switch}",
        "swap": f"SWAP from step {switch}",
    }.get(str(kind), str(kind))
    return ", ".join([words, *further])


def subject(settings: Settings) -> str:
    """What is trained on what."""
    model, data = settings.get("model"), settings.get("data")
    return f"{model} on {data}" if model and data else ""


def _local(settings: Settings) -> bool:
    return str(settings["optimizer"]).startswith("local")


def _method(settings: Settings) -> str:
    """Optimizer, rule and period; "" where no settings are known."""
    optimizer = str(settings.get("optimizer") or "")
    words = [_OPTIMIZERS.get(optimizer, optimizer)]
    if optimizer and _local(settings):
        sync, when = str(settings.get("sync", "average")), period(settings)
        words += [sync] * (sync != "average") + [when.split(",")[0]]
    return ", ".join(words)


def _differing(settings: Sequence[Settings], method: Sequence[str], label: str) -> list[str]:
    """The settings in which the runs that share ``label`` differ; only the first few."""
    group = [s for s, own in zip(settings, method, strict=True) if own == label]
    keys = dict.fromkeys(key for s in group for key in s if key not in _SURROUNDINGS)
    return [key for key in keys if any(s.get(key) != group[0].get(key) for s in group)][:_AT_MOST]
