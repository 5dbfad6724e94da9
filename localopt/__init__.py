"""localopt: train with few synchronisations.

Every replica makes H steps alone, then parameters are averaged. *When* is a period, *how* a rule;
any period goes with any rule around any torch optimizer.
"""

from .collective import Traffic
from .compat import CommOptimizer, DistOptimizer
from .control import AbsentRankError, LayoutMismatchError
from .header import CollectiveError, NonFiniteError, ReplicaMismatchError, SyncError
from .optimizer import LocalAdamW, LocalOptimizer, LocalSGD
from .period import QSR, SWAP, Constant, Period, PostLocal, PowerRule
from .replica import SyncReport
from .sync import (
    BMUF,
    EASGD,
    LSGD,
    Average,
    BlockMomentum,
    CoCoDSGD,
    DiLoCo,
    HierarchicalAverage,
    OverlapLocalSGD,
    Rule,
    SlowMo,
    Streaming,
)
from .watch import Watch

__all__ = [
    "BMUF",
    "EASGD",
    "LSGD",
    "QSR",
    "SWAP",
    "AbsentRankError",
    "Average",
    "BlockMomentum",
    "CoCoDSGD",
    "CollectiveError",
    "CommOptimizer",
    "Constant",
    "DiLoCo",
    "DistOptimizer",
    "HierarchicalAverage",
    "LayoutMismatchError",
    "LocalAdamW",
    "LocalOptimizer",
    "LocalSGD",
    "NonFiniteError",
    "OverlapLocalSGD",
    "Period",
    "PostLocal",
    "PowerRule",
    "ReplicaMismatchError",
    "Rule",
    "SlowMo",
    "Streaming",
    "SyncError",
    "SyncReport",
    "Traffic",
    "Watch",
]
