r"""Covariances that depend on the state: the shape of the reverse kernel at each x_n.

The exact reverse density is that of x_{n-1} = r x_n + (1 - r) x_0 + sqrt(v_n) xi with x_0 drawn
from the posterior given x_n. Its mean is the mu_n of Eq. 20. With C(x_n) = Cov[x_0 | x_n] / t_n^2
its covariance is

    Sigma_n(x_n) = v_n I + (1 - r)^2 t_n^2 C = v_n [ I + (1 - r) / r C ],

and the Gaussian with these two moments is the one closest to the truth (in KL from it). A family
says how it estimates C, a symmetric matrix in reduced coordinates; its negative eigenvalues are set
to zero, and two functions of the noise level are tuned:

    Sigma_n(x_n) = v_n [ a(t_n) I + c(t_n) (1 - r) / r C_+ ],         a = c = 1 untuned.

log a and log c are linear in log t between fixed knots, half a decade apart, so that few numbers
are fitted. A penalty keeps a knot where the trajectories say nothing of it, or nothing worth a
hundredth of a nat: a coarse grid has few levels between knots, and what they leave open would be
met by another grid. On that, c stays as it is; a - 1 stands for the denoiser's error, whose part of
the variance grows like (1 - r) / r, and is carried over in proportion.

In the eigenbasis of C the log density needs the eigenvalues and the squares of the residual's
components: these 2 d numbers a step are the statistics. If C turns with the configuration, so does
Sigma.

How C is estimated is another matter (:mod:`~openmm_vtdis.diffusion.posteriors`), and all that the
families differ in.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core.space import LOG_2PI
from openmm_vtdis.diffusion.covariance.base import COVARIANCES, Covariance, ReverseStep
from openmm_vtdis.diffusion.covariance.gaussians import (
    CholeskyScatter,
    EigenScatter,
    Scatter,
    components,
)
from openmm_vtdis.diffusion.denoiser import Denoiser, knows_pairs
from openmm_vtdis.diffusion.posteriors.base import DefinitePosterior, Estimator
from openmm_vtdis.diffusion.posteriors.hessian import HessianEstimator, hessian_price
from openmm_vtdis.diffusion.posteriors.jacobian import JacobianEstimator
from openmm_vtdis.diffusion.posteriors.pairwise import PairwiseEstimator
from openmm_vtdis.diffusion.schedule import Schedule

_FIRST_KNOT, _KNOTS_PER_DECADE, N_KNOTS = -3.0, 2.0, 11
"""log10 of the first knot's noise level; knots reach to 100."""
PAIRWISE_PRICE = 1.3
"""Cost of a "pairwise" step in network evaluations, rounded from ``benchmarks/step_time.py``."""
_PENALTY = 0.01
"""Penalty in nats on a knot that is off by a factor e, and on two that differ by one."""


