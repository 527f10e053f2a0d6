r"""Covariances of the reverse kernel, one class per family.

All families here are constant in x and have the form Sigma_n = v_n (B_n (x) I_D), which makes the
reverse kernel E(3)-equivariant (paper, App. B); B_n respects the class labels of the particles.
Densities are those of the reduced coordinates (Eq. 23), so what is inverted is the restriction of
B_n to the space, never B_n itself (Eq. 24 is right only where B_n commutes with the projector).

*Which matrices respect the labels.* Matrices on the space that commute with every permutation
inside the classes split, by Schur's lemma, into

    within a class L:  a multiple of the identity on { z in class L, sum z = 0 },  dimension m_L - 1
    between classes:   any matrix on the normalised class sums  e_L . z,  e_L = 1_L / sqrt(m_L),
                       k = K dimensions, or K - 1 where the centre of mass is removed,

and the inverse has the same form. A family therefore needs only to give, per step, the precision
lambda_L of each class (K,) and a Cholesky factor C of the precision between classes, G = C C^T
(k, k). For identical particles with zero CoM k = 0, and all families are isotropic.

*Why precisions.* Along forward trajectories the residual R = x_{n-1} - mu_n does not depend on the
covariance, and -log p = 1/2 tr(Lambda S) - 1/2 log det Lambda + const is convex in Lambda, with
S = R R^T / v_n. The statistics of a trajectory are all that :mod:`~openmm_vtdis.diffusion.tuning`
needs.

A state-dependent family implements the same four methods: it is given x_n, D(x_n, t_n), both noise
levels and the denoiser in a :class:`ReverseStep`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis import checks
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.geometry import LOG_2PI, Space

Denoiser = Any  # the protocol lives in denoiser.py; covariances only pass it on


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
    denoiser
        For families that differentiate it.
    """

    n: int
    t: float
    s: float
    x: Tensor
    denoised: Tensor
    denoiser: Denoiser

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


class Covariance(ABC):
    """A family of reverse covariances, with its fitted parameters.

    Attributes
    ----------
    space, labels
        Where residuals live, and the class of each particle (K classes, 0..K-1).
    parameters
        (N, P) float64, the fitted parameters of each step; (1, P) where they do not depend on it.
    """

    kind: ClassVar[str]

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

    # -- the Gaussian of one step -------------------------------------------------------------
    @abstractmethod
    def at(self, step: ReverseStep) -> Scatter:
        """The Gaussian of the residual at a step."""

    @abstractmethod
    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """Sufficient statistics of a residual (B, M, D), in units of v_n: (B, F) float64."""

    # -- fitting ------------------------------------------------------------------------------
    @abstractmethod
    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        """- sum_n log p(x_{n-1} | x_n) of each trajectory: statistics (S, N, F) -> (S,)."""

    @abstractmethod
    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """Starting parameters for a fit: the optimum under KL where it has a closed form."""

    @abstractmethod
    def with_parameters(self, parameters: Tensor) -> Covariance:
        """The same family with other parameters."""

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        """Smallest allowed value of each parameter, -inf where there is none."""
        return torch.full_like(parameters, -math.inf)

    # -- bookkeeping --------------------------------------------------------------------------
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

    @property
    def options(self) -> dict[str, Any]:
        """JSON-able constructor options beyond labels."""
        return {}


