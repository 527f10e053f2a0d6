"""The levels at which the Laplace approximation is taken: where it is exact, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Energy, TorchEnergy
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange, laplace_posterior
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import GaussianMixture, double_well
from openmm_vtdis.tuning import laplace_range
from openmm_vtdis.tuning.laplace_range import JUMP_COST, find_range
from tests.conftest import Oracle, exact_generator, make_oracle
from tests.diffusion.quadratic import Quadratic, rng


def test_a_gaussian_is_taken_from_the_highest_level() -> None:
    gaussian = Quadratic(Space(3, 2))
    found = find_range(
        TorchEnergy(gaussian.energy),
        gaussian,
        gaussian.sample(500, 1),
        0.01,
        2.0,
        rng(2),
        progress=False,
    )
    assert found == LaplaceRange(pytest.approx(2.0), pytest.approx(2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_a_small_error_of_the_denoiser_is_found_in_spite_of_the_noise(seed: int) -> None:
    """A Gaussian and its denoiser, 30 % too wide: the gain is small where t is small."""
    space = Space(3, 3)
    target = GaussianMixture(torch.zeros(1, 3, 3), [0.7], [1.0], space)
    wide = GaussianMixtureDenoiser(space, target.weights, target.means, 1.3 * target.variances)
    found = find_range(
        TorchEnergy(target.reduced_energy), wide, target.sample(500, 1), 0.01, 1.0, rng(seed),
        progress=False,
    )  # fmt: skip
    assert found == LaplaceRange(pytest.approx(1.0), pytest.approx(1.0))  # type: ignore[arg-type]


def test_between_two_modes_the_exact_denoiser_is_taken() -> None:
    """The Laplace approximation sees one mode only; it gains nothing on an exact denoiser."""
    oracle = make_oracle(4, 2, True)
    found = find_range(
        TorchEnergy(oracle.reduced_energy), oracle.denoiser, oracle.sample(500, 1), 0.01, 5.0,
        rng(2), progress=False,
    )  # fmt: skip
    assert found.level < 1.5
    assert 0.0 < found.jump <= found.level
    below = jump_divergence(oracle, found.jump)
    assert float(below.mean()) < JUMP_COST + 4.0 * float(below.std()) / 4_000**0.5
    above = jump_divergence(oracle, 4.0 * found.jump)
    assert float(above.mean()) > JUMP_COST + 4.0 * float(above.std()) / 4_000**0.5


@pytest.mark.parametrize("seed", range(4))
def test_a_mode_that_the_gaussian_misses_is_seen(seed: int) -> None:
    """Two far, narrow modes: draws from the Gaussian around either never see the other."""
    space = Space(2, 2)
    apart = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    target = GaussianMixture(torch.stack([apart, -apart]), [0.01, 0.01], [0.5, 0.5], space)
    exact = GaussianMixtureDenoiser(space, target.weights, target.means, target.variances)
    found = find_range(
        TorchEnergy(target.reduced_energy), exact, target.sample(500, 1), 0.01, 2.0, rng(seed),
        progress=False,
    )  # fmt: skip
    # At a level t the other mode has the posterior weight exp(-2 / t^2) or more, if x is between
    assert 0.0 < found.jump < 0.5


@pytest.mark.parametrize("fails", ["cost", "shortfall"])
@pytest.mark.parametrize("n_passing", [0, 1, 2, 9, 16])
def test_the_jump_is_from_the_level_before_the_last_that_passes(
    n_passing: int, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all below it goes by the energy, though this exact denoiser is better there."""
    space = Space(2, 2)
    apart = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    target = GaussianMixture(torch.stack([apart, -apart]), [0.01, 0.01], [0.5, 0.5], space)
    exact = GaussianMixtureDenoiser(space, target.weights, target.means, target.variances)
    calls: list[int] = []

    def found(energy: Energy, space: Space, x_0: Tensor, *rest: object) -> Tensor:
        calls.append(1)
        bad = 0.0 if len(calls) <= n_passing else 1.1 * laplace_range.MOST
        both = [bad, 0.0] if fails == "cost" else [0.0, bad]
        return torch.tensor(both)[:, None].expand(2, len(x_0))

    monkeypatch.setattr(laplace_range, "_jump_cost", found)
    measured = find_range(
        TorchEnergy(target.reduced_energy), exact, target.sample(500, 1), 0.01, 2.0, rng(0),
        progress=False,
    )  # fmt: skip
    levels = Schedule.geometric(laplace_range.N_LEVELS - 1, 0.01, 2.0).times
    expected = {0: 0.0, 1: 0.0, 2: levels[0], 9: levels[7], 16: levels[15]}
    assert measured.jump == expected[n_passing]
    assert measured.level >= measured.jump
    assert measured.level < levels[-1] or n_passing == 16


