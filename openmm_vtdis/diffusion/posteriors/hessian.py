r"""Covariance from the Hessian of the energy itself: no training, and no network Jacobian.

The posterior of x_0 given x_n is proportional to ``exp(-u(x_0) - |x_0 - x_n|^2 / 2 t_n^2)``. Where
it is narrow it is a Gaussian around D(x_n) with the precision H + I / t_n^2, H = Hessian of u at
D(x_n). Where H says that it is wider than the data themselves, which have unit variance per degree
of freedom in model units, the data's width is taken: with h_i the eigenvalues of H::

    C = Cov / t_n^2,          eigenvalues 1 / (1 + t_n^2 max(h_i, 1)).

This catches the stiff degrees of freedom, such as bonds, at low noise. The cost is a Hessian of the
energy and its eigendecomposition a step. An energy whose Hessian is not finite at D(x_n) is taken
to be flat there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.core.eigh import eigh
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import Energy, ReverseStep
from openmm_vtdis.diffusion.covariance.state_dependent import StateCovariance, finite_or_zero


def energy_derivatives(energy: Energy, space: Space, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, d) and Hessian (B, d, d) of an energy in reduced coordinates, float64.

    ``x`` is (B, M, D); both are on its device. They come from the energy's own method
    ``derivatives(x)`` where it has one.

    Raises
    ------
    ValueError
        If the energy cannot be differentiated twice, such as that of OpenMM Contexts.
    """
    x = x.detach().to(torch.float64)
    known = getattr(energy, "derivatives", None)
    gradient, hessian = differentiate_twice(energy, x) if known is None else known(x)
    basis = space.basis_like(hessian)
    rows = torch.einsum("ki,biajc->bkajc", basis, hessian)
    matrix = torch.einsum("lj,bkajc->bkalc", basis, rows).flatten(3).flatten(1, 2)
    return space.reduce(gradient).flatten(1), 0.5 * (matrix + matrix.mT)


def hessian_spectrum(matrix: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d) and eigenvectors (B, d, d) of C at levels t (B,), from H (B, d, d)."""
    values, vectors = eigh(finite_or_zero(matrix))
    return 1.0 / (1.0 + t.square()[:, None] * values.clamp_min(1.0)), vectors


class Hessian(StateCovariance):
    """C = (I + t^2 max(H, 1))^-1, eigenvalue by eigenvalue; see the module."""

    kind = "hessian"

    def shape(self, step: ReverseStep) -> Tensor:
        """C at x_n, from the energy at D(x_n)."""
        values, vectors = self.spectrum(step)
        return (vectors * values[:, None]) @ vectors.mT

    def spectrum(self, step: ReverseStep) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, d) and eigenvectors (B, d, d) of C at x_n."""
        if step.posterior is not None:
            return step.posterior.values, step.posterior.vectors
        if step.energy is None:
            raise ValueError(
                "covariance: expected a kernel that knows the energy of its target for "
                '"hessian", got one without'
            )
        _, matrix = energy_derivatives(step.energy, self.space, step.denoised)
        level = torch.full((len(step.x),), step.t, dtype=torch.float64, device=step.x.device)
        return hessian_spectrum(matrix.to(step.x.device), level)
