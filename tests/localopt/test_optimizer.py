"""LocalOptimizer in one process: a torch optimizer that behaves as one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import localopt
from localopt import (
    QSR,
    SWAP,
    Average,
    Constant,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    NonFiniteError,
    PostLocal,
    PowerRule,
)
from localopt.collective import Traffic


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))  # (B, 4)
    loss = model(x).square().sum()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *also: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        for scheduler in also:
            scheduler.step()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# The round.


def test_place_in_the_round() -> None:
    """H is chosen at a round's first step; `synced`, `h` and `round` tell where we are."""
    model = network()
    asked = []

    def period(step: int, lr: float) -> int:
        asked.append((step, lr))
        return 3

    optimizer = LocalSGD(model.parameters(), 0.5, period=period)
    assert (optimizer.synced, optimizer.h, optimizer.round) == (True, 0, 0)
    seen = []
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        optimizer.step()
        seen.append((optimizer.synced, optimizer.round))
    assert seen == [
        (False, 0), (False, 0), (True, 1), (False, 1), (False, 1), (True, 2), (False, 2),
    ]  # fmt: skip
    assert asked == [(0, 0.5), (3, 0.125), (6, pytest.approx(0.5 / 7))]
    optimizer.finish()
    assert (optimizer.synced, optimizer.h, optimizer.round) == (True, 3, 3)
    optimizer.finish()
    assert optimizer.round == 3


def test_rate_is_group_0s() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.001}]
    optimizer = LocalSGD(groups, period=QSR(0.2, 1))
    optimizer.step()
    assert optimizer.h == 4


def test_by_hand() -> None:
    """auto=False: "the caller calls it himself (optimizer.step(); optimizer.average())"."""
    optimizer = LocalSGD(network().parameters(), period=Constant(3), auto=False)
    ended = []
    for _ in range(6):
        optimizer.step()
        ended.append(optimizer.average())
    assert ended == [False, False, True] * 2
    skipped = [optimizer.average() for _ in range(3)]  # a loop that skips bad batches
    assert skipped == [False, False, True] and optimizer.round == 3


@pytest.mark.parametrize("h", [0, -1, 2.0, None, 2**63])
def test_period_must_give_a_count(h: Any) -> None:
    optimizer = LocalSGD(network().parameters(), period=lambda step, lr: h)
    with pytest.raises(ValueError, match=r"period gave H = .* at step 0"):
        optimizer.step()


def test_failed_step_does_not_count() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2))

    def closure() -> float:
        raise KeyError("no data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    train(model, optimizer, range(1))
    assert not optimizer.synced
    train(model, optimizer, range(1))
    assert optimizer.synced and optimizer.round == 1


# consensus().


def test_consensus_restores() -> None:
    """"restored on exit": parameters and buffers, also after an exception, in mid-round or not."""
    model = network()
    optimizer = LocalAdamW(model.parameters(), period=Constant(2), model=model)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(KeyError), optimizer.consensus():
            model(torch.randn(5, 4))  # moves BatchNorm's statistics
            raise KeyError
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    train(model, optimizer, range(2))
    assert optimizer.round == 3


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_refused_inside_consensus(steps: int) -> None:
    """What would be lost on exit is refused, in mid-round and between rounds."""
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2), auto=False)
    for _ in range(steps):
        optimizer.step()
        optimizer.average()
    group = {"params": [nn.Parameter(torch.ones(1))]}
    state = optimizer.state_dict()
    calls = {
        "step": optimizer.step,
        "average": optimizer.average,
        "finish": optimizer.finish,
        "consensus": lambda: optimizer.consensus().__enter__(),
        "add_param_group": lambda: optimizer.add_param_group(group),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    with optimizer.consensus():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name}\(\) inside consensus\(\)"):
                call()
    optimizer.step()


# What torch users expect.


def test_is_the_inner_optimizer() -> None:
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer = LocalOptimizer(inner, Constant(2))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state and optimizer.defaults is inner.defaults
    for text in ("LocalOptimizer(AdamW", "Constant(", "h=2", "sync=Average("):
        assert text in repr(optimizer)


def test_edited_groups_are_seen() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2))
    backward(model, 0)
    before = vector(model)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2))
    backward(model, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else not g.any() for g in grads)


