"""torch.distributed.checkpoint.state_dict: a look changes nothing, a round trip loses nothing."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from localopt import (
    EASGD,
    LSGD,
    QSR,
    Average,
    CoCoDSGD,
    Constant,
    DiLoCo,
    LocalOptimizer,
    LocalSGD,
    Rule,
    Streaming,
)
from localopt.saved import own_state
from tests.support.contract import (
    LRS,
    SIZE,
    Model,
    equal_on_all_ranks,
    everything,
    local_step,
    same_bits,
    stacked,
)
from tests.support.oracle import Quadratics
from tests.support.ranks import run
from tests.support.small_network import network, train, vector

# One process without a group is a case of these tests; torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "tensor rate": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1)),
}
PERIODS: dict[str, Any] = {"constant": Constant(4), "qsr": QSR(alpha=0.2, base=2)}


def local(inner: str = "adamw", period: Any = None) -> tuple[nn.Module, LocalOptimizer]:
    model = network()
    optimizer = LocalOptimizer(INNERS[inner](model.parameters()), period or Constant(4))
    return model, optimizer


def told(model: nn.Module, optimizer: LocalOptimizer) -> str:
    """All that a look could change, to the last digit."""
    torch.set_printoptions(precision=12, threshold=10**6)
    grads = [p.grad for p in model.parameters()]
    weights = {name: t.tolist() for name, t in model.state_dict().items()}
    # Not `state_dict`, which is what is looked with.
    replica = optimizer._replica
    figures = [replica.state_dict(), optimizer.synced, replica.meeting.identity]
    return repr([weights, grads, figures, dict(optimizer.inner.state), optimizer.param_groups])


# A look.


@pytest.mark.parametrize("steps", [0, 1, 4, 5])
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("inner", INNERS)
def test_a_look_changes_nothing(inner: str, period: str, steps: int) -> None:
    """Neither step, round, H, weights nor state, not even what is not there yet; so that a run
    that was looked at is the run that was not."""
    model, optimizer = local(inner, PERIODS[period])
    twin, unseen = local(inner, PERIODS[period])
    for net, opt in ((model, optimizer), (twin, unseen)):
        train(net, opt, range(steps))
        opt.zero_grad()
    before = told(model, optimizer)
    get_state_dict(model, optimizer)
    get_optimizer_state_dict(model, optimizer)
    get_state_dict(model, optimizer, options=FLAT)
    assert bool(optimizer.state) and list(optimizer.state.keys()) == list(optimizer.inner.state)
    optimizer.state.get(model[0].weight)
    assert told(model, optimizer) == before
    if not steps:
        assert len(optimizer.inner.state) == 0 and optimizer.round == optimizer.h == 0
    for net, opt in ((model, optimizer), (twin, unseen)):
        train(net, opt, range(steps, 9))
    assert told(model, optimizer).split("traffic")[0] == told(twin, unseen).split("traffic")[0]
    assert torch.equal(vector(model), vector(twin))


# Round trips.

RULES: dict[str, Callable[[], Rule]] = {
    "average": Average,
    "moments": lambda: Average(state_fields=("exp_avg",)),
    "int8": lambda: Average(compress="int8"),
    "diloco": DiLoCo,
    "easgd": lambda: EASGD(alpha=0.3, beta=0.4),
    "cocod": CoCoDSGD,
    "streaming": lambda: Streaming(3, outer_momentum=0.5, overlap=True),
    "lsgd": LSGD,
}
LAST = 14
SAVED = (2, 6, 7)  # within a round, between, and one step later: means are in flight


class Run:
    """A replica on its own problem."""

    def __init__(self, rule: str, rank: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.rank, self.model = rank, Model(dtype, seed)
        inner = torch.optim.AdamW(self.model.parameters(), lr=LRS[0], weight_decay=0.1)
        self.optimizer = LocalOptimizer(inner, Constant(3), RULES[rule](), model=self.model)
        self.problem = Quadratics.make(4, SIZE, seed=3)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            local_step(self.optimizer, self.model, self.problem, self.rank, step)

    def get(self) -> Any:
        return copy.deepcopy(get_state_dict(self.model, self.optimizer))

    def set(self, weights: Any, state: Any) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=weights, optim_state_dict=state
        )

    def end(self) -> list[Tensor]:
        now = everything(self.optimizer, self.model)
        self.optimizer.finish()
        return [*now, *everything(self.optimizer, self.model)]


def round_trips(rank: int, m: int, dtype: torch.dtype) -> int:
    """Each rule, each place: how many came back."""
    tried = 0
    for rule in RULES:
        alone = Run(rule, rank, dtype)
        alone.train(0, LAST)
        final = alone.end()
        looked, saved = Run(rule, rank, dtype), {}
        for start, stop in itertools.pairwise((0, *SAVED, LAST)):
            looked.train(start, stop)
            saved[stop] = looked.get()
        assert same_bits(final, looked.end()), f"{rule}: a look has changed the run"
        for step in SAVED:
            resumed = Run(rule, rank, dtype, seed=7)
            resumed.set(*saved[step])
            if m > 1 and not resumed.optimizer.synced:
                rows = stacked(resumed.model.vector())
                assert not torch.equal(rows[0], rows[1]), "replicas differ within a round"
            resumed.train(step, LAST)
            assert same_bits(final, resumed.end()), f"{rule}, {dtype}: resumed at step {step}"
            figures = (alone.optimizer, resumed.optimizer)
            assert len({(o.round, o.h, o.synced, o.traffic.syncs) for o in figures}) == 1
            tried += 1
    return tried


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trips_alone(dtype: torch.dtype) -> None:
    """Bit for bit the run that was not interrupted, from any place."""
    assert round_trips(0, 1, dtype) == len(RULES) * len(SAVED)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trips_on_two_ranks(dtype: torch.dtype) -> None:
    """Each rank its own, whatever is in flight."""
    assert run(round_trips, 2, dtype) == [len(RULES) * len(SAVED)] * 2


def test_groups_and_names() -> None:
    """Several groups come back in their places, and the state's own groups stay clean."""

    def build() -> tuple[nn.Module, LocalOptimizer]:
        model = network()
        groups = [
            {"params": model[3].parameters(), "lr": 0.3},
            {"params": model[0].parameters(), "momentum": 0.9},
        ]
        return model, LocalSGD(groups, 0.1, period=Constant(4), model=model)

    (model, optimizer), (other, resumed) = build(), build()
    train(model, optimizer, range(6))
    state = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(other, resumed, model_state_dict=state[0], optim_state_dict=state[1],
                   options=StateDictOptions(strict=False))  # fmt: skip
    assert [g["lr"] for g in resumed.param_groups] == [0.3, 0.1]
    assert all("localopt" not in g for g in resumed.param_groups)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, range(6, 11))
    assert torch.equal(vector(model), vector(other)) and resumed.round == 2


