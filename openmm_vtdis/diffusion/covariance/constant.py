r"""Constant covariances that respect the class labels of the particles.

All families here have the form Sigma_n = v_n (B_n (x) I_D), which makes the reverse kernel
E(3)-equivariant (paper, App. B); B_n respects the class labels of the particles. Densities are
those of the reduced coordinates (Eq. 23), so what is inverted is the restriction of B_n to the
space, never B_n itself (Eq. 24 is right only where B_n commutes with the projector).

*Which matrices respect the labels.* Matrices on the space that commute with every permutation
inside the classes split, by Schur's lemma, into::

    within a class L:  a multiple of the identity on { z in class L, sum z = 0 },  dimension m_L - 1
    between classes:   any matrix on the normalised class sums  e_L . z,  e_L = 1_L / sqrt(m_L),
                       k = K dimensions, or K - 1 where the centre of mass is removed,

and the inverse has the same form. A family therefore needs only to give, per step, the precision
lambda_L of each class (K,) and a Cholesky factor C of the precision between classes, G = C C^T
(k, k). For identical particles with zero CoM k = 0, and all families are isotropic.

*Why precisions.* With S = R R^T / v_n, -log p = 1/2 tr(Lambda S) - 1/2 log det Lambda + const is
convex in Lambda.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from openmm_vtdis.core.space import LOG_2PI, Space
from openmm_vtdis.diffusion.covariance.base import (
    COVARIANCES,
    Covariance,
    ReverseStep,
    roughness,
)
from openmm_vtdis.diffusion.covariance.gaussians import MatrixScatter, Scatter
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.schedule import Schedule

LEAST_ETA = 0.1
"""Least variance, in units of v_n, on a grid that a covariance was not fitted for."""


class ClassCovariance(Covariance):
    """Constant covariance given by class precisions (K,) and a factor between classes (k, k)."""

    @abstractmethod
    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(lambda (N, K), C (N, k, k)), in units of 1/v_n, at levels (N, 2) = (t_{n-1}, t_n)."""

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
        """Root, whitening and log det of one step, made once per (step, levels, device)."""
        cache = self.__dict__.setdefault("_cache", {})
        device = step.x.device
        key = (step.n, step.t, step.s, device)
        if key not in cache:
            row = 0 if self.parameters.shape[0] == 1 else step.n - 1
            levels = torch.tensor([[step.s, step.t]], dtype=torch.float64)
            lam, factor = self.precision(self.parameters[row : row + 1], levels)
            root, whitening, log_det = self._matrices(lam[0].detach(), factor[0].detach())
            cache[key] = root.to(device), whitening.to(device), log_det
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
        lam, factor = self.precision(parameters, schedule.pairs)
        square = torch.einsum("snk,nk->s", within, lam)
        white = torch.einsum("nji,snjd->snid", factor, between)
        square = square + white.square().sum(dim=(1, 2, 3))
        return 0.5 * (square - self.space.n_dims * self._log_det(lam, factor).sum()) + (
            _constant(self.space, schedule)
        )

    def eta(self, schedule: Schedule) -> Tensor:
        lam, factor = self.precision(self.parameters, schedule.pairs)
        out = torch.empty(schedule.n_steps, lam.shape[1], dtype=torch.float64)
        identity = self.space.project(torch.eye(len(self.labels), dtype=torch.float64))
        trace = torch.diagonal(identity) @ self._indicator
        for n in range(schedule.n_steps):
            row = 0 if lam.shape[0] == 1 else n
            root = self._matrices(lam[row].detach(), factor[row].detach())[0]
            out[n] = (root.square().sum(dim=1) @ self._indicator) / trace
        return out


def transferred(eta: Tensor, old: Schedule, new: Schedule) -> Tensor:
    """Carry variances (N, K) in units of v_n from one grid over to another: (N', K).

    On any grid the variance closest to the exact reverse kernel's is
    eta_n = 1 + (1 - r_n) / r_n g(t_n),
    where g is the denoising error over t^2 and knows of no grid. What a fit says about g is linear
    in log t between the levels of the old grid, and constant outside.
    """
    g = (eta - 1.0) / old.widening[:, None]
    return (1.0 + new.widening[:, None] * old.carried(g, new)).clamp_min(LEAST_ETA)


