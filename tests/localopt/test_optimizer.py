"""LocalOptimizer in one process: a torch optimizer that behaves as one."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from localopt import Constant, LocalOptimizer, LocalSGD
from tests.support.small_network import backward, network, train, vector


def test_is_the_inner_optimizer() -> None:
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer = LocalOptimizer(inner, Constant(2))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert dict(optimizer.state) == {} and optimizer.defaults is inner.defaults
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
