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
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior
from openmm_vtdis.diffusion.posteriors.laplace import TRUST_RADIUS, LaplaceRange, laplace_posterior
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import OpenMMTarget, double_well
from tests.conftest import make_oracle, z_of_mean_weight
from tests.diffusion.quadratic import Quadratic, rng
from tests.molecules import molecule

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


def test_a_kernel_without_energy_is_refused() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, Schedule.geometric(5, 0.1, 10.0))
    with pytest.raises(ValueError, match="knows the energy"):
        process.with_laplace(LaplaceRange(0.2))


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
