r"""-log Z from generated samples *and* target samples: Bennett's acceptance ratio.

Over whole trajectories of the diffusion, the generator is a state with a density that is known and
normalised, and the target noised by the forward process another one with the same Z as the target
itself. Their difference in free energy is -log Z, and the reduced work between the two is

    -log w    on generated samples,           +log w    on noised target samples,

so that BAR (Bennett 1976; Shirts et al. 2003) applies as it stands. It weighs either side by what
it knows: its error is below that of both one-sided averages,

    -log mean_p w    (generated)              log mean_q 1/w - log P    (target),

which come with it for comparison. (P is the share of generated samples that have weight: the others
are outside the target, of another handedness say, where no target sample can tell of them.) Its
*overlap* is 1 where the two states are one and 0 where they do not meet (1 minus the second
eigenvalue of the overlap matrix, Klimovich et al. 2015).

Frames of MD are correlated: g of them count as one. All m are used, each with the weight 1/g, so
that they count as m' = m / g. With f(x) = 1 / (1 + exp(-(log w + F + log m'/n))), the chance that x
is of the target's side, F = -log Z and its variance are

    n <f>_p = m' <1 - f>_q,        (n Var_p f + m' Var_q f) / S^2,
    S = n <f (1 - f)>_p + m' <f (1 - f)>_q,        overlap = S (1/n + 1/m'),

where g is the statistical inefficiency of f over the frames. (Thinning the frames to every g-th
instead leaves a slow part of log w correlated, under the white noise of the noising, and its errors
too small.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array, quiet
from openmm_vtdis.ensemble.diagnostics import Estimate, log_mean_weight
from openmm_vtdis.runtime.optional_imports import quiet_pymbar

LEAST_COMMON, LARGE = 10.0, 0.1
"""Fewest samples that two states must have in common (overlap times the smaller number), and an
overlap that is enough with any number."""
LEAST_BLOCKS = 100


@dataclass(frozen=True, eq=False)
class FreeEnergy(Estimate):
    """-log Z in kT by BAR, with its standard error and diagnostics.

    Attributes
    ----------
    value, stderr
        -log Z, configurations in nm, and one standard error of the asymptotic theory.
    bootstrap_stderr
        The same by resampling both sides; NaN without bootstraps.
    overlap
        Overlap of the two sides, between 0 and 1.
    from_generated, from_target
        The one-sided averages.
    n_generated, n_target
        Samples of either side.
    statistical_inefficiency
        g: target samples that count as one.
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
        """Difference of the one-sided averages in standard errors.

        It is far from zero where the two sides do not belong together (are of two tunings, say), or
        where a tail has not been sampled.
        """
        return float(self.from_generated.z(self.from_target.value, self.from_target.stderr))

    def __str__(self) -> str:
        return (
            f"{super().__str__()} kT (overlap {self.overlap:.3f}; {self.n_generated} generated "
            f"samples, {self.n_target} target samples of statistical inefficiency "
            f"{self.statistical_inefficiency:.1f}; {self._sides()})"
        )

    def _sides(self) -> str:
        """What the one-sided averages say."""
        alone = [
            side
            for side, average in (
                ("generated", self.from_generated),
                ("target", self.from_target),
            )
            if math.isnan(average.stderr)
        ]
        if alone:
            sides = " and the ".join(alone)
            return f"a single sample has nearly all the weight on the {sides} side"
        return f"the two sides alone differ by {abs(self.disagreement):.1f} standard errors"


