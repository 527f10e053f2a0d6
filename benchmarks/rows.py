"""Rows of results: how to make one of trajectories and samples, and how to choose the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from openmm_vtdis import WeightedEnsemble
from openmm_vtdis.ensemble import Diagnostics, forward_ess, pareto_k, reverse_ess

Row = dict[str, Any]


# -- making one -------------------------------------------------------------------------------
def with_error(
    estimate: Callable[[np.ndarray], float], *log_w: np.ndarray, n_draws: int = 100
) -> list[float]:
    """An ESS, or the difference of two with common random numbers, and its bootstrap error."""

    def value(index: np.ndarray | slice) -> float:
        found = [estimate(lw[index]) for lw in log_w]
        return found[0] if len(found) == 1 else found[1] - found[0]

    rng, n = np.random.default_rng(0), len(log_w[0])
    again = [value(rng.integers(n, size=n)) for _ in range(n_draws)]
    return [value(slice(None)), float(np.std(again))]


def forward_part(log_w: Tensor | np.ndarray) -> Row:
    """The part of a row that comes from forward trajectories."""
    lw = np.asarray(log_w)
    return {
        "forward_ess": with_error(forward_ess, lw),
        "forward_n": len(lw),
        "forward_pareto_k": pareto_k(lw),
    }


def reverse_part(ensemble: WeightedEnsemble) -> Row:
    """The part of a row that comes from generated samples."""
    about = ensemble.diagnostics()
    energy = ensemble.expectation(ensemble.reduced_energies)
    raw = ensemble.unweighted().expectation(ensemble.reduced_energies)
    log_z = ensemble.log_z()
    return {
        "reverse_ess": with_error(reverse_ess, ensemble.log_weights),
        "reverse_n": len(ensemble),
        "reverse_pareto_k": about.pareto_k,
        "largest_weight_share": about.largest_weight_share,
        "log_z": [float(log_z.value), float(log_z.stderr)],
        "energy": [float(energy.value), float(energy.stderr)],
        "raw_energy": [float(raw.value), float(raw.stderr)],
    }


# -- choosing one -----------------------------------------------------------------------------
def lower_ess(row: Row) -> tuple[float, float]:
    """The lowest ESS of all measured directions, and its standard error."""
    ways = [row[way] for way in ("reverse_ess", "forward_ess") if way in row]
    value, error = min(ways)
    return value, error


def per_step(row: Row) -> float:
    """Effective samples per step, for each sample drawn."""
    return lower_ess(row)[0] / row["n_steps"]


def reliable(row: Row) -> bool:
    """Whether the generated weights of a row are; without any, whether the frames' are."""
    way = "reverse" if "reverse_n" in row else "forward"
    about = Diagnostics(
        n=row[f"{way}_n"],
        ess=row[f"{way}_ess"][0],
        largest_weight_share=row.get("largest_weight_share", 0.0),
        pareto_k=row[f"{way}_pareto_k"],
        n_zero_weight=0,
    )
    return about.reliable


def most_effective(rows: list[Row]) -> Row:
    """The row with the most effective samples per step, of the reliable ones if there are any."""
    return max(list(filter(reliable, rows)) or rows, key=per_step)
