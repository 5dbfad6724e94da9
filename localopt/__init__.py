"""localopt: train with few synchronisations.

Every replica makes H steps alone, then parameters are averaged. *When* is a period, *how* a rule;
any period goes with any rule around any torch optimizer.
"""

from .collective import Traffic
from .control import AbsentRankError, LayoutMismatchError
from .header import NonFiniteError, ReplicaMismatchError, SyncError
from .optimizer import LocalAdamW, LocalOptimizer, LocalSGD
from .period import QSR, SWAP, Constant, Period, PostLocal, PowerRule
from .sync import Average, Rule

__all__ = [
    "QSR",
    "SWAP",
    "AbsentRankError",
    "Average",
    "Constant",
    "LayoutMismatchError",
    "LocalAdamW",
    "LocalOptimizer",
    "LocalSGD",
    "NonFiniteError",
    "Period",
    "PostLocal",
    "PowerRule",
    "ReplicaMismatchError",
    "Rule",
    "SyncError",
    "Traffic",
]