def schedulers(optimizer: Any) -> list[Any]:
    rise, fall = lr_scheduler.LinearLR, lr_scheduler.ExponentialLR
    return [
        lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=12),
        lr_scheduler.SequentialLR(
            optimizer, [rise(optimizer, 0.1, 1.0, 3), fall(optimizer, 0.9)], [3]
        ),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_schedulers(which: int, inner: Any) -> None:
    """They act as on the inner optimizer (momentum too, with OneCycleLR), and none warns."""
    model, twin = network(), network()
    settings = {"momentum": 0.9} if inner is torch.optim.SGD else {}
    optimizer = LocalOptimizer(inner(model.parameters(), 0.1, **settings), Constant(2))
    bare = inner(twin.parameters(), 0.1, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*optimizer.step.*")
        train(model, optimizer, range(8), schedulers(optimizer)[which])
    train(twin, bare, range(8), schedulers(bare)[which])
    assert torch.equal(vector(model), vector(twin))
    keys = set(bare.param_groups[0]) - {"params"}
    assert all(optimizer.param_groups[0][k] == bare.param_groups[0][k] for k in keys)


def test_closures() -> None:
    """LBFGS evaluates a closure many times and makes one local step of it."""
    model, twin = network(), network()
    optimizer = LocalOptimizer(torch.optim.LBFGS(model.parameters(), 0.1), Constant(2))
    bare = torch.optim.LBFGS(twin.parameters(), 0.1)
    calls = []

    def closure_of(net: nn.Module, opt: Any) -> Any:
        def closure() -> Tensor:
            calls.append(net)
            opt.zero_grad()
            return backward(net, 0)

        return closure

    for _ in range(3):
        losses = [opt.step(closure_of(net, opt)) for net, opt in ((model, optimizer), (twin, bare))]
        assert torch.equal(losses[0], losses[1])
    assert torch.equal(vector(model), vector(twin))
    assert optimizer.round == 1 and not optimizer.synced and calls.count(model) > 3
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    state.seek(0)
    optimizer.load_state_dict(torch.load(state, weights_only=True))


def test_hooks() -> None:
    """Step hooks once a step, around the synchronisation; state_dict hooks as in torch."""
    optimizer = LocalSGD(network().parameters(), period=Constant(1))
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o.round)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o.round)))
    optimizer.inner.register_step_post_hook(lambda o, args, kwargs: calls.append("inner"))
    optimizer.step()
    assert calls == [("pre", 0), "inner", ("post", 1)]
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 7})
    state = optimizer.state_dict()
    assert calls[-1] == "saving" and state["mine"] == 7
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(state["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(state)
    assert calls[-2:] == [7, "loaded"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_every_way_of_stepping_works_on_flat_storage(kind: Any, way: dict[str, bool]) -> None:
    """Bit for bit, in mid-round and over boundaries."""
    model, twin = network(), network()
    optimizer = LocalOptimizer(kind(model.parameters(), lr=0.1, **way), Constant(3))
    train_both(model, optimizer, twin, kind(twin.parameters(), lr=0.1, **way))
    assert torch.equal(vector(model), vector(twin))


@pytest.mark.slow
def test_a_compiled_step_works_on_flat_storage() -> None:
    """As on the parameters' own."""
    model, twin = network(), network()
    optimizer = LocalOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), Constant(3))
    bare = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for opt in (optimizer.inner, bare):
        opt.step = torch.compile(opt.step)
    train_both(model, optimizer, twin, bare)
    assert torch.equal(vector(model), vector(twin))
    optimizer._replica.flat.check_pointers()


def train_both(model: nn.Module, optimizer: Any, twin: nn.Module, bare: Any) -> None:
    for step in range(7):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for net, opt in ((model, optimizer), (twin, bare)):
            opt.zero_grad()
            net(x).square().sum().backward()
            opt.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler_unscales(fused: bool, unscaled: bool) -> None:
    """Scaled training is the bare optimizer's with the same scaler."""
    model, twin = network(), network()
    optimizer = LocalOptimizer(torch.optim.AdamW(model.parameters(), 0.1, fused=fused), Constant(2))
    bare = torch.optim.AdamW(twin.parameters(), 0.1, fused=fused)
    for net, opt in ((model, optimizer), (twin, bare)):
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
        for step in range(5):
            opt.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            scaler.scale(net(x).square().sum()).backward()
            if step == 3:
                net[0].bias.grad[0] = float("nan")
            if unscaled:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=False)
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert torch.isfinite(vector(model)).all()
    assert torch.allclose(vector(model), vector(twin), rtol=1e-6)
    assert optimizer.round == 2 and not optimizer.synced, "the skipped step counts"


