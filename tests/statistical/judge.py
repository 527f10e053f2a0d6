"""What tells z-scores from a standard normal sample, and how wrong an error bar must be for it.

Of n independent z-scores the mean has a standard error of 1 / sqrt n, and (n - 1) times the squared
width is chi squared with n - 1 degrees of freedom. Both are judged at the level of four standard
errors of a normal sample; the shape by the test of Kolmogorov and Smirnov.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

SIGMAS = 4.0


def widths(n: int) -> tuple[float, float]:
    """Smallest and largest width of n z-scores that passes."""
    tail = stats.norm.sf(SIGMAS)
    low, high = stats.chi2.ppf(tail, n - 1), stats.chi2.isf(tail, n - 1)
    return math.sqrt(low / (n - 1)), math.sqrt(high / (n - 1))


def fault(z: np.ndarray) -> str:
    """What tells z-scores from a standard normal sample; empty if nothing does."""
    n = len(z)
    if not np.isfinite(z).all():
        return f"{int((~np.isfinite(z)).sum())} of {n} not finite"
    mean, width = z.mean(), z.std(ddof=1)
    low, high = widths(n)
    p = stats.kstest(z, "norm").pvalue
    found = []
    if abs(mean) > SIGMAS / math.sqrt(n):
        found.append(f"mean {mean:+.3f}")
    if not low < width < high:
        found.append(f"width {width:.3f}")
    if p < 1e-4:
        found.append(f"Kolmogorov-Smirnov p {p:.1e}")
    return ", ".join(found)


class Seen(NamedTuple):
    """What is found in 95 of 100 cases: error bars times these, a bias in errors of one seed."""

    short: float
    long: float
    bias: float


def seen(n: int) -> Seen:
    """What n z-scores show."""
    low, high = widths(n)
    least, most = np.sqrt(stats.chi2.ppf([0.05, 0.95], n - 1) / (n - 1))
    return Seen(least / high, most / low, (SIGMAS + stats.norm.isf(0.05)) / math.sqrt(n))


def collect(
    experiment: Callable[[int], dict[str, float]], seeds: Iterable[int]
) -> dict[str, np.ndarray]:
    """The z-scores of each estimate of an experiment, one a seed."""
    rows = [experiment(seed) for seed in seeds]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def faults(z: dict[str, np.ndarray]) -> dict[str, str]:
    """The estimates that have a fault."""
    found = {name: fault(values) for name, values in z.items()}
    return {name: text for name, text in found.items() if text}
