"""How to synchronise: one file per rule."""

from collections.abc import Callable

from .average import Average
from .block_momentum import BMUF, BlockMomentum, DiLoCo, SlowMo
from .cocod import CoCoDSGD
from .elastic import EASGD
from .hierarchical import HierarchicalAverage
from .leader import LSGD
from .overlap import OverlapLocalSGD
from .rule import Rule, Sending
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
    "Sending",
    "SlowMo",
    "Streaming",
]
