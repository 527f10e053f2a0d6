r"""What a family of reverse covariances is: sample, log density, statistics, fit.

The reverse kernel is p(x_{n-1} | x_n) = N_x(mu_n, Sigma_n). A family gives, at each step, the
Gaussian of the residual R = x_{n-1} - mu_n (:meth:`Covariance.at`). Along *forward* trajectories R
does not depend on the family's parameters, so that a fit needs only the family's sufficient
statistics of R (:meth:`Covariance.statistics`), from which :meth:`Covariance.cost` makes minus the
log density for any parameters.

A family is given x_n, D(x_n, t_n), both noise levels and the denoiser in a :class:`ReverseStep`, so
that one that depends on the state implements the same methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import LOG_2PI, Space
from openmm_vtdis.diffusion.schedule import Schedule

Energy = Callable[[Tensor], Tensor]
"""Minus the log density up to a constant, in model units: (B, M, D) -> (B,) float64.

One that has a method ``derivatives(x)``, gradient (B, M, D) and Hessian (B, M, D, M, D), is asked
for them; others are differentiated."""
_ROUGHNESS = 1e-2
Denoiser = Any  # the protocol lives in denoiser.py; covariances only pass it on


@dataclass(frozen=True)
class Posterior:
    """A Gaussian approximation of p(x_0 | x_n).

    Attributes
    ----------
    mean
        (B, M, D).
    values, vectors
        Eigenvalues (B, d), positive, and eigenvectors (B, d, d) of C = Cov[x_0 | x_n] / t_n^2, in
        reduced coordinates.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def split(self, sizes: list[int]) -> list[Posterior]:
        """Into posteriors of so many configurations each."""
        parts = (part.split(sizes) for part in (self.mean, self.values, self.vectors))
        return [Posterior(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class ReverseStep:
    """What a reverse kernel may depend on.

    Attributes
    ----------
    n
        Step number, 1..N: from x_n to x_{n-1}.
    t, s
        t_n and t_{n-1}.
    x, denoised
        x_n and D(x_n, t_n), (B, M, D).
    denoiser, energy
        For families that differentiate them; the energy may not be known.
    pairs
        (B, P, 4) coefficients of the denoiser's pair head, for families that use them.
    posterior
        From the energy, at noise levels where the kernel goes by it: ``denoised`` is then its mean,
        and families that depend on the state take its C for theirs.
    """

    n: int
    t: float
    s: float
    x: Tensor
    denoised: Tensor
    denoiser: Denoiser
    energy: Energy | None = None
    pairs: Tensor | None = None
    posterior: Posterior | None = None

    @property
    def ratio(self) -> float:
        """r_n = t_{n-1}^2 / t_n^2."""
        return (self.s / self.t) ** 2

    @property
    def variance(self) -> float:
        """DDPM variance v_n (Eq. 21)."""
        return self.s**2 * (1.0 - self.ratio)


class Scatter(Protocol):
    """Zero-mean Gaussian of the residual x_{n-1} - mu_n at one step."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, M, D) float64."""
        ...

    def log_prob(self, residual: Tensor) -> Tensor:
        """(B, M, D) -> (B,) float64."""
        ...


@dataclass(frozen=True)
class MatrixScatter:
    """Gaussian with covariance v (root root^T) (x) I_D on the space; whitening inverts root there.

    Attributes
    ----------
    root, whitening
        (M, M) float64.
    log_det
        log det of the precision whitening^T whitening restricted to the space (one of D factors).
    """

    space: Space
    root: Tensor
    whitening: Tensor
    log_det: float
    variance: float

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        noise = self.space.standard_normal(n, generator)
        return math.sqrt(self.variance) * (self.root.to(noise) @ noise)

    def log_prob(self, residual: Tensor) -> Tensor:
        white = self.whitening.to(residual) @ residual
        square = white.square().sum(dim=(-2, -1)) / self.variance
        constant = self.space.dim * (math.log(self.variance) + LOG_2PI)
        return -0.5 * (square - self.space.n_dims * self.log_det + constant)


def roughness(parameters: Tensor, schedule: Schedule) -> Tensor:
    """A price in nats on parameters (N, P) that jump from step to step: a scalar, convex.

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
    """Something of the reverse kernel that is fitted to forward trajectories in one pass.

    Attributes
    ----------
    space, labels
        Where residuals live, and the class of each particle (K classes, 0..K-1).
    parameters
        (N, P) float64, the fitted parameters of each step; (1, P) where they do not depend on it.
    """

    uses_pairs: ClassVar[bool] = False
    """Whether steps need the coefficients of the denoiser's pair head."""

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
        """What a fit adds to its objective, in nats: a convex scalar."""
        return parameters.new_zeros(())


class Covariance(Fittable):
    """A family of reverse covariances, with its fitted parameters."""

    kind: ClassVar[str]

    @abstractmethod
    def at(self, step: ReverseStep) -> Scatter:
        """The Gaussian of the residual at a step."""

    @abstractmethod
    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        """Parameters of Sigma_n = v_n I, or near it where that is no point to start a fit from."""

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

    def resampled(self, old: Schedule, new: Schedule) -> Self:
        """The family fitted for the grid ``old``, on another grid.

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
    """A family with one more setting: a rank."""

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
