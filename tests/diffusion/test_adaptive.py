"""The adaptive grid: its cost is the KL divergence that it says, and equal shares make it least."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.adaptive import (
    N_CONFIGURATIONS,
    choose_schedule,
    denoising_errors,
    equal_shares,
    step_cost,
)
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.geometry import Space
from openmm_vtdis.targets import gaussian_mixture

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
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(20_000, 2, 3, generator=generator, dtype=torch.float64)
    frames = frames * WIDTHS.reshape(2, 3)
    levels = LEVELS[::20]
    errors = denoising_errors(LinearDenoiser(), frames, levels, generator, 300, progress=False)
    expected = shrinkage(levels)
    sigma = (2.0 * expected.square().sum(dim=1) / N_CONFIGURATIONS).sqrt()
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
    for n_steps in (None, 2, 7, 300):
        grid = choose_schedule(
            "adaptive", n_steps, (0.01, 20.0), 7.0, LinearDenoiser(), frames,
            torch.Generator().manual_seed(3), progress=False,
        )  # fmt: skip
        assert grid.n_steps == (100 if n_steps is None else n_steps)
        assert (grid.times[0], grid.times[-1]) == pytest.approx((0.01, 20.0), rel=1e-14)


def test_bad_requests_are_refused() -> None:
    arguments = LinearDenoiser(), torch.zeros(5, 2, 3), torch.Generator()
    with pytest.raises(ValueError, match="schedule: expected one of 'adaptive', 'geometric'"):
        choose_schedule("best", 10, (0.1, 1.0), 7.0, *arguments)
    with pytest.raises(ValueError, match="n_steps: expected an integer >= 2, got 1"):
        choose_schedule("adaptive", 1, (0.1, 1.0), 7.0, *arguments)
    with pytest.raises(ValueError, match="t_min < t_max"):
        choose_schedule("adaptive", 10, (1.0, 0.1), 7.0, *arguments)


def test_fewer_steps_do_on_an_adaptive_grid_and_weights_stay_exact() -> None:
    target = gaussian_mixture(50)
    length = float(target.sample(1_000, seed=4).square().mean().sqrt())
    exact = GaussianMixtureDenoiser(
        target.space, target.weights, target.means, target.variances
    ).scaled(length)
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, exact, length)
    frames, divergence = target.sample(4_000, seed=5), {}
    for schedule in ("adaptive", "geometric"):
        gen.tune(frames, 40, schedule=schedule, objective="kl", progress=False)
        assert abs(gen.sample(2_000, seed=6, progress=False).log_z().z(0.0)) < 4.0
        divergence[schedule] = gen.noise(frames, seed=7, progress=False).mean()  # log Z = 0
    assert 0.0 < divergence["adaptive"] < 0.9 * divergence["geometric"]
