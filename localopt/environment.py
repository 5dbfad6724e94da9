"""What the launcher says in the environment: the only file that reads it."""

from __future__ import annotations

import os


def announced_ranks() -> int:
    """How many processes the launcher has started (WORLD_SIZE); 1 if it says nothing."""
    announced = os.environ.get("WORLD_SIZE", "")
    return int(announced) if announced.isascii() and announced.isdigit() else 1
