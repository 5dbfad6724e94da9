"""Streaming: its delay against torchft's, other outer steps, compression, and states of before."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    CollectiveError,
    Constant,
    DiLoCo,
    Int8,
    LocalOptimizer,
    LocalSGD,
    Streaming,
    compression,
)
from localopt.saved import own_state
from tests.support.ranks import run

pytestmark = pytest.mark.slow
H, K, STEPS = 8, 2, 40


class Net(nn.Module):
    """Two modules of equal size: what torchft takes for fragments."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.halves = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(K))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)

    def loss(self, step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = x
        for half in self.halves:
            y = torch.tanh(half(y))
        return ((y - x.flip(1)) ** 2).mean()

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


def path(optimizer: Any, net: Net, rank: int, steps: range = range(STEPS)) -> np.ndarray:
    """The parameters after every step, (steps, n)."""
    seen = []
    for step in steps:
        optimizer.zero_grad()
        net.loss(step, rank).backward()
        optimizer.step()
        seen.append(net.vector())
    return torch.stack(seen).numpy()


def sgd(net: Net, rule: Streaming | DiLoCo) -> LocalOptimizer:
    return LocalSGD(net.parameters(), 0.2, momentum=0.5, period=Constant(H), sync=rule, model=net)


# torchft.


class Manager:
    """As much of torchft's as its DiLoCo asks for: two replicas that never fail."""

    _use_async_quorum = False

    def __init__(self) -> None:
        self._step = 0

    def current_step(self) -> int:
        return self._step

    def should_commit(self) -> bool:
        self._step += 1
        return True

    def allreduce(self, tensor: Tensor, should_quantize: bool = False) -> dist.Work:
        tensor.div_(dist.get_world_size())
        return dist.all_reduce(tensor, async_op=True)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def beside_torchft(rank: int, m: int) -> float:
    from torchft.local_sgd import DiLoCo as Theirs

    worst = 0.0
    for delay in range(H // K):
        for local in (0.0, 0.3):  # torchft's alpha: the weight of the replica's own parameters
            net, ours = Net(), Net()
            inner = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
            outer = [
                torch.optim.SGD(half.parameters(), lr=0.7, momentum=0.6, nesterov=True)
                for half in net.halves
            ]
            with Theirs(
                Manager(), list(net.halves), inner, outer, H,
                fragment_sync_delay=delay, fragment_update_alpha=local,
            ):  # fmt: skip
                wanted = path(inner, net, rank)
            rule = Streaming(K, 0.7, 0.6, alpha=1 - local, delay=delay)
            worst = max(worst, np.abs(path(sgd(ours, rule), ours, rank) - wanted).max())
    return worst


def test_delayed_fragments_are_torchfts() -> None:
    pytest.importorskip("torchft", reason="pip install torchft: it is not among the requirements")
    assert max(run(beside_torchft, 2)) < 1e-14


# The outer step.


def with_outer(rank: int, m: int) -> None:
    """SGD with Nesterov momentum by its name, and Adam: one fragment is what DiLoCo does."""
    nesterov = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.6, nesterov=True)
    nets = Net(), Net(), Net(), Net()
    rules = (
        Streaming(K, 0.7, 0.6), Streaming(K, outer=nesterov),
        Streaming(1, outer=nesterov), DiLoCo(0.7, 0.6),
    )  # fmt: skip
    a, b, c, d = (path(sgd(net, rule), net, rank) for net, rule in zip(nets, rules, strict=True))
    assert np.array_equal(a, b)
    assert np.allclose(c, d, rtol=1e-12, atol=1e-14)
    net = Net()
    optimizer = sgd(net, Streaming(3, outer=functools.partial(torch.optim.Adam, lr=0.01)))
    path(optimizer, net, rank)
    steps = {float(s["step"]) for s in optimizer.sync.outer_optimizer.state.values()}
    assert steps == {STEPS / H}, "a fragment is stepped on once a round"


def test_any_outer_optimizer() -> None:
    run(with_outer, 2)


def test_two_kinds_of_outer_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="outer has settings of its own"):
        Streaming(2, 0.5, outer=torch.optim.Adam)
    with pytest.raises(ValueError, match="overlap and delay 2 exclude each other"):
        Streaming(2, overlap=True, delay=2)
    with pytest.raises(ValueError, match="cannot travel behind training"):
        Streaming(2, delay=2, compress="int8")


