"""What all tests share: markers, quiet for tests that need it, no GPU for most, things made once.

Several processes may run the tests (pytest-xdist); what is here holds between them.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Threads of OpenMP that wait must not hold the cores that others compute on; read when torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SUBJECTS = ("localopt", "training", "data", "from_scratch", "repository", "gpu")


def pytest_configure(config: pytest.Config) -> None:
    for subject in SUBJECTS:
        config.addinivalue_line("markers", f"{subject}: is about this; by the folder of the test")
    # Ignored where a shell has started the tests in the background; what they start inherits it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        subject = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(subject)  # an unknown one is an error: --strict-markers
    items.sort(key=lambda item: (_alone(item), item.get_closest_marker("long") is None))


def _alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


class Quiet:
    """Lets tests run beside each other, and those marked `alone` by themselves.

    Two locked files: who waits to be alone keeps the door shut for those that come later.
    """

    def __init__(self, folder: Path) -> None:
        self._door, self._room = ((folder / name).open("w") for name in ("door.lock", "room.lock"))
        self.is_mine = False

    def enter(self, alone: bool) -> None:
        if self.is_mine:
            return
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self.is_mine = alone

    def leave(self, stay: bool) -> None:
        if not stay:
            fcntl.flock(self._room, fcntl.LOCK_UN)
            self.is_mine = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[object]:
    if (quiet := item.config.stash.get(QUIET, None)) is None:
        quiet = item.config.stash[QUIET] = Quiet(_common(item.config))
    quiet.enter(_alone(item))
    wants_gpu = item.get_closest_marker("gpu") is not None
    try:
        with nullcontext() if wants_gpu or not _has_gpu() else without_gpu():
            return (yield)
    finally:
        quiet.leave(stay=_alone(item) and _alone(nextitem))


QUIET = pytest.StashKey[Quiet]()


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def without_gpu() -> Iterator[None]:
    """What runs in here, and the programs that it starts, find no GPU.

    For itself the environment would not do: CUDA reads that once in a process.
    """
    import torch

    if "tests.support.ranks" in sys.modules:
        forkserver.ensure_running()  # sees the machine's GPUs: it forks ranks that use them as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def _common(config: pytest.Config) -> Path:
    """A folder of this run, the same in all processes that run tests."""
    own: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(pytestconfig: pytest.Config) -> Once:
    """``once(name, make)``: a folder that ``make`` has filled, once in a run of the tests.

    Nobody may write to it.
    """

    def get(name: str, make: Callable[[Path], None]) -> Path:
        common = _common(pytestconfig)
        with locked(common / f"{name}.lock"):
            if not (folder := common / name).exists():
                draft = Path(tempfile.mkdtemp(prefix=name, dir=common))
                make(draft)
                draft.rename(folder)
        return folder

    return get


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
