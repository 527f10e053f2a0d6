"""The Laplace approximation of the posterior: exact for Gaussians whatever the denoiser says."""

from __future__ import annotations

import math
from pathlib import Path

import openmm
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian, Energy, ModelEnergy, TorchEnergy
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior
from openmm_vtdis.diffusion.posteriors.laplace import (
    TRUST_RADIUS,
    LaplaceRange,
    laplace_posterior,
)
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget, double_well
from openmm_vtdis.tuning import laplace_range
from openmm_vtdis.tuning.laplace_range import JUMP_COST, find_range
from tests.conftest import Oracle, exact_generator, make_oracle, z_of_mean_weight
from tests.molecules import molecule


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """u = x^T A x / 2 in reduced coordinates: a Gaussian whose variances are not equal."""

    def __init__(self, space: Space) -> None:
        self.space = space
        vectors = torch.linalg.qr(
            torch.randn(space.dim, space.dim, generator=rng(1), dtype=torch.float64)
        )[0]
        self.precision = (vectors * torch.linspace(1.5, 400.0, space.dim).double()) @ vectors.mT
        self.root = torch.linalg.cholesky(torch.linalg.inv(self.precision))

    def energy(self, x: Tensor) -> Tensor:
        z = self.space.reduce(x).flatten(1)
        return 0.5 * torch.einsum("bi,ij,bj->b", z, self.precision, z)

    def log_prob(self, x: Tensor) -> Tensor:
        log_norm = 0.5 * torch.logdet(self.precision / (2.0 * math.pi))
        return log_norm - self.energy(x)

    def sample(self, n: int, seed: int) -> Tensor:
        z = torch.randn(n, self.space.dim, generator=rng(seed), dtype=torch.float64)
        return self.space.expand((z @ self.root.mT).reshape(n, self.space.rank, self.space.n_dims))

    def matrix(self, t: float) -> Tensor:
        """Cov[x_0 | x_t]."""
        return torch.linalg.inv(self.precision + torch.eye(self.space.dim) / t**2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact denoiser but for a fifth of the posterior's width, everywhere."""
        rows = []
        for y, s in zip(x, t.tolist(), strict=True):
            matrix = self.matrix(s)
            exact = matrix @ self.space.reduce(y[None]).flatten() / s**2
            rows.append(exact + 0.2 * torch.linalg.cholesky(matrix) @ torch.cos(3.0 * exact))
        reduced = torch.stack(rows)
        return self.space.expand(reduced.reshape(len(x), self.space.rank, self.space.n_dims))


SPACES = [Space(2, 2), Space(3, 3), Space(3, 1, centred=False)]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("t", [0.02, 0.3, 4.0])
def test_a_gaussian_has_its_exact_posterior_whatever_the_denoiser(space: Space, t: float) -> None:
    gaussian = Quadratic(space)
    x = gaussian.sample(5, seed=2) + t * space.standard_normal(5, rng(3))
    exact = (gaussian.matrix(t) @ space.reduce(x).flatten(1)[:, :, None])[:, :, 0] / t**2
    denoised = gaussian(x, torch.full((5,), t))
    assert not torch.allclose(space.reduce(denoised).flatten(1), exact, rtol=1e-3)
    posterior = laplace_posterior(
        TorchEnergy(gaussian.energy), space, x, denoised, torch.full((5,), t).double()
    )
    torch.testing.assert_close(space.reduce(posterior.mean).flatten(1), exact)
    covariance = (posterior.vectors * posterior.values[:, None]) @ posterior.vectors.mT * t**2
    torch.testing.assert_close(covariance, gaussian.matrix(t).expand(5, -1, -1))


def test_the_posterior_of_springs_in_openmms_units_is_exact() -> None:
    """From a System in nm and kJ/mol to model units: a wrong unit or a missing projection shows."""
    system, force = openmm.System(), openmm.HarmonicBondForce()
    stiffness = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(4):
        system.addParticle(1.0)
    bonds = [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2)]
    for (i, j), k in zip(bonds, range(300, 800, 100), strict=True):
        force.addBond(i, j, 0.0, float(k))
        stiffness[[i, j], [i, j]] += k
        stiffness[[i, j], [j, i]] -= k
    system.addForce(force)
    topology = molecule(["C", "N", "O", "F"], bonds)
    target, length, t = OpenMMTarget(system, topology, 400.0), 0.35, 0.2
    space, kt = target.space, thermal_energy(400.0)
    precision = torch.kron(
        space.basis @ stiffness @ space.basis.mT * length**2 / kt, torch.eye(3).double()
    )
    assert float(torch.linalg.eigvalsh(precision)[0]) > 1.0  # narrower than the model's unit
    x = space.standard_normal(5, rng(1))
    exact = torch.linalg.inv(precision + torch.eye(space.dim) / t**2)
    mean = space.reduce(x).flatten(1) / t**2 @ exact
    denoised = space.expand(mean.reshape(5, 3, 3)) + 0.01 * space.standard_normal(5, rng(2))

    def posterior_agrees(energy: Energy) -> bool:
        level = torch.full((5,), t, dtype=torch.float64)
        found = laplace_posterior(energy, space, x, denoised, level)  # no longer than allowed
        shape = (found.vectors * found.values[:, None]) @ found.vectors.mT * t**2
        near = torch.allclose(space.reduce(found.mean).flatten(1), mean, rtol=1e-9, atol=1e-12)
        return near and torch.allclose(shape, exact.expand_as(shape), rtol=1e-9, atol=1e-12)

    assert posterior_agrees(ModelEnergy(target, Cartesian(space, length)))
    wrong_length = ModelEnergy(target, Cartesian(space, 1.1 * length))
    warmer = ModelEnergy(OpenMMTarget(system, topology, 440.0), Cartesian(space, length))
    assert not posterior_agrees(wrong_length)
    assert not posterior_agrees(warmer)
    assert not posterior_agrees(TorchEnergy(target.reduced_energy))  # nm


