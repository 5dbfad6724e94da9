"""Hugging Face's Trainer with AdamW inside and QSR outside.

    pip install -e '.[examples]'
    torchrun --nproc-per-node 2 examples/trainer.py --folder gpt

A small GPT-2, made from a configuration, reads the documentation that Python's help() shows, with
bytes for tokens; nothing is downloaded. `gpt` gets `model.safetensors`, the weights to use (for
`from_pretrained`), and a checkpoint with a file per rank. With `--stop 70` it stops after 70
steps; the first command goes on from there, bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from localopt import QSR
from localopt.integrations.transformers import LocalTrainer

STEPS, BATCH, CONTEXT = 150, 16, 32


class StopAfter(TrainerCallback):
    """Saves and stops after some steps, as at the end of a job's time."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True


parser = argparse.ArgumentParser()
parser.add_argument("--folder", required=True, help="saves here, goes on from here")
parser.add_argument("--stop", type=int, default=STEPS, help="stop after so many steps")
options = parser.parse_args()

text = "\n".join(topics[name] for name in sorted(topics)).encode()
windows = torch.tensor(list(text)).unfold(0, CONTEXT, CONTEXT)
examples = [{"input_ids": window, "labels": window} for window in windows]
split = len(examples) * 9 // 10

set_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=None, eos_token_id=None,
    )
)  # fmt: skip
trainer = LocalTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.folder,
        use_cpu=not torch.accelerator.is_available(),  # else, on CPUs, each rank would be alone
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=256,
        learning_rate=6e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=1.0,  # of each replica's own gradients
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=examples[:split],  # the Trainer gives each replica its own share
    eval_dataset=examples[split:],
    callbacks=[StopAfter(options.stop)],
    period=QSR(alpha=12e-3, base=4, total_steps=STEPS),
)
os.makedirs(options.folder, exist_ok=True)
trainer.train(resume_from_checkpoint=get_last_checkpoint(options.folder))
loss = trainer.evaluate()["eval_loss"]
trainer.save_model()

if trainer.is_world_process_zero():
    traffic = trainer.local_optimizer.traffic
    print(
        f"step {trainer.state.global_step}: test loss {loss:.3f}, {traffic.syncs} "
        f"synchronisations, {traffic.bytes / 1e6:.1f} MB sent per replica"
    )
dist.destroy_process_group()