# Compression.


def compressed(rank: int, m: int) -> tuple[list[float], int, int]:
    """How far x̄ is from the path without compression, by rounds; and the bytes of both."""
    plain, net = Net(), Net()
    whole = sgd(plain, Streaming(K, 0.7, 0.6))
    less = sgd(net, Streaming(K, 0.7, 0.6, compress=Int8(16)))
    far = []
    for start in range(0, STEPS, H):
        for each, of in ((whole, plain), (less, net)):
            path(each, of, rank, range(start, start + H))
        with whole.consensus(), less.consensus():
            means = [net.vector() for net in (plain, net)]
        gathered = [torch.zeros_like(means[1]) for _ in range(m)]
        dist.all_gather(gathered, means[1])
        assert all(torch.equal(x, means[1]) for x in gathered)
        far.append(float((means[0] - means[1]).norm() / means[0].norm()))
    return far, whole.traffic.bytes, less.traffic.bytes


@pytest.mark.parametrize("m", [2, 3])
def test_compressed_fragments(m: int) -> None:
    for far, whole, less in run(compressed, m):
        assert 0 < max(far) < 0.02, far
        assert less < whole


def resumed(rank: int, m: int) -> None:
    """In mid-round, also with a fragment in flight: bit for bit as without a stop."""
    for settings in ({"delay": 3}, {"overlap": True}, {"compress": "bf16"}):
        nets = Net(), Net()
        rules = [Streaming(K, 0.7, 0.6, **settings) for _ in nets]
        one = sgd(nets[0], rules[0])
        path(one, nets[0], rank, range(0, 2 * H + 3))
        weights, state = copy.deepcopy(nets[0].state_dict()), copy.deepcopy(one.state_dict())
        other = sgd(nets[1], rules[1])
        nets[1].load_state_dict(weights)
        other.load_state_dict(state)
        rest = range(2 * H + 3, STEPS)
        a, b = path(one, nets[0], rank, rest), path(other, nets[1], rank, rest)
        assert np.array_equal(a, b), settings


def test_a_run_is_resumed_exactly() -> None:
    run(resumed, 2)


def fails_once(rank: int, m: int) -> None:
    """What fails on its way is owed as it was: no change is sent twice."""
    nets = Net(), Net()
    one, well = (sgd(net, Streaming(1, 0.7, 0.6, compress=Int8(16))) for net in nets)
    path(one, nets[0], rank, range(2 * H - 1))
    path(well, nets[1], rank, range(2 * H))
    finish = compression._Piece.finish

    def closed(piece: Any) -> None:
        finish(piece)
        raise RuntimeError("Connection closed by peer")

    compression._Piece.finish = closed
    with pytest.raises(CollectiveError, match="Connection closed by peer"):
        path(one, nets[0], rank, range(2 * H - 1, 2 * H))
    compression._Piece.finish = finish
    assert one.average()
    assert torch.equal(nets[0].vector(), nets[1].vector())


def test_a_compressed_fragment_that_failed_is_owed() -> None:
    run(fails_once, 2)


def spreads(rank: int, m: int) -> list[tuple[float, float]]:
    """Drift as reported, and as it was: with a codec it is no less exact."""
    net = Net()
    rule = Streaming(1, 0.7, 0.6, compress=Int8(16))
    optimizer = LocalSGD(
        net.parameters(), 0.2, period=Constant(H), sync=rule, model=net, track_drift=True
    )
    seen = []
    meet = optimizer._replica.meeting.meet

    def looking(*args: Any, **options: Any) -> Any:
        every = [torch.zeros_like(net.vector()) for _ in range(m)]
        dist.all_gather(every, net.vector())
        mean = sum(every) / m
        seen.append(float(sum((x - mean).square().sum() for x in every) / m) ** 0.5)
        return meet(*args, **options)

    optimizer._replica.meeting.meet = looking
    told = []
    for start in range(0, STEPS, H):
        path(optimizer, net, rank, range(start, start + H))
        told.append(optimizer.drift)
    return list(zip(told, seen, strict=True))


