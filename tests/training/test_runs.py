"""main.py from the outside: it trains, evaluates and records as its recipe and flags say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Once
from tests.data.test_cifar10 import make_folder
from tests.support.program import ROOT, start
from training.settings import load

from .runs import SHORT, weights

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "recipe").glob("digits-*.yml"))


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_evaluates_and_leaves_a_folder(flags, recipe: Path) -> None:
    outcome = start("--recipe-pth", str(recipe), *flags)
    assert outcome.codes == [0, 0], outcome.errors
    folder, records = outcome.folder, outcome.records
    assert "validation accuracy (consensus)" in outcome.outputs[0]
    assert outcome.outputs[1] == ""  # only rank 0 speaks
    for name in ("config.yml", "environment.json", "summary.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "checkpoints/step-00000012/manifest.json").exists()

    trained = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(1, 13))
    evaluations = [r for r in records if r["kind"] == "val"]
    assert evaluations[-1]["step"] == 12
    assert all(r["images"] == 359 for r in evaluations)
    local = load(["--recipe-pth", str(recipe)]).local
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["syncs"] == (3 if local else 12)  # rounds of h_base = 4
    assert summary["bytes"] > 0


@pytest.fixture(scope="session")
def cifar10(once: Once) -> str:
    """A folder of data sets with a small CIFAR-10, written from torchvision's folder."""

    def write(folder: Path) -> None:
        command = [sys.executable, "-m", "data.write", "cifar10", "--folder"]
        command += [str(make_folder(folder)), "--out", str(folder / "cifar10")]
        subprocess.run(command, check=True, cwd=ROOT)

    return str(once("torchvisions", write))


@pytest.mark.parametrize("recipe", ["overlap", "overlap-skewed", "sgd"])
def test_the_cifar_10_recipes_train_on_torchvisions_folder(
    cifar10: str, tmp_path: Path, recipe: str
) -> None:
    outcome = start(
        "--recipe-pth", f"recipe/cifar10-resnet18-{recipe}.yml", "--data-pth",
        cifar10, "--log-pth", str(tmp_path / "runs"), "--total-batch-size", "8",
        "--physical-batch-size", "4", "--epochs", "3", "--bn-batches", "2",
    )  # fmt: skip
    assert outcome.codes == [0, 0], outcome.errors
    assert outcome.records[-1]["syncs"] == (3 if recipe == "sgd" else 2), "H = 2, and the last step"


def test_the_averaged_model_is_evaluated_at_each_epochs_last_synchronisation(flags) -> None:
    rounds = ("--period", "constant", "--h-base", "4")
    steps = [r["step"] for r in start(*flags, *rounds).records if r["kind"] == "val"]
    assert steps == [4, 12]  # epochs end at 6 and 12
    steps = [
        r["step"]
        for r in start(*flags, *rounds, "--eval-at", "epoch").records
        if r["kind"] == "val"
    ]
    assert steps == [6, 12]  # of the consensus, in the middle of a round


def test_rounds_and_evaluations_follow_qsr_on_the_schedule(flags) -> None:
    """H = max(base, floor((α / η)²)) with η of the round's first step, from the closed form."""
    total, warmup, peak, low, alpha, base = 30, 5, 3e-3, 1e-6, 6e-3, 4

    def rate(step: int) -> float:
        if step < warmup:
            return low + (peak - low) * step / warmup
        return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    ends, step = [], 0
    while step < total:
        h = base if step < warmup else max(base, math.floor((alpha / rate(step)) ** 2))
        step = min(total, step + h)
        ends.append(step)
    last_of_epochs = [
        max(e for e in ends if e <= end) for end in range(6, 31, 6) if min(ends) <= end
    ]

    given = ("--epochs", "5", "--warmup-steps", str(warmup))
    records = start(*flags, *given).records
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["lr"] for r in trained] == pytest.approx([rate(s) for s in range(total)], rel=1e-12)
    assert [r["syncs"] for r in trained] == [sum(e <= s for e in ends) for s in range(1, 31)]
    evaluated = [r["step"] for r in records if r["kind"] == "val"]
    assert evaluated == sorted(set(last_of_epochs))


def test_evaluating_more_often_changes_nothing_but_its_own_traffic(flags) -> None:
    rounds = ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--period", "constant",
              "--h-base", "5")  # fmt: skip
    seldom = start(*flags, *rounds)
    often = start(*flags, *rounds, "--eval-at", "epoch", "--eval-on-start")
    assert [weights(seldom.folder, rank) for rank in (0, 1)] == [
        weights(often.folder, rank) for rank in (0, 1)
    ]
    one, other = (json.loads((o.folder / "summary.json").read_text()) for o in (seldom, often))
    assert one["bytes"] == other["bytes"]
    assert one["other_bytes"] < other["other_bytes"]


