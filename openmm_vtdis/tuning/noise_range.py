"""The ends of a grid, from the forces on frames."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.schedule import default_range

_N_FRAMES = 512


def noise_range(
    energy: Energy,
    space: Space,
    z: Tensor,
    t_min: float | None = None,
    t_max: float | None = None,
) -> tuple[float, float]:
    """Ends of the noise levels of a grid for frames z (n, M, D); given ones are kept.

    All in model coordinates, see :func:`~openmm_vtdis.diffusion.schedule.default_range`.
    """
    some = z[:: max(1, len(z) // _N_FRAMES)]
    moments = space.reduce(-energy.gradient(some)).pow(4).mean(dim=0)
    if space.centred:  # averaged over rotations
        gram = torch.einsum("bia,bja->ij", z, z) / (len(z) * space.n_dims)
        spread, mean_square = space.n_dims * float(gram.square().sum()), 0.0
    else:
        around = (z - z.mean(dim=0)).flatten(1)
        spread = float((around.mT @ around / len(z)).square().sum())
        noise = float(z.var(dim=0).sum()) / len(z)
        mean_square = max(float(z.mean(dim=0).square().sum()) - noise, 0.0)
    low, high = default_range(spread, moments, mean_square)
    return low if t_min is None else t_min, high if t_max is None else t_max
