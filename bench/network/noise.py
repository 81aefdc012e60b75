"""Whether figures of two runs differ by more than chance makes them differ.

Figures are compared as logarithms. Three rounds of one figure say little of its noise, but the same figure of many subjects
says a lot: the noise of a figure is that of its kind, or its own where that is larger. A difference counts when it is larger
than chance would make any of all the compared figures differ (Bonferroni's correction). As rounds of one run are close in time
they differ less than runs do: of few rounds, the gap between the two runs must be as large as the spread within each, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

FALSE_ALARMS = 0.1
"""Figures that are said to have changed by chance alone, in the mean of many comparisons of two runs."""
SMALLEST_CHANGE = 0.05
UNKNOWN_NOISE = 2.0
"""Of a figure of one round, in a kind of which nobody has more, only a larger change counts: one to more than three times."""
FEW_ROUNDS = 3
_MEDIAN_OF_CHI2 = math.log(4)
"""Of two degrees of freedom, as three rounds have: by so much, over 2, the median of variances is below the variance."""
_MEDIAN_TO_MEAN = 1.2533
"""The standard error of a median in that of a mean, of a normal distribution."""


def pooled_noise(figures: Iterable[Sequence[float]]) -> float | None:
    """The standard deviation of logarithms within a run, of what most figures have; None when none has two rounds."""
    variances = [statistics.variance(logs) for values in figures if len(logs := _logs(values)) > 1]
    return math.sqrt(statistics.median(variances) * 2 / _MEDIAN_OF_CHI2) if variances else None


def beyond_noise(first: Sequence[float], second: Sequence[float], noise: float | None, comparisons: int) -> bool:
    """Whether the rounds of two runs are told apart, as one of so many `comparisons`; `noise`: of the kind of figure."""
    if not (ours := _logs(first)) or not (theirs := _logs(second)):
        return False
    apart = abs(statistics.median(ours) - statistics.median(theirs))
    if apart <= math.log1p(SMALLEST_CHANGE):
        return False
    if noise is None:
        return apart > math.log1p(UNKNOWN_NOISE)
    own = [statistics.variance(logs) for logs in (ours, theirs) if len(logs) > 1]
    deviation = max([noise, math.sqrt(statistics.mean(own))] if own else [noise])
    error = _MEDIAN_TO_MEAN * deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
    if apart <= error * statistics.NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(1, comparisons)):
        return False
    low, high = sorted((ours, theirs), key=statistics.median)
    gap = min(high) - max(low)
    few = min(len(ours), len(theirs)) <= FEW_ROUNDS
    return gap > (max(max(logs) - min(logs) for logs in (ours, theirs)) if few else 0)


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values if value > 0]