def test_a_moving_average_follows_where_only_the_end_agrees(flags) -> None:
    """Groups of one, and no round that all share: the replicas first agree in finish()."""
    apart = ("--sync", "hierarchical", "--sync-settings", "group_size=1", "global_every=100")
    outcome = start(*flags, *apart, "--period", "constant", "--h-base", "4", "--ema", "1e-9")
    (*_, last) = [r for r in outcome.records if r["kind"] == "val"]
    assert last["step"] == 12 and last["ema_loss"] == pytest.approx(last["loss"], rel=1e-5)


# A layer of each kind that resnet-digits has: what is compiled is an eighth of it.
FEW_LAYERS = """
import sys
import main
from torch import nn
from training import models, settings

models.MODELS["resnet-digits"] = lambda classes, resolution: nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
)
sys.exit(main.main(settings.load(sys.argv[1:])))
"""


def test_a_compiled_model_trains_to_the_same_loss(
    flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not the machine's: a compiler that was killed leaves half of a file in it, for all later runs.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that import torch first
    (script := tmp_path / "few_layers.py").write_text(FEW_LAYERS)
    recipe = ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--epochs", "1", "--nw", "2")
    plain, compiled = (
        start(*flags, *recipe, *e, world_size=1, script=script) for e in ((), ("--compile",))
    )
    assert compiled.codes == [0], compiled.errors
    losses = [[r["loss"] for r in o.records if "loss" in r] for o in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] != losses[1]


def test_replicas_are_recorded_at_each_synchronisation(flags) -> None:
    """Where asked: drift, every replica's mean loss of the round, and what it waited."""
    rounds = ("--period", "constant", "--h-base", "4", "--track-replicas")
    for sync, learned_at in (("average", [4, 8, 12]), ("cocod", [8, 12, 12])):
        records = start(*flags, *rounds, "--sync", sync).records
        told = [r for r in records if r["kind"] == "sync"]
        assert [r["begun_at"] for r in told] == [4, 8, 12]
        assert [r["step"] for r in told] == learned_at, "behind training: a round late"
        losses = [r["loss"] for r in records if r["kind"] == "train"]
        for record in told:
            first, second = record["losses"]
            mine = losses[record["begun_at"] - 4 : record["begun_at"]]
            assert first == pytest.approx(sum(mine) / 4, rel=1e-6) and first != second
            assert record["drift"] > 0 and min(record["waits"]) == 0.0
    assert not [r for r in start(*flags).records if r["kind"] == "sync"]


def test_the_centre_is_evaluated_and_saved_where_replicas_never_agree(flags) -> None:
    """EASGD's replicas are apart when a round ends; after the run all hold what was evaluated."""
    given = (*flags, "--period", "constant", "--h-base", "3", "--sync", "easgd")
    outcome = start(*given, "--save-freq", "1")
    assert weights(outcome.folder, 0, 6) != weights(outcome.folder, 1, 6)
    assert weights(outcome.folder, 0) == weights(outcome.folder, 1)
    again = start(*given, "--resume-pth", str(outcome.folder / "checkpoints/step-00000012"))
    evaluated = [o.records[-2] for o in (outcome, again)]
    assert [r["kind"] for r in evaluated] == ["val", "val"]
    assert evaluated[0]["loss"] == evaluated[1]["loss"]


def test_the_result_does_not_depend_on_the_number_of_loader_workers(flags) -> None:
    one, three = (start(*flags, "--nw", workers) for workers in ("1", "3"))
    assert weights(one.folder, 0) == weights(three.folder, 0)


def test_a_deepspeed_file_is_merged_section_by_section(flags, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    content = {
        "bf16": {"enabled": False},
        "flops_profiler": {"enabled": True, "output_file": str(tmp_path / "profile")},
        "timers": {"throughput": {"synchronized": False}},
    }
    file.write_text(json.dumps(content))
    outcome = start(*flags, "--deepspeed", "--deepspeed_config", str(file), world_size=1)
    assert outcome.codes == [0], outcome.errors
    assert "FLOPS" in (tmp_path / "profile").read_text()


def test_wandb_offline_needs_no_account(flags) -> None:
    outcome = start(*flags, "--epochs", "1", "--wandb", "offline", world_size=1)
    assert outcome.codes == [0], outcome.errors
    assert list(outcome.folder.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_offline_sync_asks_wandb_osh_for_the_upload(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ("--wandb", "offline-sync", "--wandb-project", "p", "--wandb-entity", "e")
    outcome = start(*flags, "--epochs", "1", *given, "--wandb-tags", "a", "b", world_size=1)
    assert outcome.codes == [0], outcome.errors
    (asked,) = (tmp_path / ".wandb_osh_command_dir").glob("*.command")
    (run,) = outcome.folder.glob("wandb/offline-run-*")
    assert Path(asked.read_text()) == run.resolve()
