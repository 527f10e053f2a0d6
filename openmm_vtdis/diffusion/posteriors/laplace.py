r"""The posterior at low noise from the energy, not from the network.

Given x_n, the density of x_0 is proportional to ``exp(-u(x_0) - |x_0 - x_n|^2 / 2 t_n^2)``. At low
noise it is nearly a Gaussian, which one Newton step from D(x_n) finds, whatever error D has there
(Laplace's approximation). With g and H the gradient and Hessian of u at D, in reduced coordinates::

    P    = H_+ + I / t_n^2,                  H_+ the Hessian with eigenvalues of at least 1
    mean = D - P^-1 [ g + (D - x_n) / t_n^2 ],      Cov[x_0 | x_n] = P^-1.

Stiff degrees of freedom, bonds first of all, are where a network's score is worst in units of the
noise; here they are exact. The price is a Hessian of the energy a step. The step is kept within a
trust region: its length in the norm of P is at most ``TRUST_RADIUS`` times the square root of d.
All is exact for a Gaussian of no more than unit variance, and turns and permutes with the
configuration.

Below some level the Gaussian is so good that x_0 can be drawn from it directly: the grid then
*jumps* from there to its data end, and all other steps go where they are needed.
:mod:`~openmm_vtdis.tuning.laplace_range` measures both levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior
from openmm_vtdis.diffusion.posteriors.hessian import energy_derivatives, hessian_spectrum

TRUST_RADIUS = 0.25


def laplace_posterior(
    energy: Energy, space: Space, x: Tensor, denoised: Tensor, t: Tensor
) -> EigenPosterior:
    """Newton step from D (B, M, D) for x_n = x (B, M, D) at noise levels t (B,).

    Where the gradient or the Hessian is not finite, the mean is D.
    """
    gradient, matrix = energy_derivatives(energy, space, denoised)
    values, vectors = hessian_spectrum(matrix.to(x.device), t)
    square = t.square()[:, None]
    slope = gradient.to(x.device) + space.reduce(denoised - x).flatten(1) / square
    # In the eigenbasis, with P = 1 / (t^2 values)
    step = -square * values * (vectors.mT @ slope[:, :, None])[:, :, 0]
    length = (step.square() / (square * values)).sum(dim=1, keepdim=True).sqrt()
    step = step * (TRUST_RADIUS * math.sqrt(space.dim) / length).clamp_max(1.0)
    reduced = (vectors @ step[:, :, None])[:, :, 0]
    reduced = torch.where(torch.isfinite(reduced).all(dim=1, keepdim=True), reduced, 0.0)
    shift = space.expand(reduced.reshape(len(x), space.rank, space.n_dims))
    return EigenPosterior(denoised + shift, values, vectors)


@dataclass(frozen=True)
class LaplaceRange:
    """Noise levels at which a process uses the Laplace approximation, in model coordinates.

    Attributes
    ----------
    level
        Steps from noise levels up to this use it.
    jump
        Level from which it is good enough for one step to the data end; 0 if there is none.
    """

    level: float
    jump: float = 0.0

    @classmethod
    def rebuild(cls, description: dict[str, Any]) -> LaplaceRange:
        """Make one of its attributes, as an archive has them.

        Raises
        ------
        ValueError, TypeError
            If they are not its attributes, or no numbers of at least 0.
        """
        for name, value in description.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0.0:
                raise ValueError(f"laplace: expected a {name} of at least 0, got {value!r}")
        return cls(**description)


@dataclass(frozen=True)
class LaplaceEstimator:
    """Posteriors by the Laplace approximation: a Newton step from the denoiser's mean."""

    denoiser: Denoiser
    energy: Energy

    def __call__(self, x: Tensor, t: Tensor) -> EigenPosterior:
        """See :func:`laplace_posterior`."""
        space = self.denoiser.space
        denoised = space.project(self.denoiser(x, t))
        return laplace_posterior(self.energy, space, x, denoised, t)