def test_the_step_stays_in_the_trust_region_and_where_it_is_finite() -> None:
    """From far off it moves by the radius; from where the energy is NaN, not at all."""
    space, t = Space(3, 2), 0.3
    gaussian = Quadratic(space)
    x = gaussian.sample(3, seed=2)
    denoised = x + 50.0 * space.standard_normal(3, rng(3))

    def energy(y: Tensor) -> Tensor:
        return torch.where(torch.arange(3) == 1, torch.nan, 1.0) * gaussian.energy(y)

    level = torch.full((3,), t).double()
    shift = laplace_posterior(TorchEnergy(energy), space, x, denoised, level).mean - denoised
    z = space.reduce(shift).flatten(1)
    precision = torch.linalg.inv(gaussian.matrix(t))
    length = torch.einsum("bi,ij,bj->b", z, precision, z).sqrt()
    radius = TRUST_RADIUS * math.sqrt(space.dim)
    torch.testing.assert_close(length, torch.tensor([radius, 0.0, radius]).double())


def test_it_turns_and_permutes_with_the_configuration() -> None:
    target = double_well().target()
    space, t = target.space, torch.full((4,), 0.1, dtype=torch.float64)
    x = space.project(torch.randn(4, 4, 2, generator=rng(1), dtype=torch.float64))
    turn = random_rotations(4, 2, rng(2))
    order = [2, 0, 3, 1]

    def moved(y: Tensor) -> Tensor:
        return (y @ turn.mT)[:, order]

    denoised = 0.9 * x
    here = laplace_posterior(TorchEnergy(target.reduced_energy), space, x, denoised, t)
    there = laplace_posterior(
        TorchEnergy(target.reduced_energy), space, moved(x), moved(denoised), t
    )
    assert not torch.allclose(here.mean, denoised)
    torch.testing.assert_close(there.mean, moved(here.mean))
    torch.testing.assert_close(there.values, here.values)


def test_many_levels_at_once_are_the_same_as_one_by_one() -> None:
    space = Space(3, 2)
    gaussian = Quadratic(space)
    t = torch.tensor([0.02, 0.3, 4.0], dtype=torch.float64)
    x = gaussian.sample(3, seed=2) + t[:, None, None] * space.standard_normal(3, rng(3))
    together = laplace_posterior(TorchEnergy(gaussian.energy), space, x, 0.9 * x, t)
    alone = [
        laplace_posterior(TorchEnergy(gaussian.energy), space, y, 0.9 * y, s)
        for y, s in zip(x.split(1), t.split(1), strict=True)
    ]
    for name in ("mean", "values", "vectors"):
        expected = torch.cat([getattr(posterior, name) for posterior in alone])
        torch.testing.assert_close(getattr(together, name), expected)
    assert not torch.allclose(together.values[:1], together.values[1:])


