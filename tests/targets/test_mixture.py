"""Gaussian mixtures: normalised on their space, and sampled exactly."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_vtdis.core.space import Space
from openmm_vtdis.targets import GaussianMixture, gaussian_mixture
from openmm_vtdis.testing import check_target
from tests.targets.reference import configurations


def mixture(space: Space, seed: int = 0) -> GaussianMixture:
    means = configurations(3, space.n_particles, space.n_dims, seed) + 0.7
    return GaussianMixture(means, [0.3, 0.5, 0.8], [1.0, 2.0, 1.0], space)


SPACES = [Space(3, 2), Space(2, 3), Space(4, 1), Space(2, 2, centred=False)]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_density_is_that_of_the_reduced_coordinates(space: Space) -> None:
    """Against torch.distributions, in the coordinates V x."""
    target = mixture(space)
    x = target.sample(50, seed=1)
    components = torch.distributions.MultivariateNormal(
        space.reduce(target.means).flatten(1),
        target.variances[:, None, None] * torch.eye(space.dim, dtype=torch.float64),
    )
    dense = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(target.weights), components
    )
    expected = -dense.log_prob(space.reduce(x).flatten(1))
    assert torch.allclose(target.reduced_energy(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_log_z_is_zero(space: Space) -> None:
    """E[pi / p] = 1 under a wide Gaussian p on the space; within 4 standard errors."""
    target, variance = mixture(space), 1.5
    x = math.sqrt(variance) * space.standard_normal(100_000, torch.Generator().manual_seed(2))
    w = (-target.reduced_energy(x) - space.isotropic_log_prob(x, variance)).exp()
    stderr = float(w.std()) / math.sqrt(len(w))
    assert stderr < 0.05
    assert abs(float(w.mean()) - 1.0) < 4.0 * stderr
    # negative control: the normalisation of the full space, where that of X_0 belongs
    if space.centred:
        wrong = w * (2.0 * math.pi * 0.5) ** (-0.5 * space.n_dims)
        assert abs(float(wrong.mean()) - 1.0) > 4.0 * float(wrong.std()) / math.sqrt(len(w))


def test_samples_have_the_moments_of_the_mixture() -> None:
    target = gaussian_mixture(5)
    x = target.sample(40_000, seed=3)
    assert x.shape == (40_000, 5, 1)
    assert x.dtype == torch.float64
    left = (x.mean(dim=1) < -0.5).double().mean()
    assert abs(float(left) - 1 / 3) < 4 * math.sqrt(2 / 9 / 40_000)
    variance = x[x.mean(dim=(1, 2)) > 0].var(dim=0)
    assert torch.allclose(variance, torch.full_like(variance, 0.15), rtol=4 * math.sqrt(2 / 26_000))
    assert torch.equal(x, target.sample(40_000, seed=3))
    assert not torch.equal(x, target.sample(40_000, seed=4))


def test_centred_samples_are_centred_and_the_energy_ignores_translations() -> None:
    target = mixture(Space(3, 2))
    x = target.sample(20, seed=0)
    assert torch.allclose(x.mean(dim=1), torch.zeros(20, 2, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(target.means.mean(dim=1), torch.zeros(3, 2).double(), atol=1e-14)
    check_target(target, x, symmetries=("translation",))


def test_gmm2() -> None:
    target = gaussian_mixture(50)
    assert target.space == Space(50, 1, centred=False)
    assert target.weights.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert target.variances.tolist() == [0.15, 0.15]
    assert target.means[:, :, 0].unique(dim=1).flatten().tolist() == [1.0, -2.0]
    assert target.temperature is None
    # At a mean the other component is 450 / 0.3 = 1500 kT away.
    at_mean = target.reduced_energy(target.means)
    expected = [25 * math.log(0.3 * math.pi) - math.log(w) for w in (2 / 3, 1 / 3)]
    assert at_mean.tolist() == pytest.approx(expected, rel=1e-13)
    check_target(target, target.sample(10, seed=0))


@pytest.mark.parametrize(
    ("means", "variances", "weights", "message"),
    [
        (torch.zeros(2, 3), [1.0, 1.0], [1.0, 1.0], r"means: expected shape \(K, M, D\)"),
        (torch.zeros(2, 3, 1), [1.0], [1.0, 1.0], "variances: expected 2 finite numbers > 0"),
        (torch.zeros(2, 3, 1), [1.0, 0.0], [1.0, 1.0], "variances: expected 2 finite numbers > 0"),
        (torch.zeros(2, 3, 1), [1.0, 1.0], [1.0, -1.0], "weights: expected 2 finite numbers > 0"),
        (torch.full((2, 3, 1), torch.nan), [1.0, 1.0], [1.0, 1.0], "means: .*finite positions"),
    ],
)
def test_bad_arguments(means, variances, weights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(means, variances, weights)


def test_means_of_another_space_are_refused() -> None:
    with pytest.raises(ValueError, match=r"means: expected shape \(K, 4, 2\) on this space"):
        GaussianMixture(torch.zeros(1, 3, 2), [1.0], [1.0], Space(4, 2))
    with pytest.raises(ValueError, match=r"x: expected positions of shape \(B, 5, 1\)"):
        gaussian_mixture(5).reduced_energy(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="dim: expected an integer >= 1"):
        gaussian_mixture(0)