def test_drift_is_exact_with_a_codec() -> None:
    for told, was in run(spreads, 2)[0]:
        assert told == pytest.approx(was, rel=1e-6)


# What the outer step goes by.


def scheduled(rank: int, m: int, looks: bool) -> np.ndarray:
    """The outer rate changes while a fragment travels; somebody may look meanwhile."""
    net = Net()
    outer = functools.partial(torch.optim.SGD, lr=0.9)
    optimizer = sgd(net, Streaming(K, outer=outer, overlap=True))
    seen = []
    for step in range(STEPS):
        seen.append(path(optimizer, net, rank, range(step, step + 1)))
        if looks:
            optimizer.state_dict()
        optimizer.sync.outer_optimizer.param_groups[0]["lr"] = 0.9 * 0.95**step
    return np.concatenate(seen)


def test_a_look_does_not_change_the_outer_rate() -> None:
    for a, b in zip(run(scheduled, 2, False), run(scheduled, 2, True), strict=True):
        assert np.array_equal(a, b)


REFUSED = {
    "other fragments": (Streaming(3, 0.7, 0.6), "other parameters or fragments"),
    "another outer step": (Streaming(2, outer=torch.optim.Adam), "outer optimizer SGD, this"),
    "a codec": (Streaming(2, 0.7, 0.6, compress="int8"), "has no 'lost'"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_state_of_other_settings_is_refused_before_it_is_loaded(which: str) -> None:
    rule, message = REFUSED[which]
    net, other = Net(), Net()
    one = sgd(net, Streaming(K, 0.7, 0.6))
    path(one, net, 0, range(H + 1))
    taker = sgd(other, copy.deepcopy(rule))
    with pytest.raises(ValueError, match=message):
        taker.load_state_dict(one.state_dict())
    assert taker.round == 0 and not taker.inner.state


def test_the_momentum_of_version_4_needs_sgd() -> None:
    net, other = Net(), Net()
    one = sgd(net, Streaming(K, 0.7, 0.6))
    path(one, net, 0, range(H + 1))
    taker = sgd(other, Streaming(K, outer=torch.optim.Adam))
    with pytest.raises(ValueError, match="momentum of an outer SGD, this rule Adam"):
        taker.load_state_dict(as_before(one.state_dict(), one.sync))


# States of version 4: the momentum was a vector of the rule's.


def as_before(state: dict[str, Any], rule: Streaming) -> dict[str, Any]:
    """A state as version 4 would have written it."""
    state = copy.deepcopy(state)
    own = own_state(state)
    sync, flat = own["sync"], rule.replica.flat
    v = flat.vector(wide=True)
    for k in range(K):
        for name, piece in rule.mean.pieces(v.data, k).items():
            p = rule._step._params[f"{name}"]
            piece.copy_(rule.outer_optimizer.state[p]["momentum_buffer"])
    sync["vectors"]["v"] = v.state_dict()
    del sync["outer"], sync["outer_type"]
    own["version"] = 4
    return state


def older(rank: int, m: int) -> None:
    nets = Net(), Net()
    one, other = (sgd(net, Streaming(K, 0.7, 0.6)) for net in nets)
    path(one, nets[0], rank, range(2 * H + 5))
    nets[1].load_state_dict(nets[0].state_dict())
    other.load_state_dict(as_before(one.state_dict(), one.sync))
    rest = range(2 * H + 5, STEPS)
    assert np.array_equal(path(one, nets[0], rank, rest), path(other, nets[1], rank, rest))


def test_a_state_of_version_4_is_read() -> None:
    run(older, 2)


def named_before(rank: int, m: int) -> None:
    """DiLoCo's states said BlockMomentum."""
    nets = Net(), Net()
    one, other = (sgd(net, DiLoCo()) for net in nets)
    path(one, nets[0], rank, range(H + 3))
    state = copy.deepcopy(one.state_dict())
    own_state(state).update(rule="BlockMomentum", version=4)
    nets[1].load_state_dict(nets[0].state_dict())
    other.load_state_dict(state)
    rest = range(H + 3, STEPS)
    assert np.array_equal(path(one, nets[0], rank, rest), path(other, nets[1], rank, rest))


def test_a_state_of_a_rule_that_had_another_name_is_read() -> None:
    run(named_before, 2)
