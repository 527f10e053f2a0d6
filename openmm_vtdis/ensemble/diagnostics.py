r"""Diagnostics from log weights alone: effective sample sizes, tails, log Z, standard errors.

With w_i = exp(log w_i) = unnormalised target / proposal, over n samples:

    log Z        = log mean_i w_i                        for x_i ~ proposal
    reverse ESS  = (sum_i w_i)^2 / (n sum_i w_i^2)       for x_i ~ proposal        (Eq. 12)
    forward ESS  = 1 / (mean_i w_i  mean_i w_i^-1)       for x_i ~ target          (Eq. 11)

Both are fractions in [0, 1] that estimate 1 / (1 + chi^2). The reverse one sees only where the
proposal goes: a mode that was never proposed leaves no trace in it, and a heavy tail makes it fall
with n. The forward one sees both. Everything is computed from log w, of any magnitude.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from arviz_stats.base import array_stats
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import quiet, reverse_ess

_LARGEST_SHARE = 0.1
"""Largest share of the weight that one sample may carry where weights are reliable."""
_FINITE_VARIANCE = 0.5
"""Pareto k above which weights have no variance, and a standard error from them is too small."""
MINIMUM_FOR_PARETO = 25
"""Fewest finite log weights that :func:`pareto_k` fits a tail to."""
_ALONE = 1.5
"""Effective samples below which one has nearly all the weight, and no error is known."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte Carlo estimate with its standard error.

    Attributes
    ----------
    value, stderr
        Two floats, or two arrays of one shape for a vector observable. A standard error is NaN if
        there are too few samples to tell.

    Examples
    --------
    >>> print(Estimate(3.0214, 0.2931))
    3.02 ± 0.29
    >>> round(Estimate(3.0, 0.3).z(3.6, 0.4), 3)
    -1.2
    """

    value: Any
    stderr: Any

    def __post_init__(self) -> None:
        value = np.array(self.value, dtype=np.float64)
        stderr = np.array(self.stderr, dtype=np.float64)
        if value.shape != stderr.shape or (stderr < 0.0).any():
            raise ValueError(
                "stderr: expected a non-negative standard error for every value, got "
                f"{self.stderr!r} for {self.value!r}"
            )
        value.flags.writeable = stderr.flags.writeable = False
        object.__setattr__(self, "value", value if value.ndim else float(value))
        object.__setattr__(self, "stderr", stderr if stderr.ndim else float(stderr))

    @quiet
    def z(self, reference: ArrayLike, reference_stderr: ArrayLike = 0.0) -> Any:
        """(value - reference) in joint standard errors; 0 where two exact values agree."""
        difference = np.asarray(self.value - np.asarray(reference, dtype=np.float64))
        error = np.hypot(self.stderr, np.asarray(reference_stderr, dtype=np.float64))
        z = np.where((difference == 0.0) & (error == 0.0), 0.0, difference / error)
        return z if z.ndim else float(z)

    def __str__(self) -> str:
        values, errors = np.ravel(self.value), np.ravel(self.stderr)
        texts = [_two_digits(v, s) for v, s in zip(values, errors, strict=True)]
        return texts[0] if np.ndim(self.value) == 0 else f"[{', '.join(texts)}]"


def _two_digits(value: float, stderr: float) -> str:
    """Print both to the second significant digit of the error."""
    if not (math.isfinite(stderr) and stderr > 0.0 and math.isfinite(value)):
        return f"{value:.6g} ± {stderr:.2g}"
    decimals = 1 - math.floor(math.log10(stderr))
    if not 0 <= decimals <= 12:
        return f"{value:.6g} ± {stderr:.2g}"
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


@dataclass(frozen=True)
class Diagnostics:
    """Diagnostics of a set of weights: how far they can be trusted.

    Attributes
    ----------
    n
        Number of samples.
    ess
        Reverse ESS, a fraction.
    largest_weight_share
        The largest normalised weight; NaN if all weights are zero.
    pareto_k
        Shape of the tail of the weights, see :func:`pareto_k`.
    n_zero_weight
        Samples of weight zero: energies that overflowed, wrong stereochemistry.
    n_outside
        Those of them that have a finite energy: they are outside the target.
    n_failed
        Those of them whose weight is not known to be zero: the network gave NaN on the way, or an
        energy is -inf. One is enough for a bias.
    n_without_energy
        Those of them that have a position and no energy (NaN): atoms in one place, or a force that
        raised an exception.
    """

    n: int
    ess: float
    largest_weight_share: float
    pareto_k: float
    n_zero_weight: int
    n_outside: int = 0
    n_failed: int = 0
    n_without_energy: int = 0

    @classmethod
    @quiet
    def of(
        cls,
        log_weights: ArrayLike,
        energies: ArrayLike | None = None,
        positions: ArrayLike | None = None,
    ) -> Diagnostics:
        """Diagnose raw log weights (n,), of samples with these energies (n,) and positions."""
        lw = checks.log_weights(log_weights)
        zero = np.isneginf(lw)
        u = np.full(len(lw), np.nan) if energies is None else np.asarray(energies)
        x = np.zeros((len(lw), 1)) if positions is None else np.asarray(positions)
        there = np.isfinite(x.reshape(len(lw), -1)).all(axis=1)
        peak = lw.max()
        share = math.exp(peak - logsumexp(lw)) if peak > -math.inf else math.nan
        return cls(
            n=len(lw),
            ess=reverse_ess(lw),
            largest_weight_share=share,
            pareto_k=pareto_k(lw),
            n_zero_weight=int(zero.sum()),
            n_outside=int((zero & there & np.isfinite(u)).sum()),
            n_failed=int((zero & (~there | np.isneginf(u))).sum()),
            n_without_energy=0 if energies is None else int((zero & there & np.isnan(u)).sum()),
        )

    @property
    def pareto_k_threshold(self) -> float:
        """min(0.7, 1 - 1 / log10 n): above it, estimates and their errors mislead.

        Vehtari et al., Pareto smoothed importance sampling, JMLR 25 (2024).
        """
        alive = self.n - self.n_zero_weight
        return min(0.7, 1.0 - 1.0 / math.log10(alive)) if alive > 1 else -math.inf

    @property
    def reliable(self) -> bool:
        """Whether the tail is light, no sample has a tenth of the weight, and none has failed."""
        return (
            self.pareto_k < self.pareto_k_threshold
            and self.largest_weight_share < _LARGEST_SHARE
            and self.n_failed == 0
        )

    def __str__(self) -> str:
        verdict = "reliable" if self.reliable else "NOT reliable"
        if self.reliable and self.pareto_k > _FINITE_VARIANCE:
            verdict = f"reliable, errors may be too small (k above {_FINITE_VARIANCE})"
        enough = self.n - self.n_zero_weight >= MINIMUM_FOR_PARETO
        if enough and math.isnan(self.pareto_k) and not self.n_failed:  # resampled
            verdict = "reliability unknown"
        wanted = f"< {self.pareto_k_threshold:.2f} wanted" if enough else "too few samples for one"
        share = f"{self.largest_weight_share:.2%}"
        if self.largest_weight_share >= _LARGEST_SHARE:
            share += f" (< {_LARGEST_SHARE:.0%} wanted)"
        parts = (
            (self.n_outside, "outside the target"),
            (self.n_without_energy, "without an energy"),
            (self.n_failed, "failed: none wanted"),
        )
        zero = ", ".join(f"{number} {what}" for number, what in parts if number)
        zero = f" ({zero})" if zero else ""
        return (
            f"{self.n} samples, ESS {self.ess:.2%} ({self.n * self.ess:.1f} effective), largest "
            f"weight {share}, Pareto k {self.pareto_k:.2f} "
            f"({wanted}), {self.n_zero_weight} of weight zero{zero}: {verdict}"
        )


def is_alone(log_weights: ArrayLike) -> bool:
    """Whether one of (n,) samples has nearly all the weight, so that no error can be estimated.

    >>> is_alone([5.0, 0.0, 0.0]), is_alone([5.0, 5.0, 0.0])
    (True, False)
    """
    lw = checks.log_weights(log_weights)
    return len(lw) * reverse_ess(lw) < _ALONE


@quiet
def log_mean_weight(log_weights: ArrayLike) -> Estimate:
    """log mean w with the error std(w) / (mean(w) sqrt n) of the delta method.

    That is about 1 where one sample has all the weight, whatever it misses: the error is then NaN,
    see :func:`is_alone`.

    Raises
    ------
    ValueError
        If all weights are zero.
    """
    lw = checks.log_weights(log_weights)
    n = len(lw)
    value = float(logsumexp(lw)) - math.log(n)
    if value == -math.inf:
        raise ValueError(f"log_weights: expected a weight above zero, got {n} of -inf")
    if is_alone(lw):
        return Estimate(value, math.nan)
    ratio = np.exp(lw - value)  # w / mean(w), at most n
    return Estimate(value, float(ratio.std(ddof=1)) / math.sqrt(n))


@quiet
def pareto_k(log_weights: ArrayLike) -> float:
    """Shape k of the generalised Pareto distribution fitted to the largest of (n,) log weights.

    The weights have moments up to 1/k: a finite variance needs k < 0.5, estimates are usable up to
    k = 0.7, a finite mean needs k < 1. Weights of zero are left out.

    Returns
    -------
    float
        NaN with fewer than 25 non-zero weights; -inf if the largest ones are all equal; +inf if
        a quarter of the tail cannot be told from the weights below it, because of ties or because
        it underflows beside the largest one, so that there is nothing to fit.
    """
    lw = checks.log_weights(log_weights)
    lw = lw[np.isfinite(lw)]
    n = len(lw)
    if n < MINIMUM_FOR_PARETO:
        return math.nan
    # The tail that psislw fits, preceded by its cutoff. Where a quarter of the tail equals the
    # cutoff in floating point the fit is 0 / 0, and psislw returns its prior: a harmless k of
    # about 0.05, even for a single sample that outweighs all others.
    n_tail = int(3.0 * math.sqrt(n)) if n > 225 else n // 5
    tail = np.sort(lw)[-n_tail - 1 :] - lw.max()
    if tail[1] > -1e-12:
        return -math.inf
    if math.exp(tail[int(n_tail / 4.0 + 0.5)]) == math.exp(tail[0]):
        return math.inf
    # The public function writes docstrings, of which there are none under "python -OO"
    public = sys.flags.optimize < 2
    _, k = array_stats.psislw(-lw) if public else array_stats._psislw(-lw, 1.0)
    return float(k)
