"""The ImageNet recipes at ImageNet's shapes: 224 px, 1000 classes, a tree of real photographs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Once
from tests.support.photographs import make_tree
from tests.support.program import ROOT, start

pytestmark = [pytest.mark.slow, pytest.mark.long]

VALIDATION = 6  # classes with an image to evaluate on


@pytest.fixture(scope="session")
def data(once: Once) -> str:
    """A folder of data sets, with a small ImageNet written as the README says."""

    def write(folder: Path) -> None:
        tree = folder / "tree"
        make_tree(tree, classes=1000, train=1, val=1)
        for unused in sorted((tree / "val").iterdir())[VALIDATION:]:
            shutil.rmtree(unused)
        command = [sys.executable, "-m", "data.write", "imagefolder", "--folder", str(tree)]
        subprocess.run([*command, "--out", str(folder / "imagenet")], check=True, cwd=ROOT)

    return str(once("imagenet", write))


@pytest.mark.parametrize(
    ("recipe", "model"),
    [("vit-b-localadamw-cosine", "simplevit-ti16"), ("resnet152-localsgd-cosine", "resnet18")],
)
def test_a_recipe_trains_accumulates_evaluates_saves_and_resumes(
    data: str, tmp_path: Path, recipe: str, model: str
) -> None:
    """The model is a small one of its kind; everything else is the recipe's."""
    given = (
        "--recipe-pth", f"recipe/{recipe}.yml", "--model", model, "--data-pth", data,
        "--log-pth", str(tmp_path), "--total-batch-size", "8", "--physical-batch-size", "2",
        "--epochs", "2", "--steps-per-epoch", "2", "--warmup-steps", "0", "--bn-batches", "2",
        "--log-freq", "1", "--save-freq", "1", "--h-base", "3",
    )  # fmt: skip
    whole = start(*given)
    assert whole.codes == [0, 0], whole.errors
    evaluations = [r for r in whole.records if r["kind"] == "val"]
    assert [r["images"] for r in evaluations] == [VALIDATION] * len(evaluations) != []
    resumed = start(*given, "--resume-pth", str(whole.folder / "checkpoints/step-00000002"))
    assert resumed.codes == [0, 0], resumed.errors
    for rank in (0, 1):
        one, other = (weights(outcome.folder, rank) for outcome in (whole, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)
    head = [tensor for name, tensor in one.items() if name.endswith(("fc.bias", "head.bias"))]
    assert [tuple(tensor.shape) for tensor in head] == [(1000,)]


def test_a_resolution_is_asked_for_where_images_differ_in_size(data: str, tmp_path: Path) -> None:
    given = ("--data-pth", data, "--data", "imagenet", "--log-pth", str(tmp_path))
    outcome = start(*given, world_size=1)
    (complaint,) = outcome.complaints(0)
    assert "resolution is -1: images of imagenet differ in size" in complaint


def weights(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    file = folder / f"checkpoints/step-00000004/rank-{rank:04d}.pt"
    return torch.load(file, weights_only=True)["model"]