# What loses something on the way.


@pytest.mark.parametrize("trained", [0, 3, 9], ids="into one after {} steps".format)
@pytest.mark.parametrize("steps", [0, 2, 4, 5])
@pytest.mark.parametrize("inner", ["sgd", "momentum", "adamw"])
def test_a_flattened_state_is_refused(inner: str, steps: int, trained: int) -> None:
    """It has no place in a round, and for a new optimizer nothing of the inner one's: that is said,
    and the optimizer is as it was, rather than beginning again."""
    model, optimizer = local(inner)
    train(model, optimizer, range(steps))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FLAT))
    other, resumed = local(inner)
    train(other, resumed, range(trained))
    place = resumed._replica.state_dict()
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=True drops that"):
        set_optimizer_state_dict(other, resumed, optim_state_dict=state, options=FLAT)
    assert resumed._replica.state_dict() == place
    twin, unseen = local(inner)
    train(twin, unseen, range(trained))
    for net, opt in ((other, resumed), (twin, unseen)):
        train(net, opt, range(trained, 11))
    assert torch.equal(vector(other), vector(twin))


@pytest.mark.parametrize("trained", [0, 1, 4])
@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_what_dcp_loads_in_place(inner: str, steps: int, trained: int, tmp_path: Path) -> None:
    """dcp.load into a look at an optimizer "loads into what is there": all of it, or an error."""
    model, optimizer = local(inner)
    train(model, optimizer, range(steps))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    other, resumed = local(inner)
    train(other, resumed, range(trained))
    weights, state = get_state_dict(other, resumed)
    try:
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    except dcp.CheckpointException as error:
        assert "Missing key" in str(error)
        return
    except ValueError as error:
        assert "lost the inner optimizer's" in str(error) and (inner, trained) == ("adamw", 0)
        return
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, range(steps, 11))
    assert torch.equal(vector(model), vector(other)) and resumed.round == optimizer.round


