"""A watch over NCCL: a rank that is lost is named, and no other waits on the GPU for ever."""

from __future__ import annotations

import itertools
import signal
import socket
from pathlib import Path

import pytest

from tests.gpu.links import NCCL
from tests.gpu.test_program import PLACES
from tests.localopt.test_watch_lost import trains
from tests.support.program import Running
from tests.support.watched import BEAT, DEAD_AFTER, KILL, SLACK, STOP, ranks
from tests.training.test_lost import assert_named
from tests.training.test_lost import flags as flags

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("link", "victim", "number"),
    [
        *(("cpu", 1, number) for number in (KILL, STOP)),
        *(
            pytest.param("nccl", *each, marks=NCCL.marks)
            for each in itertools.product((0, 1), (KILL, STOP))
        ),
    ],
)
def test_a_lost_rank_ends_the_other(link: str, victim: int, number: int) -> None:
    """Rank 0 keeps the store; rank 1 is in a collective, mostly.

    NCCL's collectives never return where the other rank is lost, and torch's own watchdog ends the
    process a minute later, without a name.
    """
    other = 1 - victim
    with ranks(trains, 2, True, on=link) as run:
        run.wait_for("step 1")
        run.send(victim, number)
        codes = run.codes(*[victim] * (number == STOP))
        assert codes[victim] == (None if number == STOP else -KILL)
        if link == "cpu" and number == KILL and codes[other] == 1:
            assert "Connection closed by peer" in run.errors(other)  # gloo says so itself
        else:
            assert codes[other] == 3, codes
            (line,) = run.verdicts()
            told = "is stopped (no sign" if number == STOP else "has died ("
            assert line.startswith(f"rank {victim} on {socket.gethostname()} {told}")
        if number == STOP:
            assert run.seconds > DEAD_AFTER - 2 * BEAT
        assert run.seconds < SLACK + DEAD_AFTER * (number == STOP)


@pytest.mark.parametrize("link", [NCCL])
@pytest.mark.parametrize(("number", "told"), [("SIGKILL", "has died"), ("SIGSTOP", "is stopped")])
def test_main_names_a_lost_rank(
    flags: tuple[str, ...], tmp_path: Path, number: str, told: str, link: str
) -> None:
    """As on CPUs."""
    running = Running(*flags, "--device", "cuda", places=PLACES[link])
    assert_named(running, tmp_path, 1, getattr(signal, number), told)
