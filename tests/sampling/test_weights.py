"""Weights against answers that are known: log Z of mixtures, of a harmonic System, and controls."""

from __future__ import annotations

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.targets import OpenMMTarget
from tests.conftest import exact_generator

COVARIANCES = ["isotropic", "diagonal", "block", "full", "low-rank", "time-network"]


@pytest.mark.parametrize("tune_mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("space", [None, Space(4, 2), Space(4, 3)], ids=str)
@pytest.mark.parametrize("covariance", [*COVARIANCES, "tweedie", "hessian"])
def test_log_z_is_known_with_a_length_scale_that_is_not_one(
    covariance: str, space: Space | None, tune_mean: bool
) -> None:
    target, gen = exact_generator(0.7, space)
    n = 1_000 if covariance in ("tweedie", "hessian") else 3_000
    gen.tune(
        target.sample(2000, seed=1), 40, covariance, n_trajectories=n // 2, rank=2,
        tune_mean=tune_mean, progress=False,
    )  # fmt: skip
    ensemble = gen.sample(n, seed=2, progress=False)
    assert abs(ensemble.log_z().z(0.0)) < 4.0
    log_v = gen.log_weights(target.sample(n, seed=3), seed=4, progress=False)
    inverse = np.exp(-log_v)
    z = (inverse.mean() - 1.0) / (inverse.std() / math.sqrt(len(inverse)))
    assert abs(z) < 4.0


@pytest.mark.parametrize("n_steps", [25, 60])
def test_log_z_is_known_with_a_tuning_that_was_carried_over(n_steps: int) -> None:
    """Covariance and mean coefficients of 40 steps at another number, in units that are not nm."""
    target, gen = exact_generator(0.7, Space(4, 3))
    frames = target.sample(2000, seed=1)
    gen.tune(frames, 40, "diagonal", n_trajectories=1500, tune_mean=True, progress=False)
    assert gen.process is not None
    assert gen.process.mean_coefficients is not None
    log_z = gen.sample(3000, n_steps=n_steps, seed=2, progress=False).log_z()
    assert abs(log_z.z(0.0)) < 4.0
    log_v = gen.log_weights(target.sample(3000, seed=3), n_steps=n_steps, seed=4, progress=False)
    inverse = np.exp(-log_v)
    stderr = inverse.std() / math.sqrt(len(inverse))
    assert abs(inverse.mean() - 1.0) < 4.0 * stderr
    # The control: a factor of 1.2 in the weight
    assert abs(log_z.value + math.log(1.2)) > 4.0 * log_z.stderr
    assert abs((inverse / 1.2).mean() - 1.0) > 4.0 * stderr


def test_log_z_of_a_harmonic_system_has_the_units_of_openmm() -> None:
    """u = k |x_1 - x_2|^2 / 2kT is a Gaussian of variance kT / 2k on the zero-CoM subspace.

    log Z = 3/2 log(pi kT / k), k in kJ/mol/nm^2: nothing here comes from the package's own
    energies, so that kT, the unit of energy or length, or a factor in the weight would show.
    """
    spring, temperature = 2500.0, 310.0
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.0, spring)
    system.addForce(bond)
    target = OpenMMTarget(system, None, temperature * unit.kelvin)
    variance = 8.31446261815324e-3 * temperature / (2.0 * spring)
    exact = GaussianMixtureDenoiser(
        target.space, torch.ones(1), torch.zeros(1, 2, 3), torch.tensor([variance]).double()
    )
    length = 0.03
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, exact.scaled(length), Cartesian(target.space, length)
    )
    noise = target.space.standard_normal(2000, torch.Generator().manual_seed(1))
    gen.tune(math.sqrt(variance) * noise, 40, "isotropic", n_trajectories=1500, progress=False)
    ensemble = gen.sample(4000, seed=2, progress=False)
    expected = 1.5 * math.log(2.0 * math.pi * variance)
    assert abs(ensemble.log_z().z(expected)) < 4.0
    assert abs(ensemble.expectation(ensemble.reduced_energies).z(1.5)) < 4.0
    in_kcal = expected - 1.5 * math.log(4.184)  # controls: another unit, weights off by a factor
    twice = ensemble.with_log_weights(ensemble.log_weights + math.log(2.0))
    assert abs(ensemble.log_z().z(in_kcal)) > 20.0
    assert abs(twice.log_z().z(expected)) > 20.0


def test_negative_control_a_missing_jacobian_shifts_log_z(monkeypatch: pytest.MonkeyPatch) -> None:
    target, gen = exact_generator(length=0.7)
    gen.tune(target.sample(2000, seed=1), 40, "isotropic", n_trajectories=1500, progress=False)
    monkeypatch.setattr(Cartesian, "log_det", 0.0)
    ensemble = gen.sample(3000, seed=2, progress=False)
    assert abs(ensemble.log_z().z(0.0)) > 20.0
    assert ensemble.log_z().value == pytest.approx(-3 * math.log(0.7), abs=0.1)


def test_probability_flow_weights_have_the_known_log_z() -> None:
    target, gen = exact_generator(length=0.7)
    gen.tune(
        target.sample(500, seed=1), 80, "isotropic", n_trajectories=200, t_max=60.0, progress=False
    )
    ensemble = gen.sample_ode(200, seed=2, progress=False)
    assert ensemble.log_z().value == pytest.approx(0.0, abs=0.05)
    assert ensemble.ess > 0.95
    log_v = gen.log_weights_ode(target.sample(50, seed=3), progress=False)
    assert float(np.abs(log_v).mean()) < 0.15


@pytest.mark.parametrize("n_steps", [10, 20, 40, 80])
def test_one_tuning_of_a_time_network_serves_other_numbers_of_steps(n_steps: int) -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    x, fresh = target.sample(3000, seed=1), target.sample(2000, seed=2)
    options = {"n_trajectories": 2500, "progress": False}
    gen.tune(x, 20, "time-network", **options)  # type: ignore[arg-type]
    transferred = forward_ess(gen.log_weights(fresh, n_steps=n_steps, seed=3, progress=False))
    gen.tune(x, n_steps, "diagonal", **options)  # type: ignore[arg-type]
    direct = forward_ess(gen.log_weights(fresh, seed=3, progress=False))
    assert transferred > 0.85 * direct


def test_a_denoiser_that_leaves_the_space_does_not_bias_the_weights() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    exact = gen.denoiser
    drifting = lambda x, t: exact(x, t) + 0.3  # noqa: E731
    drifting.space = target.space  # type: ignore[attr-defined]
    other = DiffusionBoltzmannGenerator.from_denoiser(
        target, drifting, Cartesian(target.space, 0.7)
    )
    other.tune(target.sample(2000, seed=1), 40, "isotropic", n_trajectories=1000, progress=False)
    assert abs(other.sample(2000, seed=2, progress=False).log_z().z(0.0)) < 4.0
