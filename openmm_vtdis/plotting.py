"""Figures of the paper, from ensembles and log weights.

========================  ================================================  ========
function                  shows                                             paper
========================  ================================================  ========
energy_histogram          raw, reweighted and reference energies            Fig. 3
ess_curve                 ESS over the number of network evaluations        Fig. 1, 2
eta_profile               tuned variance over the noise level               Fig. 5
ess_versus_samples        whether ESS is stable in the number of samples    Fig. 6
weight_distribution       the weights themselves
ramachandran              free energy over two dihedrals, weighted          Fig. 4
free_energy_profile       free energy along a coordinate, with its error
pareto_tail               the largest weights, and the tail fitted to them
step_cost                 where in the noise levels steps are lost
overlap_matrix            which states of a pool know of each other
========================  ================================================  ========

Each function draws into ``ax``, or into a new figure if there is none, and returns the Axes, so
that figures compose and titles, limits and files stay with the caller. Colours are those of Okabe
and Ito, which stay distinct for colour-blind readers; lines also differ in style.

This module needs matplotlib (``pip install openmm-vtdis[plot]``); the package does not import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike
from scipy.special import boxcox

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import check_log_weights, forward_ess, reverse_ess
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.ensemble.diagnostics import pareto_k

BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
"""Okabe and Ito's colours, the most distinct first."""
_LEAST_SHOWN = -12.0
"""log10 of a weight over the mean below which it is not worth the room on an axis."""


def energy_histogram(
    ensemble: WeightedEnsemble,
    reference_energies: ArrayLike | None = None,
    ax: Axes | None = None,
    bins: int | Sequence[float] = 80,
) -> Axes:
    """Reduced energies of an ensemble: as generated, reweighted, and of reference samples.

    Parameters
    ----------
    ensemble
        Its samples of zero weight are part of the raw histogram if their energy is finite.
    reference_energies
        (m,) u(x) in kT of unweighted samples of the target, such as molecular dynamics.
    bins
        Edges, or their number over a range that holds all but the outermost energies. Densities
        count what lies outside.
    """
    ax = _axes(ax)
    energies = ensemble.reduced_energies
    raw = energies[np.isfinite(energies)]
    reference = None
    if reference_energies is not None:
        reference = np.asarray(reference_energies, dtype=np.float64)
        if reference.ndim != 1 or len(reference) == 0 or not np.isfinite(reference).all():
            raise ValueError(
                "reference_energies: expected a non-empty, finite array of shape (m,) in kT, got "
                f"shape {reference.shape}"
            )
    if np.ndim(bins) == 0:
        bins = checks.positive_integer("bins", bins)
        edges = np.linspace(*_energy_range(ensemble, raw, reference), bins + 1)
    else:
        edges = np.asarray(bins, dtype=np.float64)
    if reference is not None:
        ax.stairs(_density(reference, edges), edges, color=BLUE, fill=True, alpha=0.3)
        ax.stairs(_density(reference, edges), edges, color=BLUE, lw=1.5, label="reference")
    raw_density = np.histogram(raw, edges)[0] / len(ensemble) / np.diff(edges)
    ax.stairs(raw_density, edges, color=ORANGE, lw=1.5, ls="--", label="generated, raw")
    density, _, stderr = ensemble.histogram(energies, edges)
    ax.stairs(density, edges, color=RED, lw=1.8, label="generated, reweighted")
    centres = 0.5 * (edges[1:] + edges[:-1])
    low, high = np.maximum(density - stderr, 0.0), density + stderr
    ax.fill_between(centres, low, high, step="mid", color=RED, alpha=0.2, lw=0.0)
    ax.set(xlabel=r"reduced energy $u$ / $k_\mathrm{B}T$", ylabel="probability density")
    ax.set_xlim(edges[0], edges[-1])
    ax.autoscale(axis="y")
    ax.set_ylim(bottom=0.0)
    ax.legend(frameon=False)
    return ax