class StateCovariance(Covariance):
    """Sigma_n(x_n) = v_n [a I + c (1 - r) / r C_+]; see the module.

    Parameters: log a and log c at the knots, (1, 2 K).
    """

    by_state: ClassVar[bool] = True

    def at(self, step: ReverseStep) -> Scatter:
        a, gain = self._factors(step)
        posterior = step.posterior
        if isinstance(posterior, DefinitePosterior):
            matrix = posterior.matrix * (gain * step.variance)
            matrix.diagonal(dim1=1, dim2=2).add_(a * step.variance)
            return CholeskyScatter(self.space, torch.linalg.cholesky_ex(matrix).L)
        values, vectors = posterior.spectrum()
        return EigenScatter(self.space, vectors, step.variance * (a + gain * values))

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """(B, 2 d): eigenvalues of C_+, and squares of the components of R over v_n."""
        values, vectors = step.posterior.spectrum()
        square = components(self.space, vectors, residual).square() / step.variance
        return torch.cat([values, square], dim=1)

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        values, square = statistics.chunk(2, dim=-1)
        a, c = self._scales(parameters, schedule.pairs)
        scale = a[:, None] + (c * schedule.widening)[:, None] * values
        terms = (square / scale + scale.log()).sum(dim=(1, 2))
        v = schedule.variances
        return 0.5 * (terms + self.space.dim * (v.log() + LOG_2PI).sum())

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """The optimum for an exact denoiser, a = c = 1."""
        return self.ddpm_parameters(schedule)

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        """Parameters a = c = 1. (DDPM itself has c = 0, a point that log c cannot leave.)"""
        return torch.zeros(1, 2 * N_KNOTS, dtype=torch.float64)

    def eta(self, schedule: Schedule) -> Tensor:
        """The part of the variance that does not depend on the state, a(t_n): (N, K)."""
        a, _ = self._scales(self.parameters, schedule.pairs)
        return a[:, None].expand(-1, len(set(self.labels)))

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        logs = parameters.reshape(2, N_KNOTS)
        return _PENALTY * (logs.square().sum() + logs.diff(dim=1).square().sum())

    def carried(self, old: Schedule, new: Schedule) -> Self:
        """Scale the excess of a (or 1/a) over one in proportion to (1 - r) / r; keep c."""
        levels = torch.logspace(
            _FIRST_KNOT, _FIRST_KNOT + (N_KNOTS - 1) / _KNOTS_PER_DECADE, N_KNOTS,
            dtype=torch.float64,
        )  # fmt: skip
        wider, narrower = (grid.interpolated(grid.widening.log(), levels) for grid in (new, old))
        log_a, log_c = self.parameters[0].chunk(2)
        excess = log_a.abs().expm1() * (wider - narrower).exp()
        log_a = torch.sign(log_a) * excess.log1p()
        return self.with_parameters(torch.cat([log_a, log_c])[None])

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)

    def _factors(self, step: ReverseStep) -> tuple[float, float]:
        """Factors of I and C_+ at one step: :meth:`_scales` without the overhead of tensors."""
        logs = self.parameters.detach().numpy().reshape(2, N_KNOTS)
        a, c = np.exp(logs @ _hats(np.array([step.t]))[:, 0]).tolist()
        return a, c * (1.0 - step.ratio) / step.ratio

    def _scales(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """a and c at levels (N, 2) = (t_{n-1}, t_n): (N,) each."""
        hats = torch.from_numpy(_hats(levels[:, 1].numpy()))
        a, c = (parameters.reshape(2, N_KNOTS) @ hats).exp()
        return a, c


def _hats(t: np.ndarray) -> np.ndarray:
    """Shares (K, N) of the knots at noise levels (N,): two for each level, which sum to one.

    Linear in log t between the knots, constant beyond them.
    """
    position = (np.log10(t) - _FIRST_KNOT) * _KNOTS_PER_DECADE
    apart = np.arange(N_KNOTS)[:, None] - position.clip(0.0, N_KNOTS - 1.0)
    return np.maximum(1.0 - np.abs(apart), 0.0)


@COVARIANCES.register
class Tweedie(StateCovariance):
    """C from products with the denoiser's Jacobian, d of them a step."""

    kind: ClassVar[str] = "tweedie"

    @classmethod
    def step_price(cls, dim: int) -> float:
        return 1.0 + 1.5 * dim

    def estimator(self, denoiser: Denoiser, energy: Energy | None) -> Estimator:
        return JacobianEstimator(denoiser)


@COVARIANCES.register
class Pairwise(StateCovariance):
    """C from the pair coefficients of the denoiser's head."""

    kind: ClassVar[str] = "pairwise"

    @classmethod
    def is_candidate(cls, denoiser: Denoiser, twice_differentiable: bool) -> bool:
        return knows_pairs(denoiser)

    @classmethod
    def step_price(cls, dim: int) -> float:
        return PAIRWISE_PRICE

    def estimator(self, denoiser: Denoiser, energy: Energy | None) -> Estimator:
        return PairwiseEstimator(denoiser)


@COVARIANCES.register
class Hessian(StateCovariance):
    """C from the Hessian of the energy at D(x_n)."""

    kind: ClassVar[str] = "hessian"

    @classmethod
    def is_candidate(cls, denoiser: Denoiser, twice_differentiable: bool) -> bool:
        return twice_differentiable

    @classmethod
    def step_price(cls, dim: int) -> float:
        return hessian_price(dim)

    def estimator(self, denoiser: Denoiser, energy: Energy | None) -> Estimator:
        if energy is None:
            raise ValueError(
                "covariance: expected a process that knows the energy of its target for "
                '"hessian", got one without'
            )
        return HessianEstimator(denoiser, energy)
