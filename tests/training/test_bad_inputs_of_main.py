"""From outside the process: one line and status 2 for what cannot be, a traceback and 1 for a bug.

The test_bad_*.py files have the many; these are some of each kind, through main.py.
"""

from __future__ import annotations

import io
import json
import pickle
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from data import write
from tests.support.program import ROOT, start
from tests.support.refusals import contents

pytestmark = pytest.mark.slow

SHORT = ("--epochs", "1", "--steps-per-epoch", "2", "--warmup-epochs", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with redirect_stderr(io.StringIO()):
        write.write("digits", {"size": 32, "split": "test"}, folder / "digits")
    return folder


# Refused before anything is imported: nothing else may be on standard error.
EARLY = [
    (["--max-lrr", "1"], ["--max-lrr", "--max-lr"]),
    (["--epochs", "many"], ["--epochs", "'many'"]),
    (["--alpha", "nan"], ["alpha", "nan"]),
    (["--log-pth", "a\nb"], ["--log-pth", "'a\\nb'"]),
    (["--recipe-pth", "GIVEN/bomb.yml"], ["GIVEN/bomb.yml", "alias *a"]),
    (["--recipe-pth", "GIVEN/weights.pt"], ["GIVEN/weights.pt", "UTF-8"]),
    (["--config-pth", "GIVEN/host.yml"], ["GIVEN/host.yml", "'epochs'"]),
    (["--plan", "--plan-hostfile", "GIVEN/hosts"], ["GIVEN/hosts", "'node1 slots=0'"]),
    (["--plan", "--plan-nodes", "1e3"], ["--plan-nodes", "'1e3'"]),
]
# Refused by a run that has begun.
LATE = [
    (["--deepspeed_config", "GIVEN/steps.json"], ["GIVEN/steps.json", "steps_per_print is 'x'"]),
    (["--sync", "easgd", "--sync-settings", "alpha=x"], ["alpha is 'x'"]),
    (["--data-pth", "GIVEN"], ["GIVEN/digits/train.beton", "bytes instead of"]),
    (["--data-pth", "GIVEN/other"], ["GIVEN/other/digits/val.beton is there already", "--force`"]),
    (["--total-batch-size", "4096"], ["total_batch_size is 4096", "1438 images"]),
    (["--resolution", "7"], ["model simplevit-digits", "7"]),
    (["--resume-pth", "GIVEN/none"], ["resume_pth", "GIVEN/none", "not there"]),
    (["--resume-pth", "GIVEN/folder"], ["resume_pth", "GIVEN/folder", "manifest.json"]),
    (["--resume-pth", "GIVEN/hosts"], ["resume_pth", "GIVEN/hosts", "not a file of weights"]),
    (["--resume-pth", "GIVEN/weights.pt"], ["resume_pth", "GIVEN/weights.pt", "not a file"]),
    (
        ["--resume-pth", "GIVEN/hosts", "--optimizer-resume-pth", "GIVEN/none"],
        ["optimizer_resume_pth", "GIVEN/none", "not there"],
    ),
]


@pytest.fixture
def given(data: Path, tmp_path: Path) -> Path:
    """A folder of damaged files."""
    folder = tmp_path / "given"
    (folder / "folder").mkdir(parents=True)
    (folder / "bomb.yml").write_text("alpha: 1\nwandb_tags: [&a [x], *a]\n")
    (folder / "host.yml").write_text("epochs: 3\n")
    (folder / "hosts").write_text("node1 slots=0\n")
    (folder / "steps.json").write_text('{"steps_per_print": "x"}')
    (folder / "weights.pt").write_bytes(pickle.dumps({"weights": print}))
    (folder / "other" / "digits").mkdir(parents=True)
    (folder / "other" / "digits" / "val.beton").write_text("mine")
    (folder / "digits").mkdir()
    for file in (data / "digits").iterdir():
        content = file.read_bytes()
        cut = 1000 if file.name == "train.beton" else 0
        (folder / "digits" / file.name).write_bytes(content[: len(content) - cut])
    return folder


@pytest.mark.parametrize(
    ("flags", "parts"), EARLY + LATE, ids=[" ".join(flags)[:50] for flags, _ in EARLY + LATE]
)
def test_one_line_and_status_2(
    data: Path, given: Path, tmp_path: Path, flags: list[str], parts: list[str]
) -> None:
    places = ("--data-pth", str(data), "--log-pth", str(tmp_path / "runs"))
    early = flags in [case for case, _ in EARLY]
    flags = [flag.replace("GIVEN", str(given)) for flag in flags]
    before = contents(tmp_path), contents(data)
    outcome = start(*places, *SHORT, *flags, world_size=1)
    assert (contents(tmp_path), contents(data)) == before
    assert outcome.codes == [2], outcome
    # What it is doing, and nothing else; no run folder has been made.
    assert all(line.startswith("main.py: ") for line in outcome.outputs[0].splitlines())
    (line,) = outcome.complaints(0)
    assert all(part.replace("GIVEN", str(given)) in line for part in parts), line
    assert "Traceback" not in outcome.errors[0]
    if early:
        assert outcome.errors[0] == f"{line}\n"


BUGGY = """
import runpy, sys
sys.path.insert(0, {root!r})
import {module}
def bug(*_, **__):
    raise {error}("a bug of ours")
{module}.{name} = bug
runpy.run_path({root!r} + "/main.py", run_name="__main__")
"""


@pytest.mark.parametrize("error", ["TypeError", "ValueError", "OSError"])
@pytest.mark.parametrize(
    ("place", "flags"),
    [
        ("training.settings:_read_recipe", []),
        ("training.plan.plan:_variants", ["--plan"]),
        ("training.models:build", []),
    ],
)
def test_a_bug_shows_its_traceback(
    data: Path, tmp_path: Path, place: str, flags: list[str], error: str
) -> None:
    """It is not taken for a mistake of the user, which status 2 would be."""
    module, name = place.split(":")
    script = tmp_path / "buggy.py"
    script.write_text(BUGGY.format(root=str(ROOT), module=module, name=name, error=error))
    places = ("--data-pth", str(data), "--log-pth", str(tmp_path / "runs"))
    outcome = start(*places, *SHORT, *flags, script=script, world_size=1)
    assert outcome.codes == [1], outcome
    assert "Traceback (most recent call last)" in outcome.errors[0]
    assert f"{error}: a bug of ours" in outcome.errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_broken_entry_of_a_description_is_refused_by_the_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    for file in (data / "digits").iterdir():
        (tmp_path / "digits" / file.name).write_bytes(file.read_bytes())
    description = tmp_path / "digits/dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps(content | {"mean": ["x", 0, 0]}))
    places = ("--data-pth", str(tmp_path), "--log-pth", str(tmp_path / "runs"))
    outcome = start(*places, *SHORT, world_size=1)
    assert outcome.codes == [2], outcome
    (line,) = outcome.complaints(0)
    assert f"{description}: mean is ['x', 0, 0]" in line
    assert not (tmp_path / "runs").exists()
