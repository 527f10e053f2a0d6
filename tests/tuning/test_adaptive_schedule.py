"""The adaptive grid: its cost is the KL divergence that it says, and equal shares make it least."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.targets import gaussian_mixture
from openmm_vtdis.tuning.adaptive_schedule import adapt, denoising_errors, equal_shares, step_cost

WIDTHS = torch.tensor([0.05, 0.3, 0.3, 1.0, 1.5, 2.0], dtype=torch.float64)
LEVELS = torch.logspace(-3, 1.5, 200, dtype=torch.float64)


class LinearDenoiser:
    """Exact denoiser of a Gaussian with one width for each of the degrees of freedom."""

    space = Space(2, 3, centred=False)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        square = WIDTHS.square().reshape(2, 3)
        return x * square / (square + t.square()[:, None, None])


def shrinkage(t: Tensor) -> Tensor:
    """Eigenvalues of the posterior covariance over t^2: t (L,) -> (L, d)."""
    return WIDTHS.square() / (WIDTHS.square() + t.square()[:, None])


def divergence(grid: Schedule) -> float:
    """Sum over steps of the KL divergence of the best isotropic kernel from the true one."""
    t = grid.tensor
    gain = (t[1:] / t[:-1]).square() - 1.0
    widths = 1.0 + gain[:, None] * shrinkage(t[1:])
    return float(0.5 * (len(WIDTHS) * widths.mean(dim=1).log() - widths.log().sum(dim=1)).sum())


def exact_cost() -> Tensor:
    return step_cost(LEVELS, shrinkage(LEVELS).sum(dim=1), len(WIDTHS))


def test_errors_are_those_of_the_posterior() -> None:
    rng = torch.Generator().manual_seed(1)
    frames = torch.randn(20_000, 2, 3, generator=rng, dtype=torch.float64)
    frames = frames * WIDTHS.reshape(2, 3)
    levels = LEVELS[::20]
    errors = denoising_errors(LinearDenoiser(), frames, levels, rng, 300, progress=False)
    expected = shrinkage(levels)
    sigma = (2.0 * expected.square().sum(dim=1) / len(frames)).sqrt()
    assert float(((errors - expected.sum(dim=1)) / sigma).abs().max()) < 4.0


def test_the_cost_is_the_divergence_of_a_small_step() -> None:
    cost, h = exact_cost(), 1e-3
    for i in range(5, 195, 10):
        t = float(LEVELS[i])
        step = Schedule((t * math.exp(-2.0 * h), t * math.exp(-h), t))
        assert divergence(step) / (2.0 * h**2) == pytest.approx(float(cost[i]), rel=0.03, abs=5e-4)


def test_equal_shares_cost_least() -> None:
    n, cost, width = 400, exact_cost(), float(LEVELS.log().diff()[0])
    best = divergence(equal_shares(LEVELS, cost, n, least_share=0.0))
    assert best == pytest.approx((float(cost.sqrt().sum()) * width) ** 2 / n, rel=0.02)
    for power in (0.5, 2.0):  # controls: other densities
        assert best < 0.95 * divergence(equal_shares(LEVELS, cost**power, n, least_share=0.0))
    geometric = divergence(Schedule.geometric(n, 1e-3, 10**1.5))
    assert best < divergence(equal_shares(LEVELS, cost, n)) < 0.8 * geometric


def test_an_isotropic_posterior_wants_a_geometric_grid() -> None:
    levels = torch.logspace(-2, 1, 30, dtype=torch.float64)
    grid = equal_shares(levels, torch.zeros(30, dtype=torch.float64), 7)
    np.testing.assert_allclose(grid.times, Schedule.geometric(7, 1e-2, 10.0).times, rtol=1e-12)


def test_ends_are_kept_and_the_number_of_steps_is_free() -> None:
    frames = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for n_steps in (2, 7, 300):
        geometric = Schedule.geometric(n_steps, 0.01, 20.0)
        rng = torch.Generator().manual_seed(3)
        grid = adapt(geometric, LinearDenoiser(), frames, rng, progress=False)
        assert grid.n_steps == n_steps
        assert (grid.times[0], grid.times[-1]) == pytest.approx((0.01, 20.0), rel=1e-14)


# -- two modes --------------------------------------------------------------------------------
def two_modes(dim: int) -> DiffusionBoltzmannGenerator:
    """GMM-2: the posterior has two modes at some noise levels and is isotropic at others."""
    target = gaussian_mixture(dim)
    length = float(target.sample(1_000, seed=4).square().mean().sqrt())
    exact = GaussianMixtureDenoiser(
        target.space, target.weights, target.means, target.variances
    ).scaled(length)
    coordinates = Cartesian(target.space, length)
    return DiffusionBoltzmannGenerator.from_denoiser(target, exact, coordinates)


def frames_of(gen: DiffusionBoltzmannGenerator, n: int, seed: int) -> Tensor:
    return gen.target.sample(n, seed=seed)  # type: ignore[attr-defined]


class Profile:
    """The divergence of any grid, from denoising errors of many frames at many levels."""

    def __init__(
        self, gen: DiffusionBoltzmannGenerator, grid: Schedule, n_frames: int = 20_000
    ) -> None:
        self.dim = gen.space.dim
        levels = Schedule.geometric(300, grid.times[0], grid.times[-1]).tensor
        frames = frames_of(gen, n_frames, seed=11) / gen.coordinates.length
        errors = denoising_errors(
            gen.denoiser, frames, levels, torch.Generator().manual_seed(12), 10_000, progress=False
        )
        self.tau, self.errors = levels.log().numpy(), errors.numpy()
        areas = 0.5 * (self.errors[1:] + self.errors[:-1]) * np.diff(self.tau)
        self.integral = np.concatenate([[0.0], np.cumsum(areas)])

    def divergence(self, grid: Schedule) -> float:
        tau = np.log(grid.times)
        m, integral = (np.interp(tau, self.tau, y) for y in (self.errors, self.integral))
        gain = np.exp(2.0 * np.diff(tau)) - 1.0
        steps = 0.5 * self.dim * np.log1p(gain * m[1:] / self.dim) - np.diff(integral)
        return float(steps.sum())


def test_the_divergence_is_that_of_trajectories() -> None:
    """The mean log weight (log Z = 0) is the sum over steps; the ends cost no more than they say.

    Control: a grid that ends where the data's widest direction is not yet drowned in noise.
    """
    gen = two_modes(20)
    frames, fresh = frames_of(gen, 20_000, seed=5), frames_of(gen, 8_000, seed=6)
    settings: dict[str, Any] = {"schedule": "geometric", "objective": "kl", "progress": False}
    excess = {}
    for t_max in (None, 7.0):
        gen.tune(frames, 30, "isotropic", n_trajectories=4_000, t_max=t_max, **settings)
        assert gen.process is not None
        grid = gen.process.schedule
        log_w = np.asarray(gen.log_weights(fresh, seed=7, progress=False))
        excess[t_max] = log_w.mean() - Profile(gen, grid, 8_000).divergence(grid)
        stderr = log_w.std() / np.sqrt(len(log_w))
    assert abs(excess[None]) < 4.0 * stderr + 2e-3
    assert excess[7.0] > 4.0 * stderr + 2e-3


def test_the_measured_grid_is_nearly_the_best() -> None:
    gen, geometric = two_modes(2), Schedule.geometric(40, 0.01, 40.0)
    profile = Profile(gen, geometric)
    levels = torch.from_numpy(np.exp(profile.tau))
    cost = step_cost(levels, torch.from_numpy(profile.errors), gen.space.dim)
    best = profile.divergence(equal_shares(levels, cost, 40))
    frames = frames_of(gen, 5_000, seed=8) / gen.coordinates.length
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        grid = adapt(geometric, gen.denoiser, frames, rng, progress=False)
        assert profile.divergence(grid) < 1.3 * best < 0.5 * profile.divergence(geometric)


def test_weights_stay_exact_on_an_adaptive_grid() -> None:
    gen = two_modes(20)
    gen.tune(frames_of(gen, 4_000, seed=9), 40, "isotropic", n_trajectories=2_000, progress=False)
    assert abs(gen.sample(2_000, seed=10, progress=False).log_z().z(0.0)) < 4.0
