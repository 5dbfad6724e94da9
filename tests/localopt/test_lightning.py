"""LocalStrategy and ConsensusEvaluation: steps, losses, checkpoints, and what is evaluated."""

from __future__ import annotations

import importlib.util
import signal
import time
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.program import Running, start
from tests.support.resumed import TORCHRUN

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("lightning") is None,
        reason="lightning is not installed: pip install -e '.[examples]'",
    ),
]

COMMON = """
import sys
from pathlib import Path
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from localopt import LSGD, Constant, LocalSGD
from localopt.integrations.lightning import ConsensusEvaluation, LocalStrategy

folder = Path(sys.argv[1])
torch.manual_seed(0)
inputs, labels = torch.randn(128, 4), torch.randint(3, (128,))

def loader(batch=4):
    return DataLoader(TensorDataset(inputs, labels), batch)

class Module(pl.LightningModule):
    def __init__(self, sync=None, **settings):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.how = {"period": Constant(6), "sync": sync, **settings}
        self.forwards, self.seen = 0, []

    def training_step(self, batch, index):
        self.forwards += 1
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.seen.append(everybodys(self))

    def configure_optimizers(self):
        self.optimizer = LocalSGD(self.parameters(), lr=0.1, model=self, **self.how)
        return self.optimizer

def trainer_of(*callbacks, **arguments):
    given = dict(
        strategy=LocalStrategy(), devices=2, accelerator="cpu", max_epochs=1, logger=False,
        callbacks=list(callbacks), limit_val_batches=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    return pl.Trainer(**given | arguments)

def everybodys(model):
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(found, mine)
    return found
"""


def ran(tmp_path: Path, program: str) -> None:
    """Both ranks run the program to its end."""
    (tmp_path / "program.py").write_text(COMMON + program)
    script = tmp_path / "program.py"
    ended = start(str(tmp_path / "out"), script=script, places=[TORCHRUN] * 2)
    assert ended.codes == [0, 0], "\n".join(ended.errors)


def test_a_step_of_several_batches_counts_once_and_lsgd_has_its_loss(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
class Look(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 9:
            parted.append(not torch.equal(*everybodys(module)))
            norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]))

parted, norms = [], []
module = Module(LSGD())
trainer_of(Look(), accumulate_grad_batches=2, gradient_clip_val=0.01).fit(module, loader())
torch.testing.assert_close(torch.stack(norms), torch.tensor([0.01]), rtol=1e-2, atol=0)
assert module.forwards == 16
assert module.optimizer.round == 2, "six steps, and finish()"
assert parted == [True]
one, other = module.optimizer.report.losses
assert 0 < one < 3 and one != other
assert torch.equal(*everybodys(module))
""",
    )


def test_the_consensus_is_validated_and_replicas_are_saved(tmp_path: Path) -> None:
    """Each rank has a file, which is removed with rank 0's."""
    ran(
        tmp_path,
        """
module = Module()
trainer = trainer_of(
    ConsensusEvaluation(), ModelCheckpoint(folder, "{step}", save_on_train_epoch_end=False),
    max_epochs=2,
)
trainer.fit(module, loader(), loader())  # 16 steps an epoch: in the middle of a round of 6
dist.barrier()
assert sorted(file.name for file in folder.iterdir()) == ["step=32.ckpt", "step=32.ckpt.rank1"]
saved = torch.load(folder / ("step=32.ckpt" + ".rank1" * dist.get_rank()), weights_only=False)
assert saved["optimizer_states"][0]["param_groups"][0]["localopt"]["rank"] == dist.get_rank()
mine = torch.cat([saved["state_dict"][name].reshape(-1) for name in ("layer.weight", "layer.bias")])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert not torch.equal(*both)
assert len(module.seen) == 2
for first, second in module.seen:
    assert torch.equal(first, second)
assert torch.allclose(module.seen[-1][0], sum(both) / 2)

dist.barrier()
(folder / ("step=32.ckpt" + ".rank1" * dist.get_rank())).unlink()
try:
    trainer_of(max_epochs=3).fit(Module(), loader(), ckpt_path=folder / "step=32.ckpt")
except FileNotFoundError as error:
    assert str(error).endswith("step=32.ckpt" + ".rank1" * dist.get_rank())
else:
    raise AssertionError("a checkpoint without this rank's state is loaded")
""",
    )


def test_without_the_callback_each_rank_validates_its_own_replica(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
module = Module()
trainer_of().fit(module, loader(), loader())
assert [torch.equal(*both) for both in module.seen] == [False]
""",
    )


def test_an_optimizer_that_never_synchronises_is_refused(tmp_path: Path) -> None:
    ran(
        tmp_path,
        """
class Forgetful(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

try:
    trainer_of().fit(Forgetful(), loader())
except TypeError as error:
    assert str(error).startswith("configure_optimizers() returned SGD, which never synchronises")
else:
    raise AssertionError("replicas that never meet")

module = Module()
trainer = trainer_of(ConsensusEvaluation())
trainer.fit(module, loader(), loader())
trainer.validate(module, loader())  # without an optimizer: as the model is
assert all(torch.equal(*both) for both in module.seen) and len(module.seen) == 2
""",
    )


def test_a_signal_to_stop_ends_all_ranks(tmp_path: Path) -> None:
    """Also one that waits in a synchronisation for another, slower one."""
    (tmp_path / "program.py").write_text(
        COMMON
        + """
import time

class Slow(Module):
    def training_step(self, batch, index):
        time.sleep(0.05 * dist.get_rank())
        if self.trainer.global_step == 12:
            (folder / f"training{dist.get_rank()}").touch()
        return super().training_step(batch, index)

folder.mkdir(exist_ok=True)
trainer_of(max_epochs=10_000).fit(Slow(), loader())
"""
    )
    running = Running(
        str(tmp_path / "out"), script=tmp_path / "program.py", places=[TORCHRUN] * 2
    )
    deadline = time.monotonic() + PATIENCE
    while not all((tmp_path / f"out/training{rank}").exists() for rank in (0, 1)):
        assert running.alive() and time.monotonic() < deadline
        time.sleep(0.05)
    running.signal(signal.SIGTERM, [0, 1])
    ended = running.ended(timeout=60)
    assert -signal.SIGKILL not in ended.codes, "one waits for ever"
    assert 0 in ended.codes, ended.errors
