"""Colours, axes and limits that the figures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from openmm_vtdis.ensemble import WeightedEnsemble

BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"


PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
"""Okabe and Ito's colours, the most distinct first."""


LEAST_SHOWN = -12.0
"""log10 of the smallest weight, in units of the mean, that an axis shows."""


def axes_of(ax: Axes | None) -> Axes:
    """The given axes, or new ones; colours and grid are set where nothing has been drawn yet."""
    if ax is None:
        _, ax = plt.subplots(figsize=(5.0, 3.6), layout="constrained")
    if not ax.has_data():
        ax.set_prop_cycle(color=PALETTE)
        ax.grid(True, color="0.9", lw=0.6)
        ax.set_axisbelow(True)
    return ax


def solid_and_dashed(
    ax: Axes,
    label: str | None,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    marker: str | None,
) -> None:
    """Draw forward (solid) and reverse (dashed) curves of one method in one colour."""
    colour = None
    for name, (x, y) in curves.items():
        (line,) = ax.plot(
            x,
            y,
            color=colour,
            ls="-" if name == "forward" else "--",
            lw=1.6,
            marker=marker,
            ms=3.5,
            label=name if label is None else f"{label}, {name}",
        )
        colour = line.get_color()


def finish_ess(ax: Axes) -> Axes:
    ax.set_ylabel("effective sample size")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.autoscale(axis="y")  # an earlier curve has fixed the limits
    ax.set_ylim(bottom=0.0)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return ax


def density_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Density over the edges of all values (m,), those outside included in the norm."""
    return np.histogram(values, edges)[0] / len(values) / np.diff(edges)


def energy_range(
    ensemble: WeightedEnsemble, raw: np.ndarray, reference: np.ndarray | None
) -> tuple[float, float]:
    """A range with 99.9 % of the reweighted and reference energies, and most of the raw ones."""
    alive = ensemble.log_weights > -math.inf
    order = np.argsort(ensemble.reduced_energies[alive])
    cumulative = np.cumsum(ensemble.weights[alive][order])
    inner = order[np.searchsorted(cumulative, [0.0005, 0.9995]).clip(max=len(order) - 1)]
    ends = [*ensemble.reduced_energies[alive][inner], *np.quantile(raw, [0.005, 0.98])]
    if reference is not None:
        ends.extend(np.quantile(reference, [0.0005, 0.9995]))
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def running(
    ess: Callable[[np.ndarray], float], lw: np.ndarray, n_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample sizes m spread over log m from 10 (or 1) to n, and the ESS of the first m."""
    n = len(lw)
    sizes = np.unique(np.geomspace(min(10, n), n, n_points).round().astype(int))
    return sizes, np.array([ess(lw[:m]) for m in sizes])
