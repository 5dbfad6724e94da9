"""What the studies share: means with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n)
