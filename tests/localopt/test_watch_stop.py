"""All ranks stop at the same step."""

from __future__ import annotations

import random
import re
import signal
import time

import pytest

from tests.support.ranks import context
from tests.support.watched import INT, SLACK, TERM, Rank, ranks

pytestmark = pytest.mark.slow


def stops(rank: Rank, m: int) -> None:
    """Training at a speed of its own; rank 0 is the slowest."""
    with rank.watch() as watch:
        rank.say("begun")
        made = rank.train(watch, seconds=0.03 / (1 + rank.rank))
        assert not watch.begin(made), "a stop is final"
        rank.say(f"stopped at {made}: {watch.signal} {watch.reason}")


@pytest.mark.parametrize(("m", "number", "times"), [(2, TERM, 1), (4, TERM, 2), (4, INT, 1)])
def test_stop(m: int, number: int, times: int) -> None:
    """A signal to one rank at some moment, in a collective or not: all stop before one step."""
    moment = random.Random(m + number + times)
    with ranks(stops, m, m) as run:
        run.wait_for("step 1")
        time.sleep(moment.uniform(0, 0.5))
        target = moment.randrange(m)
        for _ in range(times):
            run.send(target, number)
            time.sleep(0.02)
        assert run.codes() == [0] * m
        ends = {run.said(rank).splitlines()[-1] for rank in range(m)}
        assert len(ends) == 1, ends
        assert f"{signal.Signals(number).name} on rank {target} on " in ends.pop()
        assert run.seconds < SLACK
        assert run.verdicts() == []


def test_stop_asked_of_all_at_once() -> None:
    """As launchers do: every rank gets it, twice."""
    with ranks(stops, 4, 4) as run:
        run.wait_for("step 7")
        for rank in (0, 1, 2, 3, 3, 2, 1, 0):
            run.send(rank, TERM)
        assert run.codes() == [0] * 4
        assert len({run.said(rank).splitlines()[-1] for rank in range(4)}) == 1


@pytest.mark.parametrize("held", [True, False])
def test_an_interrupt_that_a_launcher_passes_on_as_sigterm_is_one(held: bool) -> None:
    """Ctrl-C reaches the ranks, and the launcher, which sends them SIGTERM. Of two signals that
    wait for a process that is held up, the later one is handled first."""
    with ranks(stops, 2, 2) as run:
        run.wait_for("step 7")
        for number in (*([signal.SIGSTOP] if held else ()), INT, TERM, signal.SIGCONT):
            for rank in (0, 1):
                run.send(rank, number)
        assert run.codes() == [0] * 2
        assert all("SIGINT on rank" in run.said(rank).splitlines()[-1] for rank in (0, 1))


def waits_for_a_slow_one(rank: Rank) -> None:
    """All but rank 0 spend their time in the collective that ends every step."""
    with rank.watch() as watch:
        rank.train(watch, 0.5 if rank.rank == 0 else 0.0, h=1)
        rank.say(watch.reason)


def test_stop_inside_a_collective() -> None:
    """The thread hears of it while the main thread cannot: two steps of rank 0 at the most."""
    with ranks(waits_for_a_slow_one, 2) as run:
        run.wait_for("step 1")
        time.sleep(0.1)
        made = run.said(0).count("step")
        run.send(1, TERM)
        assert run.codes() == [0, 0]
        (end,) = {*re.findall(r"end (\d+)", run.said(0)), *re.findall(r"end (\d+)", run.said(1))}
        assert "SIGTERM on rank 1" in run.said(0)
        assert int(end) - made <= 4, "two, and as many for a busy machine"


def cannot_be_asked(rank: Rank) -> None:
    with rank.watch() as watch:
        if rank.rank == 1:
            rank.say("in")
            time.sleep(60)
        rank.train(watch, h=1)


def test_second_interrupt() -> None:
    """One Ctrl-C waits for the step to end, two do not."""
    with ranks(cannot_be_asked, 2) as run:
        run.wait_for("in", 1)
        time.sleep(0.2)
        run.send(0, INT)
        time.sleep(0.5)
        assert run.processes[0].is_alive()
        run.send(0, INT)
        assert run.codes(1)[0] == 128 + INT
        assert run.seconds < SLACK


def has_a_launcher(rank: Rank, pid: int) -> None:
    with rank.watch(watch_parent=[pid] if rank.rank == 1 else ()) as watch:
        rank.train(watch)
        rank.say(f"{watch.signal} {watch.reason}")


def test_launcher_ends() -> None:
    """Its end is a SIGTERM, also while its parent has not yet asked how it ended."""
    launcher = context.Process(target=time.sleep, args=(60,))
    launcher.start()
    with ranks(has_a_launcher, 2, launcher.pid) as run:
        run.wait_for("step 1")
        launcher.kill()
        assert run.codes() == [0, 0]
        for rank in (0, 1):
            end = run.said(rank).splitlines()[-1]
            assert end.startswith(f"{int(TERM)} the launcher of rank 1 on ")
            assert end.endswith(f"(process {launcher.pid}) has ended")
    launcher.join()