def test_a_bare_state_with_names() -> None:
    """What the error says works: it is loaded into the inner optimizer."""
    twin, (model, optimizer) = network(), local("momentum")
    bare = INNERS["momentum"](twin.parameters())
    train(twin, bare, range(3))
    weights, state = copy.deepcopy(get_state_dict(twin, bare))
    with pytest.raises(ValueError, match=r"bare optimizer's, load it into optimizer\.inner"):
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    set_state_dict(model, optimizer.inner, model_state_dict=weights, optim_state_dict=state)
    for net, opt in ((model, optimizer), (twin, bare)):
        train(net, opt, range(3, 9))
    assert torch.equal(vector(model), vector(twin)) and optimizer.round == 1


# Of other versions, of other ranks.


@pytest.mark.parametrize("steps", range(3, 9))
@pytest.mark.parametrize("rule", RULES)
def test_version_3(rule: str, steps: int) -> None:
    """States that were written with the place beside the groups, and less of it."""
    run_, resumed = (Run(rule, 0, torch.float64, seed) for seed in (0, 7))
    run_.train(0, steps)
    weights, state = copy.deepcopy((run_.model.state_dict(), run_.optimizer.state_dict()))
    place = state["param_groups"][0].pop("localopt")
    place["version"] = 3
    del place["has_state"], place["replica"]["open"], place["replica"]["start"]
    place["sync"].pop("sent", None)
    old = {**state, "localopt": place}
    assert own_state(old) is place
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(old)
    assert resumed.optimizer.synced == (steps % 3 == 0)
    for each in (run_, resumed):
        each.train(steps, LAST)
    assert same_bits(run_.end(), resumed.end())


def another_ranks(rank: int, m: int) -> list[str]:
    """What is said when all load rank 0's state, twice between rounds, then in mid-round."""
    replica = Run("average", rank, torch.float32)
    replica.train(0, 3)
    states = [replica.get()]
    replica.train(3, 4)
    states.append(replica.get())
    shared: list[Any] = [states]
    torch.distributed.broadcast_object_list(shared)
    loading = Run("average", rank, torch.float32, seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loading.set(*copy.deepcopy(shared[0][0]))
    texts = [str(w.message) for w in caught if "momenta" in str(w.message)]
    loading.train(3, 6)
    assert equal_on_all_ranks(loading.model.vector())
    try:
        loading.set(*shared[0][1])
    except ValueError as error:
        texts.append(str(error))
    return texts


@pytest.mark.slow
def test_another_ranks_state() -> None:
    """Between rounds a warning, once; in mid-round it is refused."""
    zero, one = run(another_ranks, 2)
    assert zero == []
    assert one[0].startswith("rank 1: the optimizer state that is loaded is that of rank 0")
    (line,) = one[1:]
    assert line.startswith("rank 1: the state to load has rank 0, this optimizer 1; save one file")
