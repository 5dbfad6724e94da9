"""No rank outlives one that is lost: killed, stopped, hung, or ended by an exception."""

from __future__ import annotations

import re
import socket
import time

import pytest
import torch
import torch.distributed as dist

from localopt.collective import Collective
from tests.support.watched import BEAT, DEAD_AFTER, KILL, SLACK, STALL_AFTER, STOP, Rank, ranks

pytestmark = pytest.mark.slow


def trains(rank: Rank, waits: bool, elsewhere: bool = False) -> None:
    """Rank 0 and 1 make steps; with ``waits`` the victim's peers are in a collective, mostly."""
    with rank.watch() as watch:
        if elsewhere:  # another system's process numbers mean nothing here
            place = watch._post.process
            object.__setattr__(place, "system", f"{place.system} of rank {rank.rank}")
        rank.say("begun")
        seconds = 0.3 if waits and rank.rank == 0 else 0.01
        rank.train(watch, seconds, h=1 if waits else 10**9)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed(victim: int, waits: bool) -> None:
    """Named on this host within a few beats, by one line, whatever the others are in."""
    with ranks(trains, 3, waits) as run:
        run.wait_for("step 1")
        time.sleep(0.35)
        run.send(victim, KILL)
        codes = run.codes()
        verdicts = run.verdicts()
        assert codes[victim] == -KILL
        if waits:  # a main thread's own error may come first: it waited for the verdict
            assert set(codes) - {-KILL} <= {1, 3}, codes
        else:
            assert set(codes) == {-KILL, 3}, codes
            assert verdicts, "somebody says so"
        assert len(verdicts) <= 1 or victim == 0
        host, pid = socket.gethostname(), run.processes[victim].pid
        for line in verdicts:
            assert line.startswith(f"rank {victim} on {host} has died (process {pid} has gone;")
            assert re.search(r"last at step \d+, (training|in a collective)\); ", line)
        assert run.seconds < SLACK
        print(f"detected in {run.seconds:.2f} s")


