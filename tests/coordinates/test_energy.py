"""The energy in model units, as covariances are given it."""

from __future__ import annotations

import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import exact_generator


def test_a_covariance_that_uses_the_energy_is_given_it_in_model_units() -> None:
    """Weights are exact with any energy, so that log Z would not show one in the wrong unit."""
    space, variance, length = Space(4, 3), 0.2, 0.7
    target = GaussianMixture(torch.zeros(1, 4, 3), [variance], [1.0], space)
    denoiser = GaussianMixtureDenoiser(space, target.weights, target.means, target.variances)
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, denoiser.scaled(length), Cartesian(target.space, length)
    )
    gen.tune(target.sample(200, seed=1), 10, "hessian", n_trajectories=100, progress=False)
    assert gen.process is not None
    scaled = variance / length**2
    for n in (1, 5, 10):
        t = gen.process.schedule.times[n]
        values, vectors = gen.process.step(
            n, target.sample(3, seed=2) / length
        ).posterior.spectrum()
        shape = (vectors * values[:, None]) @ vectors.mT
        identity = torch.eye(space.dim, dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(shape, scaled / (scaled + t**2) * identity)


def test_the_model_energy_is_that_of_a_density_in_model_units() -> None:
    """A constant in it changes no effective sample size, so that nothing else would show it."""
    target, gen = exact_generator(0.7, Space(4, 2))
    variances = target.variances / 0.7**2
    scaled = GaussianMixture(target.means / 0.7, variances, target.weights, target.space)
    y = target.sample(20, seed=1) / 0.7
    torch.testing.assert_close(gen.model_energy(y), scaled.reduced_energy(y))
