"""What a run would synchronise and send, and how long it would wait for that.

The rounds come from the schedule and the period that the run itself would ask, the bytes from its
rule and its model. Seconds are a model of the network: a ring all-reduce of b bytes over m replicas
sends 2 (m - 1)/m b from each of them, and as the ranks of a node are neighbours in the ring, as
much through each node's link. So a synchronisation takes

    t = 2 (m - 1)/m b / (efficiency · link)

with no latency, no waiting for the slowest replica, and nothing for what stays inside a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from torch import nn

from localopt import (
    LSGD,
    HierarchicalAverage,
    Period,
    Rule,
    Streaming,
)
from localopt.buffers import Buffers
from localopt.compression import codec

from . import optimizers
from .config import Config, ConfigError
from .lr import Schedule

PARAMETER = 4  # bytes: weights are float32, whatever the autocast

Round = tuple[int, int]  # first step, H
Groups = Sequence[Sequence[int]]  # ranks


def rounds_of(period: Period, schedule: Schedule) -> list[Round]:
    """All rounds of a run."""
    rounds, step = [], 0
    while step < schedule.total_steps:
        h = period(step, schedule(step))
        rounds.append((step, h))
        step += h
    return rounds


@dataclass(frozen=True)
class Message:
    """Bytes of one synchronisation.

    Attributes:
        sent: from each replica (mean).
        link: through the busiest node's link, in one direction.
    """

    sent: float = 0.0
    link: float = 0.0

    def __add__(self, other: Message) -> Message:
        return Message(self.sent + other.sent, self.link + other.link)


@dataclass(frozen=True)
class Scenario:
    """One way to synchronise a run.

    Attributes:
        rounds: all of them.
        base: H where nothing makes a round longer.
        each: what every round's end sends.
        further: what every ``every``-th sends besides.
        hides: whether it travels behind the next round.
    """

    rounds: list[Round]
    base: int
    each: Message
    further: Message
    every: int
    hides: bool

    @property
    def longest(self) -> int:
        """The largest H."""
        return max((h for _, h in self.rounds), default=0)

    @property
    def first_longer(self) -> Round | None:
        """The first round of more than ``base`` steps."""
        return next((r for r in self.rounds if r[1] > self.base), None)

    @property
    def sent(self) -> float:
        """Bytes from each replica over the run."""
        return self._total(self.each.sent, self.further.sent)

    def exposed(self, bandwidth: float, step_seconds: float | None) -> float:
        """Seconds in which training stands still over the run.

        Args:
            bandwidth: bytes per second through a node's link.
            step_seconds: computing time of a step, behind which communication may hide; None:
                unknown, and nothing is taken as hidden.
        """
        if not self.hides or step_seconds is None:
            return self._total(self.each.link, self.further.link) / bandwidth
        # What a round's end launches runs behind the next round; behind the last there is none.
        seconds = self.each.link / bandwidth
        covers = chain((h * step_seconds for _, h in self.rounds[1:]), repeat(0.0))
        return sum(max(0.0, seconds - cover) for _, cover in zip(self.rounds, covers, strict=False))

    def _total(self, each: float, further: float) -> float:
        return len(self.rounds) * each + len(self.rounds) // self.every * further


def scenario(
    config: Config, schedule: Schedule, model: nn.Module, nodes: Sequence[int]
) -> Scenario:
    """How ``config`` would synchronise.

    Args:
        config: the run's settings.
        schedule: its learning rate.
        model: its model; only shapes are looked at.
        nodes: the node of each rank.

    Raises:
        ConfigError: if the rule does not take its settings, or this number of replicas.
    """
    if not config.local:
        every_step = [(step, 1) for step in range(schedule.total_steps)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everyone = _all_reduce([range(len(nodes))], PARAMETER * trained, nodes)
        return Scenario(every_step, 1, everyone, Message(), 1, False)
    period, rule = optimizers.period(config, schedule), optimizers.rule(config)
    each, further, every = _messages(config, rule, model, nodes)
    rounds = rounds_of(period, schedule)
    return Scenario(rounds, period.base_h, each, further, every, rule.overlaps)


def _messages(
    config: Config, rule: Rule, model: nn.Module, nodes: Sequence[int]
) -> tuple[Message, Message, int]:
    """What every round's end sends, and what every so many send besides."""
    m = len(nodes)
    everyone = [range(m)]
    parameters = PARAMETER * sum(p.numel() for p in model.parameters())
    if isinstance(rule, LSGD):
        everywhere = _broadcast(everyone, parameters, nodes)
        if rule.group_size is None or rule.global_every is None:
            return everywhere, Message(), 1
        inside, _ = _split(config, m, rule.group_size)
        return _broadcast(inside, parameters, nodes), everywhere, rule.global_every
    if isinstance(rule, Streaming):
        return _all_reduce(everyone, parameters, nodes), Message(), 1
    payload = _payload(config, rule, model)
    if isinstance(rule, HierarchicalAverage):
        inside, peers = _split(config, m, rule.group_size)
        across = Message()
        if len(inside) > 1:
            shard = payload / rule.group_size
            across = _all_reduce(peers, shard, nodes) + _broadcast(inside, payload, nodes)
        return _all_reduce(inside, payload, nodes), across, rule.global_every
    compress = codec(getattr(rule, "compress", None))
    if compress is not None:
        blocks = -(-parameters // PARAMETER // compress.block)
        beside = _all_reduce(everyone, payload - parameters, nodes)
        return _in_shards(compress.size(blocks * compress.block), nodes) + beside, Message(), 1
    return _all_reduce(everyone, payload, nodes), Message(), 1


def _payload(config: Config, rule: Rule, model: nn.Module) -> int:
    """Bytes of what the rule averages: parameters, and what travels beside them."""
    named = list(model.named_parameters())
    beside = [
        *rule.beside(named),
        *Buffers(model, config.buffers, [p for _, p in named]).entries(),
    ]
    return PARAMETER * (sum(p.numel() for _, p in named) + sum(entry.numel for entry in beside))


def _split(config: Config, m: int, size: int) -> tuple[Groups, Groups]:
    """Groups of ``size`` consecutive ranks, and those of ranks with the same place in them."""
    if m % size:
        raise ConfigError(
            f"sync {config.sync}: group_size is {size}: it does not divide the {m} replicas"
        )
    inside = [range(first, first + size) for first in range(0, m, size)]
    return inside, [range(place, m, size) for place in range(size)]


def _all_reduce(groups: Groups, payload: float, nodes: Sequence[int]) -> Message:
    """A ring all-reduce in each group at once: 2 (m - 1)/m of the payload at every place."""
    m = len(groups[0])
    sent = 2 * (m - 1) / m * payload
    return Message(sent, sent * _crossing(groups, nodes))


def _in_shards(payload: float, nodes: Sequence[int]) -> Message:
    """A shard to each rank from all others, and from it to them: no ring, which would add up what
    it passes on, but as much from each rank. Replicas of a node all send to those of others."""
    m = len(nodes)
    pairs = max(n * (m - n) for n in Counter(nodes).values())
    return Message(2 * (m - 1) / m * payload, 2 * pairs / m * payload)


def _broadcast(groups: Groups, payload: float, nodes: Sequence[int]) -> Message:
    """A broadcast in each group at once; into a node the whole payload travels once."""
    m = len(groups[0])
    return Message((m - 1) / m * payload, payload * _crossing(groups, nodes))


def _crossing(groups: Groups, nodes: Sequence[int]) -> int:
    """Groups that share the busiest node's link: they have ranks in it and elsewhere."""
    places = [{nodes[rank] for rank in group} for group in groups]
    return max(Counter(n for place in places if len(place) > 1 for n in place).values(), default=0)
