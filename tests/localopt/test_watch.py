"""All ranks stop at the same step, and none outlives a rank that is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localopt import Watch
from localopt.collective import Collective, waiting
from tests.support.ranks import context, outcomes_of
from tests.support.ranks import run as run_on_file_store

pytestmark = pytest.mark.slow

BEAT, DEAD_AFTER, SLACK = 0.1, 1.5, 4.0  # seconds; slack for a machine that does other things
H = 5  # steps between collectives
KILL, STOP, TERM, INT = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT
ADVICE = "resume from the newest checkpoint"


class Rank:
    """What a test's function finds on its rank."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self._log = rank, folder / f"{rank}.log"
        self.collective = Collective()
        self._tensor = torch.ones(3)

    def say(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{text}\n")

    def watch(self, **settings: Any) -> Watch:
        return Watch(self.collective, **{"beat": BEAT, "dead_after": DEAD_AFTER, **settings})

    def meet(self) -> None:
        self.collective.sum_([self._tensor])

    def train(self, watch: Watch, seconds: float = 0.01, steps: int = 10**9, h: int = H) -> int:
        """Make steps and meet the other ranks after every ``h``; return how many were made."""
        step = 0
        while step < steps and watch.begin(step):
            time.sleep(seconds)
            step += 1
            if step % h == 0:
                self.meet()
            self.say(f"step {step}")
        self.say(f"end {step}")
        return step


def _main(
    function: Callable[..., None], rank: int, m: int, port: int, folder: Path, args: tuple[Any, ...]
) -> None:
    """A rank's process: as a program would, it says its failures itself, in one line."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=m,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    dist.barrier()
    code, mine = 0, Rank(rank, folder)
    try:
        function(mine, *args)
    except BaseException as error:
        os.write(2, f"raised {type(error).__name__}: {error}\n".encode())
        code = 1
    os._exit(code)


class Run:
    """Processes that form a group whose store rank 0 keeps."""

    def __init__(self, processes: list[Any], folder: Path) -> None:
        self.processes, self.folder = processes, folder
        self._hit = 0.0

    def said(self, rank: int) -> str:
        path = self.folder / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    def errors(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def wait_for(self, text: str, *ranks: int) -> None:
        deadline = time.monotonic() + 30
        for rank in ranks or range(len(self.processes)):
            while f"{text}\n" not in self.said(rank):
                assert time.monotonic() < deadline, f"rank {rank} never said {text!r}"
                time.sleep(0.005)

    def send(self, rank: int, number: int) -> None:
        self._hit = time.monotonic()
        os.kill(self.processes[rank].pid, number)

    def codes(self, *besides: int, timeout: float = 30) -> list[int | None]:
        """Exit codes of all ranks but ``besides``, which may go on; None where one does."""
        for rank, process in enumerate(self.processes):
            if rank not in besides:
                process.join(timeout)
        self.seconds = time.monotonic() - self._hit
        return [process.exitcode for process in self.processes]

    def verdicts(self) -> list[str]:
        """The lines that say why the run is over, of all ranks."""
        text = "".join(self.errors(rank) for rank in range(len(self.processes)))
        return [line for line in text.splitlines() if line.endswith(ADVICE)]


@contextmanager
def ranks(function: Callable[..., None], m: int, *args: Any) -> Iterator[Run]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_main, args=(function, rank, m, port, folder, args))
            for rank in range(m)
        ]
        for process in processes:
            process.start()
        run = Run(processes, folder)
        try:
            yield run
        except AssertionError:
            for rank in range(m):
                print(f"--- rank {rank}: {run.said(rank)[-200:]}\n{run.errors(rank)[-3000:]}")
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()


# The agreed stop.


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
        run.send(1, TERM)
        assert run.codes() == [0, 0]
        assert re.findall(r"end \d+", run.said(0)) == re.findall(r"end \d+", run.said(1))
        assert "SIGTERM on rank 1" in run.said(0)
        assert run.seconds < 2


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


# A rank is lost.


def trains(rank: Rank, waits: bool, elsewhere: bool = False) -> None:
    """Rank 0 and 1 make steps; with ``waits`` the victim's peers are in a collective, mostly."""
    with rank.watch() as watch:
        if elsewhere:  # another system's process numbers mean nothing here
            place = watch._post.place
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
    with rank.watch(stall_after=1.0) as watch:
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
        assert run.seconds < 1.0 + SLACK
        print(f"detected in {run.seconds:.2f} s")


def waits_for_ever(rank: Rank) -> None:
    """Ranks in collectives that will never meet."""
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    with rank.watch(stall_after=1.0) as watch:
        rank.train(watch, steps=5 - rank.rank, h=100)
        rank.say("waits")
        Collective(groups[rank.rank]).sum_([torch.ones(3)])


def test_all_wait() -> None:
    with ranks(waits_for_ever, 2) as run:
        run.wait_for("waits")
        run._hit = time.monotonic()
        assert run.codes() == [3, 3]
        (line,) = run.verdicts()
        assert line.startswith("all ranks have waited in a collective for 1 s: rank 1 on ")
        assert "at step 4, the others up to step 5; " in line
        assert run.seconds < 1.0 + SLACK


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
    with rank.watch(beat=0.02, dead_after=2.0) as watch:
        rank.train(watch, seconds=0.0, steps=10**9 if rank.rank else 0, h=10**9)
        time.sleep(60)


def burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


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


# Without a store of its own, without other ranks.


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
    zero, one = run_on_file_store(on_file_store, 2)
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


def test_one_rank() -> None:
    """Signals, and nothing else."""
    handler = signal.getsignal(TERM)
    with Watch(Collective(), beat=BEAT) as watch:
        assert watch.begin(0) and watch.begin(1)
        os.kill(os.getpid(), TERM)
        deadline = time.monotonic() + 10
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
