"""Each parameter, and each averaged state field, is a tensor with a storage of its own."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import Average, Constant, DiLoCo, LocalOptimizer, LocalSGD, Streaming
from tests.support.contract import equal_on_all_ranks
from tests.support.ranks import run
from tests.support.small_network import backward, network, vector

MOMENTS = ("exp_avg", "exp_avg_sq")
SLACK = 8192  # bytes of a file beside its tensors


class Net(nn.Module):
    """Every type, and shapes that are easily got wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.Linear(3, 5)
        self.large = nn.Linear(256, 256)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.halves = nn.Parameter(torch.randn(33).half())
        self.bfloats = nn.Parameter(torch.randn(7, 5).bfloat16())
        self.doubles = nn.Parameter(torch.randn(7).double())
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.ones = nn.Parameter(torch.randn(1, 5, 1))
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.empty = nn.Parameter(torch.empty(0, 3))

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 5, 5, generator=generator)  # (B, C, H, W)
        loss = self.conv(images).square().mean() + self.small(images[0, 0, :, :3]).square().sum()
        loss = loss + self.large(torch.randn(2, 256, generator=generator)).square().mean()
        others = (self.halves, self.bfloats, self.doubles, self.scalar, self.ones, self.transposed)
        return loss + sum((x.double() - step).square().sum() for x in others)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def with_moments(model: nn.Module, h: int = 2) -> LocalOptimizer:
    """With Adam's moments averaged."""
    sync = Average(state_fields=MOMENTS)
    return LocalOptimizer(adamw(model), Constant(h), sync, model=model)


def trained() -> tuple[Net, LocalOptimizer]:
    """After a synchronisation, one step into the next round."""
    model = Net()
    optimizer = with_moments(model)
    train(model, optimizer, range(3))
    return model, optimizer


def tensors(model: nn.Module, optimizer: LocalOptimizer) -> dict[str, Tensor]:
    """The parameters, and what is averaged beside them."""
    found = dict(model.named_parameters())
    for name, p in model.named_parameters():
        found |= {f"{name}/{f}": optimizer.state[p][f] for f in MOMENTS if p in optimizer.state}
    return found


def size(what: Any) -> int:
    """Bytes of its file."""
    file = io.BytesIO()
    torch.save(what, file)
    return file.tell()


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for name, t in state.items()}  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    return bits(dict(a.named_parameters())) == bits(dict(b.named_parameters()))


# The storage.


