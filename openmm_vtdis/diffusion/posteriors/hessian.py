r"""The posterior's covariance from the Hessian of the energy: no training, no network Jacobian.

The posterior of x_0 given x_n is proportional to ``exp(-u(x_0) - |x_0 - x_n|^2 / 2 t_n^2)``. Where
it is narrow it is a Gaussian around D(x_n) with the precision H + I / t_n^2, H = Hessian of u at
D(x_n). Where H says that it is wider than the data themselves, which have unit variance per degree
of freedom in model coordinates, the data's width is taken: with h_i the eigenvalues of H::

    C = Cov / t_n^2,          eigenvalues 1 / (1 + t_n^2 max(h_i, 1)).

This catches the stiff degrees of freedom, such as bonds, at low noise. The cost is a Hessian of the
energy and its eigendecomposition a step. An energy whose Hessian is not finite at D(x_n) is taken
to be flat there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core.eigh import eigh, finite_or_zero
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior

_PRICE_OF_A_DIMENSION = 0.025
"""Cost of a Hessian and its eigenvectors per dimension, in network evaluations, rounded from
``benchmarks/step_time.py``."""


def hessian_price(dim: int) -> float:
    """Cost of a network evaluation and a Hessian in ``dim`` dimensions, in network evaluations."""
    return 1.0 + _PRICE_OF_A_DIMENSION * dim


def energy_derivatives(energy: Energy, space: Space, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, d) and Hessian (B, d, d) of an energy in reduced coordinates, float64.

    ``x`` is (B, M, D); both are on its device.

    Raises
    ------
    ValueError
        If the energy cannot be differentiated twice, such as that of OpenMM Contexts.
    """
    gradient, hessian = energy.derivatives(x.detach().to(torch.float64))
    basis = space.basis_like(hessian)
    rows = torch.einsum("ki,biajc->bkajc", basis, hessian)
    matrix = torch.einsum("lj,bkajc->bkalc", basis, rows).flatten(3).flatten(1, 2)
    return space.reduce(gradient).flatten(1), 0.5 * (matrix + matrix.mT)


def hessian_spectrum(matrix: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d) and eigenvectors (B, d, d) of C at levels t (B,), from H (B, d, d)."""
    values, vectors = eigh(finite_or_zero(matrix))
    return 1.0 / (1.0 + t.square()[:, None] * values.clamp_min(1.0)), vectors


@dataclass(frozen=True)
class HessianEstimator:
    """C = (I + t^2 max(H, 1))^-1, eigenvalue by eigenvalue, around the denoiser's mean."""

    denoiser: Denoiser
    energy: Energy

    def __call__(self, x: Tensor, t: Tensor) -> EigenPosterior:
        """Estimate the posterior from the energy's Hessian at D(x, t)."""
        space = self.denoiser.space
        denoised = space.project(self.denoiser(x, t))
        _, matrix = energy_derivatives(self.energy, space, denoised)
        return EigenPosterior(denoised, *hessian_spectrum(matrix.to(x.device), t))
