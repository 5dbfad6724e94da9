"""Weights of a checkpoint for other programs: what plain libraries load, and one line if not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from localopt import EASGD, Average, Constant, LocalOptimizer, Rule
from localopt.saved import own_state
from training import models
from training.checkpoint import files as checkpoint
from training.export import main
from training.methods import Ema

models.allow_torchvision_without_cuda()

from torchvision.models import resnet18  # noqa: E402
from vit_pytorch.simple_vit import SimpleViT  # noqa: E402

CLASSES, RANKS, STEP = 7, 2, 12


def digits_vit(resolution: int = 16) -> nn.Module:
    return SimpleViT(
        image_size=resolution, patch_size=4, num_classes=CLASSES, dim=64, depth=4, heads=4,
        mlp_dim=128, dim_head=16,
    )  # fmt: skip


def config(**settings: Any) -> dict[str, Any]:
    common = {"model": "simplevit-digits", "resolution": 16, "optimizer": "localsgd"}
    return {**common, "sync": "average", **settings}


def build(settings: dict[str, Any]) -> nn.Module:
    names = ("blurpool", "squeeze_excite", "channels_last")
    return models.build(
        settings["model"],
        classes=CLASSES,
        resolution=settings["resolution"],
        seed=3,
        **{name: settings.get(name, False) for name in names},
    )


def trained(settings: dict[str, Any], rank: int, rule: Rule) -> dict[str, Any]:
    """What a rank saves, in the middle of a round: replicas differ."""
    model = build(settings)
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = LocalOptimizer(inner, Constant(2), rule, model=model)
    ema = Ema(model, 0.5) if settings.get("ema") else None
    optimizer.start_at(STEP - 3)
    generator = torch.Generator().manual_seed(rank)
    side = settings["resolution"]
    for _ in range(3):
        model(torch.randn(4, 3, side, side, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    state["param_groups"][0]["localopt"] |= {"rank": rank, "world_size": RANKS}
    content: dict[str, Any] = {
        "place": {"step": STEP, "rank": rank, "world_size": RANKS},
        "model": model.state_dict(),
    }
    if ema is not None:
        ema.update(STEP)
        content["ema"] = copy.deepcopy(ema.state_dict())
    if settings.get("save_opt", True):
        content["optimizer"] = state
    return content


def saved(run: Path, settings: dict[str, Any], contents: list[dict[str, Any]]) -> Path:
    """A checkpoint as the program writes it."""
    final = checkpoint.folder_of(run / "checkpoints", STEP)
    draft = checkpoint.draft_of(final)
    files = {
        checkpoint.rank_file(rank): checkpoint.write_rank(draft, rank, content)
        for rank, content in enumerate(contents)
    }
    told = {"step": STEP, "world_size": len(contents), "config": settings, "evaluation": {}}
    checkpoint.publish(draft, final, {**told, "files": files})
    return final


def checkpoint_of(run: Path, rule: type[Rule] = Average, **given: Any) -> Path:
    settings = config(**given)
    return saved(run, settings, [trained(settings, rank, rule()) for rank in range(RANKS)])


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line that a successful export prints."""
    assert main([str(argument) for argument in arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return line


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    """The line of a refusal; nothing is written."""
    before = sorted(out.parent.rglob("*"))
    assert main([*map(str, arguments), "--out", str(out)]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert told.out == "" and sorted(out.parent.rglob("*")) == before
    return line


def contents_of(folder: Path) -> list[dict[str, Any]]:
    manifest = checkpoint.manifest(folder)
    return [checkpoint.rank_state(folder, manifest, rank) for rank in range(RANKS)]


def mean(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    first, second = (
        {**content["ema"]["parameters"], **content["ema"]["buffers"]}
        if part == "ema"
        else content["model"]
        for content in contents_of(folder)
    )
    return {
        name: ((x.double() + second[name].double()) / 2).float() if x.is_floating_point() else x
        for name, x in first.items()
    }


def outputs(model: nn.Module, side: int) -> torch.Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.slow
def test_torchvision_loads_a_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model": "resnet18", "resolution": 64, "channels_last": True}
    folder = checkpoint_of(tmp_path, **given)
    line = exported(capsys, folder, "--out", tmp_path / "weights.pt")
    for part in (
        f"consensus of 2 replicas after step {STEP}", "resnet18, 7 classes, 64 x 64 pixels",
        "11,180,103 parameters", "torchvision.models.resnet18(num_classes=7)",
        "BatchNorm statistics are means",
    ):  # fmt: skip
        assert part in line
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert type(weights) is dict and all(x.is_contiguous() for x in weights.values())
    assert not list(tmp_path.glob(".*")), "no draft is left"
    plain, ours = resnet18(num_classes=CLASSES), build(config(**given))
    plain.load_state_dict(weights, strict=True)
    ours.load_state_dict(mean(folder))
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in weights.items())
    assert torch.allclose(outputs(plain, 64), outputs(ours, 64), rtol=1e-5, atol=1e-6)


def test_vit_pytorch_loads_a_simplevit_from_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name that tells what it is; the data's mean is told where they are."""
    run, data = tmp_path / "run", tmp_path / "data" / "digits"
    folder = checkpoint_of(run)
    described = {"data": "digits", "data_pth": str(data.parent)}
    (run / "config.yml").write_text(yaml.safe_dump(config(**described)))
    monkeypatch.chdir(tmp_path)
    assert "normalised" not in exported(capsys, run)
    data.mkdir(parents=True)
    contents = {"name": "digits", "settings": {}, "classes": [], "files": {}}
    text = json.dumps({**contents, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    (data / "dataset.json").write_text(text)
    line = exported(capsys, run)
    assert line.startswith(f"simplevit-digits-step-000000{STEP}.pt: ")
    assert "normalised with mean [0.1, 0.2, 0.3] and std [0.4, 0.5, 0.6]" in line
    assert "SimpleViT(image_size=16, num_classes=7" in line and "BatchNorm" not in line
    weights = torch.load(f"simplevit-digits-step-000000{STEP}.pt", weights_only=True)
    plain, ours = digits_vit(), build(config())
    plain.load_state_dict(weights, strict=True)
    ours.load_state_dict(mean(folder))
    torch.testing.assert_close(outputs(plain, 16), outputs(ours, 16), rtol=1e-5, atol=1e-6)


def test_the_centre_is_exported_not_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What EASGD evaluates; without optimizer state it is not there."""
    out = tmp_path / "weights.pt"
    folder = checkpoint_of(tmp_path / "whole", EASGD, sync="easgd")
    centre = own_state(contents_of(folder)[0]["optimizer"])["sync"]["vectors"]["z"]
    exported(capsys, folder, "--out", out)
    weights, means = torch.load(out), mean(folder)
    other = [own_state(content["optimizer"])["sync"]["vectors"]["z"]
             for content in contents_of(folder)][1]  # fmt: skip
    assert not torch.equal(weights["linear_head.bias"], means["linear_head.bias"])
    for name, z in centre.items():
        assert torch.equal(weights[name], ((z.double() + other[name].double()) / 2).float())
    part = checkpoint_of(tmp_path / "part", EASGD, sync="easgd", save_opt=False)
    assert "save_opt: false" in refused(capsys, out, part)
    assert exported(capsys, checkpoint_of(tmp_path / "average", save_opt=False), "--out", out)


def test_the_moving_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights.pt"
    folder = checkpoint_of(tmp_path / "with", model="resnet-digits", ema=0.5)
    line = exported(capsys, folder, "--ema", "--out", out)
    assert f"moving average of 2 replicas after step {STEP}" in line
    assert "training.models.build('resnet-digits'" in line
    weights, average = torch.load(out), mean(folder, "ema")
    assert average.keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in average.items())
    assert not torch.equal(weights["8.bias"], mean(folder)["8.bias"])
    assert "no moving average" in refused(capsys, out, checkpoint_of(tmp_path / "no"), "--ema")


@pytest.mark.slow
def test_a_changed_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_of(tmp_path, model="resnet18", resolution=32, blurpool=True)
    line = exported(capsys, folder, "--out", tmp_path / "weights.pt")
    assert "with blurpool, which no plain library has" in line


def test_as_a_command(tmp_path: Path) -> None:
    """``python -m training.export``."""
    command = [sys.executable, "-m", "training.export", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode != 0 and "nowhere" in ended.stderr


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out" / "weights.pt"
    out.parent.mkdir()
    settings = config()
    contents = [trained(settings, rank, Average()) for rank in range(RANKS)]
    folder = saved(run, settings, contents)
    second, manifest = folder / "rank-0001.pt", folder / "manifest.json"

    assert "neither a checkpoint nor a run" in refused(capsys, out, tmp_path)
    assert "not there" in refused(capsys, out, run / "checkpoints" / "step-00000099")
    assert "not there" in refused(capsys, out, tmp_path / "nowhere")
    assert "--sideways" in refused(capsys, out, folder, "--sideways")
    assert "cannot be written" in refused(capsys, tmp_path / "nowhere" / "w.pt", folder)
    assert "cannot be written" in refused(capsys, out.parent, folder)

    whole = second.read_bytes()
    second.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    assert "rank-0001.pt is damaged" in refused(capsys, out, folder)
    second.unlink()
    assert "rank-0001.pt is missing" in refused(capsys, out, run)
    second.write_bytes(whole)
    manifest.write_text(manifest.read_text().replace(f'"step": {STEP}', '"step": 13'))
    assert "manifest.json is damaged" in refused(capsys, out, folder)

    other = saved(tmp_path / "other", config(resolution=32, model="resnet18"), contents)
    assert "weights of another resnet18" in refused(capsys, out, other)
    own_state(contents[1]["optimizer"])["rule"] = "EASGD"
    mixed = saved(tmp_path / "mixed", settings, contents)
    assert "rule is 'EASGD', on rank 0 'Average'" in refused(capsys, out, mixed)
