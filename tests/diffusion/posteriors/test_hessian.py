"""Posteriors from the energy's Hessian: derivatives, and one exact Gaussian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmm_vtdis.coordinates import TorchEnergy
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import ReverseStep, make_covariance
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.posteriors.hessian import energy_derivatives
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from tests.conftest import Oracle, make_oracle

GRID = Schedule.geometric(12, 0.03, 15.0)


def matrix_of(step: ReverseStep) -> Tensor:
    """C of a step's posterior, (B, d, d)."""
    values, vectors = step.posterior.spectrum()
    return (vectors * values[:, None]) @ vectors.mT


def test_gradient_and_hessian_are_the_derivatives(oracle: Oracle) -> None:
    x = oracle.sample(3, seed=1)
    space = oracle.space

    def reduced_energy(z: Tensor) -> Tensor:
        return oracle.reduced_energy(space.expand(z.reshape(1, space.rank, space.n_dims)))[0]

    exact = torch.stack(
        [torch.autograd.functional.hessian(reduced_energy, space.reduce(y).flatten()) for y in x]
    )
    gradient, hessian = energy_derivatives(TorchEnergy(oracle.reduced_energy), space, x)
    torch.testing.assert_close(hessian, exact)
    slopes = [
        torch.autograd.functional.jacobian(reduced_energy, space.reduce(y).flatten()) for y in x
    ]
    torch.testing.assert_close(gradient, torch.stack(slopes))


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_one_gaussian_has_the_exact_posterior(t: float) -> None:
    """Narrower than the data's unit variance, so that nothing is clamped."""
    space, variance = Space(3, 2), 0.4
    mean = torch.zeros(1, 3, 2, dtype=torch.float64)
    oracle = Oracle(GaussianMixtureDenoiser(space, torch.ones(1), mean, torch.tensor([variance])))
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule((0.05, 0.07, t)), oracle.reduced_energy
    )
    family = make_covariance("hessian", space, [0] * 3, torch.zeros(1, 22))
    step = process.step(2, oracle.sample(4, seed=0), family)
    shape = matrix_of(step)
    identity = torch.eye(space.dim, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(shape, variance / (variance + t**2) * identity)


def test_an_energy_that_is_not_finite_counts_as_flat() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, GRID, lambda x: x.square().sum(dim=(1, 2)) * torch.nan
    )
    family = make_covariance("hessian", oracle.space, [0] * 3, torch.zeros(1, 22))
    step = process.step(6, oracle.sample(4, seed=0), family)
    identity = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(matrix_of(step), identity / (1.0 + step.t**2))
    with pytest.raises(ValueError, match='a process that knows the energy .* for "hessian"'):
        DiffusionProcess.ddpm(oracle.denoiser, GRID).step(6, step.x, family)