# -- where it is used -------------------------------------------------------------------------
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


def test_the_level_itself_goes_by_the_energy_in_whatever_order() -> None:
    """A jump starts exactly there."""
    space = Space(3, 2)
    gaussian = Quadratic(space)
    grid = Schedule.geometric(6, 0.01, 10.0)
    process = DiffusionProcess.ddpm(gaussian, grid, gaussian.energy)  # type: ignore[arg-type]
    process = process.with_laplace(LaplaceRange(grid.times[3]), jump=False)
    x = gaussian.sample(2, seed=2)
    order = [3, 6, 1, 4, 2]
    steps = process.steps(order, [x] * 5)
    assert [step.n for step in steps] == order
    assert [isinstance(step.posterior, EigenPosterior) for step in steps] == [n <= 3 for n in order]
    for step in steps:
        torch.testing.assert_close(step.denoised, process.step(step.n, x).denoised)


def forward_log_w(gaussian: Quadratic, process: DiffusionProcess) -> Tensor:
    x = gaussian.sample(400, seed=7)
    return gaussian.log_prob(x) + forward_paths(process, x, rng(8), progress=False).log_ratio


def test_the_error_of_a_denoiser_leaves_the_weights() -> None:
    """Weights of a Gaussian are flat with the approximation, and are not without."""
    space = Space(3, 2)
    gaussian = Quadratic(space)
    family = make_covariance("hessian", space, [0] * 3, torch.zeros(1, 22))
    grid = Schedule.geometric(20, 0.002, 30.0)
    plain = DiffusionProcess.ddpm(gaussian, grid, gaussian.energy).with_covariance(family)
    spreads = {}
    for name, process in {
        "plain": plain,
        "laplace": plain.with_laplace(LaplaceRange(30.0), jump=False),
        "jump": plain.with_laplace(LaplaceRange(30.0, 0.1)),
    }.items():
        assert process.schedule.n_steps == 20
        spreads[name] = float(forward_log_w(gaussian, process).std())
    assert spreads["laplace"] < 0.02
    assert spreads["jump"] < 0.02
    assert spreads["plain"] > 0.3


@pytest.mark.parametrize("kind", ["hessian", "tweedie"])
def test_mean_weight_is_one(kind: str) -> None:
    """Weights are exact where the approximation is not: two modes, and a level far too high."""
    oracle = make_oracle(3, 2, True)
    family = make_covariance(kind, oracle.space, [0] * 3, torch.zeros(1, 22))
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(15, 0.02, 15.0), oracle.reduced_energy
    ).with_covariance(family)
    process = process.with_laplace(LaplaceRange(0.8, 0.1))
    paths = reverse_paths(process, 4_000, rng(1), progress=False)
    log_w = paths.log_ratio - oracle.reduced_energy(paths.x)
    assert abs(z_of_mean_weight(log_w)) < 4.0
    x = oracle.sample(4_000, 2)
    log_v = forward_paths(process, x, rng(3), progress=False).log_ratio
    assert abs(z_of_mean_weight(oracle.reduced_energy(x) - log_v)) < 4.0


# -- grids and generators ---------------------------------------------------------------------
def test_jumping_keeps_ends_number_and_density() -> None:
    grid = Schedule.geometric(40, 1e-3, 10.0)
    jumped = grid.jumping(0.05)
    assert (jumped.n_steps, jumped.times[0], jumped.times[-1]) == (40, 1e-3, 10.0)
    assert jumped.times[1] == 0.05
    ratios = torch.tensor(jumped.times[1:]).log().diff()
    torch.testing.assert_close(ratios, torch.full_like(ratios, math.log(200.0) / 39.0))
    assert grid.jumping(1e-4) is grid
    assert grid.jumping(20.0) is grid
    again = jumped.with_n_steps(20, keep_first=True)
    assert (again.n_steps, *again.times[:2], again.times[-1]) == (20, 1e-3, 0.05, 10.0)
    with pytest.raises(ValueError, match="n_steps"):
        jumped.with_n_steps(2, keep_first=True)


