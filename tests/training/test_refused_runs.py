"""main.py on two ranks: what cannot be trained is refused, in one line on each rank it concerns."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import write
from tests.support.program import start

from .runs import SHORT, one_line

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


def test_missing_data_are_named_with_the_remedy(flags, tmp_path: Path) -> None:
    line = one_line(start(*flags, "--data-pth", str(tmp_path), "--data", "imagenet"))
    assert str(tmp_path / "imagenet/train.beton") in line
    assert "python -m data.write" in line


def test_a_corrupt_file_is_named(flags, data: str, tmp_path: Path) -> None:
    broken = tmp_path / "digits"
    broken.mkdir()
    for file in (Path(data) / "digits").iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.name == "val.beton" else len(content)
        (broken / file.name).write_bytes(content[:cut])
    line = one_line(start(*flags, "--data-pth", str(tmp_path)))
    assert str(broken / "val.beton") in line


def test_batches_that_do_not_divide_are_named(flags) -> None:
    assert "total_batch_size is 63" in one_line(start(*flags, "--total-batch-size", "63"))
    line = one_line(start(*flags, "--physical-batch-size", "12"))
    assert "physical_batch_size is 12" in line
    assert "total_batch_size is 4096" in one_line(start(*flags, "--total-batch-size", "4096"))


def test_an_unknown_key_is_named_once_per_host(flags, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("alpha: 0.1\nhbase: 4\n")
    line = one_line(start(*flags, "--recipe-pth", str(recipe)))
    assert "'hbase'" in line
    assert "'h_base'" in line


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--sync", "easgd", "--sync-settings", "aplha=0.1"], ["'aplha'", "alpha, beta, pull"]),
        (["--sync", "easgd", "--sync-settings", "alpha=0.9"], ["beta 1.8", "less than 2"]),
        (
            ["--sync", "hierarchical", "--sync-settings", "group_size=3", "global_every=2"],
            ["group_size is 3", "2 replicas"],
        ),
    ],
    ids=["unknown", "unstable for two", "does not divide"],
)
def test_a_rule_that_cannot_be_is_refused_on_every_rank(flags, given, parts) -> None:
    outcome = start(*flags, *given)
    assert all(code != 0 for code in outcome.codes)
    for rank in (0, 1):
        (complaint,) = outcome.complaints(rank)
        assert all(part in complaint for part in parts), complaint


def test_a_moving_average_needs_replicas_that_agree(flags) -> None:
    line = one_line(start(*flags, "--ema", "0.5", "--sync", "easgd", world_size=1))
    assert "ema is 0.5: with sync easgd" in line


def test_images_of_changing_size_need_a_model_that_takes_them(flags) -> None:
    line = one_line(start(*flags, "--resize-initial-scale", "0.5", world_size=1))
    assert "resize_initial_scale is 0.5: model simplevit-digits" in line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"zero_optimization": {"stage": 1}}', ["stage is 1", "local optimizer"]),
        ('{"bf16": {"enabled": true}}', ["bf16", "precision"]),
        ('{"gradient_clipping": 1.0}', ["gradient_clipping", "clip_norm"]),
        ('{"tensor_parallel": {"autotp_size": 2}}', ["tensor_parallel", "whole replica"]),
        ('{"communication_data_type": "fp16"}', ["communication_data_type", "all-reduce"]),
        ('{"progressive_layer_drop": {"enabled": true}}', ["DeepSpeed refuses it"]),
        ("{", ["not valid JSON"]),
        (None, ["No such file"]),
    ],
    ids=["ZeRO", "bf16", "clipping", "split replicas", "reduction", "DeepSpeed", "JSON", "missing"],
)
def test_a_deepspeed_file_that_contradicts_local_training_is_refused(
    flags, tmp_path: Path, content: str | None, parts: list[str]
) -> None:
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    line = one_line(start(*flags, "--deepspeed_config", str(file), world_size=1))
    assert all(part in line for part in [*parts, "deepspeed.json"]), line


def test_a_replica_with_another_recipe_is_named_on_every_rank(flags) -> None:
    outcome = start(*flags, per_rank=[(), ("--alpha", "0.9")])
    for rank in (0, 1):
        line = one_line(outcome, rank)
        assert "rank 1" in line
        assert "alpha: 0.9" in line


def test_a_host_with_another_data_set_is_named(flags, tmp_path: Path) -> None:
    write.write("digits", {"size": 32, "split": "tune"}, tmp_path / "digits")
    outcome = start(*flags, per_rank=[(), ("--data-pth", str(tmp_path))])
    for rank in (0, 1):
        line = one_line(outcome, rank)
        assert "rank 1 has [data digits: " in line


def test_replicas_that_do_not_come_are_not_waited_for_all_day(flags, tmp_path: Path) -> None:
    alone = tmp_path / "alone.py"
    alone.write_text(
        "import sys\nfrom datetime import timedelta\nimport main\n"
        "from training import distributed, settings\n"
        "distributed.ARRIVAL = timedelta(seconds=3)\nmain.main(settings.load(sys.argv[1:]))\n"
    )
    outcome = start(*flags, script=alone, world_size=2, absent=1)
    line = one_line(outcome)
    assert "not all 2 replicas met: rank 1 did not come within 3 s (at 127.0.0.1" in line
    assert "--master_port" in line


def test_a_diverging_run_says_so(flags) -> None:
    recipe = ("--recipe-pth", "recipe/digits-resnet-sgd.yml")
    line = one_line(start(*flags, *recipe, "--max-lr", "1e20", "--min-lr", "1e20"))
    assert "the training loss is" in line
    assert "max_lr" in line


def test_replicas_with_statistics_of_their_own_are_not_evaluated(flags) -> None:
    recipe = ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--no-bn")
    assert "bn is false" in one_line(start(*flags, *recipe))
    outcome = start(*flags, *recipe, "--buffers", "average")
    assert outcome.codes == [0, 0], outcome.errors


def test_a_log_folder_that_cannot_be_is_named(flags, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = one_line(start(*flags, "--log-pth", str(tmp_path / "file"), world_size=1))
    assert f"log_pth {tmp_path / 'file'}" in line


def test_wandb_online_needs_a_login(flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is built, with what to do; no run folder is left."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    outcome = start(*flags, "--wandb", "online")
    assert all(outcome.codes), outcome.errors
    (line,) = outcome.complaints(0)
    assert "`wandb login`" in line and "--wandb offline" in line
    assert "Traceback" not in "".join(outcome.errors) and not (tmp_path / "runs").exists()
