"""SDTL's published calls: `CommOptimizer`, and `DistOptimizer` to write one's own rule with.

Here they are a `LocalOptimizer` with a constant period and a `Rule`, so everything that those do
(schedulers, saving, `consensus`, `finish`) works as well, around any torch optimizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import check_group
from .collective import Collective
from .flat import pull_
from .optimizer import LocalOptimizer
from .period import Constant
from .replica import Replica
from .sync import EASGD, LSGD, Rule


class DistOptimizer(Rule):
    """Base of rules in SDTL's words; a subclass says what `comm_train_step` does.

    After every local step `local_pulling_step` and `dist_train_step` are called, after every
    ``comm_period``-th also `comm_train_step`, which alone may communicate. The center is saved and
    restored here; for more, extend `state_dict` and `load_state_dict`. See
    examples/own_dist_optimizer.py.

    Args:
        local_optimizer: the optimizer that makes the local steps.
        world_size: number of replicas; None: that of the process group.
        local_pulling_strength: p, strength of `local_pulling_step` over a round.
        dist_pulling_strength: c, for the subclass to use.
        comm_period: H, local steps in a round.

    Attributes:
        params: this replica's parameters, one flat tensor (n,) per device and type; work on them in
            place.
        center: what `local_pulling_step` pulls to, tensors alike (parameters of 16 bits have it in
            float32); at first the initial model.
    """

    def __init__(
        self,
        local_optimizer: Optimizer,
        world_size: int | None = None,
        local_pulling_strength: float = 0.1,
        dist_pulling_strength: float = 0.1,
        comm_period: int = 4,
    ) -> None:
        self.local_optimizer, self.world_size = local_optimizer, world_size
        self.local_pulling_strength = local_pulling_strength
        self.dist_pulling_strength = dist_pulling_strength
        self.comm_period = comm_period

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(local_pulling_strength={self.local_pulling_strength}, "
            f"dist_pulling_strength={self.dist_pulling_strength}, comm_period={self.comm_period})"
        )

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self._center = self.anchor("center")
        self._mean = self.mean_of_copies()

    @property
    def params(self) -> list[Tensor]:
        """This replica's parameters, one flat tensor per device and type."""
        return self.replica.flat.params

    @property
    def center(self) -> list[Tensor]:
        """The center, as `params`."""
        return self._center.data

    def mean(self) -> list[Tensor]:
        """x̄, the mean of all replicas' parameters, as `center`. Collective."""
        self._mean.launch()
        mean = self._mean.land()
        assert mean is not None, "it has been launched"
        return [x.to(z.dtype) for x, z in zip(mean, self.center, strict=True)]

    def pull(self, towards: Sequence[Tensor], strength: float) -> None:
        """x ← x + strength (towards - x)."""
        with torch.no_grad():
            pull_(self.params, towards, strength)

    def local_pulling_step(self) -> None:
        """x ← x - (p/H)(x - center). No collective."""
        if self.local_pulling_strength:
            self.pull(self.center, self.local_pulling_strength / self.replica.round.h)

    def dist_train_step(self) -> None:
        """Collect what `comm_train_step` will need. No collective."""

    @abstractmethod
    def comm_train_step(self) -> None:
        """End the round: communicate, move the center, pull the parameters. Collective."""

    def after_step(self) -> None:
        self.local_pulling_step()
        self.dist_train_step()

    def end_round(self) -> None:
        self.comm_train_step()
        self.replicas_agree = False


class _Alone(Rule):
    """Replicas that do not communicate."""

    def __repr__(self) -> str:
        return "no communication"

    def end_round(self) -> None:
        self.replicas_agree = False


class CommOptimizer(LocalOptimizer):
    """SDTL's wrapper around a local optimizer: EASGD or LSGD every ``comm_period`` steps.

    With strengths p and c, m replicas and H = comm_period, every local step ends with
    x ← x - (p/H)(x - z), and every H-th, exactly, with

    - "EASGD": x ← (1 - c/m) x + (c/m) z;  z ← (1 - c) z + c x̄, both with the old x and z: `EASGD`
      with α = c/m and β = c;
    - "LSGD": z ← the leader's parameters;  x ← (1 - c) x + c z: `LSGD`, which needs the loss:
      ``step(closure)``, or ``record_loss(loss)`` before ``step()``;
    - None: nothing, and replicas train on their own.

    Args:
        local_optimizer: the optimizer that makes the local steps.
        dist_optim_name: "EASGD", "LSGD", None, or a subclass of `DistOptimizer`.
        world_size: number of replicas m, to be checked; None: that of the process group.
        local_pulling_strength: p, in [0, 1].
        dist_pulling_strength: c.
        comm_period: H.
        **options: `LocalOptimizer`'s (model, buffers, process_group, …).

    Raises:
        ValueError: for an unknown name, settings out of range, or a ``world_size`` that is not the
            number of replicas.

    Source: Teng et al., NeurIPS 2019, arXiv 1905.10395, and the library of its authors; Zhang et
    al. 2015, arXiv 1412.6651.
    """

    def __init__(
        self,
        local_optimizer: Optimizer,
        dist_optim_name: str | type[DistOptimizer] | None,
        world_size: int | None = None,
        local_pulling_strength: float = 0.1,
        dist_pulling_strength: float = 0.1,
        comm_period: int = 4,
        **options: Any,
    ) -> None:
        group, alone = options.get("process_group"), options.get("alone", False)
        check_group(group, alone=alone)
        m = Collective(group, alone=alone).world_size
        if world_size not in (None, m):
            raise ValueError(f"world_size is {world_size}: the process group has {m} replicas")
        p, c = local_pulling_strength, dist_pulling_strength
        rule: Rule
        if dist_optim_name == "EASGD":
            rule = EASGD(alpha=c / m, beta=c, pull=p)
        elif dist_optim_name == "LSGD":
            rule = LSGD(c=c, p=p)
        elif dist_optim_name is None:
            rule = _Alone()
        elif isinstance(dist_optim_name, type) and issubclass(dist_optim_name, DistOptimizer):
            rule = dist_optim_name(local_optimizer, m, p, c, comm_period)
        else:
            raise ValueError(
                f"dist_optim_name is {dist_optim_name!r}: it must be 'EASGD', 'LSGD', None or a "
                "subclass of DistOptimizer"
            )
        super().__init__(local_optimizer, Constant(comm_period), rule, **options)

    @property
    def local_optimizer(self) -> Optimizer:
        """The optimizer that makes the local steps."""
        return self.inner

    @property
    def dist_optimizer(self) -> Rule:
        """What makes the replicas meet."""
        return self.sync

    # What `step` does besides the local step, for loops that call local_optimizer.step().

    def local_pulling_step(self) -> None:
        """After every local step: x ← x - (p/H)(x - z). No collective."""
        self._open_round()
        self._replica.round.count_step()
        if isinstance(self.sync, DistOptimizer):
            self.sync.local_pulling_step()
        else:
            self.sync.after_step()

    def dist_train_step(self) -> None:
        """After every local step: collect statistics. No collective."""
        if isinstance(self.sync, DistOptimizer):
            self.sync.dist_train_step()

    def comm_train_step(self) -> None:
        """After every ``comm_period``-th local step: end the round. Collective."""
        self._open_round()
        self._replica.round.start_at(self._opened_at + self.h)
        self.sync.end_round()
        self._replica.meeting.reports.show_landed()
        self._replica.end_round()

    def _open_round(self) -> None:
        if self.synced:
            clock = self._replica.round
            self._opened_at = clock.step
            clock.begin(self.period(clock.step, 0.0))
