"""What the studies share: means with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n)


def accuracy(values: Sequence[float], images: int) -> str:
    """The mean of shares of ``images`` that were right, and its 95 % interval, as text in %.

    Student's t over the seeds, of log((k + 1/2) / (n - k + 1/2)) with k of n images right: near
    100 % an interval of shares themselves would go beyond it.
    """
    low, high = accuracy_interval(values, images)
    bounds = "" if math.isnan(low) else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{100 * statistics.fmean(values):.2f}{bounds} %"


def accuracy_interval(values: Sequence[float], images: int) -> tuple[float, float]:
    """The ends of the interval that `accuracy` writes; NaN for one value."""
    odds = [math.log((v * images + 0.5) / (images - v * images + 0.5)) for v in values]
    mean, half = mean_and_interval(odds)
    low, high = (1 / (1 + math.exp(-(mean + sign * half))) for sign in (-1, 1))
    return low, high


def interval(values: Sequence[float], form: str) -> str:
    """Mean ± half the interval, as text."""
    mean, half = mean_and_interval(values)
    return f"{mean:{form}} ± {half:.2f}"


def difference(
    runs: Mapping[str, Mapping[str, str]], base: Mapping[str, Mapping[str, str]]
) -> str:
    """By how many points of accuracy runs, by seed, are better than those of the same seeds."""
    both = [seed for seed in runs if seed in base]
    pairs = [100 * (float(runs[seed]["top1"]) - float(base[seed]["top1"])) for seed in both]
    return interval(pairs, "+.2f") if pairs else ""
