"""Zero-mean Gaussians of the residual x_{n-1} - mu_n at one step: draws and log densities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from openmm_vtdis.core.space import LOG_2PI, Space


class Scatter(Protocol):
    """Zero-mean Gaussian of the residual x_{n-1} - mu_n at one step."""

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
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

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        noise = self.space.standard_normal(n, rng)
        return math.sqrt(self.variance) * (self.root.to(noise) @ noise)

    def log_prob(self, residual: Tensor) -> Tensor:
        white = self.whitening.to(residual) @ residual
        square = white.square().sum(dim=(-2, -1)) / self.variance
        constant = self.space.dim * (math.log(self.variance) + LOG_2PI)
        return -0.5 * (square - self.space.n_dims * self.log_det + constant)


@dataclass(frozen=True)
class EigenScatter:
    """Gaussian with a covariance of its own for every sample, given by its eigenvectors.

    Attributes
    ----------
    vectors
        (B, d, d), eigenvectors in the columns, in reduced coordinates.
    variances
        (B, d) positive.
    """

    space: Space
    vectors: Tensor
    variances: Tensor

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, M, D) float64, n = B."""
        noise = self.space.reduce(self.space.standard_normal(n, rng)).flatten(1)
        reduced = self.vectors @ (self.variances.sqrt() * noise)[:, :, None]
        return self.space.expand(reduced.reshape(n, self.space.rank, self.space.n_dims))

    def log_prob(self, residual: Tensor) -> Tensor:
        """(B, M, D) -> (B,) float64."""
        square = components(self.space, self.vectors, residual).square()
        terms = square / self.variances + self.variances.log() + LOG_2PI
        return -0.5 * terms.sum(dim=1)


@dataclass(frozen=True)
class CholeskyScatter:
    """Gaussian with a covariance of its own for every sample, given by its Cholesky factor.

    Attributes
    ----------
    factor
        (B, d, d) lower triangular, in reduced coordinates. Unchecked, so that a GPU need not wait
        for the answer: draws and densities use the same factor and weights are exact whatever it
        is, or NaN where it is singular.
    """

    space: Space
    factor: Tensor

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, M, D) float64, n = B."""
        noise = self.space.reduce(self.space.standard_normal(n, rng)).flatten(1)
        reduced = self.factor @ noise[:, :, None]
        return self.space.expand(reduced.reshape(n, self.space.rank, self.space.n_dims))

    def log_prob(self, residual: Tensor) -> Tensor:
        """(B, M, D) -> (B,) float64."""
        reduced = self.space.reduce(residual.to(torch.float64)).flatten(1)
        white = torch.linalg.solve_triangular(self.factor, reduced[:, :, None], upper=False)
        log_det = torch.diagonal(self.factor, dim1=1, dim2=2).abs().log().sum(dim=1)
        square = white.square().sum(dim=(1, 2))
        return -0.5 * (square + self.space.dim * LOG_2PI) - log_det


def finite_or_zero(matrices: Tensor) -> Tensor:
    """Matrices (B, d, d), set to zero where any entry, or their sum, is NaN or infinite."""
    finite = torch.isfinite(matrices.sum(dim=(1, 2), keepdim=True))  # faster than asking each
    return torch.where(finite, matrices, 0.0)


def components(space: Space, vectors: Tensor, residual: Tensor) -> Tensor:
    """Components (B, d) of residuals (B, M, D) in bases (B, d, d)."""
    reduced = space.reduce(residual.to(torch.float64)).flatten(1)
    return (vectors.mT @ reduced[:, :, None])[:, :, 0]
