"""The weights of a checkpoint for other programs: ``python -m training.export CHECKPOINT``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoint.export import ExportError, export
from .checkpoint.files import CheckpointError
from .settings import Parser
from .values import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    purpose = "Write the weights of a checkpoint as a plain state_dict."
    parser = Parser(prog="python -m training.export", description=purpose)
    newest = "its folder, or a run's folder: the newest one's"
    parser.add_argument("checkpoint", type=Path, help=newest)
    default = "default MODEL-step-N.pt in the working directory"
    parser.add_argument("--out", type=Path, metavar="FILE", help=default)
    parser.add_argument("--ema", action="store_true", help="the moving average of the model")
    try:
        flags = parser.parse_args(arguments)
        print(export(flags.checkpoint, flags.out, ema=flags.ema))
    except (CheckpointError, ConfigError, ExportError) as error:
        print(f"training.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
