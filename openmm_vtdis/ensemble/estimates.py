"""Weighted means and histograms of observables, with standard errors.

With normalised weights W_i = w_i / sum_j w_j,

    <f>    = sum_i W_i f(x_i)              standard error  sqrt( sum_i W_i^2 (f(x_i) - <f>)^2 ).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array
from openmm_vtdis.core.rng import Seed, make_rng
from openmm_vtdis.ensemble.diagnostics import Estimate


def checked_values(name: str, raw: object, log_weights: Array) -> tuple[Array, Array]:
    """Values (n, ...) of an observable, and which samples have weight (n,).

    Raises
    ------
    ValueError
        If there is not one for each sample, or one that has weight is not finite.
    """
    values, n = checks.real_array(name, raw), len(log_weights)
    if values.ndim == 0 or len(values) != n:
        raise ValueError(
            f"{name}: expected one value per sample, first axis {n}, got an array of shape "
            f"{values.shape}"
        )
    alive = np.isfinite(log_weights)
    finite = np.isfinite(values).reshape(n, -1).all(axis=1)
    bad = np.flatnonzero(~finite & alive)
    if len(bad):
        raise ValueError(
            f"{name}: expected finite values wherever the log weight is, got NaN or infinity in "
            f"{len(bad)} of {n} samples, the first at index {bad[0]}"
        )
    return values, alive


def expectation(weights: Array, values: Array, alive: Array, no_error: bool) -> Estimate:
    """Mean of values (n, ...) under normalised weights (n,).

    ``alive`` (n,): those that have weight. ``no_error``: it is not known, and NaN.
    """
    v = values[alive]
    w = weights[alive].reshape(-1, *[1] * (v.ndim - 1))
    mean = (w * v).sum(axis=0)
    error = np.sqrt((w * w * (v - mean) ** 2).sum(axis=0))
    return Estimate(mean, np.full_like(error, np.nan) if no_error else error)


def histogram(
    weights: Array,
    values: Array,
    alive: Array,
    bins: int | Sequence[float] | Array,
    range: tuple[float, float] | None,
    no_error: bool,
) -> tuple[Array, Array, Array]:
    """Density (k,), edges (k + 1,) and standard errors (k,) of values (n,).

    Raises
    ------
    ValueError
        If there are several values a sample.
    """
    if values.ndim != 1:
        raise ValueError(f"histogram: expected one value per sample, got {values.shape}")
    v, w = values[alive], weights[alive]
    probability, edges = np.histogram(v, bins, range, weights=w)
    square, _ = np.histogram(v, edges, weights=w * w)
    rest = np.maximum((w * w).sum() - square, 0.0)
    variance = square * (1.0 - probability) ** 2 + rest * probability**2
    if no_error:
        variance = np.full_like(variance, np.nan)
    widths = np.diff(edges)
    return probability / widths, edges, np.sqrt(variance) / widths


def systematic(weights: Array, n: int, seed: Seed) -> Array:
    """Draw n indices in proportion to normalised weights (m,), in random order.

    Systematic resampling: sample i appears floor(n W_i) or ceil(n W_i) times.
    """
    rng = make_rng(seed)
    offset = torch.rand((), generator=rng, dtype=torch.float64, device="cpu").item()
    cumulative = np.cumsum(weights)
    points = np.minimum((np.arange(n) + offset) / n, np.nextafter(1.0, 0.0))
    index = np.searchsorted(cumulative / cumulative[-1], points, side="right")
    order: Array = torch.randperm(n, generator=rng, device="cpu").numpy()
    return index[order]