def test_grad_scaler_with_a_closure_is_refused() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(backward(model, 0))
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, lambda: backward(model, 0))


def test_a_replica_with_nan_is_not_saved() -> None:
    """Saving checks locally, and names the parameter."""
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(9), model=model)
    train(model, optimizer, range(2))
    optimizer.state_dict()
    with torch.no_grad():
        model[3].bias[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"rank 0 holds NaN or infinity at step 2: 3\.bias$"):
        optimizer.state_dict()
    careless = LocalSGD(model.parameters(), period=Constant(9), check_finite=False)
    careless.state_dict()


def test_copies_are_refused_with_the_reason() -> None:
    optimizer = LocalSGD(network().parameters(), period=Constant(2))
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save its state_dict"):
            copying(optimizer)


def test_model_can_be_copied() -> None:
    """An exponential moving average's copy has memory of its own."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 1.0, period=Constant(2))
    ema = copy.deepcopy(model)
    train(model, optimizer, range(1))
    assert torch.equal(vector(ema), vector(network()))
    assert not torch.equal(vector(ema), vector(model))


def test_named_parameters() -> None:
    """torch's named groups name the parameters in errors."""
    model = network()
    optimizer = LocalSGD(model.named_parameters(), period=Constant(1))
    model[0].bias.data = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"parameter 0\.bias no longer lives"):
        optimizer.step()


# Saving.


def test_bare_state() -> None:
    """"A state of the bare inner optimizer is taken too; then the first round begins"."""
    model, twin = network(), network()
    bare = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    train(twin, bare, range(3))
    optimizer = LocalSGD(model.parameters(), 0.1, momentum=0.9, period=Constant(4))
    train(model, optimizer, range(5, 8))
    # torch's load_state_dict keeps the tensors it is given: without a copy the two would share.
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert optimizer.synced and optimizer.round == 0
    model.load_state_dict(twin.state_dict())
    for net, opt in ((model, optimizer), (twin, bare)):
        train(net, opt, range(3, 7))
    assert torch.equal(vector(model), vector(twin)) and optimizer.synced


def test_state_of_another_rule_is_refused() -> None:
    optimizer = LocalSGD(network().parameters(), period=Constant(2))
    for key, value in (("rule", "Other"), ("version", 99)):
        state = optimizer.state_dict()
        state["localopt"][key] = value
        with pytest.raises(ValueError, match=f"state to load has {key} {value!r}"):
            optimizer.load_state_dict(state)


def test_state_dict_is_a_copy() -> None:
    """What was saved does not change when training goes on; what is loaded is not changed."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(1))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(2))
    assert state == before


# What cannot work is refused.


class SGDScheduleFree(torch.optim.SGD):
    """Named as the schedule-free optimizers are."""


class RateFree(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Moves nothing."""


def test_rate_free_optimizers() -> None:
    """A period that follows the rate is refused where there is none to follow."""
    for make in (SGDScheduleFree, RateFree):
        for period in (QSR(0.1, 2), PowerRule(0.1, 2, 3)):
            inner = make(network().parameters())
            with pytest.raises(ValueError, match=f"{make.__name__} has none: use Constant"):
                LocalOptimizer(inner, period)
        optimizer = LocalOptimizer(make(network().parameters()), Constant(2))
        optimizer.step()
        assert not optimizer.synced


