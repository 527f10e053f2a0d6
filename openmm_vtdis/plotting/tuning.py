"""Figures of a tuning: variances and costs over the noise level."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from openmm_vtdis.plotting.style import (
    RED,
    axes_of,
)


def eta_profile(times: ArrayLike, eta: ArrayLike, ax: Axes | None = None) -> Axes:
    """Variance of the reverse kernels, in units of the DDPM variance, over the noise level.

    Parameters
    ----------
    times
        (N + 1,) noise levels t_0 < ... < t_N, of which step n is drawn at t_n; or the (N,) levels
        of the steps themselves. In model coordinates.
    eta
        (N,), or (N, K) for K classes of particles.
    """
    ax = axes_of(ax)
    t = np.asarray(times, dtype=np.float64)
    values = np.asarray(eta, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if t.ndim != 1 or values.ndim != 2 or len(t) - len(values) not in (0, 1):
        raise ValueError(
            "eta_profile: expected times of shape (N + 1,) or (N,) and eta of shape (N,) or "
            f"(N, K), got {t.shape} and {np.shape(eta)}"
        )
    t = t[len(t) - len(values) :]
    marker = "o" if len(t) <= 60 else None
    n_classes = values.shape[1]
    for k in range(n_classes):
        label = None if n_classes == 1 else f"class {k}"
        ax.plot(t, values[:, k], lw=1.5, marker=marker, ms=3.0, label=label)
    ax.axhline(1.0, color="0.35", ls="--", lw=1.2, label=r"DDPM ($\eta = 1$)")
    ax.set_xscale("log")
    ax.set(xlabel="noise level $t$ / model length", ylabel=r"variance scale $\eta_n$")
    ax.legend(frameon=False, ncols=1 if n_classes <= 8 else 2)
    return ax


def step_cost(
    levels: ArrayLike,
    cost: ArrayLike,
    times: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Cost C(t) of a step over the noise level, and where the steps of a grid are.

    Parameters
    ----------
    levels, cost
        (L,) each, as :func:`~openmm_vtdis.tuning.adaptive_schedule.step_cost` gives it: a step from
        t_n to t_{n-1} costs C (log t_n / t_{n-1})^2 nats.
    times
        (N + 1,) levels of a grid, drawn as ticks.
    """
    ax = axes_of(ax)
    t, c = np.asarray(levels, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if t.ndim != 1 or t.shape != c.shape or not (t > 0.0).all() or not np.isfinite(c).all():
        raise ValueError(
            "step_cost: expected positive levels and finite costs of one shape (L,), got "
            f"{t.shape} and {c.shape}"
        )
    ax.plot(t, c, lw=1.6)
    if times is not None:
        grid = np.asarray(times, dtype=np.float64)
        ax.plot(
            grid, np.full(grid.shape, 0.02), ls="", marker="|", ms=10.0, color=RED,
            transform=ax.get_xaxis_transform(), label=f"{len(grid) - 1} steps",
        )  # fmt: skip
        ax.legend(frameon=False)
    ax.set_xscale("log")
    ax.set(xlabel="noise level $t$ / model length", ylabel="cost $C$ / nats")
    ax.set_ylim(bottom=0.0)
    return ax
