"""Plans that cannot be, and DeepSpeed's hostfiles that they read, are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.refusals import check, numbered, told, untouched
from training import checks
from training.plan.plan import plan
from training.settings import load

HOSTFILES: list[tuple[bytes | None, list[str]]] = [
    (None, ["No such file"]),
    (b"", ["no host"]),
    (b"# node1 slots=2\n\n", ["no host"]),
    (b"node1\n", ["'node1'"]),
    (b"node1 slots=\n", ["'node1 slots='"]),
    (b"node1 slots=0\n", ["'node1 slots=0'"]),
    (b"node1 slots=-1\n", ["'node1 slots=-1'"]),
    (b"node1 slots=two\n", ["'node1 slots=two'"]),
    (b"node1 slots=1.5\n", ["'node1 slots=1.5'"]),
    (b"node1 slots = 2\n", ["'node1 slots = 2'"]),
    (b"slots=2\n", ["'slots=2'"]),
    (b"node1 slots=2 slots=3\n", ["'node1 slots=2 slots=3'"]),
    (b"node1 slots=2\nnode1 slots=2\n", ["'node1 slots=2'", "second time"]),
    (b"node1 slots=999999\n", ["999999", "100000"]),
    (b"node1 slots=" + b"9" * 5000, ["'node1 slots=999"]),
    (b"node1 slots=\xd9\xa1\n", ["node1 slots="]),
    (b"\x00\x01 slots=2\x02\n", ["\\x02"]),
    (b"\xff\xfe\n", ["UTF-8"]),
]


@pytest.mark.parametrize(("content", "parts"), HOSTFILES, ids=numbered(HOSTFILES))
def test_a_hostfile(tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content)
    with untouched(tmp_path):
        check([str(path), *parts], told(plan, ["--plan", "--plan-hostfile", str(path)]))


PLANS: list[tuple[str, list[str]]] = [
    ("--plan-nodes 0", ["--plan-nodes is 0"]),
    ("--plan-nodes -1", ["--plan-nodes is -1"]),
    ("--plan-nodes 1.5", ["--plan-nodes", "'1.5'"]),
    ("--plan-nodes", ["--plan-nodes", "expected one argument"]),
    ("--plan-nodes 1000000000000", ["--plan-nodes is 1000000000000"]),
    ("--plan-gpus 1000000000000", ["--plan-gpus 1000000000000"]),
    ("--plan-gpus nan", ["--plan-gpus", "'nan'"]),
    ("--plan-link-gbits nan", ["--plan-link-gbits is nan"]),
    ("--plan-link-gbits 0", ["--plan-link-gbits is 0"]),
    ("--plan-link-gbits x", ["--plan-link-gbits", "'x'"]),
    ("--plan-link-efficiency 75", ["--plan-link-efficiency is 75"]),
    ("--plan-step-seconds inf", ["--plan-step-seconds is inf"]),
    ("--plan-step-seconds -1", ["--plan-step-seconds is -1"]),
    ("--plan-alphas", ["--plan-alphas", "at least one"]),
    ("--plan-alphas 0.1 x", ["--plan-alphas", "'x'"]),
    ("--plan-images 0", ["--plan-images is 0"]),
    ("--plan-images 1000000000000", ["epochs is 60", "10000000 steps"]),
    ("--plan-images 5", ["total_batch_size is 32", "5 images"]),
    ("--plan-classes -1", ["--plan-classes is -1"]),
    ("--plan-node 2", ["--plan-node", "--plan-nodes"]),
    ("--plan=yes", ["--plan", "'yes'"]),
    ("--plan-hostfile ~no-such-user/x", ["--plan-hostfile", "'~no-such-user/x'"]),
    ("--plan-hostfile /dev/zero", ["/dev/zero", "bytes"]),
    ("--plan-hostfile /tmp", ["/tmp", "Is a directory"]),
    ("--epochs 1000000", ["epochs is 1000000", "steps"]),
    ("--epoch 2", ["--epoch", "--epochs"]),
    ("--data flowers", ["data is 'flowers'", "--plan-images"]),
    ("--total-batch-size 33", ["total_batch_size is 33", "2 replicas"]),
    ("--physical-batch-size 3", ["physical_batch_size is 3", "16"]),
    ("--mixup 0.2 --physical-batch-size 1", ["physical_batch_size is 1", "mixup"]),
    ("--total-batch-size 4096 --physical-batch-size 8", ["4096", "1438 images"]),
    ("--steps-per-epoch 45", ["steps_per_epoch is 45", "44 steps"]),
    ("--model nothing", ["'nothing'"]),
    ("--resolution 7", ["model simplevit-digits", "7"]),
    ("--data imagenet", ["resolution is -1", "imagenet"]),
    ("--model resnet-digits --no-bn", ["bn is false"]),
    ("--resize-initial-scale 0.5", ["resize_initial_scale is 0.5", "simplevit-digits"]),
    ("--model resnet-digits --bn-batches 1", ["bn_batches is 1", "2 replicas"]),
    ("--ema 0.5 --sync easgd", ["ema is 0.5", "easgd"]),
    ("--sync-settings alpha=1", ["'alpha'", "sync average"]),
    ("--sync easgd --sync-settings alpha=x", ["alpha is 'x'"]),
    ("--sync easgd --sync-settings alpha=.nan", ["alpha is nan"]),
    ("--sync easgd --sync-settings =1", ["''", "easgd"]),
    ("--sync slowmo --sync-settings beta=2", ["'beta': 2"]),
    ("--sync average --sync-settings state_fields=[a]", ["state_fields", "'a'"]),
    ("--sync hierarchical", ["hierarchical", "group_size and global_every"]),
    ("--sync hierarchical --sync-settings group_size=0 global_every=1", ["group_size is 0"]),
]


@pytest.mark.parametrize(("flags", "parts"), PLANS, ids=[flags for flags, _ in PLANS])
def test_a_plan(tmp_path: Path, flags: str, parts: list[str]) -> None:
    with untouched(tmp_path):
        check(parts, told(plan, ["--plan", "--data-pth", str(tmp_path), *flags.split()]))


def test_settings_that_the_images_or_the_model_do_not_fit() -> None:
    config = load(["--total-batch-size", "64", "--physical-batch-size", "16"])
    check(["total_batch_size is 64", "3 replicas"], told(checks.with_fitting_batches, config, 3))
    check(["resolution is -1", "digits"], told(checks.with_resolution, config, None))
    long = load(["--steps-per-epoch", "9"])
    check(["steps_per_epoch is 9", "64 images"], told(checks.steps_per_epoch, long, 64))
