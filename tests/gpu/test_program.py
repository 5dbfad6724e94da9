"""main.py on a GPU: two replicas on one card, through gloo, and as if they were two NCCL hosts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.gpu.links import on_a_gpu
from tests.support.program import start
from tests.support.ranks import ONE_CARD
from tests.training.runs import SHORT, weights

pytestmark = pytest.mark.slow
ALONE = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
PLACES = {
    "cpu": [{}, {}],
    "gloo": [{}, {}],
    "nccl": [{**ALONE, **ONE_CARD, "NCCL_HOSTID": f"rank{rank}"} for rank in (0, 1)],
}
MODELS = {
    "vit": ("--recipe-pth", "recipe/digits-vit-localadamw-qsr.yml"),
    "resnet": ("--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--channels-last"),
}


SYNCS = {
    "average": ("average",),
    "overlap": ("overlap",),
    "streaming": ("streaming", "--sync-settings", "fragments=2"),
}


@pytest.mark.parametrize(
    ("link", "model", "sync"),
    [
        ("cpu", "vit", "streaming"),
        *(
            pytest.param(*each, marks=on_a_gpu)
            for each in itertools.product(("gloo", "nccl"), MODELS, SYNCS)
        ),
    ],
)
def test_a_deterministic_run_is_resumed_bit_for_bit(
    data: str, tmp_path: Path, link: str, model: str, sync: str
) -> None:
    """Also in mid-round, and with a collective in flight."""
    given = [*MODELS[model], "--data-pth", data, "--log-pth", str(tmp_path), *SHORT]
    given += [
        "--period",
        "constant",
        "--h-base",
        "4",
        "--precision",
        "bf16",
        "--sync",
        *SYNCS[sync],
    ]
    given += ["--device", "cpu" if link == "cpu" else "cuda"]
    whole = start(*given, "--save-freq", "1", places=PLACES[link])
    assert whole.codes == [0, 0], whole.errors
    checkpoint = str(whole.folder / "checkpoints/step-00000006")
    resumed = start(*given, "--resume-pth", checkpoint, places=PLACES[link])
    assert resumed.codes == [0, 0], resumed.errors
    for rank in (0, 1):
        assert weights(whole.folder, rank) == weights(resumed.folder, rank)
