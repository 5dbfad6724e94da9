"""A plan as text: what is trained, how its replicas meet, and what else could have been chosen."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from .. import optimizers
from ..lr import Schedule
from .cost import PARAMETER, Round, Scenario
from .plan import Plan

_WIDTH = 100
_COLUMNS, _ROWS = 72, 12  # of the sketch, at most so many rows


def report(plan: Plan) -> str:
    """``plan`` as text, at most 100 columns wide."""
    own = plan.scenarios[plan.chosen]
    rows = {**_run(plan), **_synchronisation(plan, own), **_rounds(plan, own)}
    width = max(map(len, rows)) + 2
    lines = [line for row in rows.items() for line in _wrapped(*row, width)]
    if own.first_longer is not None:
        lines += ["", *_sketch(plan, own.rounds)]
    return "\n".join([*lines, "", *_table(plan), "", *_notes(plan)])


def _wrapped(key: str, value: str, width: int) -> list[str]:
    """``value`` next to its key, on as many lines as it takes."""
    text = textwrap.wrap(value, _WIDTH - width, break_long_words=False, break_on_hyphens=False)
    return [
        f"{name:<{width}}{line}"
        for name, line in zip([key, *[""] * (len(text) - 1)], text, strict=True)
    ]


def _run(plan: Plan) -> dict[str, str]:
    """What is trained."""
    config, m, total = plan.config, len(plan.nodes), plan.schedule.total_steps
    hosts = " + ".join(
        f"{_count(number, 'node')} of {size}"
        for size, number in Counter(Counter(plan.nodes).values()).items()
    )
    local_batch = config.total_batch_size // m
    micro_steps = _count(local_batch // config.physical_batch_size, "micro-step")
    return {
        "recipe": plan.recipe,
        "model": f"{config.model}, {plan.parameters:,} parameters, "
        f"{_size(PARAMETER * plan.parameters)}",
        "data": f"{config.data}, {plan.images:,} training images ({plan.source})",
        "replicas": f"{m} ({hosts})",
        "batch": f"{config.total_batch_size:,} images: {local_batch:,} for each replica, in "
        f"{micro_steps} of {config.physical_batch_size:,}",
        "length": f"{_count(config.epochs, 'epoch')} of {plan.steps_per_epoch:,} steps: "
        f"{_count(total, 'step')}",
        "optimizer": config.optimizer,
        "learning rate": _rate(plan.schedule),
    }


def _rate(schedule: Schedule) -> str:
    text = f"{schedule.kind}, peak {schedule.max_lr:g}"
    if schedule.warmup_steps:
        text += f" after {schedule.warmup_steps:,} steps of warm-up from {schedule.min_lr:g}"
    if schedule.kind == "step":
        points = ", ".join(f"{point:,}" for point in schedule.decay_at)
        text += f", × {schedule.gamma:g} at {points}"
    return f"{text}; last step {schedule(max(0, schedule.total_steps - 1)):.3g}"


def _synchronisation(plan: Plan, own: Scenario) -> dict[str, str]:
    """How its replicas meet."""
    config, total = plan.config, plan.schedule.total_steps
    rows = {}
    if config.local:
        rows["period"] = plan.chosen
        if optimizers.takes(config, "alpha") and config.max_lr:
            rows["period"] += f" ({config.alpha / config.max_lr:.3g} × peak), H ≥ {own.base}"
        settings = " ".join(f"{name}={value}" for name, value in config.sync_settings.items())
        rows["sync"] = f"{config.sync} {settings}".rstrip()
    sent = f"{_size(own.each.sent)} each"
    for every, message in own.seldom.items():
        sent += f", {_size(message.sent)} more every {every} rounds"
    rows["synchronisations"] = f"{len(own.rounds):,} of {total:,} steps ({_share(plan, own)})"
    rows["sent per replica"] = f"{sent}; {_size(own.sent)} over the run"
    if plan.nodes[-1]:
        link = plan.options.link_gbits, plan.options.link_efficiency
        seconds = f"{own.each.link / plan.bandwidth:.3g} s each"
        for every, message in own.seldom.items():
            if message.link:
                seconds += f", {message.link / plan.bandwidth:.3g} s more every {every} rounds"
        rows["communication"] = f"{seconds}, at {link[0]:g} Gbit/s × {link[1]:g}"
        if own.hides:
            rows["communication"] += ", behind the next round"
    return rows


def _rounds(plan: Plan, own: Scenario) -> dict[str, str]:
    """The first and the last rounds; those of data-parallel training are all alike."""
    if not plan.config.local or not own.rounds:
        return {}
    firsts: dict[int, int] = {}
    for step, h in own.rounds:
        firsts.setdefault(h, step)
    heights = [f"{h:,} from step {step:,}" for h, step in list(firsts.items())[:3]]
    rows = {"first H": ", ".join(heights)}
    if (longer := own.first_longer) is not None:
        rows["first longer round"] = f"{_round(longer)}, {_percent(plan, longer[0])} of the run"
    rows["last rounds"] = "  ".join(map(_round, own.rounds[-3:])) + "  (step, H)"
    return rows


def _sketch(plan: Plan, rounds: Sequence[Round]) -> list[str]:
    """H over the steps, its axis in powers of two; and the learning rate below."""
    total, starts = plan.schedule.total_steps, [step for step, _ in rounds]
    middles = [int((column + 0.5) * total / _COLUMNS) for column in range(_COLUMNS)]
    h = [rounds[bisect_right(starts, middle) - 1][1] for middle in middles]
    doublings = int(math.log2(max(h) / min(h))) + 1
    levels = [min(h) * 2**k for k in range(0, doublings, -(-doublings // _ROWS))]
    lines = ["       H"]
    for level in reversed(levels):
        marks = "".join("#" if value >= level else " " for value in h)
        lines.append(f"{level:>8,} |{marks}".rstrip())
    quarter = _COLUMNS // 4
    lines.append(" " * 9 + "+" + f"{'-' * (quarter - 1)}+" * 4)
    ticks = [total * k // 4 for k in range(5)]
    for name, values in (
        ("step", [f"{step:,}" for step in ticks]),
        ("epoch", [f"{step / plan.steps_per_epoch:.4g}" for step in ticks]),
        ("η", [f"{plan.schedule(step):.3g}" for step in ticks]),
    ):
        lines.append(f"{name:>8} " + "".join(f"{value:<{quarter}}" for value in values).rstrip())
    return lines


def _table(plan: Plan) -> list[str]:
    """The ways to synchronise, side by side."""
    exposed = {name: plan.exposed(s) for name, s in plan.scenarios.items()}
    seconds = {name: plan.seconds(s) for name, s in plan.scenarios.items()}
    (wait_unit, waits), (run_unit, runs) = _in_unit(exposed), _in_unit(seconds)
    parallel = next(iter(seconds.values()))
    rows = [
        ["", "", "", "", "", "", wait_unit, run_unit, ""],
        ["", "syncs", "share", "GB sent", "grows at", "longest", "exposed", "in all", "speed-up"],
    ]
    for name, s in plan.scenarios.items():
        longer, took = s.first_longer, seconds[name]
        rows.append(
            [
                f"{'>' if name == plan.chosen else ' '} {name}",
                f"{len(s.rounds):,}",
                _share(plan, s),
                f"{s.sent / 1e9:,.{1 if s.sent >= 1e10 else 3}f}",
                "–" if longer is None else _percent(plan, longer[0]),
                f"{s.longest:,}",
                waits[name],
                runs[name],
                f"{parallel / took:.2f}" if parallel and took else "–",
            ]
        )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _notes(plan: Plan) -> list[str]:
    """What the table's words mean, and what it does not know."""
    step_seconds = plan.options.step_seconds
    notes = ["> this run. grows at: where the first round of more than H_base steps begins."]
    if plan.exposed(plan.scenarios[plan.chosen]) is None:
        notes.append("Inside one node nothing crosses the network; what it takes is not known.")
    elif step_seconds is None:
        notes.append("--plan-step-seconds, the seconds of a step, gives the hours of the run.")
        if any(s.hides for s in plan.scenarios.values()):
            notes.append("How much of the communication hides behind training depends on it too.")
    else:
        alone = _in_unit({"": plan.schedule.total_steps * step_seconds})
        notes.append(f"Computing alone: {alone[1]['']} {alone[0]}. Evaluation is not counted.")
    return notes


def _in_unit(seconds: dict[str, float | None]) -> tuple[str, dict[str, str]]:
    """The durations' unit, hours if one of them exceeds an hour, and their numbers."""
    most = max((s for s in seconds.values() if s is not None), default=math.inf)
    unit, factor = ("hours", 3600) if most >= 3600 else ("seconds", 1)
    return unit, {k: "–" if s is None else f"{s / factor:,.2f}" for k, s in seconds.items()}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _round(r: Round) -> str:
    return f"({r[0]:,}, {r[1]:,})"


def _percent(plan: Plan, step: int) -> str:
    return f"{100 * step / plan.schedule.total_steps:.1f} %"


def _share(plan: Plan, scenario: Scenario) -> str:
    return f"{100 * len(scenario.rounds) / max(1, plan.schedule.total_steps):.2f} %"


def _size(amount: float) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e10 else f"{amount / 1e6:,.1f} MB"