def test_refused_settings() -> None:
    optimizer = LocalSGD(network().parameters(), period=Constant(1))
    with pytest.raises(ValueError, match="is a LocalOptimizer already"):
        LocalOptimizer(optimizer, Constant(1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, not list"):
        LocalOptimizer(list(network().parameters()), Constant(1))
    with pytest.raises(TypeError, match="period must be a callable"):
        LocalSGD(network().parameters(), period=4)
    with pytest.raises(TypeError, match="sync must be a rule"):
        LocalSGD(network().parameters(), period=Constant(1), sync=Average)
    rule = Average()
    LocalSGD(network().parameters(), period=Constant(1), sync=rule)
    with pytest.raises(ValueError, match="this Average already belongs to an optimizer"):
        LocalSGD(network().parameters(), period=Constant(1), sync=rule)
    with pytest.raises(ValueError, match="sequence of names"):
        Average(state_fields="exp_avg")
    with pytest.raises(ValueError, match="both averaged and reset"):
        Average(state_fields=("exp_avg",), reset_fields=("exp_avg",))
    with pytest.raises(TypeError, match="unexpected keyword"):
        LocalSGD(network().parameters(), period=Constant(1), momentun=0.9)


class WideState(torch.optim.SGD):
    """Keeps its state in float32, whatever the parameters' type."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["moment"] = torch.full(p.shape, 1.001)


def test_state_of_another_type_is_not_rounded() -> None:
    """A float32 moment of a bfloat16 parameter cannot live in the parameter's buffer."""
    inner = WideState([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])
    optimizer = LocalOptimizer(inner, Constant(1), Average(state_fields=("moment",)))
    with pytest.raises(ValueError, match=r"float32, its parameter \(3,\) and torch.bfloat16"):
        optimizer.step()


# Figures.


def test_wait() -> None:
    """Waits add up by rank; of ranks that were not met nothing is known."""
    traffic = Traffic()
    traffic.count_wait({0: 2.0, 1: 0.0, 2: 0.5}, 4)
    traffic.count_wait({0: 3.0, 1: 3.0}, 4)
    assert traffic.wait == [5.0, 3.0, 0.5, 0.0]


def test_one_replica_sends_nothing() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2), track_drift=True)
    train(model, optimizer, range(4))
    traffic = optimizer.traffic
    assert (traffic.syncs, traffic.bytes, traffic.other_bytes, traffic.hidden) == (2, 0, 0, 0)
    assert traffic.wait == [0.0] and optimizer.drift == 0.0


# The public face.

SIGNATURES: dict[str, list[str]] = {
    "LocalOptimizer": [
        "inner", "period", "sync", "model", "buffers", "process_group", "auto", "track_drift",
    ],
    "Constant": ["h"],
    "PowerRule": ["alpha", "base", "power"],
    "QSR": ["alpha", "base"],
    "PostLocal": ["switch_step", "h"],
    "SWAP": ["switch_step"],
    "Average": ["state_fields"],
    "BlockMomentum": ["outer", "normalize_by_lr"],
    "BMUF": ["momentum", "lr", "nesterov"],
    "SlowMo": ["beta", "lr"],
    "DiLoCo": ["lr", "momentum"],
    "EASGD": ["alpha", "beta", "pull"],
    "OverlapLocalSGD": ["alpha", "beta"],
    "CoCoDSGD": [],
    "LSGD": ["c", "p", "group_size"],
    "HierarchicalAverage": ["group_size", "global_every"],
}  # fmt: skip


def test_public_names() -> None:
    """The names that users, tests and benchmarks rely on, by keyword."""
    for name, keywords in SIGNATURES.items():
        accepted = inspect.signature(getattr(localopt, name)).parameters
        common = ["warmup_steps", "total_steps", "h_max"] if name in PERIODS else []
        assert set(keywords + common) <= set(accepted), name
    for name in ("LocalSGD", "LocalAdamW"):
        optimizer = getattr(localopt, name)(
            params=network().parameters(), lr=0.1, weight_decay=0.1, period=Constant(h=2),
            sync=Average(state_fields=()), model=None, buffers="keep", process_group=None,
            auto=True, track_drift=False,
        )  # fmt: skip
        assert type(optimizer) is getattr(localopt, name)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        for attribute in ("step", "average", "record_loss", "finish", "consensus", "synced", "h",
                          "round", "traffic", "drift"):  # fmt: skip
            assert hasattr(optimizer, attribute), attribute
    assert set(localopt.__all__) >= {*SIGNATURES, "LocalSGD", "LocalAdamW"}
    assert all(hasattr(localopt, name) for name in localopt.__all__)


PERIODS = {cls.__name__ for cls in (Constant, PowerRule, QSR, PostLocal, SWAP)}
