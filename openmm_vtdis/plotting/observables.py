"""Figures of energies and other observables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from openmm_vtdis.core import checks
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.plotting.style import (
    BLUE,
    ORANGE,
    RED,
    axes_of,
    density_of,
    energy_range,
)


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
    ax = axes_of(ax)
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
        edges = np.linspace(*energy_range(ensemble, raw, reference), bins + 1)
    else:
        edges = np.asarray(bins, dtype=np.float64)
    if reference is not None:
        ax.stairs(density_of(reference, edges), edges, color=BLUE, fill=True, alpha=0.3)
        ax.stairs(density_of(reference, edges), edges, color=BLUE, lw=1.5, label="reference")
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
        Bins in either direction.
    depth
        Free energy at which the colours end, kT.
    """
    ax = axes_of(ax)
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
        (k,), (k + 1,), (k,) from :meth:`~openmm_vtdis.WeightedEnsemble.histogram`. Empty bins are
        gaps.
    label
        Name in the legend.
    """
    ax = axes_of(ax)
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
