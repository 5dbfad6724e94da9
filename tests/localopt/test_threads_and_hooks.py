"""Hooks fire once, losses do not drift, other threads and stray collectives are told apart."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from localopt import (
    EASGD,
    LSGD,
    Average,
    CollectiveError,
    CommOptimizer,
    Constant,
    DiLoCo,
    LocalOptimizer,
    LocalSGD,
    Rule,
    Streaming,
    SyncError,
)
from localopt.header import SLOT
from tests.support.ranks import outcomes_of, run
from tests.support.small_network import backward, network, train, vector

# Hooks.


@contextmanager
def everywhere(calls: list[Any]) -> Iterator[None]:
    """Hooks on all optimizers there are."""
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


RULES: dict[str, Callable[[], Rule]] = {
    "average": Average, "diloco": DiLoCo, "easgd": EASGD, "streaming": lambda: Streaming(2),
}  # fmt: skip
MAKES: dict[str, Callable[[torch.optim.Optimizer], LocalOptimizer]] = {
    **{name: lambda inner, rule=rule: LocalOptimizer(inner, Constant(2), rule())
       for name, rule in RULES.items()},
    "sdtl": lambda inner: CommOptimizer(inner, "EASGD", comm_period=2),
}  # fmt: skip


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_global_hooks(kind: Any, make: Any) -> None:
    """Once for each local step, around it; an outer optimizer's own steps come on top."""
    model, calls = network(), []
    inner = kind(model.parameters(), lr=0.1)
    optimizer = make(inner)
    with everywhere(calls):
        train(model, optimizer, range(5))
    assert [c for c in calls if c[1] is inner] == [("pre", inner), ("post", inner)] * 5
    outer = getattr(optimizer.sync, "outer_optimizer", None)
    assert [c for c in calls if c[1] is not inner] == [("pre", outer), ("post", outer)] * (
        2 if outer is not None else 0
    )


@pytest.mark.parametrize("h", [1, 3])
@pytest.mark.parametrize("scheduled", [False, True])
def test_all_hooks_in_order(h: int, scheduled: bool) -> None:
    """Of this optimizer, of all, of the inner one; also where a scheduler has wrapped `step`."""
    model, calls = network(), []
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(h))
    inner = optimizer.inner
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for opt, name in ((optimizer, "own"), (inner, "inner")):
        for number in (1, 2):
            opt.register_step_pre_hook(lambda o, a, k, t=f"{name} pre {number}": calls.append(t))
            opt.register_step_post_hook(lambda o, a, k, t=f"{name} post {number}": calls.append(t))
    expected = [
        "own pre 1", "own pre 2", ("pre", inner), "inner pre 1", "inner pre 2",
        "inner post 1", "inner post 2", ("post", inner), "own post 1", "own post 2",
    ]  # fmt: skip
    with everywhere(calls):
        for _ in range(4):
            optimizer.step()
    assert calls == expected * 4 and optimizer.round == 4 // h


