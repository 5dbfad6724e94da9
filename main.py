"""Train a network with few synchronisations: ``deepspeed --hostfile hostfile main.py``."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import socket
import sys
import time
import traceback
from typing import NoReturn

from training import launchers, progress
from training.config import Config
from training.plan.options import help_text
from training.settings import load, recipe_of
from training.siblings import Siblings
from training.values import ConfigError


def main(config: Config) -> int:
    """Build what ``config`` names, and train; return the exit status."""
    if config.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take the GPU
    for name in ("stdout", "stderr"):
        setattr(sys, name, _unbreakable(getattr(sys, name)))
    # What its C++ says of a connection that ends would bury the line that says why. Read on import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imported here: DeepSpeed takes seconds to import, and a wrong flag should not wait for it.
    progress.say("imports torch, DeepSpeed and FFCV")
    siblings = Siblings()
    siblings.start()
    from localopt.faults.watch import DEAD
    from training.loop import train
    from training.run import OWN_ERRORS, LostRankError, assembled

    try:
        with assembled(config, all_met=siblings.stop) as run:
            train(run)
    except OWN_ERRORS as error:
        fail(f"{type(error).__name__}: {error}")
    except LostRankError as error:
        end(DEAD, f"main.py: {error}" if error.first else "")
    except Exception:
        fail(traceback.format_exc(), status=1)
    if not run.preempted:
        return 0
    if run.process.rank == 0:
        print(f"main.py: {run.watch.reason}: saved and stopped; continue with --resume auto")
    return 128 + run.watch.signal


class _Unbreakable(io.FileIO):
    """What cannot be written is lost: nobody reads it any more, or the disk behind it is full."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return memoryview(data).nbytes


_LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _unbreakable(stream: io.TextIOBase) -> io.TextIOBase:
    """A stream of the process's own, whose reader may go without ending the run."""
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    raw = _Unbreakable(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True
    )


def fail(message: str, status: int = 2) -> NoReturn:
    """Say on standard error which rank stops and why, and stop it at once."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    # Ranks of a host mostly fail alike: the launcher ends the others before they repeat it.
    time.sleep(0 if local_rank == "0" else 3)
    end(status, f"main.py: rank {rank} on {socket.gethostname()}: {message}")


def end(status: int, line: str) -> NoReturn:
    """Stop at once: an orderly exit could wait for collectives that never end."""
    with contextlib.suppress(OSError):  # whoever reads this may be gone
        if line:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        if any(word.startswith("--plan") for word in sys.argv[1:]):
            from training.plan.plan import plan

            made = plan(sys.argv[1:])
            from training.plan.report import report  # imports torch

            text = report(made)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
            print(text)
            sys.exit()
        for name in ("stdout", "stderr"):
            setattr(sys, name, _unbreakable(getattr(sys, name)))
        settings = load(sys.argv[1:], help_text)
        launchers.check()
        progress.begin(settings, recipe_of(sys.argv[1:]))
    except ConfigError as problem:
        fail(str(problem))
    sys.exit(main(settings))
