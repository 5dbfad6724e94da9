"""What a run says of itself while it goes on."""

from __future__ import annotations

import pytest

from data.loaders import Pace
from training.record import waiting_for_images


@pytest.mark.parametrize("kept_up", [Pace(), Pace(1000, 2.0, 0.9), Pace(40, 0.2, 0.5)])
def test_a_loader_that_keeps_up_is_not_mentioned(kept_up: Pace) -> None:
    """Nor one whose epoch is too short to judge by."""
    assert waiting_for_images(kept_up, 10.0 if kept_up.images == 1000 else 0.6, 4) is None


def test_a_loader_that_is_too_slow_is_told_with_both_rates() -> None:
    told = waiting_for_images(Pace(images=1000, seconds=9.5, waited=7.5), 10.0, 4)
    assert told is not None
    assert "75% of the time" in told and "gives 105 images/s" in told and "take 400" in told
    assert "Raise nw (now 4)" in told