def _constant(space: Space, schedule: Schedule) -> Tensor:
    """1/2 sum_n d log(2 pi v_n): the part of -log p that no family changes."""
    return 0.5 * space.dim * (schedule.variances.log() + LOG_2PI).sum()


@COVARIANCES.register
class Isotropic(ClassCovariance):
    """Sigma_n = eta_n v_n I (Eq. 6). Parameters: log(1/eta_n), (N, 1)."""

    kind = "isotropic"

    @classmethod
    def is_candidate(cls, denoiser: Denoiser, twice_differentiable: bool) -> bool:
        return True

    @classmethod
    def ddpm(cls, space: Space, schedule: Schedule) -> Isotropic:
        """The covariance of DDPM, eta_n = 1."""
        family = cls(space, [0] * space.n_particles, torch.zeros(1, 1))
        return family.with_parameters(family.ddpm_parameters(schedule))

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        lam = parameters.exp().expand(-1, len(self.multiplicity))
        identity = torch.eye(len(self.between), dtype=torch.float64)
        return lam, (0.5 * parameters[:, :, None]).exp() * identity

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """(B, 1): ``|R|^2 / v_n``."""
        return (residual.square().sum(dim=(-2, -1)) / step.variance)[:, None].to(torch.float64)

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        square = statistics[..., 0] @ parameters[:, 0].exp()
        return 0.5 * (square - self.space.dim * parameters.sum()) + _constant(self.space, schedule)

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        """The KL optimum, eta_n = mean(s_n) / d."""
        return -(statistics.mean(dim=0) / self.space.dim).log()

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        return torch.zeros(schedule.n_steps, 1, dtype=torch.float64)

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        return roughness(parameters, schedule)

    def carried(self, old: Schedule, new: Schedule) -> Self:
        """Interpolate the excess of eta over one; see :func:`transferred`."""
        return self.with_parameters(-transferred((-self.parameters).exp(), old, new).log())

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)


@COVARIANCES.register
class Diagonal(ClassCovariance):
    r"""Precision V diag(lambda_L) V^T on the space: particles independent given their CoM (Eq. 7).

    Parameters: lambda, (N, K). Without the CoM constraint this is the paper's diagonal covariance
    with eta = 1/lambda; with it, the precision rather than the covariance is the projected
    diagonal, which makes the fit convex and the Gaussian that of independent particles
    conditioned on sum_i z_i = 0.
    """

    kind = "diagonal"

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
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

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        return torch.ones(schedule.n_steps, len(self.multiplicity), dtype=torch.float64)

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        return roughness(parameters, schedule)

    def carried(self, old: Schedule, new: Schedule) -> Self:
        """Interpolate the excess of eta over one; see :func:`transferred`."""
        if self.parameters.shape[0] == 1:
            return self
        return self.with_parameters(1.0 / transferred(1.0 / self.parameters, old, new))

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)


@COVARIANCES.register
class Block(ClassCovariance):
    """Every covariance that respects the labels: class-class blocks (Sec. 4.3).

    Parameters, (N, K + k(k+1)/2): lambda_L, and the lower triangle of C row by row. The paper's
    (A A^T)_{LL'} + alpha delta is the special case of one common lambda. With every particle a
    class of its own this is the full covariance.
    """

    kind = "block"

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
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
        k, n_fit = len(self.between), len(statistics)
        if n_fit * self.space.n_dims < 2 * k:
            raise ValueError(
                f"n_trajectories: expected enough to fit covariances of {k} x {k} numbers, at "
                f"least {math.ceil(2 * k / self.space.n_dims)}, got {n_fit}"
            )
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

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        k = len(self.between)
        rows, columns = torch.tril_indices(k, k)
        row = torch.cat([torch.ones(len(self.multiplicity)), (rows == columns).float()])
        return row.to(torch.float64).repeat(schedule.n_steps, 1)

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)
