"""What runs are called: by how their replicas meet, and by the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..values import shortened

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
_LONGEST = 300  # characters of anything that is shown


def shown(text: str) -> str:
    """``text`` as a page can hold it: not too long, no control characters, no half characters."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)


def in_words(value: Any) -> str:
    """What a run has left under a name, whatever it is, in a few words."""
    return str(value) if isinstance(value, (str, float, bool)) else shortened(value)


def labels(runs: Sequence[tuple[str, Settings]]) -> list[str]:
    """A short label for each (name, settings), no two the same."""
    method = [_method(settings) or name for name, settings in runs]
    differing = [_differing([s for _, s in runs], method, label) for label in method]
    longer = [
        ", ".join([label, *_items({key: runs[at][1].get(key, "–") for key in differing[at]})])
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
    return ", ".join([in_words(settings.get("sync", "average")), *_items(given)])


def period(settings: Settings) -> str:
    """When replicas synchronise."""
    if not settings.get("optimizer"):
        return "–"
    if not _local(settings):
        return "every step"
    names = ("period", "alpha", "h_base", "power", "switch_step")
    kind, alpha, base, power, switch = (in_words(settings.get(key, "?")) for key in names)
    given = settings.get("period_settings")
    first = {
        "qsr": f"QSR, α {alpha}, H ≥ {base}",
        "power": f"power {power}, α {alpha}, H ≥ {base}",
        "constant": f"H = {base}",
        "post-local": f"H = {base} from step {switch}",
        "swap": f"SWAP from step {switch}",
    }.get(kind, kind)
    return ", ".join([first, *_items(given)])


def _items(given: Any) -> list[str]:
    """A rule's or a period's own settings."""
    items = given.items() if isinstance(given, dict) else ()
    return [f"{in_words(key)} {in_words(value)}" for key, value in items]


def subject(settings: Settings) -> str:
    """What is trained on what."""
    model, data = settings.get("model"), settings.get("data")
    return f"{in_words(model)} on {in_words(data)}" if model and data else ""


def different_data(runs: Sequence[Settings]) -> str:
    """What to say of runs on different data; "" where there is one, or none known."""
    further, unset = ("resolution", "label_skew"), (None, -1, 0)
    kinds = dict.fromkeys(
        ", ".join([str(s["data"]), *(f"{k} {s[k]}" for k in further if s.get(k) not in unset)])
        for s in runs
        if s.get("data")
    )
    if len(kinds) < 2:
        return ""
    return f"These runs are on different data ({'; '.join(kinds)}): do not compare their figures."


def _local(settings: Settings) -> bool:
    return in_words(settings["optimizer"]).startswith("local")


def _method(settings: Settings) -> str:
    """Optimizer, rule and period; "" where no settings are known."""
    optimizer = in_words(settings.get("optimizer") or "")
    words = [_OPTIMIZERS.get(optimizer, optimizer)]
    if optimizer and _local(settings):
        sync, when = in_words(settings.get("sync", "average")), period(settings)
        words += [sync] * (sync != "average") + [when.split(",")[0]]
    return ", ".join(words)


def _differing(settings: Sequence[Settings], method: Sequence[str], label: str) -> list[str]:
    """The settings in which the runs that share ``label`` differ; only the first few."""
    group = [s for s, own in zip(settings, method, strict=True) if own == label]
    keys = dict.fromkeys(key for s in group for key in s if key not in _SURROUNDINGS)
    return [key for key in keys if any(s.get(key) != group[0].get(key) for s in group)][:_AT_MOST]
