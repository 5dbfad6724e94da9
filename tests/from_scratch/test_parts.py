"""from_scratch: its flags, its data and its README; what needs no processes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from from_scratch import param_server, ring_all_reduce
from from_scratch.__main__ import STRATEGIES, main, parser
from from_scratch.task import Replica, digits_task

ROOT = Path(__file__).parents[2]
SETTINGS = {"batch_size": 64, "epochs": 1, "lr": 0.2}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "--strategy"),
        ("--strategy gossip", "gossip"),
        ("--strategy param_server --workers 1", "param_server needs at least 2 processes"),
        ("--strategy param_server --n-gpus 1", "param_server needs at least 2 processes"),
        ("--strategy ring_all_reduce --workers 0", "--workers: '0' is not"),
        ("--strategy ring_all_reduce --workers two", "--workers: 'two' is not"),
        ("--strategy ring_all_reduce --workers 2 --n-gpus 2", "not allowed with"),
        ("--strategy ring_all_reduce --batch-size -3", "--batch-size"),
        ("--strategy ring_all_reduce --batch_size 65 --train_size 64", "exceeds the 64 training"),
        ("--strategy ring_all_reduce --train-size 1439", "there are 1438"),
        ("--strategy ring_all_reduce --epochs 0", "--epochs"),
        ("--strategy ring_all_reduce --lr nan", "--lr: 'nan' is not"),
        ("--strategy ring_all_reduce --lr 0", "--lr: '0' is not"),
        ("--strategy ring_all_reduce --seed -1", "--seed"),
        ("--strategy ring_all_reduce --out /nowhere/at/all.json", "there is no folder /nowhere/at"),
        ("--strategy ring_all_reduce --out /tmp", "this is a folder"),
        (f"--strategy ring_all_reduce --out {__file__}", "it is there already"),
        ("--strategy ring_all_reduce --momentum 0.9", "--momentum"),
        ("--strategy data_parallel --workers 2", "say --n-gpus"),
    ],
)
def test_bad_flags_take_one_line(
    flags: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(flags))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    assert re.fullmatch(r"from_scratch: .*\n", told.err) and complaint in told.err


def test_data_parallel_says_that_it_needs_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--strategy", "data_parallel", "--n-gpus", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "from_scratch: data_parallel needs a GPU for each of 2 replicas, and there are 0; "
        "on CPUs take param_server, ring_all_reduce or ddp\n"
    )


def test_flags_have_both_spellings() -> None:
    dashes = "--strategy ddp --n-gpus 3 --batch-size 32 --epochs 2 --lr 0.5 --train-size 100"
    same = parser().parse_args(dashes.split())
    underscores = [flag.replace("-", "_").replace("__", "--") for flag in dashes.split()]
    assert "--train_size" in underscores and parser().parse_args(underscores) == same
    assert (same.n_gpus, same.batch_size, same.train_size) == (3, 32, 100)


def test_the_readmes_commands_are_right() -> None:
    page = (ROOT / "from_scratch" / "README.md").read_text()
    commands = re.findall(r"python -m from_scratch( --[^`#\n]*)", page)
    for command in commands:
        parser().parse_args(shlex.split(command))
    assert all(any(name in command for command in commands) for name in STRATEGIES)
    for name in re.findall(r"`(\w+\.py)`", page):
        assert (ROOT / "from_scratch" / name).exists(), name


def test_what_is_random_depends_on_the_seed_alone() -> None:
    """On neither the number of shards nor what the generator has done before."""
    one, same, other = (digits_task(train_size=200, seed=s, **SETTINGS) for s in (1, 1, 2))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    whole = Replica(one)
    torch.manual_seed(99)
    parts = [Replica(same, shard=shard, shards=3) for shard in range(3)]
    assert all(torch.equal(whole.weights, part.weights) for part in parts)
    assert not torch.equal(whole.weights, Replica(other).weights)
    for joint, *shards in zip(*(replica.batches(5) for replica in (whole, *parts)), strict=True):
        for ours, theirs in zip(joint[:2], zip(*(s[:2] for s in shards), strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs))


def test_smaller_data_are_part_of_larger() -> None:
    small, large = (digits_task(train_size=s, seed=0, **SETTINGS) for s in (64, 100))
    assert torch.equal(small.images, large.images[:64])
    assert len(digits_task(train_size=None, seed=0, **SETTINGS).images) == 1438


def test_every_image_is_seen_once_an_epoch() -> None:
    task = digits_task(train_size=150, seed=0, **SETTINGS)
    batches = list(Replica(task).batches(0))
    assert [len(batch.labels) for batch in batches] == [64, 64, 22] and task.updates == 3
    seen = torch.cat([batch.images for batch in batches])
    assert torch.equal(seen.sum(0), task.images[_sorted(task, seen)].sum(0))
    assert not torch.equal(seen, torch.cat([b.images for b in Replica(task).batches(1)]))


def _sorted(task, seen: torch.Tensor) -> list[int]:
    """The number of each image that was seen; all of them, none twice."""
    numbers = {image.numpy().tobytes(): i for i, image in enumerate(task.images)}
    found = [numbers[image.numpy().tobytes()] for image in seen]
    assert sorted(found) == list(range(len(task.images)))
    return found


def test_a_ring_of_pipes() -> None:
    """What one worker sends, the next one receives, and nobody else."""
    links = list(ring_all_reduce.peers(3).values())
    for rank, (to_next, _) in enumerate(links):
        to_next.send(rank)
    assert [from_last.recv() for _, from_last in links] == [2, 0, 1]


def test_the_server_has_a_pipe_to_each_worker() -> None:
    (server, pipes), *workers = param_server.peers(3).items()
    assert server == "server (process 0)" and [name for name, _ in workers] == [
        "worker 1", "worker 2"
    ]  # fmt: skip
    for pipe, (name, link) in zip(pipes, workers, strict=True):
        link.send(name)
        assert pipe.recv() == name
