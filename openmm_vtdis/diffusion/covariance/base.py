r"""Families of reverse covariances: the interface to draw, weigh and fit.

The reverse kernel is p(x_{n-1} | x_n) = N_x(mu_n, Sigma_n). A family gives, at each step, the
Gaussian of the residual R = x_{n-1} - mu_n (:meth:`Covariance.at`). Along *forward* trajectories R
does not depend on the family's parameters, so that a fit needs only the family's sufficient
statistics of R (:meth:`Covariance.statistics`), from which :meth:`Covariance.cost` makes minus the
log density for any parameters.

A family is given x_n, both noise levels and an estimate of the posterior in a :class:`ReverseStep`;
it says how the latter is to be made (:meth:`Fittable.estimator`), so that one that depends on the
state implements the same methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core import checks
from openmm_vtdis.core.registry import Registry
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.gaussians import Scatter
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.base import Estimator, MeanEstimator, Posterior
from openmm_vtdis.diffusion.schedule import Schedule

_ROUGHNESS = 1e-2


@dataclass(frozen=True)
class ReverseStep:
    """One step of the reverse process: everything that its Gaussian may depend on.

    Attributes
    ----------
    n
        Step number, 1..N: from x_n to x_{n-1}.
    t, s
        t_n and t_{n-1}.
    x
        x_n, (B, M, D).
    posterior
        The estimate of p(x_0 | x_n).
    """

    n: int
    t: float
    s: float
    x: Tensor
    posterior: Posterior

    @property
    def denoised(self) -> Tensor:
        """Estimate of the posterior's mean, D(x_n, t_n) by default: (B, M, D)."""
        return self.posterior.mean

    @property
    def ratio(self) -> float:
        """r_n = t_{n-1}^2 / t_n^2."""
        return (self.s / self.t) ** 2

    @property
    def variance(self) -> float:
        """DDPM variance v_n (Eq. 21)."""
        return self.s**2 * (1.0 - self.ratio)


def roughness(parameters: Tensor, schedule: Schedule) -> Tensor:
    """Convex penalty in nats, a scalar, on parameters (N, P) that jump from step to step.

    ``_ROUGHNESS`` N^2 times the sum of squared second differences. A fit has noise, which costs
    about N P / S nats where each of N steps learns from S trajectories for itself; but steps that
    follow each other are alike. Where the grid has a second difference of its own, in
    log (1 - r) / r, that much of one is free.
    """
    n = len(parameters)
    if n < 3:
        return parameters.new_zeros(())
    free = schedule.widening.log().diff(n=2).abs()[:, None]
    excess = (parameters.diff(n=2, dim=0).abs() - free).clamp_min(0.0)
    return _ROUGHNESS * n**2 * excess.square().sum()


class Fittable(ABC):
    """A part of the reverse process that is fitted to forward trajectories in one pass.

    Attributes
    ----------
    space, labels
        The space of the residuals, and the class of each particle (K classes, 0..K-1).
    parameters
        (N, P) float64, the fitted parameters of each step; (1, P) where they do not depend on it.
    """

    def __init__(self, space: Space, labels: Sequence[int], parameters: Tensor) -> None:
        self.space = space
        self.labels = tuple(int(label) for label in labels)
        if len(self.labels) != space.n_particles or sorted(set(self.labels)) != list(
            range(len(set(self.labels)))
        ):
            raise ValueError(
                f"labels: expected {space.n_particles} integers that use every class 0..K-1, "
                f"got {labels!r}"
            )
        self.parameters = torch.as_tensor(parameters, dtype=torch.float64)

    def estimator(self, denoiser: Denoiser, energy: Energy | None) -> Estimator:
        """Estimator of the posterior of x_0 for its steps; by default the denoiser's mean.

        Raises
        ------
        ValueError
            If the denoiser or the energy lacks what the estimator needs.
        """
        return MeanEstimator(denoiser)

    @abstractmethod
    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """Sufficient statistics of a residual (B, M, D), in units of v_n: (B, F) float64."""

    @abstractmethod
    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        """- sum_n log p(x_{n-1} | x_n) of each trajectory: statistics (S, N, F) -> (S,)."""

    @abstractmethod
    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """Starting parameters for a fit: the optimum under KL where it has a closed form."""

    @abstractmethod
    def with_parameters(self, parameters: Tensor) -> Self:
        """The same family with other parameters."""

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        """Smallest allowed value of each parameter, -inf where there is none."""
        return torch.full_like(parameters, -math.inf)

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        """Convex scalar in nats that a fit adds to its objective."""
        return parameters.new_zeros(())


class Covariance(Fittable):
    """A family of reverse covariances, with its fitted parameters."""

    kind: ClassVar[str]
    by_state: ClassVar[bool] = False
    """Whether it depends on x_n through a posterior estimate, which the energy may improve."""

    @classmethod
    def is_candidate(cls, denoiser: Denoiser, twice_differentiable: bool) -> bool:
        """Whether ``covariance="auto"`` tries it.

        ``twice_differentiable``: whether the energy is.
        """
        return False

    @classmethod
    def step_price(cls, dim: int) -> float:
        """Cost of a step in d = ``dim`` dimensions, in network evaluations."""
        return 1.0

    @abstractmethod
    def at(self, step: ReverseStep) -> Scatter:
        """The Gaussian of the residual at a step."""

    @abstractmethod
    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        """Parameters of Sigma_n = v_n I, or of a better start for a fit close to it."""

    @abstractmethod
    def eta(self, schedule: Schedule) -> Tensor:
        """Variance in units of v_n, averaged over the degrees of freedom of a class: (N, K)."""

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError if the parameters were fitted for another number of steps."""
        n = self.parameters.shape[0]
        if n not in (1, schedule.n_steps):
            raise ValueError(
                f"covariance: expected parameters for {schedule.n_steps} steps, got {n}; "
                "tune again for this schedule"
            )

    def carried(self, old: Schedule, new: Schedule) -> Self:
        """Carry a covariance that was fitted on the grid ``old`` over to another grid.

        Raises
        ------
        ValueError
            If its parameters belong to the steps of the old one.
        """
        self.check_schedule(new)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """JSON-able constructor options beyond labels."""
        return {}


class Ranked(Covariance):
    """Base of families that also have a rank."""

    def __init__(
        self, space: Space, labels: Sequence[int], parameters: Tensor, rank: int = 4
    ) -> None:
        super().__init__(space, labels, parameters)
        self.rank = checks.positive_integer("rank", rank)

    @property
    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters, self.rank)


COVARIANCES: Registry[Covariance] = Registry("covariances")
"""Families by their kind; others register with it, or by an entry point."""
