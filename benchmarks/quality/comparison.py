"""Means with intervals, paired differences, and Holm's correction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean: t_{0.975, n−1} s / √n; NaN below two values."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


@dataclass(frozen=True)
class Difference:
    """Mean of the differences at equal seeds, half of its 95 % interval, p of the paired t test, number of pairs."""

    mean: float
    interval: float
    p: float
    pairs: int


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Differences of two methods by seed, over the seeds that both have; None below two of them."""
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if len(differences) < 2:
        return None
    if statistics.pstdev(differences) == 0:  # no spread: the t statistic has none to be divided by
        p = 1.0 if differences[0] == 0 else 0.0
    else:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(statistics.mean(differences), interval(differences), p, len(differences))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p: in rising order max over j ≤ i of (m − j) p_(j), at most 1 (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for index, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - index) * p))
        adjusted[name] = largest
    return adjusted