def test_a_flow_does_not_jump() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(40, 1e-3, 10.0), oracle.reduced_energy
    )
    jumped = process.with_laplace(LaplaceRange(0.2, 0.05))
    assert process.flow_schedule() == process.schedule
    for n in (40, 25):
        flow = jumped.flow_schedule(n)
        torch.testing.assert_close(flow.tensor, Schedule.geometric(n, 1e-3, 10.0).tensor)
    assert jumped.flow_schedule().n_steps == 40


def test_a_kernel_keeps_its_jump_for_another_number_of_steps() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(40, 1e-3, 10.0), oracle.reduced_energy
    )
    family = make_covariance("hessian", oracle.space, [0] * 3, torch.zeros(1, 22))
    jumped = process.with_covariance(family).with_laplace(LaplaceRange(0.2, 0.05))
    again = jumped.with_n_steps(20)
    assert again.schedule.times[:2] == jumped.schedule.times[:2] == (1e-3, 0.05)
    assert again.laplace == jumped.laplace


def test_a_jump_for_which_the_grid_has_no_room_is_none() -> None:
    """Below its second level, or with too few levels above: else a step would pass for a jump."""
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(12, 0.02, 10.0)
    process = DiffusionProcess.ddpm(oracle.denoiser, grid, oracle.reduced_energy)
    for jump in (0.9 * grid.times[1], 1.1 * grid.times[-2]):
        there = process.with_laplace(LaplaceRange(11.0, jump))
        assert there.schedule == grid
        assert not there.jumps
        assert there.laplace == LaplaceRange(11.0)
    assert process.with_laplace(LaplaceRange(11.0, 1.1 * grid.times[1])).jumps  # control


def test_its_covariance_stands_in_for_that_of_every_family() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(20, 0.02, 10.0), oracle.reduced_energy
    ).with_laplace(LaplaceRange(0.5), jump=False)
    step = process.step(3, oracle.sample(5, seed=1))
    assert step.posterior is not None
    tweedie, hessian = (
        make_covariance(kind, oracle.space, [0] * 3, torch.zeros(1, 22)).at(step)
        for kind in ("tweedie", "hessian")
    )
    torch.testing.assert_close(tweedie.variances, hessian.variances)
    shape = 1.0 + (1.0 - step.ratio) / step.ratio * step.posterior.values
    torch.testing.assert_close(tweedie.variances / step.variance, shape)


def test_a_grid_above_one_goes_without() -> None:
    target, gen = exact_generator(0.7)
    levels = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    frames = target.sample(600, seed=1)
    gen.tune(frames, None, "hessian", schedule=levels, n_trajectories=200, progress=False)
    assert gen.process is not None
    assert gen.process.laplace is None


def test_a_kernel_without_energy_is_refused() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, Schedule.geometric(5, 0.1, 10.0))
    with pytest.raises(ValueError, match="knows the energy"):
        process.with_laplace(LaplaceRange(0.2))


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


def test_an_archive_keeps_it(frames: Tensor, tmp_path: Path) -> None:
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network="egnn-1x8", seed=1
    )
    gen.train(frames, 3, progress=False)
    gen.tune(frames, 10, "hessian", n_trajectories=100, progress=False)
    assert gen.process is not None
    found = LaplaceRange(0.3, 0.05)
    gen.process = gen.process.with_laplace(found)
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "a.vtdis"))
    assert again.process is not None
    assert again.process.laplace == found
    assert again.process.schedule == gen.process.schedule
    one, two = (g.sample(20, seed=3, progress=False) for g in (gen, again))
    torch.testing.assert_close(torch.tensor(one.log_weights), torch.tensor(two.log_weights))


def test_energies_from_contexts_are_not_asked_for_second_derivatives(frames: Tensor) -> None:
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network="egnn-1x8", backend="contexts"
    )
    gen.train(frames, 3, progress=False)
    gen.tune(frames, 10, "tweedie", n_trajectories=100, progress=False)
    assert gen.process is not None
    assert gen.process.laplace is None
