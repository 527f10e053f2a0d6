"""A Gaussian with an exact posterior, and a denoiser that is wrong everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmm_vtdis.core.space import Space


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """u = x^T A x / 2 in reduced coordinates: a Gaussian whose variances are not equal."""

    def __init__(self, space: Space) -> None:
        self.space = space
        vectors = torch.linalg.qr(
            torch.randn(space.dim, space.dim, generator=rng(1), dtype=torch.float64)
        )[0]
        self.precision = (vectors * torch.linspace(1.5, 400.0, space.dim).double()) @ vectors.mT
        self.root = torch.linalg.cholesky(torch.linalg.inv(self.precision))

    def energy(self, x: Tensor) -> Tensor:
        z = self.space.reduce(x).flatten(1)
        return 0.5 * torch.einsum("bi,ij,bj->b", z, self.precision, z)

    def log_prob(self, x: Tensor) -> Tensor:
        log_norm = 0.5 * torch.logdet(self.precision / (2.0 * math.pi))
        return log_norm - self.energy(x)

    def sample(self, n: int, seed: int) -> Tensor:
        z = torch.randn(n, self.space.dim, generator=rng(seed), dtype=torch.float64)
        return self.space.expand((z @ self.root.mT).reshape(n, self.space.rank, self.space.n_dims))

    def matrix(self, t: float) -> Tensor:
        """Cov[x_0 | x_t]."""
        return torch.linalg.inv(self.precision + torch.eye(self.space.dim) / t**2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact denoiser but for a fifth of the posterior's width, everywhere."""
        rows = []
        for y, s in zip(x, t.tolist(), strict=True):
            matrix = self.matrix(s)
            exact = matrix @ self.space.reduce(y[None]).flatten() / s**2
            rows.append(exact + 0.2 * torch.linalg.cholesky(matrix) @ torch.cos(3.0 * exact))
        reduced = torch.stack(rows)
        return self.space.expand(reduced.reshape(len(x), self.space.rank, self.space.n_dims))
