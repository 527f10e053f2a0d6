r"""Covariance from the denoiser's own Jacobian.

Tweedie's second-order identity, Cov[x_0 | x_n] = t_n^2 dD/dx, makes C = J = dD/dx in reduced
coordinates. That of a learned denoiser is symmetrised. The cost is d products with it a step.
"""

from __future__ import annotations

from torch import Tensor

from openmm_vtdis.diffusion.covariance.base import ReverseStep
from openmm_vtdis.diffusion.covariance.state_dependent import StateCovariance
from openmm_vtdis.diffusion.posteriors.jacobian import denoiser_jacobian


class Tweedie(StateCovariance):
    """C from products with the denoiser's Jacobian."""

    kind = "tweedie"

    def shape(self, step: ReverseStep) -> Tensor:
        """sym(dD/dx) at x_n."""
        return denoiser_jacobian(step.denoiser, self.space, step.x, step.t)