def eta_profile(times: ArrayLike, eta: ArrayLike, ax: Axes | None = None) -> Axes:
    """Variance of the reverse kernels in units of the DDPM variance, over the noise level.

    Parameters
    ----------
    times
        (N + 1,) noise levels t_0 < ... < t_N, of which step n is drawn at t_n; or the (N,) levels
        of the steps themselves. In units of the model's length.
    eta
        (N,), or (N, K) for K classes of particles.
    """
    ax = _axes(ax)
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
    ax = _axes(ax)
    _solid_and_dashed(ax, label, {k: (steps, v) for k, v in curves.items() if v is not None}, "o")
    ax.set(xlabel="network evaluations per sample")
    return _finish_ess(ax)


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
    ax = _axes(ax)
    forward_log_weights = forward_log_weights or {}
    for label in [*log_weights, *(k for k in forward_log_weights if k not in log_weights)]:
        curves = {}
        if label in forward_log_weights:
            lw = check_log_weights(forward_log_weights[label])
            curves["forward"] = _running(forward_ess, lw, n_points)
        if label in log_weights:
            lw = check_log_weights(log_weights[label])
            curves["reverse"] = _running(reverse_ess, lw, n_points)
        _solid_and_dashed(ax, label, curves, None)
    ax.set_xscale("log")
    ax.set(xlabel="number of samples $M$")
    return _finish_ess(ax)


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
    ax = _axes(ax)
    weights = ensemble.weights
    about = ensemble.diagnostics()
    shares = (ensemble.log_weights - ensemble.log_z().value) / math.log(10.0)
    alive = shares > _LEAST_SHOWN
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


