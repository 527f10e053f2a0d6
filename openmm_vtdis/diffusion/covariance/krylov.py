r"""The denoiser's Jacobian from a few products: low rank plus a multiple of the identity.

k steps of Arnoldi's iteration with the transpose of J = dD/dx, from the direction of the noise that
the denoiser sees, v_1 = x_n - D over its length, give an orthonormal basis V (d, k) of the Krylov
space and H = V^T J^T V. The covariance over t_n^2 is

    C = V sym(H)_+ V^T + sigma (I - V V^T),   sigma = (d H_11 - tr H) / (d - k), no less than zero,

in which d H_11, Hutchinson's estimate with the one direction v_1, stands for the trace of J. The
start turns and permutes with the configuration, and so does C. The cost is k passes backwards
through one evaluation; k = d gives "tweedie", unless the Krylov space ends before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import Ranked, ReverseStep
from openmm_vtdis.diffusion.covariance.state_dependent import StateCovariance
from openmm_vtdis.diffusion.posteriors.jacobian import linearised

_BREAKDOWN = 1e-10
"""A new direction this short, next to its image, is no direction: the space is invariant."""


def krylov_basis(
    denoiser: object, space: Space, x: Tensor, start: Tensor, t: float, k: int
) -> tuple[Tensor, Tensor]:
    """V (B, d, k) and V^T J^T V (B, k, k), float64, for x and start (B, M, D).

    Columns that the iteration does not reach are zero, and so are their rows and columns of the
    second.
    """
    denoised = linearised(denoiser, x, t)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    new = space.reduce(start.to(torch.float64)).flatten(1)
    scale = torch.ones_like(new[:, :1])
    for _ in range(k):
        length = new.norm(dim=1, keepdim=True)
        kept = torch.isfinite(length) & (length > _BREAKDOWN * scale)
        basis.append(torch.where(kept, new / length, 0.0))
        direction = space.expand(basis[-1].reshape(len(x), space.rank, space.n_dims))
        image = denoised.product(direction.to(x.dtype))
        images.append(space.reduce(image.to(torch.float64)).flatten(1))
        new, scale = images[-1], images[-1].norm(dim=1, keepdim=True)
        for _ in range(2):  # once more against rounding
            for old in basis:
                new = new - (old * new).sum(dim=1, keepdim=True) * old
    v = torch.stack(basis, dim=2)
    return v, v.mT @ torch.stack(images, dim=2)


class Krylov(Ranked, StateCovariance):
    """C from ``rank`` products with the Jacobian; see the module."""

    kind = "krylov"

    def shape(self, step: ReverseStep) -> Tensor:
        """C at x_n."""
        d = self.space.dim
        k = min(self.rank, d)
        v, small = krylov_basis(
            step.denoiser, self.space, step.x, step.x - step.denoised, step.t, k
        )
        identity = torch.eye(d, dtype=torch.float64, device=step.x.device)
        inside = v @ (0.5 * (small + small.mT)) @ v.mT
        rank = v.square().sum(dim=(1, 2))
        trace = torch.diagonal(small, dim1=1, dim2=2).sum(dim=1)
        rest = ((d * small[:, 0, 0] - trace) / (d - rank).clamp_min(0.5)).clamp_min(0.0)
        return inside + rest[:, None, None] * (identity - v @ v.mT)
