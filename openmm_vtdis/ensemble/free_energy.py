r"""-log Z from generated samples *and* target samples: Bennett's acceptance ratio.

Over whole trajectories of the diffusion, the generator is a state with a density that is known and
normalised, and the target noised by the forward process another one with the same Z as the target
itself. Their difference in free energy is -log Z, and the reduced work between the two is

    -log w    on generated samples,           +log w    on noised target samples,

so that BAR (Bennett 1976; Shirts et al. 2003) applies as it stands. It weighs either side by what
it knows: its error is below that of both one-sided averages,

    -log mean_p w    (generated)              log mean_q 1/w    (target),

which come with it for comparison. Its *overlap* is 1 where the two states are one and 0 where they
do not meet (1 minus the second eigenvalue of the overlap matrix, Klimovich et al. 2015).

Frames of MD are correlated. What enters the estimate is f(log w), f the Fermi function of BAR; the
statistical inefficiency of that series says how many frames count as one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit

from openmm_vtdis import checks
from openmm_vtdis.ensemble.diagnostics import Array, Estimate, check_log_weights, log_mean_weight

LEAST_COMMON = 10.0
"""Fewest samples, overlap times the smaller number, that two states must have in common."""
_NOTHING = 700.0
"""Reduced energy above all others at which a sample has no weight in double precision."""


@dataclass(frozen=True, eq=False)
class FreeEnergy(Estimate):
    """-log Z in kT by BAR, with its standard error and what to judge it by.

    Attributes
    ----------
    value, stderr
        -log Z, configurations in nm, and one standard error of the asymptotic theory.
    bootstrap_stderr
        The same by resampling both sides; NaN without bootstraps.
    overlap
        Between 0 and 1.
    from_generated, from_target
        The one-sided averages.
    n_generated, n_target
        Samples used of either side.
    statistical_inefficiency
        Target samples given for each one used.
    """

    overlap: float
    bootstrap_stderr: float
    from_generated: Estimate
    from_target: Estimate
    n_generated: int
    n_target: int
    statistical_inefficiency: float

    @property
    def disagreement(self) -> float:
        """One-sided averages apart, in their standard errors: far from zero where the two sides do
        not belong together (of two tunings, say), or where a tail has not been sampled.
        """
        return float(self.from_generated.z(self.from_target.value, self.from_target.stderr))

    def __str__(self) -> str:
        return (
            f"{super().__str__()} kT (overlap {self.overlap:.3f}, {self.n_generated} generated and "
            f"{self.n_target} target samples, one in {self.statistical_inefficiency:.1f}; the two "
            f"sides alone differ by {abs(self.disagreement):.1f} standard errors)"
        )


def bar(
    log_weights: ArrayLike,
    target_log_weights: ArrayLike,
    *,
    subsample: bool = True,
    n_bootstraps: int = 100,
    seed: int = 0,
) -> FreeEnergy:
    """-log Z in kT from the raw log weights of both sides.

    Parameters
    ----------
    log_weights
        (n,) of generated samples; -inf is a sample of no weight.
    target_log_weights
        (m,) of noised target samples, in the order of the MD.
    subsample
        Use one frame in g, the statistical inefficiency, which is measured.
    n_bootstraps, seed
        Of the second error estimate; 0 leaves it out.

    Raises
    ------
    ValueError
        If a target sample has no weight, or the two hardly overlap.
    """
    generated = check_log_weights(log_weights)
    target = check_log_weights(target_log_weights)
    if n_bootstraps:
        checks.positive_integer("n_bootstraps", n_bootstraps, minimum=2)
    if min(len(generated), len(target)) < 2:
        raise ValueError(
            "free_energy: expected at least two samples of either side, got "
            f"{len(generated)} generated and {len(target)} target samples"
        )
    lost = int(np.isneginf(target).sum())
    if lost:
        raise ValueError(
            f"free_energy: expected target samples that have weight, got {lost} of {len(target)} "
            "with log weight -inf: they lie outside the target"
        )
    if np.isneginf(generated).all():
        raise ValueError("free_energy: expected a generated sample with weight, got none")
    g, value = 1.0, _root(generated, target)
    if checks.boolean("subsample", subsample):
        g = statistical_inefficiency(_is_target(target + value, generated, target))
        target = target[subsample_indices(len(target), g)]
        value = _root(generated, target)
    work = -np.concatenate([generated, target]) - value
    u, counts = np.stack([np.zeros_like(work), work]), [len(generated), len(target)]
    solution = solve_mbar(u, counts)
    overlap = float(solution.compute_overlap()["scalar"])
    check_overlap("free_energy", overlap, min(counts))
    result = solution.compute_free_energy_differences()
    bootstrap = math.nan
    if n_bootstraps:
        rng = np.random.default_rng(seed)
        sides = (generated, target)
        again = [_root(*(rng.choice(lw, len(lw)) for lw in sides)) for _ in range(n_bootstraps)]
        bootstrap = float(np.std(again, ddof=1))
    one_sided = log_mean_weight(generated)
    return FreeEnergy(
        value=value + float(result["Delta_f"][0, 1]),
        stderr=float(result["dDelta_f"][0, 1]),
        overlap=overlap,
        bootstrap_stderr=bootstrap,
        from_generated=Estimate(-one_sided.value, one_sided.stderr),
        from_target=log_mean_weight(-target),
        n_generated=len(generated),
        n_target=len(target),
        statistical_inefficiency=g,
    )


def _is_target(log_weights: Array, generated: Array, target: Array) -> Array:
    """Probability that a sample with this log(w / Z) is one of the target, not a generated one."""
    return expit(math.log(len(target) / len(generated)) + log_weights)


def _root(generated: Array, target: Array) -> float:
    """-log Z at which as many samples are expected to be of the target as there are.

    That is BAR's equation, monotonic in -log Z: pymbar starts from here, since its own solvers can
    take minutes from elsewhere.
    """
    everything = np.concatenate([generated, target])
    finite = everything[np.isfinite(everything)]

    def excess(value: float) -> float:
        return float(_is_target(everything + value, generated, target).sum()) - len(target)

    margin = 50.0 + math.log(len(everything))
    return float(brentq(excess, -finite.max() - margin, -finite.min() + margin))


# -- pymbar, and nothing else that it does -----------------------------------------------------
def solve_mbar(u: Array, n_samples: ArrayLike, initial: Array | None = None) -> Any:
    """``pymbar.MBAR`` of reduced energies (K, N), +inf allowed, and sample numbers (K,).

    Raises
    ------
    ValueError
        If its equations have no solution that can be found: the states do not overlap.
    """
    finite = np.isfinite(u)
    u = np.where(finite, u, u[finite].max() + _NOTHING)
    with quiet_pymbar() as pymbar:
        try:
            return pymbar.MBAR(u, np.asarray(n_samples), initial_f_k=initial)
        except (pymbar.utils.ParameterError, pymbar.utils.ConvergenceError) as error:
            raise ValueError(f"free_energy: expected states that overlap, got {error}") from error


def check_overlap(name: str, overlap: float, n_samples: int) -> None:
    """Raise ValueError where an estimate would rest on next to nothing."""
    if not overlap * n_samples >= LEAST_COMMON:
        raise ValueError(
            f"{name}: expected states that overlap, got an overlap of {overlap:.2g} with "
            f"{n_samples} samples: about {overlap * n_samples:.1f} of them in common, of "
            f"{LEAST_COMMON:.0f} needed. Draw more, take more steps, or train longer"
        )


def statistical_inefficiency(series: Array) -> float:
    """How many frames of a series (n,) count as one, at least 1 (Chodera et al. 2007)."""
    if len(series) < 3 or np.ptp(series) == 0.0:
        return 1.0
    with quiet_pymbar() as pymbar:
        return float(pymbar.timeseries.statistical_inefficiency(series))


def subsample_indices(n: int, g: float) -> Array:
    """Every g-th of n frames: integer positions."""
    return np.unique(np.round(np.arange(0.0, n - 0.5, g)).astype(int))


@contextmanager
def quiet_pymbar() -> Iterator[Any]:
    """The pymbar module, imported without its banner, and without a trace in numpy's settings."""
    names = ("pymbar.mbar_solvers", "pymbar.timeseries")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with np.errstate():
            import pymbar
            import pymbar.timeseries

            yield pymbar
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
