"""A short form of `python -m tests.localopt.soak`."""

from __future__ import annotations

import pytest

from .soak import check

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rule", ["overlap", "lsgd"])
def test_nothing_grows_with_the_rounds(rule: str) -> None:
    check(rule, 200)
