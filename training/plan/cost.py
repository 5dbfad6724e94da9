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
from itertools import chain

from torch import nn

from localopt import Period, Rule, Sending
from localopt.buffers import BufferPolicy, Buffers

from .. import optimizers
from ..config import Config
from ..lr import Schedule
from ..values import ConfigError, about

PARAMETER = 4  # bytes: weights are float32, whatever the autocast

Round = tuple[int, int]  # first step, H
Groups = Sequence[Sequence[int]]  # ranks


def rounds_of(period: Period, schedule: Schedule) -> list[Round]:
    """All rounds of a run.

    Raises:
        ConfigError: if the period gives no number of steps.
    """
    rounds, step = [], 0
    while step < schedule.total_steps:
        h = period(step, schedule(step))
        if not isinstance(h, int) or h < 1:
            raise ConfigError(f"period {period}: H is {h!r} at step {step}: at least 1 step")
        rounds.append((step, h))
        step += h
    return rounds


@dataclass(frozen=True)
class Message:
    """Bytes of one synchronisation."""

    sent: float = 0.0  # from each replica (mean)
    link: float = 0.0  # through the busiest node's link, in one direction

    def __add__(self, other: Message) -> Message:
        return Message(self.sent + other.sent, self.link + other.link)


@dataclass(frozen=True)
class Scenario:
    """One way to synchronise a run."""

    rounds: list[Round]
    base: int  # H where nothing makes a round longer
    messages: dict[int, Message]  # by n, what every n-th round's end sends
    hides: bool  # whether it travels behind the next round

    @property
    def each(self) -> Message:
        """What every round's end sends."""
        return self.messages.get(1, Message())

    @property
    def seldom(self) -> dict[int, Message]:
        """By n, what every n-th sends besides, where that is anything."""
        return {n: m for n, m in sorted(self.messages.items()) if n > 1 and m != Message()}

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
        return sum(len(self.rounds) // n * m.sent for n, m in self.messages.items())

    def exposed(self, bandwidth: float, step_seconds: float | None) -> float:
        """Seconds in which training stands still over the run, at a link's bytes per second.

        Communication may hide behind the seconds of a step; None: unknown, and nothing hides.
        """
        seconds = {n: m.link / bandwidth for n, m in self.messages.items()}
        if not self.hides or step_seconds is None:
            return sum(len(self.rounds) // n * s for n, s in seconds.items())
        # What a round's end launches runs behind the next round; behind the last there is none.
        covers = chain((h * step_seconds for _, h in self.rounds[1:]), [0.0])
        launched = (
            sum(s for n, s in seconds.items() if number % n == 0)
            for number in range(1, len(self.rounds) + 1)
        )
        return sum(max(0.0, s - cover) for s, cover in zip(launched, covers, strict=False))


def scenario(
    config: Config, schedule: Schedule, model: nn.Module, nodes: Sequence[int]
) -> Scenario:
    """How ``config`` would synchronise replicas on ``nodes``, given for each rank.

    Only shapes of ``model`` are looked at.

    Raises:
        ConfigError: if the rule does not take its settings, or this number of replicas.
    """
    if not config.local:
        every_step = [(step, 1) for step in range(schedule.total_steps)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everyone = _all_reduce([range(len(nodes))], PARAMETER * trained, nodes)
        return Scenario(every_step, 1, {1: everyone}, hides=False)
    period, rule = optimizers.period(config, schedule), optimizers.rule(config)
    with about(f"sync {config.sync}"):
        messages = messages_of(rule, model, config.buffers, nodes)
    return Scenario(rounds_of(period, schedule), period.base_h, messages, rule.overlaps)


def messages_of(
    rule: Rule, model: nn.Module, buffers: BufferPolicy, nodes: Sequence[int]
) -> dict[int, Message]:
    """By n, what every n-th round's end sends: what the rule says of itself.

    Raises:
        ValueError: if the rule does not take this number of replicas.
    """
    named = list(model.named_parameters())
    further = [
        *rule.extra(named),
        *Buffers(model, buffers, [p for _, p in named]).entries(),
    ]
    numbers = sum(p.numel() for _, p in named), sum(entry.numel for entry in further)
    messages: dict[int, Message] = {}
    for sending in rule.sends(*numbers, PARAMETER):
        sent = messages.get(sending.every, Message())
        messages[sending.every] = sent + _message(sending, nodes)
    return messages


def _message(sending: Sending, nodes: Sequence[int]) -> Message:
    m, size = len(nodes), sending.group_size
    if size is not None and m % size:
        raise ValueError(f"group_size is {size}: it does not divide the {m} replicas")
    groups = [range(m)] if size is None else [range(at, at + size) for at in range(0, m, size)]
    if sending.across:
        if len(groups) == 1:
            return Message()
        peers = [range(first, m, size) for first in range(size)]
        shards = _all_reduce(peers, sending.bytes / size, nodes)
        return shards + _broadcast(groups, sending.bytes, nodes)
    return _REACH[sending.how](groups, sending.bytes, nodes)


def _all_reduce(groups: Groups, payload: float, nodes: Sequence[int]) -> Message:
    """A ring all-reduce in each group at once: 2 (m - 1)/m of the payload from every rank."""
    m = len(groups[0])
    sent = 2 * (m - 1) / m * payload
    return Message(sent, sent * _crossing(groups, nodes))


def _in_shards(groups: Groups, payload: float, nodes: Sequence[int]) -> Message:
    """A shard to each rank from all others, and from it to them: no ring, which would add up what
    it passes on, but as much from each rank. Replicas of a node all send to those of others."""
    m = len(groups[0])
    pairs: Counter[int] = Counter()
    for group in groups:
        inside = Counter(nodes[rank] for rank in group)
        pairs += Counter({node: n * (m - n) for node, n in inside.items()})
    busiest = max(pairs.values(), default=0)
    return Message(2 * (m - 1) / m * payload, 2 * busiest / m * payload)


def _broadcast(groups: Groups, payload: float, nodes: Sequence[int]) -> Message:
    """A broadcast in each group at once; into a node the whole payload travels once."""
    m = len(groups[0])
    return Message((m - 1) / m * payload, payload * _crossing(groups, nodes))


def _crossing(groups: Groups, nodes: Sequence[int]) -> int:
    """Groups that share the busiest node's link: they have ranks in it and elsewhere."""
    spans = [{nodes[rank] for rank in group} for group in groups]
    return max(Counter(n for span in spans if len(span) > 1 for n in span).values(), default=0)


_REACH = {"all_reduce": _all_reduce, "broadcast": _broadcast, "shards": _in_shards}
