r"""Effective sample sizes from log weights, in log space, of any magnitude.

With w_i = exp(log w_i) = unnormalised target / proposal, over n samples:

    reverse ESS  = (sum_i w_i)^2 / (n sum_i w_i^2)       for x_i ~ proposal        (Eq. 12)
    forward ESS  = 1 / (mean_i w_i  mean_i w_i^-1)       for x_i ~ target          (Eq. 11)

Both are fractions in [0, 1] that estimate 1 / (1 + chi^2). The reverse one sees only where the
proposal goes; the forward one sees all of the target.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from openmm_vtdis.core import checks

Array = np.ndarray

quiet = np.errstate(all="ignore")
"""Decorator for computations with weights, which may underflow or be infinite: silences numpy's
floating-point warnings, whatever the caller has set."""


@quiet
def forward_ess(log_weights: ArrayLike) -> float:
    """Forward ESS, a fraction, from the log weights (n,) of noised *target* samples (Eq. 11).

    A weight of zero, which no target sample should have, makes 1/w infinite and the ESS zero.

    >>> round(forward_ess(np.log([3.0, 1.0])), 3)
    0.75
    """
    lw = checks.log_weights(log_weights)
    if np.isneginf(lw).any():
        return 0.0
    return float(np.exp(2.0 * math.log(len(lw)) - logsumexp(lw) - logsumexp(-lw)))


@quiet
def reverse_ess(log_weights: ArrayLike) -> float:
    """Reverse ESS, a fraction, from the log weights (n,) of generated samples (Eq. 12).

    >>> round(reverse_ess(np.log([3.0, 1.0])), 3)
    0.8
    """
    lw = checks.log_weights(log_weights)
    if np.isneginf(lw).all():
        return 0.0
    return float(np.exp(2.0 * logsumexp(lw) - logsumexp(2.0 * lw) - math.log(len(lw))))
