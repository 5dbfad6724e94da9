"""--resume-pth: a run goes on from a checkpoint bit for bit, or says why it cannot."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.program import start
from training.checkpoint import files as checkpoints

from .runs import SHORT, one_line, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


LOCAL = ("--period", "constant", "--h-base", "4", "--track-replicas")
METHODS = (
    "--randaugment-depth", "2", "--randaugment-operations", "original", "--mixup", "0.2",
    "--resize-initial-scale", "0.5", "--resize-finetune-fraction", "0.3", "--ema", "0.9",
    "--channels-last", "--blurpool",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("digits-vit-localadamw-qsr", ("--precision", "fp16")),
        ("digits-resnet-localsgd-qsr", METHODS),
        ("digits-resnet-sgd", ()),
        ("digits-resnet-overlap", ()),
        ("digits-resnet-lsgd", ()),
        ("digits-resnet-slowmo", ()),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(flags, recipe: str, extra) -> None:
    """Saved in the middle of a round: replicas, momenta and data positions are each their own, and
    so is the loss scale of fp16; with Overlap-Local-SGD a collective is in flight."""
    given = (
        "--recipe-pth",
        f"recipe/{recipe}.yml",
        *flags,
        *extra,
        *(() if recipe.endswith("-sgd") else LOCAL),
    )
    whole = start(*given, "--save-freq", "1")
    assert whole.codes == [0, 0], whole.errors
    slow = ["precision is fp16, which a CPU computes" in told for told in whole.errors]
    assert slow == ["fp16" in extra, False]
    resumed = start(*given, "--resume-pth", str(whole.folder / "checkpoints/step-00000006"))
    assert resumed.codes == [0, 0], resumed.errors
    for rank in (0, 1):
        assert weights(whole.folder, rank) == weights(resumed.folder, rank)
    if not recipe.endswith("-sgd"):
        halfway = [weights(whole.folder, rank, 6) for rank in (0, 1)]
        assert halfway[0] != halfway[1]
    timed = (
        "seconds",
        "eval_seconds",
        "exposed_seconds",
        "hidden_seconds",
        "waits",
        "train_seconds",
        "images_per_second",
        "wait",
        "other_bytes",
    )
    later = [r for r in whole.records if r["step"] > 6]
    for expected, told in zip(later, resumed.records, strict=True):
        for record in (expected, told):
            for key in timed:
                record.pop(key, None)
        assert told == expected


def test_weights_and_optimizer_states_can_be_resumed_from_files_of_their_own(flags) -> None:
    """The published program's way: the averaged model, a state per rank, and where to go on."""
    given = (*flags, "--period", "constant", "--h-base", "3")
    whole = start(*given, "--save-freq", "1")
    assert whole.codes == [0, 0], whole.errors
    saved = whole.folder / "checkpoints/step-00000006"
    averaged = ("--resume-pth", str(saved / "rank-0000.pt"))
    states = ("--optimizer-resume-pth", str(saved))
    after = [r["lr"] for r in whole.records if r["kind"] == "train" and r["step"] > 6]

    resumed = {}
    for name, how in {
        "own": (*states, "--resume-from-epoch", "1"),
        "rank 0's": (*states, "--resume-from-step", "6", "--no-multiple-optimizers"),
        "none": ("--resume-from-step", "6", "--init-model-by-seed", "-1"),
    }.items():
        outcome = start(*given, *averaged, *how)
        assert outcome.codes == [0, 0], outcome.errors
        told = [r for r in outcome.records if r["kind"] == "train"]
        assert [r["lr"] for r in told] == after and told[-1]["syncs"] == 2
        resumed[name] = weights(outcome.folder, 0)
    assert resumed.pop("own") == weights(whole.folder, 0)
    assert resumed["rank 0's"] != weights(whole.folder, 0) != resumed["none"]

    # Moments of the replicas' own would take data-parallel ones apart.
    parallel = ("--recipe-pth", "recipe/digits-vit-adamw.yml", "--resume-from-epoch", "1")
    outcome = start(*flags, *parallel, *averaged, *states)
    assert outcome.codes == [0, 0], outcome.errors
    assert weights(outcome.folder, 0) == weights(outcome.folder, 1)
    assert outcome.records[-1]["share"] == 1.0

    refused = {
        (*states,): "give resume_pth too",
        ("--resume-pth", "/no/weights.pt"): "/no/weights.pt: not there",
        (*averaged, *states, "--optimizer", "localsgd"): "saved with optimizer 'localadamw'",
        ("--resume-pth", str(saved), "--resume-from-step", "7"): "at step 6, and 7 was asked for",
        ("--resume-pth", str(saved), *states): "has its own optimizer state",
        ("--resume-pth", str(saved / "manifest.json")): "not a file of weights",
        ("--resume-pth", str(whole.folder)): "a run's folder: give one of those in its checkpoints",
        (*averaged, "--model", "resnet-digits"): "weights of another model",
    }
    for how, part in refused.items():
        assert part in one_line(start(*given, *how, world_size=1))


