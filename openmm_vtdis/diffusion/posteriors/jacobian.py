r"""The posterior's covariance from the denoiser's Jacobian (Tweedie's second-order identity).

With V the orthonormal basis of the space, J = V (dD/dx) V^T is a d x d matrix for every
configuration. For an exact denoiser t^2 J = Cov[x_0 | x_t = x], symmetric and positive
semi-definite; a learned one is symmetrised. A row is one pass backwards through the same
evaluation, which takes about as long as that. (The same by forward-mode differentiation, for many
directions at once, is twice to three times as slow on a CPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import Linearised
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior

Denoise = Callable[[Tensor, Tensor], Tensor]
"""A function of x (B, M, D) and t (B,) that gives (B, M, D)."""


def tangent_basis(space: Space, like: Tensor) -> Tensor:
    """Orthonormal basis of the space as tangents of configurations: (d, M, D)."""
    rows = space.basis_like(like)
    axes = torch.eye(space.n_dims, dtype=like.dtype, device=like.device)
    return torch.einsum("rm,de->rdme", rows, axes).reshape(space.dim, *like.shape[1:])


def denoiser_jacobian(
    denoiser: Denoise, space: Space, x: Tensor, t: Tensor | float
) -> tuple[Tensor, Tensor]:
    """D (B, M, D) and sym(V dD/dx V^T) (B, d, d) float64, at x (B, M, D) and levels t (B,)."""
    level = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))

    def function(y: Tensor) -> Tensor:
        return denoiser(y, level.to(y).clone())  # one that was made in inference mode too

    denoised = Linearised(function, x)
    rows = [denoised.product(v.expand_as(x)) for v in tangent_basis(space, x)]
    matrix = torch.stack([space.reduce(row).flatten(1) for row in rows], dim=1)
    return denoised.value, 0.5 * (matrix + matrix.mT).to(torch.float64)


@dataclass(frozen=True)
class JacobianEstimator:
    """C = sym(dD/dx), from d products with the denoiser's Jacobian."""

    denoiser: Denoiser

    def __call__(self, x: Tensor, t: Tensor) -> EigenPosterior:
        """Estimate the posterior; C is zero where the Jacobian is not finite."""
        space = self.denoiser.space
        denoised, matrix = denoiser_jacobian(self.denoiser, space, x, t)
        return EigenPosterior.of(space.project(denoised), matrix)
