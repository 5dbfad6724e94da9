"""One run of main.py, as the studies make it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def trained(recipe: str, replicas: int, seed: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Train once, on ``replicas`` processes of this host; what of the result goes into a row."""
    with tempfile.TemporaryDirectory() as logs:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(replicas), "main.py", "--recipe-pth", f"recipe/{recipe}",
            "--seed", str(seed), "--init-model-by-seed", str(seed), *flags, "--log-pth", logs,
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{ended.stderr}")
        (folder,) = Path(logs).iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        environment = json.loads((folder / "environment.json").read_text())
    return {
        "replicas": replicas,
        "seed": seed,
        "top1": summary["top1"],
        "loss": summary["loss"],
        "steps": summary["step"],
        "syncs": summary["syncs"],
        "bytes": summary["bytes"],
        "exposed": summary["exposed_seconds"],
        "hidden": summary["hidden_seconds"],
        "seconds": summary["train_seconds"],
        "commit": environment["commit"],
    }
