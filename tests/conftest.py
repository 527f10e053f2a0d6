"""Fixtures shared by the tests: small spaces and the exact Gaussian-mixture oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import openmm
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget, gaussian_mixture

settings.register_profile("always", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=2_000, deadline=None)
settings.load_profile("always")

needs_python_force = pytest.mark.skipif(
    not hasattr(openmm, "PythonForce"), reason="OpenMM has a PythonForce from version 8.5 on"
)


@dataclass
class Oracle:
    """A normalised Gaussian mixture with its exact denoiser: log Z = 0 and E[w] = 1."""

    denoiser: GaussianMixtureDenoiser

    @property
    def space(self) -> Space:
        return self.denoiser.space

    def sample(self, n: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        d = self.denoiser
        k = torch.multinomial(d.weights, n, replacement=True, generator=rng)
        noise = self.space.standard_normal(n, rng)
        return d.means[k] + d.variances[k].sqrt()[:, None, None] * noise

    def reduced_energy(self, x: Tensor) -> Tensor:
        d = self.denoiser
        square = (x[:, None] - d.means).square().sum(dim=(-2, -1))
        log_norm = 0.5 * self.space.dim * (2.0 * math.pi * d.variances).log()
        return -torch.logsumexp(d.weights.log() - 0.5 * square / d.variances - log_norm, dim=1)


def make_oracle(n_particles: int, n_dims: int, centred: bool, seed: int = 0) -> Oracle:
    space = Space(n_particles, n_dims, centred)
    rng = torch.Generator().manual_seed(seed)
    means = 1.2 * torch.randn(2, n_particles, n_dims, generator=rng, dtype=torch.float64)
    return Oracle(
        GaussianMixtureDenoiser(space, torch.tensor([0.6, 0.4]), means, torch.tensor([0.3, 0.5]))
    )


@pytest.fixture(
    params=[(2, 1, True), (4, 2, True), (3, 3, True), (3, 1, False), (2, 2, False), (2, 3, False)],
    ids=lambda p: f"M{p[0]}-D{p[1]}-{'zero-CoM' if p[2] else 'free'}",
)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return make_oracle(*request.param)


def z_of_mean_weight(log_w: Tensor) -> float:
    """(mean w - 1) in standard errors."""
    w = log_w.exp()
    return float((w.mean() - 1.0) / (w.std() / math.sqrt(len(w))))


def exact_generator(
    length: float = 0.7, space: Space | None = None
) -> tuple[GaussianMixture, DiffusionBoltzmannGenerator]:
    """A normalised mixture (log Z = 0) and its exact denoiser in units that are not nm."""
    target = gaussian_mixture(3)
    labels = None
    if space is not None:
        noise = torch.randn(2, 4, space.n_dims, generator=torch.Generator().manual_seed(0))
        target = GaussianMixture(noise.double(), [0.15, 0.3], [2.0, 1.0], space)
        labels = [0, 1, 1, 2]
    denoiser = GaussianMixtureDenoiser(
        target.space, target.weights, target.means, target.variances
    ).scaled(length)
    return target, DiffusionBoltzmannGenerator.from_denoiser(
        target, denoiser, Cartesian(target.space, length), labels
    )


def springs(temperature: float) -> tuple[OpenMMTarget, float]:
    """Three particles, springs of no length between them, and the exact log Z."""
    system, force = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(3):
        system.addParticle(12.0)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        force.addBond(i, j, 0.0, 300.0)
    system.addForce(force)
    variance = 8.31446261815324e-3 * temperature / 900.0
    return OpenMMTarget(system, None, temperature), 3.0 * math.log(2.0 * math.pi * variance)