@pytest.mark.parametrize("number", [KILL, STOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_lost_on_another_host(victim: int, number: int) -> None:
    """Nothing to see but silence, or a connection that breaks."""
    with ranks(trains, 2, False, True) as run:
        run.wait_for("step 1")
        time.sleep(0.3)
        run.send(victim, number)
        assert run.codes(victim)[1 - victim] == 3
        (line,) = run.verdicts()
        assert line.startswith(f"rank {victim} on {socket.gethostname()} has died ")
        assert ("connection lost" if (victim, number) == (0, KILL) else "no sign of life") in line
        assert run.seconds < DEAD_AFTER + SLACK
        print(f"detected in {run.seconds:.2f} s")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped(victim: int, waits: bool) -> None:
    """SIGSTOP: with rank 0 the store falls silent, and operations on it never return."""
    with ranks(trains, 3, waits) as run:
        run.wait_for("step 1")
        time.sleep(0.35)
        run.send(victim, STOP)
        codes = run.codes(victim)
        assert codes[victim] is None
        others = [rank for rank in range(3) if rank != victim]
        assert 3 in codes, codes
        for rank in others:
            if waits and codes[rank] == 1:  # its collective failed when the other rank ended
                assert "Connection closed by peer" in run.errors(rank)
            else:
                assert codes[rank] == 3, codes
        verdicts = run.verdicts()
        assert 1 <= len(verdicts) <= (2 if victim == 0 else 1)
        for line in verdicts:
            assert line.startswith(f"rank {victim} on {socket.gethostname()} is stopped (no sign")
        assert DEAD_AFTER - 2 * BEAT < run.seconds < DEAD_AFTER + SLACK
        print(f"detected in {run.seconds:.2f} s")


def hangs(rank: Rank) -> None:
    with rank.watch(stall_after=STALL_AFTER) as watch:
        rank.train(watch, steps=8)
        rank.say("hung")
        if rank.rank == 1:
            with watch.phase("evaluating"):
                time.sleep(60)
        while True:  # as one that says so while it takes long
            watch.touch()
            time.sleep(0.1)


def test_hung() -> None:
    """A main thread that does not move, and says not that it is alive."""
    with ranks(hangs, 2) as run:
        run.wait_for("hung")
        run._hit = time.monotonic()
        assert run.codes() == [3, 3]
        (line,) = run.verdicts()
        assert line.startswith(f"rank 1 on {socket.gethostname()} hangs (evaluating at step 8")
        assert run.seconds < STALL_AFTER + SLACK
        print(f"detected in {run.seconds:.2f} s")


def waits_for_ever(rank: Rank) -> None:
    """Ranks in collectives that will never meet."""
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    with rank.watch(stall_after=STALL_AFTER) as watch:
        rank.train(watch, steps=5 - rank.rank, h=100)
        rank.say("waits")
        Collective(groups[rank.rank]).sum_([torch.ones(3)])


def test_all_wait() -> None:
    with ranks(waits_for_ever, 2) as run:
        run.wait_for("waits")
        run._hit = time.monotonic()
        codes = run.codes()
        assert 3 in codes and set(codes) <= {1, 3}, codes
        if 1 in codes:  # its collective failed when the other rank ended, which had decided first
            assert "Connection closed by peer" in run.errors(codes.index(1))
        (line,) = run.verdicts()
        assert re.match(r"all ranks have waited in a collective for \d+ s: rank 1 on ", line)
        assert "at step 4, the others up to step 5; " in line
        assert run.seconds < STALL_AFTER + SLACK


def raises(rank: Rank, victim: int, waits: bool) -> None:
    with rank.watch() as watch:
        rank.train(watch, steps=7, h=7)
        if rank.rank == victim:
            raise ValueError("a bad\nbatch")
        if waits:
            rank.meet()
        time.sleep(60)


@pytest.mark.parametrize(("victim", "waits"), [(1, False), (1, True), (0, False)])
def test_raises(victim: int, waits: bool) -> None:
    """An exception that leaves the context ends the others, which know why."""
    with ranks(raises, 3, victim, waits) as run:
        run.wait_for("step 7")
        run._hit = time.monotonic()
        codes = run.codes()
        assert "raised ValueError: a bad\nbatch" in run.errors(victim)
        assert codes[victim] == 1 and set(codes) <= {1, 3}
        assert waits or codes == [1 if rank == victim else 3 for rank in range(3)]
        assert run.verdicts() == [], "the rank that fails says so itself"
        assert run.seconds < SLACK
        print(f"detected in {run.seconds:.2f} s")


def explains(rank: Rank) -> None:
    """Rank 2 raises while the others wait for it; they learn why their collective failed."""
    watch = rank.watch()
    try:
        with watch:
            if rank.rank == 2:
                time.sleep(0.3)
                raise ValueError("a bad batch")
            rank.meet()
    except RuntimeError:
        rank.say(f"explained {watch.verdict}")
    except ValueError:
        rank.say(f"own {watch.first}")


def test_explained() -> None:
    with ranks(explains, 3) as run:
        assert set(run.codes()) <= {0, 3}
        host = socket.gethostname()
        for rank, code in enumerate(run.codes()[:2]):
            told = f"explained rank 2 on {host} stopped: ValueError: a bad batch (at step 0); "
            assert code == 3 or run.said(rank).startswith(told)


def all_raise(rank: Rank) -> None:
    with rank.watch() as watch:
        rank.train(watch, steps=5)
        raise ValueError(f"the same on rank {rank.rank}")


def test_all_raise() -> None:
    """Where all ranks raise, each says so itself."""
    with ranks(all_raise, 3) as run:
        assert run.codes() == [1, 1, 1]
        for rank in range(3):
            assert f"the same on rank {rank}" in run.errors(rank)
