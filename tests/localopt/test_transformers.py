"""LocalTrainer: what it records, what it evaluates and saves, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.program import start

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="transformers is not installed: pip install -e '.[examples]'",
    ),
]

COMMON = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from localopt import EASGD, LSGD, Constant
from localopt.integrations.transformers import LocalTrainer

folder = Path(sys.argv[1])
set_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.forwards = 0

    def forward(self, inputs, labels):
        self.forwards += 1
        logits = self.layer(inputs)
        self.computed_in = logits.dtype
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

examples = [{"inputs": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(128)]

def trainer_of(model, callbacks=(), settings=None, use_cpu=True, sync=None, h=4, **arguments):
    given = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=0.1,
        optim="sgd", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no", use_cpu=use_cpu,
    )
    return LocalTrainer(
        model=model, args=TrainingArguments(**given | arguments), train_dataset=examples,
        eval_dataset=examples, callbacks=list(callbacks), period=Constant(h), sync=sync,
        settings=settings,
    )

def everybodys(model):
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(found, mine)
    return found
"""


def ran(tmp_path: Path, program: str) -> None:
    """Both ranks run the program to its end."""
    (tmp_path / "program.py").write_text(COMMON + program)
    ended = start(str(tmp_path / "out"), script=tmp_path / "program.py")
    assert ended.codes == [0, 0], "\n".join(ended.errors)


def test_a_step_of_several_batches_has_one_loss_and_lsgd_follows_the_best(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
parted, losses, norms, grads = [], [], [], []

class Look(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # they are clipped
        grads.append(model.layer.weight.grad.clone())
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 4 == 3:
            first, second = everybodys(model)
            parted.append(not torch.equal(first, second))
        elif state.global_step % 4 == 0:
            losses.append(trainer.local_optimizer.report.losses)

model = Model()
trainer = trainer_of(model, [Look()], sync=LSGD(), settings={"track_drift": True},
                     gradient_accumulation_steps=2, max_grad_norm=0.01, bf16=True)
trainer.train()
assert model.computed_in is torch.bfloat16
torch.testing.assert_close(torch.stack(norms), torch.full((8,), 0.01), rtol=1e-2, atol=0)
everyone = [torch.empty(8, 3, 4) for _ in range(2)]
dist.all_gather(everyone, torch.stack(grads))
assert not torch.equal(*everyone), "each replica clips its own"
assert model.forwards == 16 and trainer.local_optimizer.round == 2
assert parted == [True, True]
assert all(0 < one < 3 and other != one for one, other in losses), losses
assert trainer.local_optimizer.drift > 0
assert torch.equal(*everybodys(model)), "finished"
assert trainer.args.average_tokens_across_devices is False
""",
    )


def test_the_consensus_is_evaluated_and_saved_within_a_round(tmp_path: Path) -> None:
    """And training goes on with each replica's own weights."""
    ran(
        tmp_path,
        """
from safetensors.torch import load_file

here, seen = [], []

class Look(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            here.append(everybodys(model))
            control.should_evaluate = control.should_save = True

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            here.append(everybodys(model))

class Watched(Model):
    def forward(self, inputs, labels):
        if not self.training:
            seen.append(everybodys(self))
        return super().forward(inputs, labels)

model = Watched()
trainer = trainer_of(model, [Look()], save_strategy="steps", save_steps=100)
trainer.train()
before, after = here
assert not torch.equal(*before)
assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
mean = sum(before) / 2
assert seen and all(torch.allclose(one, mean) for both in seen for one in both)
saved = load_file(folder / "checkpoint-6/model.safetensors")
saved = torch.cat([saved["layer.weight"].reshape(-1), saved["layer.bias"]])
assert torch.allclose(saved, mean)
""",
    )


def test_the_best_model_stays_where_finishing_moves_replicas(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
from safetensors.torch import load_file

class Declining(LocalTrainer):
    def evaluate(self, *arguments, **named):
        super().evaluate(*arguments, **named)
        return {"eval_score": -self.state.global_step}

LocalTrainer = Declining
model = Model()
trainer = trainer_of(
    model, sync=EASGD(), eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
    load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
)
trainer.train()
best = load_file(folder / "checkpoint-4/model.safetensors")
assert torch.equal(model.layer.weight.detach(), best["layer.weight"])
assert torch.equal(*everybodys(model))
""",
    )


def test_it_refuses_what_cannot_be(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
trainer = trainer_of(Model(), save_strategy="steps", save_steps=2)
trainer.train()
dist.barrier()
(folder / f"checkpoint-2/replica_{dist.get_rank()}.pt").unlink()
try:
    trainer_of(Model()).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
except FileNotFoundError as error:
    assert f"replica_{dist.get_rank()}.pt" in str(error)
else:
    raise AssertionError("a checkpoint without this rank's state is loaded")

try:
    trainer_of(Model(), use_cpu=False)
except RuntimeError as error:
    assert "there are 2 ranks, and the Trainer knows of 1" in str(error)
    assert "use_cpu=True" in str(error)
else:
    raise AssertionError("each rank trains on all data")

class Sharded(LocalTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True  # as with the arguments for it

LocalTrainer = Sharded
try:
    trainer_of(Model())
except ValueError as error:
    assert "neither DeepSpeed nor FSDP" in str(error)
else:
    raise AssertionError("FSDP shares out what is averaged")
""",
    )