def test_a_mode_that_no_draw_meets_is_seen_at_the_frames_in_it() -> None:
    """A denoiser that knows one mode only: the draws are content, frames in the other are not."""
    space, t = Space(2, 2), 1.0
    apart = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    target = GaussianMixture(torch.stack([apart, -apart]), [0.002, 0.002], [0.97, 0.03], space)
    known, missed = (sign * apart.expand(50, 2, 2) for sign in (1.0, -1.0))
    x = torch.zeros_like(known)
    posterior = laplace_posterior(
        TorchEnergy(target.reduced_energy), space, x, known, torch.full((50,), t).double()
    )
    for frames, is_seen in ((known, False), (missed, True)):
        cost, shortfall = laplace_range._jump_cost(
            target.reduced_energy, space, frames, x, posterior, t, rng(0)
        )
        assert float(cost.mean()) < JUMP_COST
        assert (float(shortfall.max()) > laplace_range.MOST) == is_seen


def jump_divergence(oracle: Oracle, level: float) -> Tensor:
    """log p(x_0 | x_1) by Bayes, all densities being known, less that of the kernel: (4,000,)."""
    grid = Schedule((1e-4, level, 1.1 * level))
    x = oracle.sample(4_000, 5)
    process = DiffusionProcess.ddpm(oracle.denoiser, grid, oracle.reduced_energy)
    family = make_covariance("hessian", oracle.space, [0] * 4, torch.zeros(1, 22))
    x_1 = process.sample_forward(1, x, rng(6))
    step = process.with_laplace(LaplaceRange(level), jump=False).step(1, x_1)
    log_p = family.at(step).log_prob(x - process.mean(step))
    exact = oracle.denoiser
    variances = exact.variances + grid.times[1] ** 2 - grid.times[0] ** 2
    marginal = GaussianMixture(exact.means, variances, exact.weights, oracle.space)
    log_q = process.forward_log_prob(1, x, x_1) - oracle.reduced_energy(x)
    return log_q + marginal.reduced_energy(x_1) - log_p


def test_a_grid_above_one_goes_without() -> None:
    target, gen = exact_generator(0.7)
    levels = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    frames = target.sample(600, seed=1)
    gen.tune(frames, None, "hessian", schedule=levels, n_trajectories=200, progress=False)
    assert gen.process is not None
    assert gen.process.laplace is None


def test_only_covariances_that_know_the_state_use_it() -> None:
    target, gen = exact_generator(0.7)
    frames = target.sample(600, seed=1)
    for kind, used in (("isotropic", False), ("tweedie", True)):
        gen.tune(frames, 20, kind, n_trajectories=200, progress=False)
        assert gen.process is not None
        assert (gen.process.laplace is not None) == used
    gen.tune(frames, 20, "tweedie", n_trajectories=200, laplace=False, progress=False)
    assert gen.process is not None
    assert gen.process.laplace is None
    levels = [0.01 * 2.0**k for k in range(11)]
    gen.tune(frames, None, "tweedie", schedule=levels, n_trajectories=200, progress=False)
    assert gen.process is not None
    assert gen.process.schedule.times == tuple(levels)
    assert gen.process.laplace is not None
    assert not gen.process.jumps


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return sample_hmc(
        double_well().target(), n_chains=100, n_samples=2, burn_in=60, seed=1, progress=False
    ).positions


def test_energies_from_contexts_are_not_asked_for_second_derivatives(frames: Tensor) -> None:
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network="egnn-1x8", backend="contexts"
    )
    gen.train(frames, 3, progress=False)
    gen.tune(frames, 10, "tweedie", n_trajectories=100, progress=False)
    assert gen.process is not None
    assert gen.process.laplace is None
