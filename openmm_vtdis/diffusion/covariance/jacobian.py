r"""The denoiser's Jacobian, in reduced coordinates.

With V the orthonormal basis of the space, J = V (dD/dx) V^T is a d x d matrix for every
configuration. For an exact denoiser t^2 J = Cov[x_0 | x_t = x] (Tweedie's second-order identity),
symmetric and positive semi-definite; a learned one is symmetrised. Columns are Jacobian-vector
products, taken together by forward-mode differentiation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.geometry import Space

_TANGENTS_AT_ONCE = 16


def tangent_basis(space: Space, like: Tensor) -> Tensor:
    """Orthonormal basis of the space as tangents of configurations: (d, M, D)."""
    rows = space.basis_like(like)
    axes = torch.eye(space.n_dims, dtype=like.dtype, device=like.device)
    return torch.einsum("rm,de->rdme", rows, axes).reshape(space.dim, *like.shape[1:])


def denoiser_jacobian(denoiser: object, space: Space, x: Tensor, t: float) -> Tensor:
    """sym(V dD/dx V^T) at x (B, M, D) and noise level t: (B, d, d) float64."""
    x = x.contiguous()
    level = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)

    def column(tangent: Tensor) -> Tensor:
        _, derivative = torch.func.jvp(  # type: ignore[misc]
            lambda y: denoiser(y, level),  # type: ignore[operator]
            (x,),
            (tangent.expand_as(x),),
        )
        return space.reduce(derivative).flatten(1)

    columns = torch.func.vmap(column, randomness="error", chunk_size=_TANGENTS_AT_ONCE)(
        tangent_basis(space, x)
    )
    matrix = columns.permute(1, 2, 0).to(torch.float64)
    return 0.5 * (matrix + matrix.mT)
