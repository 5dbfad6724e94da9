"""localopt: train with few synchronisations.

Every replica makes H steps alone, then parameters are averaged. *When* is a period, *how* a rule;
any period goes with any rule around any torch optimizer.
"""

from .compat import CommOptimizer, DistOptimizer
from .compression import Bfloat16, Codec, Int8
from .errors import (
    AbsentRankError,
    CollectiveError,
    LayoutMismatchError,
    NonFiniteError,
    ReplicaMismatchError,
    SyncError,
)
from .faults.watch import Watch
from .local import LocalAdamW, LocalSGD
from .merge import merged
from .optimizer import LocalOptimizer
from .period import QSR, SWAP, Constant, Period, PostLocal, PowerRule
from .report import SyncReport
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
from .traffic import Sending, Traffic

__version__ = "0.1.0"

__all__ = [
    "BMUF",
    "EASGD",
    "LSGD",
    "QSR",
    "SWAP",
    "AbsentRankError",
    "Average",
    "Bfloat16",
    "BlockMomentum",
    "CoCoDSGD",
    "Codec",
    "CollectiveError",
    "CommOptimizer",
    "Constant",
    "DiLoCo",
    "DistOptimizer",
    "HierarchicalAverage",
    "Int8",
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
    "Sending",
    "SlowMo",
    "Streaming",
    "SyncError",
    "SyncReport",
    "Traffic",
    "Watch",
    "merged",
]
