r"""Covariance as a learned elastic network: nearly the price of an isotropic one.

Where forces act between pairs, the Hessian of the energy is an elastic network: a sum over pairs of
springs along and across the line that joins them. With e_i the unit vector of particle i and r_ij
the direction from j to i in the denoised configuration, the *pair Laplacian*

    L(alpha, beta) = sum_{i<j} (e_i - e_j)(e_i - e_j)^T (x) (alpha_ij I + beta_ij r_ij r_ij^T)

is positive semi-definite for alpha, beta >= 0, blind to translations, and turns and permutes with
the configuration, whatever network gives the coefficients. Two of them make the covariance of the
posterior over t^2 (see :mod:`~openmm_vtdis.diffusion.covariance.state`):

    C = (I + t^2 / M  L_1)^-1  +  t^2 / (M (1 + t^2)^2)  L_2 / 10.

The first is a precision: t^2 Hess u at low noise, t^2 over the variance of the data at large
noise, which coefficients that do not depend on t can follow. It cannot be wider than the noise; the
second, a covariance, adds the width of posteriors with more than one mode.

A head on the frozen denoiser's messages gives the coefficients. It is trained by the Gaussian
likelihood of x_0 - D in noised data, for which no grid is needed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance.base import ReverseStep
from openmm_vtdis.diffusion.covariance.state import StateCovariance, finite_or_zero
from openmm_vtdis.geometry import Space
from openmm_vtdis.networks.pair_head import pair_indices

_WIDTH = 0.1
"""Of the second part where the network says one: it starts out small."""


def pair_laplacian(space: Space, alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """L in reduced coordinates: alpha, beta (B, P) over pairs, x (B, M, D) -> (B, d, d).

    Pairs stand in the order of :func:`~openmm_vtdis.networks.pair_head.pair_indices`.
    """
    m, n_dims = space.n_particles, space.n_dims
    i, j = pair_indices(m, x.device)
    difference = x[:, i] - x[:, j]
    length = (difference.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
    direction = difference / length
    springs = beta[..., None, None] * direction[..., :, None] * direction[..., None, :]
    springs.diagonal(dim1=-2, dim2=-1).add_(alpha[..., None])
    blocks = x.new_zeros(len(x), m, m, n_dims, n_dims)
    blocks[:, i, j] = blocks[:, j, i] = -springs
    blocks.diagonal(dim1=1, dim2=2).copy_(-blocks.sum(dim=2).permute(0, 2, 3, 1))
    half = space.basis_like(x) @ blocks.flatten(2)
    half = half.reshape(len(x), space.rank, m, n_dims, n_dims).permute(0, 2, 4, 1, 3)
    full = space.basis_like(x) @ half.flatten(2)
    return full.reshape(len(x), space.dim, space.dim)


def posterior_shape(space: Space, pairs: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """C from pair coefficients (B, P, 4), D (B, M, D) and noise levels (B,): (B, d, d)."""
    square, m = t.square()[:, None], space.n_particles
    precision, width = square / m, _WIDTH / m * square / (1.0 + square).square()
    alpha_1, beta_1, alpha_2, beta_2 = pairs.unbind(dim=-1)
    stiff, wide = pair_laplacian(
        space,
        torch.cat([precision * alpha_1, width * alpha_2]),
        torch.cat([precision * beta_1, width * beta_2]),
        torch.cat([denoised, denoised]),
    ).chunk(2)
    identity = torch.eye(space.dim, dtype=stiff.dtype, device=stiff.device)
    return spd_inverse(identity + finite_or_zero(stiff)) + wide


def spd_inverse(matrices: Tensor) -> Tensor:
    """Of positive definite (B, d, d)."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices).L)


class Pairwise(StateCovariance):
    """C from the pair coefficients of the denoiser's head."""

    kind = "pairwise"
    uses_pairs: ClassVar[bool] = True
    positive: ClassVar[bool] = True

    def shape(self, step: ReverseStep) -> Tensor:
        """C at x_n."""
        if step.pairs is None:
            raise ValueError("covariance: expected pair coefficients in a step, got none")
        level = torch.full((len(step.x),), step.t, dtype=torch.float64, device=step.x.device)
        return posterior_shape(
            self.space, step.pairs.to(torch.float64), step.denoised.to(torch.float64), level
        )
