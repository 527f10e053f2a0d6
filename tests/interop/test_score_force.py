"""The score force: that of an exact density, in its units, on its platform, in a file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.interop import score_force
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import exact_generator, needs_python_force

SIGMA, LENGTH, KT = 0.35, 0.7, thermal_energy(300.0)


def platforms() -> list[str]:
    """Those that are present and have a device."""
    found = []
    for i in range(openmm.Platform.getNumPlatforms()):
        platform, system = openmm.Platform.getPlatform(i), openmm.System()
        system.addParticle(1.0)
        with contextlib.suppress(openmm.OpenMMException):  # OpenCL without any
            openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
            found.append(platform.getName())
    return found


def exact(n_dims: int = 3) -> tuple[GaussianMixture, DiffusionBoltzmannGenerator]:
    target, gen = exact_generator(LENGTH, Space(4, n_dims))
    target.temperature = 300.0
    return target, gen


def noised(target: GaussianMixture) -> GaussianMixture:
    return GaussianMixture(target.means, target.variances + SIGMA**2, target.weights, target.space)


def evaluate(force: openmm.Force, x: np.ndarray, platform: str) -> tuple[float, np.ndarray]:
    system = openmm.System()
    for _ in x:
        system.addParticle(1.0)
    system.addForce(force)
    context = openmm.Context(
        system,
        openmm.VerletIntegrator(1.0 * unit.femtosecond),
        openmm.Platform.getPlatformByName(platform),
    )
    context.setPositions(x)
    found = context.getState(energy=True, forces=True)
    per_nm = unit.kilojoule_per_mole / unit.nanometer
    return (
        found.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole),
        found.getForces(asNumpy=True).value_in_unit(per_nm),
    )


@needs_python_force
@pytest.mark.parametrize("platform", platforms())
@pytest.mark.parametrize("n_dims", [2, 3])
def test_it_is_kT_times_the_gradient_of_the_log_density(n_dims: int, platform: str) -> None:
    target, gen = exact(n_dims)
    x = np.zeros((4, 3))
    x[:, :n_dims] = target.sample(1, seed=1)[0].numpy()
    x += 0.7  # anywhere: the density does not see translations
    energy, force = evaluate(score_force(gen, SIGMA * unit.nanometer), x, platform)
    assert energy == 0.0
    density, h = noised(target), 1e-5
    expected = np.zeros((4, 3))
    for i in range(4):
        for a in range(n_dims):
            step = np.zeros((4, 3))
            step[i, a] = h
            pair = torch.tensor(np.stack([x - step, x + step])[:, :, :n_dims])
            low, high = density.reduced_energy(density.space.project(pair)).tolist()
            expected[i, a] = -KT * (high - low) / (2.0 * h)
    np.testing.assert_allclose(force, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@needs_python_force
def test_another_noise_level_is_another_force() -> None:
    """Negative control."""
    target, gen = exact()
    x = target.sample(1, seed=1)[0].numpy()
    a, b = (evaluate(score_force(gen, s), x, "Reference")[1] for s in (SIGMA, 1.1 * SIGMA))
    assert np.abs(a - b).max() > 0.01 * np.abs(a).max()


@needs_python_force
def test_it_is_copied_and_serialised_with_the_network(tmp_path: Path) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    x = np.zeros((4, 3))
    x[:, :2] = np.random.default_rng(0).normal(size=(4, 2))
    force = score_force(gen, 0.5)
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))
    results = [evaluate(f, x, "Reference")[1] for f in (force, copy.deepcopy(force), again)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert np.abs(results[0][:, 2]).max() == 0.0
    assert np.abs(results[0].sum(axis=0)).max() < 1e-6 * np.abs(results[0]).max()


@needs_python_force
@pytest.mark.parametrize("platform", platforms())
def test_langevin_dynamics_samples_the_noised_density(platform: str) -> None:
    """In an app.Simulation; a mean square in the zero-CoM space, kinetics aside."""
    space, variance = Space(4, 3), 0.2
    target = GaussianMixture(torch.zeros(1, 4, 3), [variance], [1.0], space)
    target.temperature = 300.0
    denoiser = GaussianMixtureDenoiser(space, target.weights, target.means, target.variances)
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, denoiser.scaled(LENGTH), Cartesian(target.space, LENGTH)
    )
    system = openmm.System()
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for i in range(4):
        system.addParticle(10.0)
        topology.addAtom(f"X{i}", app.Element.getBySymbol("Ar"), residue)
    system.addForce(score_force(gen, SIGMA))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 2.0, 0.05)
    integrator.setRandomNumberSeed(1)
    on = openmm.Platform.getPlatformByName(platform)
    simulation = app.Simulation(topology, system, integrator, on)
    simulation.context.setPositions(target.sample(1, seed=2)[0].numpy())
    squares = []
    for _ in range(600):
        simulation.step(10)
        x = simulation.context.getState(positions=True).getPositions(asNumpy=True)
        x = x.value_in_unit(unit.nanometer)
        squares.append(np.square(x - x.mean(axis=0)).sum())
    assert np.mean(squares[50:]) == pytest.approx(9.0 * (variance + SIGMA**2), rel=0.2)


def test_bad_input() -> None:
    _, gen = exact()
    with pytest.raises(ValueError, match="sigma: expected a finite number > 0"):
        score_force(gen, -0.1)
    with pytest.raises(ValueError, match="backend: expected one of"):
        score_force(gen, 0.1, backend="jax")
    with pytest.raises(ValueError, match="expected a DiffusionBoltzmannGenerator, got str"):
        score_force("dw4", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a trained generator of a temperature"):
        score_force(exact_generator()[1], 0.1)


@pytest.mark.skipif(
    importlib.util.find_spec("openmmtorch") is not None, reason="openmm-torch is installed"
)
def test_without_openmm_torch_its_backend_says_so() -> None:
    with pytest.raises(ImportError, match='needs openmm-torch.*or use backend="python"'):
        score_force(exact()[1], 0.1, backend="torch")


@needs_python_force
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_the_torch_backend_is_the_same_force(platform: str) -> None:
    pytest.importorskip(
        "openmmtorch", reason="openmm-torch does not import here", exc_type=ImportError
    )
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    x = np.zeros((4, 3))
    x[:, :2] = np.random.default_rng(0).normal(size=(4, 2))
    forces = [evaluate(score_force(gen, 0.5, b), x, platform)[1] for b in ("python", "torch")]
    np.testing.assert_allclose(forces[0], forces[1], rtol=1e-4, atol=1e-3)