def test_a_storage_of_its_own_size() -> None:
    """"To everybody else a tensor looks like one with a storage of its own, of its own size"; no
    two share an address, which is how safetensors finds tied weights."""
    model, optimizer = trained()
    addresses = []
    found = tensors(model, optimizer)
    fresh = dict(Net().named_parameters())
    assert len(found) > 2.7 * len(fresh), "state fields too"
    for name, t in found.items():
        like = fresh[name.split("/")[0]]
        assert (t.shape, t.stride(), t.dtype) == (like.shape, like.stride(), like.dtype), name
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), name
        assert t.storage_offset() == 0, name
        assert t.untyped_storage().data_ptr() == t.data_ptr(), name
        if t.numel():
            addresses.append(t.untyped_storage().data_ptr())
    assert len(set(addresses)) == len(addresses)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_layer_saves_itself_alone(dtype: torch.dtype) -> None:
    """"Whatever saves or copies storages takes this tensor and no other"."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(8, 8)).to(dtype)
    bare = copy.deepcopy(model)
    sync = Average(state_fields=("momentum_buffer",))
    optimizer = LocalSGD(model.parameters(), 0.1, momentum=0.9, period=Constant(1), sync=sync)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer, twin in zip(model, bare, strict=True):
        assert size(layer.state_dict()) == size(twin.state_dict())
        assert size(layer) == size(twin)
        p = layer.weight
        assert size(p) < p.nbytes + SLACK
        assert size(optimizer.state[p]["momentum_buffer"]) < p.nbytes + SLACK
    whole = sum(p.nbytes for p in model.parameters())
    state = optimizer.state_dict()["state"]
    assert whole < size(state) < whole + SLACK
    copied = copy.deepcopy({"model": model.state_dict(), "optimizer": state})
    own = [*copied["model"].values(), *(s["momentum_buffer"] for s in copied["optimizer"].values())]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    assert sum(held.values()) == 2 * whole, "the bytes once"
    own[0].untyped_storage().resize_(4)  # a copy is like any other tensor


def test_saved_and_loaded() -> None:
    """Model and state come back from files with the same bits; also the model as an object."""
    model, optimizer = trained()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Net()
    resumed = with_moments(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    assert same(torch.load(whole, weights_only=False), model)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, range(3, 8))
    assert same(model, other)


def test_memory_outlives_the_optimizer() -> None:
    """A storage "keeps the whole alive": also what only the optimizer had made."""
    model, optimizer = trained()
    moment = optimizer.state[model.large.weight]["exp_avg"]
    before, kept = bits(dict(model.named_parameters())), moment.clone()
    del optimizer
    gc.collect()
    others = [torch.full((size,), 7.0) for size in (16, 100, 10_000, 70_000, 150_000)] * 20
    assert bits(dict(model.named_parameters())) == before
    assert torch.equal(moment, kept)
    train(model, torch.optim.SGD(model.parameters(), 0.01), range(2))
    assert all(bool((x == 7).all()) for x in others)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_goes_with_the_last_tensor() -> None:
    """Flat buffers are freed once nobody has a parameter."""
    megabytes = 16

    def build() -> None:
        p = nn.Parameter(torch.ones(megabytes * 2**18))
        optimizer = LocalSGD([p], 0.1, period=Constant(1))
        del optimizer
        p.detach().add_(1)

    for _ in range(2):
        build()
    gc.collect()
    before = resident()
    for _ in range(8):
        build()
    gc.collect()
    assert resident() - before < 4 * megabytes * 2**20


def test_it_cannot_be_resized() -> None:
    """"Such a storage cannot be resized": that is said, and nothing is changed."""
    model, optimizer = trained()
    before = bits(tensors(model, optimizer))
    for t in tensors(model, optimizer).values():
        for resize in (t.untyped_storage().resize_, t.detach().resize_):
            with pytest.raises(RuntimeError, match="not resizable"):
                resize(2**20)
    assert bits(tensors(model, optimizer)) == before


# Moved elsewhere.


SHARING: dict[str, Callable[[Net, LocalOptimizer], Any]] = {
    "model": lambda model, optimizer: model.share_memory(),
    "parameter": lambda model, optimizer: model.bfloats.data.share_memory_(),
    "storage": lambda model, optimizer: model.scalar.untyped_storage().share_memory_(),
    "moment": lambda model, optimizer: optimizer.state[model.halves]["exp_avg_sq"].share_memory_(),
    "saved": lambda model, optimizer: model.state_dict()["large.weight"].share_memory_(),
}


@pytest.mark.parametrize("open_", [True, False], ids=["mid-round", "between rounds"])
@pytest.mark.parametrize("what", SHARING)
def test_sharing_is_detected(what: str, open_: bool) -> None:
    """It moves a storage, as model.to() moves a parameter: the next boundary says so, rather than
    averaging what nobody trains any more."""
    model, optimizer = trained()
    if not open_:
        train(model, optimizer, range(3, 4))
    assert optimizer.synced is not open_
    SHARING[what](model, optimizer)
    with pytest.raises(RuntimeError, match=r"no longer lives in the optimizer's flat buffer: .*sh"):
        train(model, optimizer, range(4, 6))


# As any other parameter.


RULES: Any = {"plain": Average, "moments": partial(Average, MOMENTS)}
RULES["streaming"] = partial(Streaming, 3)


@pytest.mark.parametrize("rule", RULES)
def test_training_is_the_bare_optimizers(rule: str) -> None:
    """Bit for bit, with one replica, in all types; also with weights loaded in between."""
    model, twin = Net(), Net()
    optimizer = LocalOptimizer(adamw(model), Constant(3), RULES[rule](), model=model)
    bare = adamw(twin)
    for start in (0, 4, 8):
        for net, opt in ((model, optimizer), (twin, bare)):
            train(net, opt, range(start, start + 4))
        assert same(model, twin)
        other = {name: t + 0.25 for name, t in Net().state_dict().items()}
        if rule != "streaming":  # the other's anchor would pull back
            model.load_state_dict(other)
            twin.load_state_dict(other)
    assert optimizer.round == 4


def test_hooks_on_parameters() -> None:
    """Those that were registered before building, and after."""
    model = network()
    seen: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}

    def register(moment: str) -> None:
        for name, p in model.named_parameters():
            note = seen[name].append
            p.register_hook(lambda g, note=note: note(f"{moment} gradient"))
            p.register_post_accumulate_grad_hook(lambda p, note=note: note(f"{moment} grad"))

    register("before")
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(1))
    register("after")
    for step in range(2):
        backward(model, step)
        optimizer.step()
    once = ["before gradient", "after gradient", "before grad", "after grad"]
    assert all(calls == once * 2 for calls in seen.values())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("late", [False, True])
def test_compiled_models(backend: str, late: bool) -> None:
    """Compiled, and used, before the parameters move, or after."""
    model, twin = small(), small()
    if not late:
        compiled = torch.compile(model, backend=backend)
        compiled(torch.zeros(6, 4)).sum().backward()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2), model=model)
    if late:
        compiled = torch.compile(model, backend=backend)
    bare = torch.optim.SGD(twin.parameters(), 0.1)
    for step in range(5):
        for net, opt in ((compiled, optimizer), (twin, bare)):
            opt.zero_grad()
            backward(net, step)
            opt.step()
    assert torch.allclose(vector(model), vector(twin), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(vector(model), vector(small()), rtol=1e-2)


# On several ranks.


def on_two_ranks(rank: int, m: int) -> list[int]:
    model = Net()
    optimizer = with_moments(model)
    for step in range(4):
        train(model, optimizer, range(10 * rank + step, 10 * rank + step + 1))
        found = tensors(model, optimizer)
        packed = torch.cat([t.detach().double().reshape(-1) for t in found.values()])
        assert equal_on_all_ranks(packed) == (step % 2 == 1), step
    sizes = [t.untyped_storage().nbytes() for t in found.values()]
    assert sizes == [t.nbytes for t in found.values()]
    assert size(model.small.state_dict()) < SLACK and size(optimizer.state[model.halves]) < SLACK
    assert same(pickle.loads(pickle.dumps(model)), model) and same(copy.deepcopy(model), model)
    model = nn.Linear(64, 64).bfloat16()
    before = copy.deepcopy(model)
    outer = LocalSGD(model.parameters(), 1.0, period=Constant(1), sync=DiLoCo())
    model(torch.ones(1, 64).bfloat16()).sum().backward()
    outer.step()
    del outer, optimizer
    assert not torch.equal(model.weight, before.weight)
    assert equal_on_all_ranks(model.weight.detach())
    return [size(model.state_dict())]


@pytest.mark.slow
def test_what_is_averaged_has_its_own_storages() -> None:
    """Parameters and moments, between ranks that differ within a round and agree after it."""
    for (saved,) in run(on_two_ranks, 2):
        assert saved < 2 * 65 * 64 + SLACK
