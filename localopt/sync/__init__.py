"""How to synchronise: one file per rule."""

from collections.abc import Callable

from .average import Average
from .block_momentum import BlockMomentum
from .bmuf import BMUF
from .cocod import CoCoDSGD
from .diloco import DiLoCo
from .easgd import EASGD
from .hierarchical import HierarchicalAverage
from .lsgd import LSGD
from .overlap import OverlapLocalSGD
from .rule import Rule
from .slowmo import SlowMo
from .streaming import Streaming

# By the name that a recipe gives.
RULES: dict[str, Callable[..., Rule]] = {
    "average": Average,
    "hierarchical": HierarchicalAverage,
    "bmuf": BMUF,
    "slowmo": SlowMo,
    "diloco": DiLoCo,
    "easgd": EASGD,
    "overlap": OverlapLocalSGD,
    "cocod": CoCoDSGD,
    "lsgd": LSGD,
    "streaming": Streaming,
}

__all__ = [
    "BMUF",
    "EASGD",
    "LSGD",
    "RULES",
    "Average",
    "BlockMomentum",
    "CoCoDSGD",
    "DiLoCo",
    "HierarchicalAverage",
    "OverlapLocalSGD",
    "Rule",
    "SlowMo",
    "Streaming",
]