@pytest.fixture(scope="module")
def checkpoint(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the quick start's recipe, after one epoch."""
    logs = str(tmp_path_factory.mktemp("runs"))
    saved = start(*SHORT, "--epochs", "1", "--data-pth", data, "--log-pth", logs)
    return saved.folder / "checkpoints/step-00000006"


class Evil:
    """What a malicious file would have run."""

    def __reduce__(self):
        return os.system, ("echo it was run >&2",)


@pytest.mark.parametrize(
    ("damage", "extra", "world_size", "part"),
    [
        ("no manifest", (), 2, "manifest.json"),
        ("a flipped bit", (), 2, "rank-0000.pt is damaged"),
        ("a missing rank", (), 2, "rank-0000.pt is missing"),
        ("", ("--model", "resnet-digits"), 2, "model 'simplevit-digits'"),
        ("", ("--label-skew", "1"), 2, "label_skew 0.0"),
        ("a pickle", (), 2, "not a file of weights: Weights only load failed"),
        ("another manifest", (), 2, "damaged: not what manifest.json recorded"),
        ("an edited manifest", (), 2, "damaged: not what its checksum says"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    flags, checkpoint: Path, tmp_path: Path, damage: str, extra: tuple, world_size: int, part: str
) -> None:
    saved = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, saved)
    file = saved / "rank-0000.pt"
    if damage == "no manifest":
        (saved / "manifest.json").unlink()
    elif damage == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "a missing rank":
        file.unlink()
    elif damage == "a pickle":
        file.write_bytes(pickle.dumps(Evil()))
        manifest = checkpoints.manifest(saved)
        manifest["files"][file.name] = {
            "bytes": file.stat().st_size, "sha256": checkpoints.sha256(file),
        }  # fmt: skip
        checkpoints.publish(saved, saved, manifest)
    elif damage == "another manifest":
        manifest = checkpoints.manifest(saved)
        names = ("rank-0000.pt", "rank-0001.pt")
        manifest["files"] = dict(zip(names, reversed(manifest["files"].values()), strict=True))
        checkpoints.publish(saved, saved, manifest)
    elif damage == "an edited manifest":
        text = (saved / "manifest.json").read_text()
        (saved / "manifest.json").write_text(text.replace('"step": 6', '"step": 7'))
    outcome = start(*flags, *extra, "--resume-pth", str(saved), world_size=world_size)
    assert outcome.codes[0] != 0
    (line,) = outcome.complaints(0)
    assert part in line
    assert "it was run" not in outcome.errors[0] + outcome.errors[1]


def test_a_rank_that_resumes_from_another_checkpoint_is_named(flags, checkpoint: Path) -> None:
    outcome = start(*flags, per_rank=[("--resume-pth", str(checkpoint)), ()])
    for rank in (0, 1):
        line = one_line(outcome, rank)
        assert "rank 1 has [resume_pth: none] where rank 0 has [resume_pth: step 6" in line


def test_a_resumed_run_follows_its_own_settings(flags, checkpoint: Path) -> None:
    own = ("--wd", "0.5", "--beta1", "0.5", "--beta2", "0.6")
    outcome = start(*flags, "--resume-pth", str(checkpoint), *own)
    assert outcome.codes == [0, 0], outcome.errors
    file = outcome.folder / "checkpoints/step-00000012/rank-0001.pt"
    (group,) = torch.load(file, weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.6))


def test_a_checkpoint_without_optimizer_state_cannot_be_resumed(flags) -> None:
    saved = start(*flags, "--epochs", "1", "--no-save-opt", world_size=1)
    folder = saved.folder / "checkpoints/step-00000006"
    line = one_line(start(*flags, "--resume-pth", str(folder), world_size=1))
    assert "saved without optimizer state (save_opt: false)" in line


def test_a_finished_run_resumed_is_evaluated_and_a_shorter_one_refused(
    flags, checkpoint: Path
) -> None:
    resumed = (*flags, "--resume-pth", str(checkpoint), "--epochs", "1")
    assert [r["step"] for r in start(*resumed).records if r["kind"] == "val"] == [6]
    line = one_line(start(*resumed, "--steps-per-epoch", "5"))
    assert "step 6, to go on from, is past this run's end at 5" in line