def test_a_hook_that_changes_the_arguments() -> None:
    """As in torch: it gets them with the optimizer first, and may return others."""
    model, twin = network(), network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2))
    bare = torch.optim.SGD(twin.parameters(), 0.1)
    seen: list[Any] = []
    for net, opt in ((model, optimizer), (twin, bare)):

        def closure(net: nn.Module = net, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            return backward(net, 0).detach()

        def change(o: Any, args: Any, kwargs: Any, opt: Any = opt, closure: Any = closure) -> Any:
            seen.append((o is opt, args[0] is opt, len(args), kwargs))
            return (opt, closure), {}

        handle = opt.register_step_pre_hook(change)
        seen.append(float(opt.step()))
        seen.append(float(opt.step(closure=lambda: pytest.fail("replaced"))))
        handle.remove()
        assert opt.step() is None
    half = len(seen) // 2
    assert [s for s in seen[:half] if isinstance(s, float)] == [
        s for s in seen[half:] if isinstance(s, float)
    ]
    assert all(s[:3] == (True, True, 1) for s in seen if isinstance(s, tuple))
    assert torch.equal(vector(model), vector(twin)) and optimizer.round == 1


def test_a_hook_that_raises() -> None:
    """Before the step: it does not count. And the optimizer can be called again."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2))

    def refuse(*_: Any) -> None:
        raise KeyError("no")

    for opt in (optimizer, optimizer.inner):
        handle = opt.register_step_pre_hook(refuse)
        with pytest.raises(KeyError):
            optimizer.step()
        handle.remove()
    train(model, optimizer, range(3))
    assert optimizer.round == 1 and optimizer._replica.round.step == 3


# Losses.


@pytest.mark.parametrize("kind", ["float", "numpy", "tensor"])
def test_mean_losses_do_not_drift(kind: str) -> None:
    """A sum of so many in float32 would stop growing."""
    number = {"float": 300_000, "numpy": 300_000, "tensor": 100_000}[kind]
    values = np.array([0.1, 7.3], dtype=np.float32)
    losses = {"float": values.tolist(), "numpy": list(values), "tensor": list(torch.tensor(values))}
    optimizer = LocalSGD([nn.Parameter(torch.zeros(1))], period=Constant(number))
    clock = optimizer._replica.round
    clock.begin(number + 1)
    record, count = optimizer.record_loss, clock.count_step
    for loss in losses[kind] * (number // 2):
        record(loss)
        count()
    assert clock.loss == pytest.approx(float(values.astype(np.float64).mean()), rel=1e-12)


# Threads.


def other_calls(optimizer: LocalOptimizer, model: nn.Module) -> dict[str, Callable[[], Any]]:
    state = optimizer.state_dict()
    group = {"params": [nn.Parameter(torch.ones(1))]}
    return {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "step": optimizer.step,
        "average": optimizer.average,
        "finish": optimizer.finish,
        "add_param_group": lambda: optimizer.add_param_group(group),
        "consensus": lambda: optimizer.consensus().__enter__(),
    }


def in_a_thread(call: Callable[[], Any]) -> BaseException | None:
    """What it raises there."""
    caught: list[BaseException] = []

    def body() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def from_another_thread(rank: int, m: int) -> list[str]:
    """What other threads are told while this one is in a step, in mid-round and at its end; the
    run is that of one which nobody disturbed."""
    texts: list[str] = []
    vectors = []
    for disturbed in (False, True):
        model = network()
        optimizer = LocalSGD(model.parameters(), 0.05, momentum=0.9, period=Constant(2))
        calls = other_calls(optimizer, model)

        def closure(step: int, model: Any = model, calls: Any = calls, on: Any = disturbed) -> Any:
            for call in calls.values() if on else ():
                error = in_a_thread(call)
                assert type(error) is RuntimeError, repr(error)
                texts.append(str(error))
            model.zero_grad()
            return backward(model, 2 * step + rank)

        for step in range(4):
            optimizer.step(lambda step=step: closure(step))
            assert not optimizer._consensus.inside
            assert in_a_thread(optimizer.state_dict) is None, "between steps it may"
        optimizer.finish()
        vectors.append(vector(model))
    assert torch.equal(*vectors)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 2])
def test_calls_from_another_thread(m: int) -> None:
    """One clear error for each, and nothing is corrupted."""
    for rank, texts in enumerate(run(from_another_thread, m)):
        assert len(texts) == 4 * 7
        for text in texts:
            name = text.split("(")[0]
            assert text == (
                f"{name}() on rank {rank}, while another thread is in step(): call it from the "
                "thread that trains, between steps"
            )


def test_a_call_within_a_call() -> None:
    """The same thread may look at the state within its closure; others are told who is busy."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2))
    texts = []

    def closure() -> Tensor:
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1
        texts.append(str(in_a_thread(optimizer.finish)))
        return backward(model, 0)

    optimizer.step(closure)
    assert "while another thread is in step()" in texts[0]
    assert in_a_thread(optimizer.finish) is None


# Collectives of the program's own, in the same process group.


STRAYS: dict[str, Callable[[int], Tensor]] = {
    "less": lambda m: torch.ones(4),
    "as much": lambda m: torch.full((m * SLOT,), 3, dtype=torch.uint8),
    "more": lambda m: torch.ones(100_000),
}


def stray(rank: int, m: int, what: str, who: int, rule: str) -> Any:
    """Rank ``who`` sums something of its own, where the other synchronises."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    p = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    sync = {"average": Average, "lsgd": LSGD, "easgd": EASGD}[rule]()
    optimizer = LocalSGD([p], 0.1, period=Constant(2), sync=sync, process_group=group)
    if rank == who:
        with suppress(RuntimeError):
            dist.all_reduce(STRAYS[what](m), group=group)
        time.sleep(1)  # it goes on with something else
        return None
    with pytest.raises(SyncError) as caught:
        for _ in range(6):
            p.grad = torch.ones_like(p)
            optimizer.record_loss(0.0)
            before = p.detach() - 0.1  # what the local step makes of it
            optimizer.step()
    if rule == "average":
        assert torch.equal(p.detach(), before), "the parameters are what they were"
    assert bool(p.isfinite().all())
    return type(caught.value), str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "what", "who"), [*itertools.product(["average", "lsgd", "easgd"], STRAYS, [0, 1])]
)
def test_a_stray_collective(rule: str, what: str, who: int) -> None:
    """ "another collective ran in this process group": a line on the rank that synchronises, after
    the group's time-out, whatever the other has summed."""
    outcomes = outcomes_of(stray, 2, what, who, rule)
    assert outcomes[who][0], outcomes[who][1]
    assert outcomes[1 - who][0], outcomes[1 - who][1]
    kind, text = outcomes[1 - who][1]
    assert kind is CollectiveError and "\n" not in text
    assert f"rank {1 - who}: the synchronisation at step " in text
    assert "or another collective ran in this process group" in text
