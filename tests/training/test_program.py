"""main.py from the outside: runs, resumes, and answers bad input with one line."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.test_cifar10 import make_folder
from tests.support.program import ROOT, start
from training import checkpoint as checkpoints
from training.config import load

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "recipe").glob("digits-*.yml"))
SHORT = ("--epochs", "2", "--steps-per-epoch", "6", "--warmup-epochs", "0", "--log-freq", "1")


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_evaluates_and_leaves_a_folder(flags, recipe: Path) -> None:
    outcome = start("--recipe-pth", str(recipe), *flags)
    assert outcome.codes == [0, 0], outcome.errors
    folder, records = outcome.folder, outcome.records
    assert "test accuracy (consensus)" in outcome.outputs[0]
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


@pytest.mark.parametrize("recipe", ["overlap", "overlap-skewed", "sgd"])
def test_the_cifar_10_recipes_train_on_torchvisions_folder(tmp_path: Path, recipe: str) -> None:
    folder = make_folder(tmp_path)
    command = [sys.executable, "-m", "data.write", "cifar10", "--folder", str(folder)]
    subprocess.run([*command, "--out", str(tmp_path / "data/cifar10")], check=True, cwd=ROOT)
    outcome = start(
        "--recipe-pth", f"recipe/cifar10-resnet18-{recipe}.yml", "--data-pth",
        str(tmp_path / "data"), "--log-pth", str(tmp_path / "runs"), "--total-batch-size", "8",
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
    assert [_weights(seldom.folder, rank) for rank in (0, 1)] == [
        _weights(often.folder, rank) for rank in (0, 1)
    ]
    one, other = (json.loads((o.folder / "summary.json").read_text()) for o in (seldom, often))
    assert one["bytes"] == other["bytes"]
    assert one["other_bytes"] < other["other_bytes"]


def _weights(folder: Path, rank: int, step: int = 12) -> dict[str, list]:
    file = folder / f"checkpoints/step-{step:08d}/rank-{rank:04d}.pt"
    state = torch.load(file, weights_only=True)["model"]
    return {name: tensor.tolist() for name, tensor in state.items()}


METHODS = (
    "--randaugment-depth", "2", "--randaugment-operations", "original", "--mixup", "0.2",
    "--resize-initial-scale", "0.5", "--resize-finetune-fraction", "0.3", "--ema", "0.9",
    "--precision", "fp16", "--channels-last", "--blurpool",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("digits-vit-localadamw-qsr", ()),
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
        "--period",
        "constant",
        "--h-base",
        "4",
        *(() if recipe.endswith("-sgd") else ("--track-replicas",)),
    )
    whole = start(*given, "--save-freq", "1")
    assert whole.codes == [0, 0], whole.errors
    resumed = start(*given, "--resume-pth", str(whole.folder / "checkpoints/step-00000006"))
    assert resumed.codes == [0, 0], resumed.errors
    for rank in (0, 1):
        assert _weights(whole.folder, rank) == _weights(resumed.folder, rank)
    if not recipe.endswith("-sgd"):
        halfway = [_weights(whole.folder, rank, 6) for rank in (0, 1)]
        assert halfway[0] != halfway[1]
    timed = (
        "seconds",
        "eval_seconds",
        "blocked_seconds",
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
    weights = ("--resume-pth", str(saved / "rank-0000.pt"))
    states = ("--optimizer-resume-pth", str(saved))
    after = [r["lr"] for r in whole.records if r["kind"] == "train" and r["step"] > 6]

    resumed = {}
    for name, how in {
        "own": (*states, "--resume-from-epoch", "1"),
        "rank 0's": (*states, "--resume-from-step", "6", "--no-multiple-optimizers"),
        "none": ("--resume-from-step", "6", "--init-model-by-seed", "-1"),
    }.items():
        outcome = start(*given, *weights, *how)
        assert outcome.codes == [0, 0], outcome.errors
        told = [r for r in outcome.records if r["kind"] == "train"]
        assert [r["lr"] for r in told] == after and told[-1]["syncs"] == 2
        resumed[name] = _weights(outcome.folder, 0)
    assert resumed.pop("own") == _weights(whole.folder, 0)
    assert resumed["rank 0's"] != _weights(whole.folder, 0) != resumed["none"]

    # Moments of the replicas' own would take data-parallel ones apart.
    parallel = ("--recipe-pth", "recipe/digits-vit-adamw.yml", "--resume-from-epoch", "1")
    outcome = start(*flags, *parallel, *weights, *states)
    assert outcome.codes == [0, 0], outcome.errors
    assert _weights(outcome.folder, 0) == _weights(outcome.folder, 1)
    assert outcome.records[-1]["share"] == 1.0

    refused = {
        (*states,): "give resume_pth too",
        ("--resume-pth", "/no/weights.pt"): "/no/weights.pt: not there",
        (*weights, *states, "--optimizer", "localsgd"): "saved with optimizer 'localadamw'",
        ("--resume-pth", str(saved), "--resume-from-step", "7"): "at step 6, and 7 was asked for",
        ("--resume-pth", str(saved), *states): "has its own optimizer state",
        ("--resume-pth", str(saved / "manifest.json")): "not a file of weights",
        (*weights, "--model", "resnet-digits"): "weights of another model",
    }
    for how, part in refused.items():
        assert part in one_line(start(*given, *how, world_size=1))


def test_a_moving_average_needs_replicas_that_agree(flags) -> None:
    line = one_line(start(*flags, "--ema", "0.5", "--sync", "easgd", world_size=1))
    assert "ema is 0.5: with sync easgd" in line


def test_a_moving_average_follows_where_only_the_end_agrees(flags) -> None:
    """Groups of one, and no round that all share: the replicas first agree in finish()."""
    apart = ("--sync", "hierarchical", "--sync-settings", "group_size=1", "global_every=100")
    outcome = start(*flags, *apart, "--period", "constant", "--h-base", "4", "--ema", "1e-9")
    (*_, last) = [r for r in outcome.records if r["kind"] == "val"]
    assert last["step"] == 12 and last["ema_loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_images_of_changing_size_need_a_model_that_takes_them(flags) -> None:
    line = one_line(start(*flags, "--resize-initial-scale", "0.5", world_size=1))
    assert "resize_initial_scale is 0.5: model simplevit-digits" in line


def test_a_compiled_model_trains_to_the_same_loss(flags) -> None:
    recipe = ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--epochs", "1", "--nw", "2")
    plain, compiled = (start(*flags, *recipe, *e, world_size=1) for e in ((), ("--compile",)))
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
    assert _weights(outcome.folder, 0, 6) != _weights(outcome.folder, 1, 6)
    assert _weights(outcome.folder, 0) == _weights(outcome.folder, 1)
    again = start(*given, "--resume-pth", str(outcome.folder / "checkpoints/step-00000012"))
    evaluated = [o.records[-2] for o in (outcome, again)]
    assert [r["kind"] for r in evaluated] == ["val", "val"]
    assert evaluated[0]["loss"] == evaluated[1]["loss"]


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


def test_the_result_does_not_depend_on_the_number_of_loader_workers(flags) -> None:
    one, three = (start(*flags, "--nw", workers) for workers in ("1", "3"))
    assert _weights(one.folder, 0) == _weights(three.folder, 0)


def test_one_replica_needs_no_launcher(flags) -> None:
    outcome = start(*flags, world_size=1)
    assert outcome.codes == [0], outcome.errors
    assert "1 replica\n" in outcome.outputs[0]


def deepspeed(hostfile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command that the README names, on this host alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launcher = [str(ROOT / ".venv/bin/deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check"]
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    return subprocess.run(
        [*launcher, *address, "main.py", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_deepspeeds_launcher_starts_it(flags) -> None:
    done = deepspeed(ROOT / "hostfile", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 replicas" in done.stdout


def test_a_missing_hostfile_is_named_where_deepspeed_would_train_on_one_process(flags) -> None:
    done = deepspeed(Path("/no/hostfile"), *flags)
    assert done.returncode != 0
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("main.py:")]
    assert "hostfile /no/hostfile is missing" in line


def test_processes_of_a_launcher_that_says_no_ranks_do_not_train_alone(flags, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    line = one_line(start(*flags, world_size=1))
    assert "SLURM_STEP_NUM_TASKS is 2" in line


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


def one_line(outcome, rank: int = 0) -> str:
    assert all(code != 0 for code in outcome.codes), outcome
    (line,) = outcome.complaints(rank)
    assert "Traceback" not in outcome.errors[rank]
    return line


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
    line = one_line(start(*flags, "--deepspeed_config", str(file)))
    assert all(part in line for part in [*parts, "deepspeed.json"]), line


def test_a_deepspeed_file_is_merged_section_by_section(flags, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    content = {
        "bf16": {"enabled": False},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "monitor"},
        "timers": {"throughput": {"synchronized": False}},
    }
    file.write_text(json.dumps(content))
    outcome = start(*flags, "--deepspeed", "--deepspeed_config", str(file), world_size=1)
    assert outcome.codes == [0], outcome.errors
    assert list((tmp_path / "monitor").glob("*.csv"))


def test_a_replica_with_another_recipe_is_named_on_every_rank(flags) -> None:
    outcome = start(*flags, per_rank=[(), ("--alpha", "0.9")])
    for rank in (0, 1):
        line = one_line(outcome, rank)
        assert "rank 1" in line
        assert "alpha: 0.9" in line


def test_a_host_with_another_data_set_is_named(flags, tmp_path: Path) -> None:
    write = [sys.executable, "-m", "data.write", "digits", "--split", "tune", "--out"]
    subprocess.run([*write, str(tmp_path / "digits")], check=True, cwd=ROOT)
    outcome = start(*flags, per_rank=[(), ("--data-pth", str(tmp_path))])
    for rank in (0, 1):
        line = one_line(outcome, rank)
        assert "rank 1 has [data digits: " in line


def test_replicas_that_do_not_come_are_not_waited_for_all_day(flags, tmp_path: Path) -> None:
    alone = tmp_path / "alone.py"
    alone.write_text(
        "import sys\nfrom datetime import timedelta\nimport main\n"
        "from training import config, engine\n"
        "engine.ARRIVAL = timedelta(seconds=3)\nmain.main(config.load(sys.argv[1:]))\n"
    )
    outcome = start(*flags, script=alone, world_size=2, absent=1)
    assert "not all 2 replicas met at 127.0.0.1" in one_line(outcome)


def test_a_diverging_run_says_so(flags) -> None:
    recipe = ("--recipe-pth", "recipe/digits-resnet-sgd.yml")
    line = one_line(start(*flags, *recipe, "--max-lr", "1e20", "--min-lr", "1e20"))
    assert "the training loss is" in line
    assert "max_lr" in line


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


def test_replicas_with_statistics_of_their_own_are_not_evaluated(flags) -> None:
    recipe = ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--no-bn")
    assert "bn is false" in one_line(start(*flags, *recipe))
    outcome = start(*flags, *recipe, "--buffers", "average")
    assert outcome.codes == [0, 0], outcome.errors


def test_a_log_folder_that_cannot_be_is_named(flags, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = one_line(start(*flags, "--log-pth", str(tmp_path / "file"), world_size=1))
    assert f"log_pth {tmp_path / 'file'}" in line
