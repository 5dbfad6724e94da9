"""How to synchronise: one file per rule."""

from .average import Average
from .rule import Rule

__all__ = ["Average", "Rule"]
