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

    Student's t over the seeds, for the log-odds log(p / (1 - p)) of the mean p, whose standard
    error is that of p over p (1 - p): near 100 % an interval of shares themselves would go beyond
    it. Where all are right, half an image is taken for wrong.
    """
    low, high = accuracy_interval(values, images)
    bounds = "" if math.isnan(low) else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{100 * statistics.fmean(values):.2f}{bounds} %"


def accuracy_interval(values: Sequence[float], images: int) -> tuple[float, float]:
    """The ends of the interval that `accuracy` writes; NaN for one value."""
    mean, half = mean_and_interval(values)
    least = 1 / (2 * images)
    p = min(max(mean, least), 1 - least)
    odds, width = math.log(p / (1 - p)), half / (p * (1 - p))
    low, high = (1 / (1 + math.exp(-(odds + sign * width))) for sign in (-1, 1))
    return low, high


def interval(values: Sequence[float], form: str) -> str:
    """Mean ± half the interval, as text."""
    mean, half = mean_and_interval(values)
    return f"{mean:{form}} ± {half:.2f}"


def differences(
    runs: Mapping[str, Mapping[str, str]], base: Mapping[str, Mapping[str, str]]
) -> list[float]:
    """By how many points of accuracy runs, by seed, are better than those of the same seeds."""
    both = [seed for seed in runs if seed in base]
    return [100 * (float(runs[seed]["top1"]) - float(base[seed]["top1"])) for seed in both]


def difference(
    runs: Mapping[str, Mapping[str, str]], base: Mapping[str, Mapping[str, str]]
) -> str:
    """The mean of `differences` and its interval, as text."""
    pairs = differences(runs, base)
    return interval(pairs, "+.2f") if pairs else ""
