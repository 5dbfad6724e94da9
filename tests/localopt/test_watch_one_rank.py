"""The watch in one process: signals, and waits that are marked."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from localopt import Watch
from localopt.collective import Collective, waiting
from tests.support.patience import PATIENCE
from tests.support.watched import BEAT, TERM


def test_one_rank() -> None:
    """Signals, and nothing else."""
    handler = signal.getsignal(TERM)
    with Watch(Collective(), beat=BEAT) as watch:
        assert watch.begin(0) and watch.begin(1)
        os.kill(os.getpid(), TERM)
        deadline = time.monotonic() + PATIENCE
        while watch.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.signal == TERM and not watch.begin(2)
        watch.fail("nobody hears it")
        assert watch.explain(0.1) is None
    assert signal.getsignal(TERM) is handler
    assert "localopt-watch" not in {thread.name for thread in threading.enumerate()}


def test_waiting_is_marked() -> None:
    """Also where a collective raises."""
    before = waiting.count
    with pytest.raises(ValueError), waiting:
        assert waiting.depth == 1
        raise ValueError
    assert (waiting.depth, waiting.count, waiting.failed) == (0, before + 1, True)
    with waiting:
        pass
    assert not waiting.failed
