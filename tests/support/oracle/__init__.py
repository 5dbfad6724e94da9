"""The mathematics again, in float64 NumPy, sharing no code with the library.

A run is simulated on stacked replicas: ``x`` has the shape (m, d), one flat vector per replica.
A rule in ``localopt/sync/`` has its oracle in the file of the same name here: a class, and in that
file's ``CASES``, under the name of the library's class, the settings that it is tried with. The
files are found by themselves; a rule without an entry is a failing test.
"""

from __future__ import annotations

import importlib
import pkgutil

from .block_momentum import OuterAdam
from .bmuf import Bmuf
from .case import Case
from .cocod import CoCoD
from .diloco import DiLoCo
from .easgd import Easgd
from .inner import INNERS, Array, Sgd
from .lsgd import Leader
from .overlap import Overlap
from .problems import Quadratics
from .rule import Round, RuleOracle
from .simulate import Trajectory, constant_h, qsr_h, simulate
from .slowmo import SlowMo
from .streaming import Streaming

__all__ = [
    "CASES",
    "INNERS",
    "Array",
    "Bmuf",
    "Case",
    "CoCoD",
    "DiLoCo",
    "Easgd",
    "Leader",
    "OuterAdam",
    "Overlap",
    "Quadratics",
    "Round",
    "RuleOracle",
    "Sgd",
    "SlowMo",
    "Streaming",
    "Trajectory",
    "constant_h",
    "find_cases",
    "qsr_h",
    "simulate",
]


def find_cases() -> dict[str, list[Case]]:
    """What the files of this folder have in their ``CASES``, by the name of the library's class."""
    found: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(__path__):
        cases = getattr(importlib.import_module(f"{__name__}.{module.name}"), "CASES", {})
        assert not found.keys() & cases.keys(), f"{module.name} has cases of another file's rule"
        found |= cases
    return found


CASES = find_cases()
