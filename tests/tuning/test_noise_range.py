"""The prior end of a schedule drowns the spread of the data."""

from __future__ import annotations

import pytest
import torch

from openmm_vtdis.coordinates import Cartesian, ModelEnergy
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.targets import GaussianMixture
from openmm_vtdis.tuning.noise_range import noise_range


@pytest.mark.parametrize("space", [Space(4, 2), Space(5, 3)], ids=str)
def test_the_prior_end_drowns_the_spread_of_turned_configurations(space: Space) -> None:
    """sum s_i^2 / 4 T^4 is the budget, 10^-3 nats, s_i being variances over all orientations."""
    rng = torch.Generator().manual_seed(1)
    chain = torch.zeros(1, space.n_particles, space.n_dims, dtype=torch.float64)
    chain[0, :, 0] = torch.arange(space.n_particles)
    target = GaussianMixture(chain, [0.05], [1.0], space)
    y = target.sample(4_000, seed=2)
    _, high = noise_range(ModelEnergy(target, Cartesian(space)), space, y)
    rotations = random_rotations(len(y), space.n_dims, rng)
    turned = space.reduce(y @ rotations).flatten(1)
    spread = float((turned.mT @ turned / len(y)).square().sum())
    assert spread > 2.0 * space.dim
    assert spread / (4.0 * high**4) == pytest.approx(1e-3, rel=0.1)
