"""The virial of frames: 1 in equilibrium, T'/T at another temperature, and what is refused."""

from __future__ import annotations

import logging

import openmm
import pytest
import torch

from openmm_vtdis.geometry import Space
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget, gaussian_mixture
from openmm_vtdis.targets.equilibrium import check_equilibrium, virial_ratio
from openmm_vtdis.units import thermal_energy
from tests.targets.reference import system_of

STIFFNESS = 800.0


def springs(temperature: float = 300.0) -> OpenMMTarget:
    """Four particles with a spring of length zero between any two: Gaussian."""
    force = openmm.HarmonicBondForce()
    for i in range(4):
        for j in range(i):
            force.addBond(i, j, 0.0, STIFFNESS)
    return OpenMMTarget(system_of(force), None, temperature)


def exact_frames(target: OpenMMTarget, n: int, temperature: float) -> torch.Tensor:
    """1/2 k sum_ij |x_i - x_j|^2 = 1/2 (4 k) |x|^2 on the zero-CoM subspace."""
    variance = thermal_energy(temperature) / (4.0 * STIFFNESS)
    return variance**0.5 * target.space.standard_normal(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [300.0, 450.0])
def test_the_virial_tells_the_temperature(temperature: float) -> None:
    target = springs()
    ratio, error = virial_ratio(target, exact_frames(target, 4000, temperature))
    assert error < 0.02
    assert abs(ratio - temperature / 300.0) < 4.0 * error


def test_the_virial_holds_without_a_centre_of_mass() -> None:
    target = gaussian_mixture(5)
    ratio, error = virial_ratio(target, target.sample(4000, seed=0))
    assert abs(ratio - 1.0) < 4.0 * error


def test_frames_of_another_temperature_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    target = springs()
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, exact_frames(target, 2000, 300.0))
        assert not caplog.records
        check_equilibrium("train", target, exact_frames(target, 2000, 600.0))
    assert "equilibrium has exactly 1, as if they were at" in caplog.text
    assert "(300 K is the target's)" in caplog.text


def test_exploded_frames_are_refused() -> None:
    target = springs()
    x = exact_frames(target, 10_000, 300.0)
    x[[18, 1041]] *= 30.0  # 1041 is not among the five thousand that are looked at anyhow
    with pytest.raises(ValueError, match="got 2 of 5001 that exploded, the first at index 18, of"):
        check_equilibrium("train", target, x)


def test_a_large_frame_of_low_energy_is_no_explosion() -> None:
    narrow = GaussianMixture(torch.zeros(2, 3, 1), [0.9, 0.1], [0.01, 100.0], Space(3, 1, False))
    check_equilibrium("train", narrow, narrow.sample(500, seed=0))


def test_frames_without_a_finite_energy_are_refused() -> None:
    force = openmm.CustomBondForce("1/r")
    for i in range(4):
        for j in range(i):
            force.addBond(i, j, [])
    target = OpenMMTarget(system_of(force), None, 300.0)
    x = target.space.standard_normal(50, torch.Generator().manual_seed(1))
    x[20, 1] = x[20, 3]
    with pytest.raises(ValueError, match="got 1 of 50 without, the first at index 20"):
        check_equilibrium("train", target, target.space.project(x))
