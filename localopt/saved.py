"""What a `LocalOptimizer` has written into a state, and whether it can be read here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATE_VERSION = 5
READABLE = (3, 4, 5)

KEY = "localopt"  # in the first parameter group of a state


def own_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the state of a `LocalOptimizer` has of replica and rule; None in another optimizer's."""
    groups = state.get("param_groups") or [{}]
    return groups[0].get(KEY, state.get(KEY))  # next to the groups in version 3


def without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inner optimizer's state."""
    groups = [{k: v for k, v in group.items() if k != KEY} for group in state["param_groups"]]
    return {**{k: v for k, v in state.items() if k != KEY}, "param_groups": groups}


def check_own(
    own: Mapping[str, Any], rule: str, was_named: str | None, rank: int, world_size: int
) -> None:
    """Raise `ValueError` unless a replica's state fits this rank.

    Args:
        own: what `own_state` gave.
        rule: the rule's name here.
        was_named: by which name it was saved before.
        rank, world_size: here; they matter in mid-round, or where replicas differ.
    """
    if own["version"] not in READABLE:
        raise ValueError(
            f"the state to load has version {own['version']!r}, this localopt writes "
            f"{STATE_VERSION} and reads {', '.join(map(str, READABLE))}"
        )
    replica = own["replica"]
    is_open = replica.get("open", replica["remaining"] > 0)
    agreed = own["sync"]["replicas_agree"] and not is_open
    mine = {"rule": rule, "rank": rank, "world_size": world_size}
    for key in ("rule",) if agreed else mine:
        if own[key] != mine[key] and (key != "rule" or own[key] != was_named):
            raise ValueError(
                f"rank {rank}: the state to load has {key} {own[key]!r}, this optimizer "
                f"{mine[key]!r}"
            )


def has_state(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state has anything about a parameter."""
    return any(not isinstance(kept, Mapping) or kept for kept in state["state"].values())


def check_whole(state: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` if ``torch.distributed.checkpoint`` has lost a part on the way."""
    named = any(isinstance(p, str) for group in state["param_groups"] for p in group["params"])
    if own is None and named:
        raise ValueError(
            "the state to load has parameters' names and nothing of localopt's: "
            "flatten_optimizer_state_dict=True drops that, so get and set the state without it. If "
            "it is a bare optimizer's, load it into optimizer.inner before the first step"
        )
    if own is not None and own.get("has_state") and not has_state(state):
        raise ValueError(
            "the state to load has lost the inner optimizer's, such as momenta: torch.distributed."
            "checkpoint loads into what is there, and a new optimizer has none yet. Save and load "
            "localopt.integrations.dcp.ReplicaState"
        )