def ramachandran(
    phi: ArrayLike,
    psi: ArrayLike,
    weights: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    bins: int = 60,
    depth: float = 8.0,
) -> Axes:
    """Free energy -log p over two dihedrals, in kT above its minimum; white where nothing came.

    Parameters
    ----------
    phi, psi
        (n,) radians, of all samples or frames; from -pi, as mdtraj gives them, or from 0.
    weights
        (n,) not negative, and not all zero; None: equal.
    bins
        In either direction.
    depth
        Where the colours end, kT.
    """
    ax = _axes(ax)
    x, y = np.asarray(phi, dtype=np.float64), np.asarray(psi, dtype=np.float64)
    w = np.ones(x.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or not x.shape == y.shape == w.shape:
        raise ValueError(
            "ramachandran: expected phi, psi and weights of one shape (n,), got "
            f"{x.shape}, {y.shape} and {w.shape}"
        )
    known = w > 0.0
    if not (known.any() and np.isfinite(w).all() and (w >= 0.0).all()):
        raise ValueError(
            "ramachandran: expected weights that are finite, not negative and not all zero (not "
            "their logarithms)"
        )
    largest = float(np.abs([x[known], y[known]]).max())
    if not largest <= 2.0 * math.pi:
        raise ValueError(f"ramachandran: expected angles in radians, up to 2 pi, got {largest:.4g}")
    turn = [-math.pi, math.pi]
    x, y = (np.remainder(angle + math.pi, 2.0 * math.pi) - math.pi for angle in (x, y))
    table, edges, _ = np.histogram2d(
        x[known], y[known], bins=bins, range=[turn, turn], weights=w[known]
    )
    with np.errstate(divide="ignore"):
        energy = -np.log(table / table.max())
    degrees = np.degrees(edges)
    image = ax.pcolormesh(
        degrees, degrees, np.ma.masked_invalid(energy).T, cmap="viridis", vmin=0.0, vmax=depth
    )
    ax.figure.colorbar(image, ax=ax, label=r"free energy / $k_\mathrm{B}T$", extend="max")
    ticks = [-180, -90, 0, 90, 180]
    ax.set(xlabel=r"$\phi$ / degrees", ylabel=r"$\psi$ / degrees", xticks=ticks, yticks=ticks)
    ax.grid(False)
    ax.set_aspect("equal")
    return ax


def free_energy_profile(
    density: ArrayLike,
    edges: ArrayLike,
    stderr: ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    label: str | None = None,
) -> Axes:
    """Free energy -log p along a coordinate, in kT above its minimum, with a band of one sigma.

    Parameters
    ----------
    density, edges, stderr
        (k,), (k + 1,), (k,) as :meth:`WeightedEnsemble.histogram` gives them. Empty bins are gaps.
    label
        For the legend.
    """
    ax = _axes(ax)
    p, x = np.asarray(density, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    error = np.zeros(p.shape) if stderr is None else np.asarray(stderr, dtype=np.float64)
    if p.ndim != 1 or error.shape != p.shape or x.shape != (len(p) + 1,) or not (p > 0.0).any():
        raise ValueError(
            "free_energy_profile: expected a density (k,) above zero somewhere, edges (k + 1,) "
            f"and stderr (k,), got {p.shape}, {x.shape} and {error.shape}"
        )
    seen = p > 0.0
    energy = np.full(p.shape, np.nan)
    energy[seen] = -np.log(p[seen] / p.max())
    centres = 0.5 * (x[1:] + x[:-1])
    (line,) = ax.plot(centres, energy, lw=1.6, label=label)
    if stderr is not None:
        sigma = np.full(p.shape, np.nan)
        sigma[seen] = error[seen] / p[seen]
        ax.fill_between(
            centres, energy - sigma, energy + sigma, color=line.get_color(), alpha=0.25, lw=0.0
        )
    ax.set(ylabel=r"free energy / $k_\mathrm{B}T$")
    if label is not None:
        ax.legend(frameon=False)
    return ax


def pareto_tail(log_weights: ArrayLike, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The largest weights over their rank, with what the fitted Pareto distribution expects.

    That is of shape k, :func:`~openmm_vtdis.ensemble.pareto_k`, for the excess over the weight
    below the tail, and of the tail's own median. The steeper, the more do few samples carry: the
    dashed line is k = 0.7, above which estimates cannot be trusted.
    """
    ax = _axes(ax)
    lw = check_log_weights(log_weights)
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
        (L,) each, as :func:`openmm_vtdis.tuning.adaptive_schedule.step_cost` gives it: a step from
        t_n to t_{n-1} costs C (log t_n / t_{n-1})^2 nats.
    times
        (N + 1,) levels of a grid, drawn as ticks.
    """
    ax = _axes(ax)
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


def overlap_matrix(
    matrix: ArrayLike, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Overlap of states, as :attr:`PooledEnsemble.overlap` gives it: (K, K), rows that sum to one.

    Entries below 0.03 next to each other are too small for a free energy to be trusted.
    """
    o = np.asarray(matrix, dtype=np.float64)
    if o.ndim != 2 or o.shape[0] != o.shape[1] or not np.isfinite(o).all():
        raise ValueError(f"overlap_matrix: expected a square matrix, got shape {o.shape}")
    names = [str(k) for k in range(len(o))] if labels is None else list(labels)
    if len(names) != len(o):
        raise ValueError(f"overlap_matrix: expected {len(o)} labels, got {len(names)}")
    ax = _axes(ax)
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


# -- parts ------------------------------------------------------------------------------------
def _axes(ax: Axes | None) -> Axes:
    """The given axes, or new ones; colours and grid are set where nothing has been drawn yet."""
    if ax is None:
        _, ax = plt.subplots(figsize=(5.0, 3.6), layout="constrained")
    if not ax.has_data():
        ax.set_prop_cycle(color=PALETTE)
        ax.grid(True, color="0.9", lw=0.6)
        ax.set_axisbelow(True)
    return ax


def _solid_and_dashed(
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


def _finish_ess(ax: Axes) -> Axes:
    ax.set_ylabel("effective sample size")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.autoscale(axis="y")  # an earlier curve has fixed the limits
    ax.set_ylim(bottom=0.0)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return ax


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Density over the edges of all values (m,), those outside included in the norm."""
    return np.histogram(values, edges)[0] / len(values) / np.diff(edges)


def _energy_range(
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


def _running(
    ess: Callable[[np.ndarray], float], lw: np.ndarray, n_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample sizes m spread over log m from 10 (or 1) to n, and the ESS of the first m."""
    n = len(lw)
    sizes = np.unique(np.geomspace(min(10, n), n, n_points).round().astype(int))
    return sizes, np.array([ess(lw[:m]) for m in sizes])
