"""A watch gives no alarm without a reason, leaves nothing behind, and needs no store of its own."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from localopt import Watch
from localopt.collective import Collective
from tests.support.ranks import context, outcomes_of, run
from tests.support.watched import BEAT, DEAD_AFTER, INT, STOP, TERM, Rank, ranks

pytestmark = pytest.mark.slow


# No alarm.


def leaves(rank: Rank, first: int) -> None:
    """One rank leaves long before the others, which the store may outlive or not."""
    with rank.watch() as watch:
        rank.train(watch, steps=10)
        if rank.rank != first:
            time.sleep(DEAD_AFTER + 0.5)
            assert watch.verdict is None
            rank.train(watch, steps=10, h=100)
    rank.say("left")


@pytest.mark.parametrize("first", [0, 1])
def test_orderly_exit(first: int) -> None:
    with ranks(leaves, 3, first) as run:
        assert run.codes() == [0, 0, 0]
        assert run.verdicts() == []


def stops_alone(rank: Rank) -> None:
    with rank.watch() as watch:
        rank.train(watch, steps=10)
        if rank.rank == 1:
            rank.say("alone")
            rank.say(f"made {rank.train(watch, h=10**9)}")


def test_stop_after_the_store_has_left() -> None:
    """Nobody is left to agree with."""
    with ranks(stops_alone, 2) as run:
        run.wait_for("alone", 1)
        assert run.codes(1)[0] == 0
        time.sleep(0.3)
        run.send(1, TERM)
        assert run.codes() == [0, 0]
        assert run.verdicts() == []


def idles(rank: Rank) -> None:
    with rank.watch(beat=0.02) as watch:
        rank.train(watch, seconds=0.0, steps=10**9 if rank.rank else 0, h=10**9)
        time.sleep(60)


def burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.alone
def test_no_false_alarm_on_a_busy_machine() -> None:
    """Two hundred beats, with more busy processes than cores, and Python held by steps."""
    busy = [context.Process(target=burn, args=(5.0,)) for _ in range(2 * (os.cpu_count() or 2))]
    for process in busy:
        process.start()
    with ranks(idles, 4) as run:
        run.wait_for("step 100", 1, 2, 3)
        time.sleep(4)
        assert all(process.is_alive() for process in run.processes), run.verdicts()
    for process in busy:
        process.kill()
        process.join()


def paused_together(rank: Rank) -> None:
    with rank.watch() as watch:
        rank.train(watch, h=10**9)


def test_all_paused() -> None:
    """Ctrl-Z and fg: whoever wakes first does not take the others for dead."""
    with ranks(paused_together, 2) as run:
        run.wait_for("step 20")
        for rank in (0, 1):
            run.send(rank, STOP)
        time.sleep(2 * DEAD_AFTER)
        for rank in (1, 0):
            run.send(rank, signal.SIGCONT)
            time.sleep(0.2)
        time.sleep(DEAD_AFTER)
        run.send(0, TERM)
        assert run.codes() == [0, 0], run.verdicts()


# Nothing is left.


def several(rank: Rank) -> None:
    """Watches one after another, and one in another: none leaves anything behind."""
    handlers = signal.getsignal(TERM), signal.getsignal(INT)

    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def settled(sought: tuple[int, int]) -> tuple[int, int]:
        """The least that is held, until it is no more than ``sought`` or for some seconds."""
        least, deadline = resources(), time.monotonic() + 3
        while (least[0] > sought[0] or least[1] > sought[1]) and time.monotonic() < deadline:
            time.sleep(0.05)  # rank 0's store closes its side a little later
            now = resources()
            least = min(least[0], now[0]), min(least[1], now[1])
        return least

    with rank.watch() as watch:
        rank.train(watch, steps=5)
    before = settled((0, 0))
    for _ in range(3):
        with rank.watch() as outer, rank.watch(signals=()) as inner:
            rank.train(outer, steps=5)
            rank.train(inner, steps=5)
    after = settled(before)
    assert after[0] <= before[0] and after[1] <= before[1], f"{before}, then {after}"
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == handlers
    assert signal.set_wakeup_fd(-1) == -1
    rank.meet()


def test_nothing_is_left() -> None:
    with ranks(several, 2) as run:
        assert run.codes() == [0, 0]


# Without a store of its own.


def on_file_store(rank: int, m: int) -> list[int]:
    """A FileStore counts its objects: a watch must not use them up."""
    made = []
    for _ in range(3):
        with Watch(Collective(), beat=BEAT, dead_after=DEAD_AFTER) as watch:
            for step in range(1000):
                if not watch.begin(step):
                    break
                time.sleep(0.01)
                if step == 10 and rank == 1:
                    os.kill(os.getpid(), TERM)
            made.append(step)
    dist.barrier(dist.new_group(list(range(m))))
    return made


def test_file_store() -> None:
    """The stop is agreed there as well."""
    zero, one = run(on_file_store, 2)
    assert zero == one and all(10 < step < 1000 for step in zero)


def lost_on_file_store(rank: int, m: int) -> str:
    def end(message: str) -> None:
        raised.append(message)

    raised: list[str] = []
    with Watch(Collective(), beat=BEAT, dead_after=DEAD_AFTER, on_death=end) as watch:
        watch.begin(0)
        time.sleep(0.3)
        if rank == 1:
            os._exit(7)
        deadline = time.monotonic() + 10
        while not raised and time.monotonic() < deadline:
            time.sleep(0.01)
    return raised[0]


def test_on_death() -> None:
    """The caller may end the process in its own way."""
    (_, told), (died, _) = outcomes_of(lost_on_file_store, 2)
    assert not died
    assert told.startswith("rank 1 on ") and "has gone; last at step 1, training" in told
