"""What DeepSpeed's JSON may not say is refused in one line that names file and entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.refusals import FEW, check, numbered, told, untouched
from training.deepspeed_settings import settings_of
from training.settings import load
from training.values import shortened

RESTS_ON_DEEPSPEED = "DeepSpeed refuses it"
JSONS: list[tuple[Any, list[str]]] = [
    ("", ["not valid JSON"]),
    ("{", ["not valid JSON"]),
    ("{'a': 1}", ["not valid JSON"]),
    ("text", ["not valid JSON"]),
    (b"\xff{}", ["UTF-8"]),
    ("\ufeff{}", ["not valid JSON", "BOM"]),
    ("[" * 100_000, ["not valid JSON"]),
    ('{"aio":' * 50_000, ["not valid JSON"]),
    ('{"steps_per_print": NaN}', ["NaN"]),
    ('{"steps_per_print": 1, "steps_per_print": 2}', ["'steps_per_print'", "twice"]),
    ('{"aio": {"block_size": 1, "block_size": 2}}', ["'block_size'", "twice"]),
    ("[]", ["one JSON object", "[]"]),
    ("3", ["one JSON object", "3"]),
    ("null", ["one JSON object", "None"]),
    ('"text"', ["one JSON object", "'text'"]),
    ({"zero_optimization": {"stage": 1}}, ["stage is 1", "local optimizer"]),
    ({"zero_optimization": {"stage": 2}}, ["stage is 2"]),
    ({"zero_optimization": {"stage": 3}}, ["stage is 3"]),
    ({"zero_optimization": {"stage": "0"}}, ["stage is '0'"]),
    ({"zero_optimization": 3}, ["stage is 3"]),
    ({"zero_optimization": None}, ["stage is None"]),
    ({"zero_optimization": {"stage": 0, "x": 1}}, ["zero_optimization", "x", RESTS_ON_DEEPSPEED]),
    ({"zero_optimization": {"reduce_bucket_size": "x"}}, ["reduce_bucket_size", "'x'"]),
    ({"fp16": {"enabled": True}}, ["fp16 is {'enabled': True}", "precision"]),
    ({"bf16": {"enabled": True}}, ["bf16", "precision"]),
    ({"bf16": "x"}, ["bf16 is 'x'", "precision"]),
    ({"amp": {"enabled": True}}, ["amp", "precision"]),
    ({"train_batch_size": 64}, ["train_batch_size is 64", "total_batch_size"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "clip_norm"]),
    ({"optimizer": {"type": "Adam"}}, ["optimizer is {'type': 'Adam'}"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler is {'type': 'WarmupLR'}"]),
    ({"sequence_parallel_size": 2}, ["sequence_parallel_size is 2", "whole replica"]),
    ({"sequence_parallel_size": "1"}, ["sequence_parallel_size is '1'"]),
    ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "'autotp_size': 2"]),
    ({"pipeline": {"stages": 2}}, ["pipeline", "'stages': 2"]),
    ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor is 2.0"]),
    ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op is 'sum'"]),
    ({"communication_data_type": "fp16"}, ["communication_data_type is 'fp16'"]),
    ({"datastates_ckpt": 4}, ["datastates_ckpt is 4", "itself"]),
    ({"nebula": {"enabled": True}}, ["nebula is {'enabled': True}", "itself"]),
    ({"steps_per_print": "x"}, ["steps_per_print is 'x'", "positive integer"]),
    ({"steps_per_print": 0}, ["steps_per_print is 0", "positive integer"]),
    ({"steps_per_print": 1.5}, ["steps_per_print is 1.5", "positive integer"]),
    ({"log_level": "x"}, ["log_level is 'x'", "debug"]),
    ({"log_level": 5}, ["log_level is 5", "debug"]),
    ({"wall_clock_breakdown": "no"}, ["wall_clock_breakdown is 'no'"]),
    ({"memory_breakdown": 7}, ["memory_breakdown is 7", "true or false"]),
    ({"dump_state": "x"}, ["dump_state is 'x'", "true or false"]),
    ({"checkpoint": 5}, ["checkpoint is 5"]),
    ({"checkpoint": {"tag_validation": "x"}}, ["tag_validation", "'x'"]),
    ({"timers": 3}, ["timers is 3"]),
    ({"timers": {"throughput": {"enabled": "q"}}}, ["timers", "'q'"]),
    ({"csv_monitor": {"enabled": "x"}}, ["csv_monitor", "'x'"]),
    ({"tensorboard": None}, ["tensorboard is None"]),
    ({"flops_profiler": [1]}, ["flops_profiler is [1]"]),
    ({"activation_checkpointing": {"profile": "x"}}, ["activation_checkpointing", "'x'"]),
    ({"aio": {"block_size": "x"}}, ["aio is {'block_size': 'x'}", "a number"]),
    ({"comms_logger": {"enabled": "x"}}, ["comms_logger", "'x'"]),
    ({"vocabulary_size": "x"}, ["vocabulary_size is 'x'"]),
    ({"eigenvalue": {"enabled": True}}, ["eigenvalue", RESTS_ON_DEEPSPEED]),
    ({"csv_monito": {}}, ["csv_monito is {}", "'csv_monitor'"]),
    ({"": 1}, ["'' is 1", "no such setting"]),
    ({"a\nb": 1}, ["'a\\nb' is 1", "no such setting"]),
]


@pytest.mark.parametrize(("content", "parts"), JSONS, ids=numbered(JSONS))
def test_a_deepspeed_json(tmp_path: Path, content: Any, parts: list[str]) -> None:
    path = tmp_path / "deepspeed.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = load(["--deepspeed_config", str(path)])
    with untouched(tmp_path):
        check([str(path), *parts], told(settings_of, config, 1))


@pytest.mark.parametrize("path", ["/no/file.json", "/tmp", "/dev/zero"])
def test_no_deepspeed_json(path: str) -> None:
    check([path], told(settings_of, load(["--deepspeed_config", path]), 1))


@pytest.mark.parametrize("optimizer", ["localadamw", "adamw"])
def test_what_a_template_says_and_means_nothing_is_taken(tmp_path: Path, optimizer: str) -> None:
    neutral = {
        "train_batch_size": None, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "gradient_clipping": 0, "zero_optimization": {"stage": 0}, "sequence_parallel_size": 1,
        "tensor_parallel": {"autotp_size": 1}, "gradient_predivide_factor": 1.0,
        "prescale_gradients": False, "communication_data_type": None, "steps_per_print": None,
        "gradient_allreduce_op": "mean", "elasticity": {"enabled": False}, "log_level": None,
    }  # fmt: skip
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(neutral | {"wall_clock_breakdown": True, "steps_per_print": 7}))
    config = load(["--deepspeed_config", str(path), "--optimizer", optimizer])
    settings = settings_of(config, 1)
    assert settings["wall_clock_breakdown"] is True and settings["steps_per_print"] == 7
    assert settings["train_batch_size"] == config.total_batch_size


SCALARS = ("memory_breakdown", "disable_allgather", "zero_allow_untested_optimizer", "dump_state")


@pytest.mark.parametrize("key", SCALARS)
def test_generated_values_for_switches_of_deepspeed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "deepspeed.json"
    config = load(["--deepspeed_config", str(path)])
    wrong = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)

    @FEW
    @given(wrong)
    def refused(value: Any) -> None:
        path.write_text(json.dumps({key: value}))
        line = told(settings_of, config, 1)
        check([str(path), f"{key} is {shortened(value)}: "], line)

    refused()