@quiet
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
        (n,) log weights of generated samples; -inf is a sample of no weight.
    target_log_weights
        (m,) log weights of noised target samples, in the order of the MD.
    subsample
        Count g frames as one, g being measured.
    n_bootstraps, seed
        Bootstraps of the second error estimate (by blocks of frames), and their seed; 0 bootstraps
        leave it out.

    Raises
    ------
    ValueError
        If a target sample has no weight, or the two hardly overlap.
    """
    generated = checks.log_weights(log_weights)
    target = checks.log_weights(target_log_weights)
    if n_bootstraps != 0:
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
    g = 1.0
    if checks.boolean("subsample", subsample):
        g = statistical_inefficiency(_is_target(generated, target, g)[1])
    value = _root(generated, target, g)
    ours, theirs = _is_target(generated, target, g, value)
    n, m = len(generated), len(target) / g
    common = n * (ours * (1.0 - ours)).mean() + m * (theirs * (1.0 - theirs)).mean()
    overlap = float(common * (1.0 / n + 1.0 / m))
    check_overlap("free_energy", overlap, min(n, m))
    bootstrap = math.nan
    if n_bootstraps:
        rng = np.random.default_rng(seed)
        again = [
            _root(rng.choice(generated, n), _blocks(target, g, rng), g) for _ in range(n_bootstraps)
        ]
        bootstrap = float(np.std(again, ddof=1))
    generated_side, target_side = log_mean_weight(generated), log_mean_weight(-target)
    inside = float(np.isfinite(generated).mean())
    target_error = math.sqrt(g * target_side.stderr**2 + (1.0 / inside - 1.0) / n)
    return FreeEnergy(
        value=value,
        stderr=float(np.sqrt(n * ours.var() + m * theirs.var()) / common),
        overlap=overlap,
        bootstrap_stderr=bootstrap,
        from_generated=Estimate(-generated_side.value, generated_side.stderr),
        from_target=Estimate(target_side.value - math.log(inside), target_error),
        n_generated=n,
        n_target=len(target),
        statistical_inefficiency=g,
    )


def _is_target(
    generated: Array, target: Array, g: float, value: float | None = None
) -> tuple[Array, Array]:
    """f on either side; at the root if no value of -log Z is given."""
    value = _root(generated, target, g) if value is None else value
    shift = value + math.log(len(target) / g / len(generated))
    return expit(generated + shift), expit(target + shift)


def _root(generated: Array, target: Array, g: float) -> float:
    """-log Z by BAR's equation, whose two sides are monotonic in it."""
    offset = math.log(len(target) / g / len(generated))
    finite = np.concatenate([generated[np.isfinite(generated)], target])

    def excess(value: float) -> float:
        ours, theirs = expit(generated + (value + offset)), expit(-target - (value + offset))
        return float(ours.sum() - theirs.sum() / g)

    margin = 50.0 + abs(offset) + math.log(len(finite))
    return float(brentq(excess, -finite.max() - margin, -finite.min() + margin))


def _blocks(series: Array, g: float, rng: np.random.Generator) -> Array:
    """Bootstrap a series: as many frames again, in blocks of a few g neighbours, from a ring."""
    length = min(len(series), max(1, math.ceil(5.0 * (g - 1.0))))
    starts = rng.integers(len(series), size=math.ceil(len(series) / length))
    index = (starts[:, None] + np.arange(length)) % len(series)
    return series[index.ravel()[: len(series)]]


# -- shared with the pool of several states ----------------------------------------------------
def check_overlap(name: str, overlap: float, n_samples: float) -> None:
    """Raise ValueError where an estimate would rest on next to nothing."""
    if not (overlap >= LARGE or overlap * n_samples >= LEAST_COMMON):
        raise ValueError(
            f"{name}: expected states that overlap, got an overlap of {overlap:.2g} with "
            f"{n_samples:.0f} samples: about {overlap * n_samples:.1f} of them in common, of "
            f"{LEAST_COMMON:.0f} needed. Draw more, take more steps, or train longer"
        )


@quiet
def statistical_inefficiency(series: Array) -> float:
    """Number of frames of a series (n,) that count as one, at least 1.

    The estimator of pymbar (Chodera et al. 2007) sums the autocorrelation up to its first zero,
    which white noise makes come early. It is therefore applied to means of blocks too, in which
    noise is less and a slow part is not, as long as there are ``LEAST_BLOCKS`` of them; the largest
    result counts.
    """
    if len(series) < 3 or np.ptp(series) == 0.0:
        return 1.0
    found, size = [], 1
    with quiet_pymbar() as pymbar:
        while size == 1 or len(series) // size >= LEAST_BLOCKS:
            blocks = series[: len(series) // size * size].reshape(-1, size).mean(axis=1)
            ratio = size * blocks.var() / series.var()
            found.append(ratio * pymbar.timeseries.statistical_inefficiency(blocks))
            size *= 2
    return float(max(1.0, *found))