class ClassCovariance(Covariance):
    """Constant covariance given by class precisions (K,) and a factor between classes (k, k)."""

    @abstractmethod
    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(lambda (N, K), C (N, k, k)): precisions in units of 1/v_n."""

    @functools.cached_property
    def multiplicity(self) -> Tensor:
        """m_L, (K,) float64."""
        return torch.bincount(torch.tensor(self.labels)).to(torch.float64)

    @functools.cached_property
    def between(self) -> Tensor:
        """(k, M): orthonormal rows from particles to class-sum coordinates inside the space."""
        n_classes = len(self.multiplicity)
        sums = torch.nn.functional.one_hot(torch.tensor(self.labels), n_classes).to(torch.float64)
        unit = (sums / self.multiplicity.sqrt()).mT
        if not self.space.centred:
            return unit
        total = (self.multiplicity / self.multiplicity.sum()).sqrt()
        complement = torch.linalg.qr(total[:, None], mode="complete").Q[:, 1:].mT
        return complement @ unit

    @functools.cached_property
    def _class_means(self) -> Tensor:
        """(M, M): averages over a particle's class."""
        labels = torch.tensor(self.labels)
        same = (labels[:, None] == labels[None]).to(torch.float64)
        return same / same.sum(dim=1, keepdim=True)

    def at(self, step: ReverseStep) -> Scatter:
        root, whitening, log_det = self._factor(step)
        return MatrixScatter(self.space, root, whitening, log_det, step.variance)

    def _factor(self, step: ReverseStep) -> tuple[Tensor, Tensor, float]:
        """Root, whitening and log det of one step, made once per (step, levels)."""
        cache = self.__dict__.setdefault("_cache", {})
        key = (step.n, step.t, step.s)
        if key not in cache:
            row = 0 if self.parameters.shape[0] == 1 else step.n - 1
            local = _TwoLevels(step.s, step.t)
            lam, factor = self.precision(self.parameters[row : row + 1], local)  # type: ignore[arg-type]
            cache[key] = self._matrices(lam[0].detach(), factor[0].detach())
        return cache[key]

    def _matrices(self, lam: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, float]:
        labels = torch.tensor(self.labels)
        inside = torch.eye(len(labels), dtype=torch.float64) - self._class_means
        per_particle = lam[labels]
        inverse = torch.linalg.solve_triangular(
            factor, torch.eye(len(factor), dtype=torch.float64), upper=False
        )
        root = inside / per_particle.sqrt() + self.between.mT @ inverse.mT @ self.between
        whitening = inside * per_particle.sqrt() + self.between.mT @ factor.mT @ self.between
        return root, whitening, float(self._log_det(lam[None], factor[None])[0])

    def _log_det(self, lam: Tensor, factor: Tensor) -> Tensor:
        """log det of the restricted precision, one of D equal factors: (N,)."""
        diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
        return ((self.multiplicity - 1.0) * lam.log()).sum(dim=1) + 2.0 * diagonal.log().sum(dim=1)

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """(B, K + k D): squares within each class, and the class-sum coordinates themselves."""
        residual = residual / math.sqrt(step.variance)
        inside = residual - self._class_means.to(residual) @ residual
        within = inside.square().sum(dim=-1) @ self._indicator.to(residual)
        between = self.between.to(residual) @ residual
        return torch.cat([within, between.flatten(1)], dim=1)

    @functools.cached_property
    def _indicator(self) -> Tensor:
        n_classes = len(self.multiplicity)
        return torch.nn.functional.one_hot(torch.tensor(self.labels), n_classes).to(torch.float64)

    def _split(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(S, N, F) -> squares (S, N, K) and coordinates (S, N, k, D)."""
        n_classes = len(self.multiplicity)
        between = statistics[..., n_classes:]
        rows = len(self.between)
        return statistics[..., :n_classes], between.unflatten(-1, (rows, self.space.n_dims))

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        within, between = self._split(statistics)
        lam, factor = self.precision(parameters, schedule)
        square = torch.einsum("snk,nk->s", within, lam)
        white = torch.einsum("nji,snjd->snid", factor, between)
        square = square + white.square().sum(dim=(1, 2, 3))
        return 0.5 * (square - self.space.n_dims * self._log_det(lam, factor).sum()) + (
            _constant(self.space, schedule)
        )

    def eta(self, schedule: Schedule) -> Tensor:
        lam, factor = self.precision(self.parameters, schedule)
        out = torch.empty(schedule.n_steps, lam.shape[1], dtype=torch.float64)
        trace = torch.tensor([len(self.labels)] * lam.shape[1], dtype=torch.float64)
        identity = self.space.project(torch.eye(len(self.labels), dtype=torch.float64))
        trace = torch.diagonal(identity) @ self._indicator
        for n in range(schedule.n_steps):
            row = 0 if lam.shape[0] == 1 else n
            root = self._matrices(lam[row].detach(), factor[row].detach())[0]
            out[n] = (root.square().sum(dim=1) @ self._indicator) / trace
        return out


@dataclass(frozen=True)
class _TwoLevels:
    """The part of a schedule that one step needs."""

    s: float
    t: float

    @property
    def tensor(self) -> Tensor:
        return torch.tensor([self.s, self.t], dtype=torch.float64)

    @property
    def ratios(self) -> Tensor:
        return torch.tensor([(self.s / self.t) ** 2], dtype=torch.float64)


def _constant(space: Space, schedule: Schedule) -> Tensor:
    """1/2 sum_n d log(2 pi v_n): the part of -log p that no family changes."""
    return 0.5 * space.dim * (schedule.variances.log() + LOG_2PI).sum()


class Isotropic(ClassCovariance):
    """Sigma_n = eta_n v_n I (Eq. 6). Parameters: log(1/eta_n), (N, 1)."""

    kind = "isotropic"

    @classmethod
    def untuned(cls, space: Space, n_steps: int, labels: Sequence[int] | None = None) -> Isotropic:
        """eta_n = 1: the DDPM kernel."""
        labels = labels if labels is not None else [0] * space.n_particles
        return cls(space, labels, torch.zeros(n_steps, 1))

    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        lam = parameters.exp().expand(-1, len(self.multiplicity))
        identity = torch.eye(len(self.between), dtype=torch.float64)
        return lam, (0.5 * parameters[:, :, None]).exp() * identity

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """(B, 1): |R|^2 / v_n."""
        return (residual.square().sum(dim=(-2, -1)) / step.variance)[:, None].to(torch.float64)

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        square = statistics[..., 0] @ parameters[:, 0].exp()
        return 0.5 * (square - self.space.dim * parameters.sum()) + _constant(self.space, schedule)

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """eta_n = mean(s_n) / d: the KL optimum."""
        return -(statistics.mean(dim=0) / self.space.dim).log()

    def with_parameters(self, parameters: Tensor) -> Isotropic:
        return Isotropic(self.space, self.labels, parameters)


class Diagonal(ClassCovariance):
    r"""Precision V diag(lambda_L) V^T on the space: particles independent given their CoM (Eq. 7).

    Parameters: lambda, (N, K). Without the CoM constraint this is the paper's diagonal covariance
    with eta = 1/lambda; with it, the precision rather than the covariance is the projected
    diagonal, which makes the fit convex and the Gaussian that of independent particles
    conditioned on sum_i z_i = 0.
    """

    kind = "diagonal"

    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        if not self.space.centred:
            return parameters, torch.diag_embed(parameters.sqrt())
        n_classes = len(self.multiplicity)
        total = (self.multiplicity / self.multiplicity.sum()).sqrt()
        complement = torch.linalg.qr(total[:, None], mode="complete").Q[:, 1:].mT
        if n_classes == 1:
            return parameters, parameters.new_zeros(parameters.shape[0], 0, 0)
        between = torch.einsum("al,nl,bl->nab", complement, parameters, complement)
        return parameters, torch.linalg.cholesky(between)

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """(B, K): squares of the residual summed over each class."""
        square = residual.to(torch.float64).square().sum(dim=-1)
        return square @ self._indicator.to(square) / step.variance

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        square = torch.einsum("snk,nk->s", statistics, parameters)
        log_det = (self.multiplicity * parameters.log()).sum(dim=1)
        if self.space.centred:
            share = self.multiplicity / self.multiplicity.sum()
            log_det = log_det + (share / parameters).sum(dim=1).log()
        return 0.5 * (square - self.space.n_dims * log_det.sum()) + _constant(self.space, schedule)

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """The isotropic KL optimum."""
        eta = statistics.mean(dim=0).sum(dim=1, keepdim=True) / self.space.dim
        return (1.0 / eta).expand(-1, len(self.multiplicity)).clone()

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        return torch.full_like(parameters, 1e-6)

    def with_parameters(self, parameters: Tensor) -> Diagonal:
        return Diagonal(self.space, self.labels, parameters)


class Block(ClassCovariance):
    """Every covariance that respects the labels: class-class blocks (Sec. 4.3).

    Parameters, (N, K + k(k+1)/2): lambda_L, and the lower triangle of C row by row. The paper's
    (A A^T)_{LL'} + alpha delta is the special case of one common lambda. With every particle a
    class of its own this is the full covariance.
    """

    kind = "block"

    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        n_classes, k = len(self.multiplicity), len(self.between)
        rows, columns = torch.tril_indices(k, k)
        factor = parameters.new_zeros(parameters.shape[0], k, k)
        factor[:, rows, columns] = parameters[:, n_classes:]
        return parameters[:, :n_classes], factor

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """The KL optimum, in closed form: inverse mean scatter within and between classes."""
        within, between = self._split(statistics)
        degrees = self.space.n_dims * (self.multiplicity - 1.0)
        lam = degrees / within.mean(dim=0).clamp_min(1e-300)
        lam = torch.where(degrees > 0, lam, torch.ones_like(lam))
        scatter = torch.einsum("snid,snjd->nij", between, between)
        scatter = scatter / (len(statistics) * self.space.n_dims)
        factor = torch.linalg.cholesky(torch.linalg.inv(scatter))
        rows, columns = torch.tril_indices(len(self.between), len(self.between))
        return torch.cat([lam, factor[:, rows, columns]], dim=1)

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        n_classes, k = len(self.multiplicity), len(self.between)
        rows, columns = torch.tril_indices(k, k)
        bounds = torch.full_like(parameters, -math.inf)
        bounds[:, :n_classes] = 1e-6
        bounds[:, n_classes:][:, rows == columns] = 1e-6
        return bounds

    def with_parameters(self, parameters: Tensor) -> Block:
        return Block(self.space, self.labels, parameters)


class LowRank(ClassCovariance):
    """Sigma_n = v_n (A A^T + alpha I), A of ``rank`` columns that respect the labels (Eq. 8).

    Parameters, (N, 1 + k rank): log alpha, and A in class-sum coordinates. Not convex; the fit
    starts at the optimum under KL, probabilistic PCA (Tipping & Bishop 1999). The paper's start,
    A = 0, is a stationary point of the objective for every alpha and cannot be left by a gradient.
    """

    kind = "low-rank"

    def __init__(
        self, space: Space, labels: Sequence[int], parameters: Tensor, rank: int = 4
    ) -> None:
        super().__init__(space, labels, parameters)
        self.rank = checks.positive_integer("rank", rank)

    @property
    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @property
    def _columns(self) -> int:
        return min(self.rank, len(self.between))

    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        alpha = parameters[:, :1].exp()
        k = len(self.between)
        identity = torch.eye(k, dtype=torch.float64)
        columns = parameters[:, 1:].reshape(len(parameters), k, self._columns)
        covariance = columns @ columns.mT + alpha[:, :, None] * identity
        lam = (1.0 / alpha).expand(-1, len(self.multiplicity))
        if k == 0:
            return lam, covariance
        return lam, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(covariance)))

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        within, between = self._split(statistics)
        k, rank, n_dims = len(self.between), self._columns, self.space.n_dims
        scatter = torch.einsum("snid,snjd->nij", between, between) / (len(statistics) * n_dims)
        spread = within.mean(dim=0).sum(dim=1) / n_dims
        if k == 0:
            return (spread / self.space.rank).log()[:, None]
        values, vectors = torch.linalg.eigh(scatter)
        rest = spread + values[:, : k - rank].sum(dim=1)
        alpha = rest / max(self.space.rank - rank, 1)
        if self.space.rank == rank:
            alpha = 0.5 * values[:, 0]
        excess = (values[:, k - rank :] - alpha[:, None]).clamp_min(1e-4)
        columns = vectors[:, :, k - rank :] * excess.sqrt()[:, None]
        return torch.cat([alpha.log()[:, None], columns.flatten(1)], dim=1)

    def with_parameters(self, parameters: Tensor) -> LowRank:
        return LowRank(self.space, self.labels, parameters, self.rank)


class TimeNetwork(Diagonal):
    r"""eta_L(t_n, t_{n-1}) from a small network of log t: one tuning for any number of steps.

    The exact reverse kernel has variance v_n + (1 - r_n)^2 c(t_n), with c the posterior variance
    of x_0 per degree of freedom, a function of t alone. Hence

        eta_n = exp(h(log t_n)) (1 + (1 - r_n) / r_n g(log t_n)),    g = c / t^2 >= 0,

    in which h = 0 for an exact denoiser: the network gives h and g, and the grid enters through r_n
    only. Parameters: the network's, (1, P).
    """

    kind = "time-network"
    _WIDTH = 16

    def precision(self, parameters: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return super().precision(1.0 / self._eta(parameters, schedule), schedule)

    def _eta(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        width, n_classes = self._WIDTH, len(self.multiplicity)
        log_t = schedule.tensor[1:].log()[:, None]
        sizes = [width, width, width * width, width, width * 2 * n_classes, 2 * n_classes]
        w1, b1, w2, b2, w3, b3 = parameters[0].split(sizes)
        hidden = torch.tanh(log_t * w1 + b1)
        hidden = torch.tanh(hidden @ w2.reshape(width, width) + b2)
        h, g = (hidden @ w3.reshape(width, 2 * n_classes) + b3).chunk(2, dim=1)
        r = schedule.ratios[:, None]
        return h.exp() * (1.0 + (1.0 - r) / r * torch.nn.functional.softplus(g - 3.0))

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        return super().cost(1.0 / self._eta(parameters, schedule), statistics, schedule)

    def eta(self, schedule: Schedule) -> Tensor:
        return Diagonal(self.space, self.labels, 1.0 / self._eta(self.parameters, schedule)).eta(
            schedule
        )

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """Small random weights from a fixed seed, biases that spread the units over log t."""
        width, n_classes = self._WIDTH, len(self.multiplicity)
        rng = np.random.default_rng(0)
        log_t = schedule.tensor[1:].log()
        centres = np.linspace(float(log_t.min()), float(log_t.max()), width)
        parts = [
            np.ones(width),
            -centres,
            rng.normal(size=width * width) / math.sqrt(width),
            np.zeros(width),
            rng.normal(size=width * 2 * n_classes) * 0.01,
            np.zeros(2 * n_classes),
        ]
        return torch.tensor(np.concatenate(parts))[None]

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        return torch.full_like(parameters, -math.inf)

    def with_parameters(self, parameters: Tensor) -> TimeNetwork:
        return TimeNetwork(self.space, self.labels, parameters)


FAMILIES: dict[str, type[ClassCovariance]] = {
    cls.kind: cls for cls in (Isotropic, Diagonal, Block, LowRank, TimeNetwork)
}
"""Families by name, for :func:`make_covariance` and archives."""


def make_covariance(
    kind: str, space: Space, labels: Sequence[int], parameters: Tensor | None = None, **options: Any
) -> Covariance:
    """Make a family by name; "full" is "block" with every particle a class of its own."""
    checks.choice("covariance", kind, (*FAMILIES, "full"))
    if kind == "full":
        kind, labels = "block", range(space.n_particles)  # type: ignore[assignment]
    if parameters is None:
        parameters = torch.zeros(1, 0, dtype=torch.float64)
    return FAMILIES[kind](space, labels, parameters, **options)
