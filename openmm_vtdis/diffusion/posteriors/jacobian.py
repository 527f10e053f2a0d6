r"""The denoiser's Jacobian, in reduced coordinates.

With V the orthonormal basis of the space, J = V (dD/dx) V^T is a d x d matrix for every
configuration. For an exact denoiser t^2 J = Cov[x_0 | x_t = x] (Tweedie's second-order identity),
symmetric and positive semi-definite; a learned one is symmetrised. A row is one pass backwards
through the same evaluation, which takes about as long as that. (The same by forward-mode
differentiation, for many directions at once, is twice to three times as slow on a CPU.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import Linearised
from openmm_vtdis.core.space import Space


def tangent_basis(space: Space, like: Tensor) -> Tensor:
    """Orthonormal basis of the space as tangents of configurations: (d, M, D)."""
    rows = space.basis_like(like)
    axes = torch.eye(space.n_dims, dtype=like.dtype, device=like.device)
    return torch.einsum("rm,de->rdme", rows, axes).reshape(space.dim, *like.shape[1:])


def linearised(denoiser: object, x: Tensor, t: float) -> Linearised:
    """D at x (B, M, D) and noise level t."""

    def function(y: Tensor) -> Tensor:
        return denoiser(y, y.new_full((len(y),), t))  # type: ignore[operator, no-any-return]

    return Linearised(function, x)


def denoiser_jacobian(denoiser: object, space: Space, x: Tensor, t: float) -> Tensor:
    """sym(V dD/dx V^T) at x (B, M, D) and noise level t: (B, d, d) float64."""
    denoised = linearised(denoiser, x, t)
    rows = [denoised.product(v.expand_as(x)) for v in tangent_basis(space, x)]
    matrix = torch.stack([space.reduce(row).flatten(1) for row in rows], dim=1)
    return 0.5 * (matrix + matrix.mT).to(torch.float64)
