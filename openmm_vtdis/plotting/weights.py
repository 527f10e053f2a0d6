"""Figures of weights and effective sample sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from scipy.special import boxcox

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import forward_ess, reverse_ess
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.ensemble.diagnostics import pareto_k
from openmm_vtdis.plotting.style import (
    LEAST_SHOWN,
    axes_of,
    finish_ess,
    running,
    solid_and_dashed,
)


def ess_curve(
    n_steps: ArrayLike,
    forward: ArrayLike | None = None,
    reverse: ArrayLike | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """ESS over the number of steps; one call per method, into one ``ax``.

    Parameters
    ----------
    n_steps
        (k,) network evaluations per sample.
    forward, reverse
        (k,) ESS as fractions: forward is drawn solid, reverse dashed, in one colour.
    label
        Name of the method.
    """
    steps = np.asarray(n_steps, dtype=np.float64)
    curves = {"forward": forward, "reverse": reverse}
    for name, curve in curves.items():
        if curve is not None and (steps.ndim != 1 or np.shape(curve) != steps.shape):
            raise ValueError(
                f"ess_curve: expected n_steps and {name} of one shape (k,), got {steps.shape} and "
                f"{np.shape(curve)}"
            )
    ax = axes_of(ax)
    solid_and_dashed(ax, label, {k: (steps, v) for k, v in curves.items() if v is not None}, "o")
    ax.set(xlabel="network evaluations per sample")
    return finish_ess(ax)


def ess_versus_samples(
    log_weights: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    forward_log_weights: Mapping[str, ArrayLike] | None = None,
    n_points: int = 60,
) -> Axes:
    """ESS of the first m samples over m. A curve that keeps falling has no finite variance.

    Parameters
    ----------
    log_weights
        Name of the method to log weights (n,) of generated samples: reverse ESS, dashed.
    forward_log_weights
        Name to log weights (n,) of noised target samples, in random order: forward ESS, solid.
    n_points
        Points of each curve, spread evenly over log m.
    """
    if not isinstance(log_weights, Mapping):
        raise ValueError(
            "log_weights: expected a mapping of names to log weights, got "
            f"{type(log_weights).__name__}"
        )
    ax = axes_of(ax)
    forward_log_weights = forward_log_weights or {}
    for label in [*log_weights, *(k for k in forward_log_weights if k not in log_weights)]:
        curves = {}
        if label in forward_log_weights:
            lw = checks.log_weights(forward_log_weights[label])
            curves["forward"] = running(forward_ess, lw, n_points)
        if label in log_weights:
            lw = checks.log_weights(log_weights[label])
            curves["reverse"] = running(reverse_ess, lw, n_points)
        solid_and_dashed(ax, label, curves, None)
    ax.set_xscale("log")
    ax.set(xlabel="number of samples $M$")
    return finish_ess(ax)


def weight_distribution(
    ensemble: WeightedEnsemble,
    ax: Axes | None = None,
    bins: int = 60,
    label: str | None = None,
) -> Axes:
    """Histogram of log10 of the weights in units of their mean, with ESS and Pareto k.

    The dashed line is an even share. Mass far to its right is a tail in which few samples carry
    the estimates. Samples of zero weight, and those of less than 1e-12 of the mean, are named in
    the legend.
    """
    ax = axes_of(ax)
    weights = ensemble.weights
    about = ensemble.diagnostics()
    shares = (ensemble.log_weights - ensemble.log_z().value) / math.log(10.0)
    alive = shares > LEAST_SHOWN
    shares = shares[alive]
    n_small = len(ensemble) - int(alive.sum()) - about.n_zero_weight
    text = f"{label or 'samples'}\nESS {about.ess:.1%}, Pareto $k$ {about.pareto_k:.2f}"
    if about.n_zero_weight:
        text += f"\n({about.n_zero_weight} of zero weight not shown)"
    if n_small:
        text += f"\n({n_small} of next to none not shown)"
    span = (float(shares.min()), float(shares.max()))
    if span[1] - span[0] < 1e-9:
        span = (span[0] - 0.5, span[1] + 0.5)
    edges = np.linspace(*span, bins + 1)
    counts = np.histogram(shares, edges)[0]
    mass = np.histogram(shares, edges, weights=weights[alive])[0]
    (line,) = ax.plot([], [])
    colour = line.get_color()
    line.remove()
    ax.stairs(counts / len(ensemble), edges, color=colour, fill=True, alpha=0.25)
    ax.stairs(counts / len(ensemble), edges, color=colour, lw=1.3, label=text)
    ax.stairs(mass, edges, color=colour, lw=1.5, ls=":", label="their share of the weight")
    ax.axvline(0.0, color="0.35", ls="--", lw=1.2)
    ax.set(xlabel=r"$\log_{10}$ (weight / mean weight)", ylabel="fraction per bin")
    ax.autoscale(axis="y")
    ax.set_ylim(0.0, 1.15 * ax.get_ylim()[1])
    ax.legend(framealpha=0.9, edgecolor="none", loc="upper left")  # the dashed line passes behind
    return ax


def pareto_tail(log_weights: ArrayLike, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The largest weights over their rank, with what the fitted Pareto distribution expects.

    That is of shape k, :func:`~openmm_vtdis.ensemble.pareto_k`, for the excess over the weight
    below the tail, and of the tail's own median. The steeper, the more do few samples carry: the
    dashed line is k = 0.7, above which estimates cannot be trusted.
    """
    ax = axes_of(ax)
    lw = checks.log_weights(log_weights)
    lw = np.sort(lw[np.isfinite(lw)])[::-1]
    k = pareto_k(lw) if len(lw) else math.nan
    if not math.isfinite(k):
        raise ValueError(f"pareto_tail: expected log weights with a tail, got a k of {k}")
    n_tail = int(3.0 * math.sqrt(len(lw))) if len(lw) > 225 else len(lw) // 5
    rank = np.arange(1, n_tail + 1)
    share = np.exp(lw[:n_tail] - np.logaddexp.reduce(lw))
    name = "samples" if label is None else label
    (line,) = ax.loglog(rank, share, ls="", marker="o", ms=3.5, label=name)
    cutoff = math.exp(lw[n_tail] - np.logaddexp.reduce(lw))
    above = (rank - 0.5) / n_tail
    for shape, style, text in ((k, "-", f"Pareto $k$ = {k:.2f}"), (0.7, "--", "$k$ = 0.7")):
        excess = boxcox(above, -shape) / boxcox(0.5, -shape)  # (p^-k - 1) / k, -log p for k = 0
        expected = cutoff + (np.median(share) - cutoff) * excess
        colour = line.get_color() if style == "-" else "0.35"
        ax.plot(rank, expected, ls=style, color=colour, lw=1.5, label=text)
    ax.set(xlabel="rank of the weight", ylabel="share of all weight")
    ax.legend(frameon=False)
    return ax


def overlap_matrix(
    matrix: ArrayLike, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Overlap matrix of states (K, K), whose rows sum to one.

    :attr:`~openmm_vtdis.ensemble.mbar.PooledEnsemble.overlap` gives it.

    Entries below 0.03 next to each other are too small for a free energy to be trusted.
    """
    o = np.asarray(matrix, dtype=np.float64)
    if o.ndim != 2 or o.shape[0] != o.shape[1] or not np.isfinite(o).all():
        raise ValueError(f"overlap_matrix: expected a square matrix, got shape {o.shape}")
    names = [str(k) for k in range(len(o))] if labels is None else list(labels)
    if len(names) != len(o):
        raise ValueError(f"overlap_matrix: expected {len(o)} labels, got {len(names)}")
    ax = axes_of(ax)
    ax.grid(False)
    ax.imshow(o, cmap="cividis", vmin=0.0, vmax=1.0)
    for i, row in enumerate(o):
        for j, value in enumerate(row):
            ax.text(
                j, i, f"{value:.2f}", ha="center", va="center",
                color="white" if value < 0.6 else "black",
            )  # fmt: skip
    ax.set_xticks(range(len(o)), names)
    ax.set_yticks(range(len(o)), names)
    return ax
