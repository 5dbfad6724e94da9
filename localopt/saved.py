"""What a `LocalOptimizer` has written into a state, and whether it can be read here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .collective import Collective
from .errors import Warnings
from .replica import Replica
from .sync import Rule

STATE_VERSION = 5
READABLE = (3, 4, 5)

KEY = "localopt"  # in the first parameter group of a state


def own_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the state of a `LocalOptimizer` has of replica and rule; None in another optimizer's."""
    groups = state.get("param_groups") or [{}]
    own: dict[str, Any] | None = groups[0].get(KEY, state.get(KEY))  # version 3: next to them
    return own


def without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inner optimizer's state."""
    groups = [{k: v for k, v in group.items() if k != KEY} for group in state["param_groups"]]
    return {**{k: v for k, v in state.items() if k != KEY}, "param_groups": groups}


def add_own(state: dict[str, Any], replica: Replica, sync: Rule) -> None:
    """Put what is a replica's and its rule's into the inner optimizer's state."""
    state["param_groups"][0][KEY] = {
        "version": STATE_VERSION,
        "rule": type(sync).__name__,
        "rank": replica.collective.rank,
        "world_size": replica.collective.world_size,
        "has_state": has_state(state),
        "replica": replica.state_dict(),
        "sync": sync.state_dict(),
    }


def check_own(
    own: Mapping[str, Any], sync: Rule, collective: Collective, warnings: Warnings
) -> None:
    """Look whether a replica's state fits this rank; warn if it is another rank's.

    Raises:
        ValueError: if it is of another version or rule; or, in mid-round or where replicas differ,
            of another rank or number of replicas.
    """
    if own["version"] not in READABLE:
        raise ValueError(
            f"the state to load has version {own['version']!r}, this localopt writes "
            f"{STATE_VERSION} and reads {', '.join(map(str, READABLE))}"
        )
    replica, rank = own["replica"], collective.rank
    is_open = replica.get("open", replica["remaining"] > 0)
    agreed = own["sync"]["replicas_agree"] and not is_open
    mine = {"rule": type(sync).__name__, "rank": rank, "world_size": collective.world_size}
    for key in ("rule",) if agreed else mine:
        if own[key] != mine[key] and (key != "rule" or own[key] != sync.was_named):
            advice = "" if key == "rule" else f"; {_OWN_FILES}"
            raise ValueError(
                f"rank {rank}: the state to load has {key} {own[key]!r}, this optimizer "
                f"{mine[key]!r}{advice}"
            )
    if own["rank"] is not None and own["rank"] != rank:
        warnings.once(
            "other rank",
            f"the optimizer state that is loaded is that of rank {own['rank']}: momenta and the "
            f"like are each replica's own; {_OWN_FILES}",
        )


_OWN_FILES = "save one file per rank and load it there, or merge them all (localopt.merged)"


def has_state(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state has anything about a parameter."""
    return any(not isinstance(kept, Mapping) or kept for kept in state["state"].values())


def check_whole(state: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` for a state of something else, or one of which a part was lost on the way.

    ``torch.distributed.checkpoint`` loses some.
    """
    if missing := [key for key in ("state", "param_groups") if key not in state]:
        raise ValueError(
            f"the state to load is no optimizer's: it has no {' and no '.join(missing)}; give what "
            "optimizer.state_dict() returned"
        )
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
