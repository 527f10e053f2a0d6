"""Validators and random streams: what passes, and what each message says."""

from __future__ import annotations

import mdtraj as md
import numpy as np
import pytest
import torch
from openmm import unit

from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import (
    GAS_CONSTANT,
    kelvin,
    nanometers,
    temperature_for,
    thermal_energy,
)
from openmm_vtdis.topology import placeholder_topology
from openmm_vtdis.topology.frames import read_frames


def test_units() -> None:
    assert pytest.approx(0.00831446261815324) == GAS_CONSTANT
    assert kelvin(300.0 * unit.kelvin) == kelvin(300.0) == 300.0
    assert temperature_for(1.0) == pytest.approx(120.272, abs=5e-4)
    assert thermal_energy(temperature_for(2.5)) == pytest.approx(2.5)


@pytest.mark.parametrize("bad", [0.0 * unit.kelvin, -5.0, float("nan"), "warm", "200", True, None])
def test_temperatures_must_be_positive(bad: object) -> None:
    with pytest.raises(ValueError, match="temperature: expected"):
        checks.temperature(bad)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3", None])
def test_positive_integers(bad: object) -> None:
    with pytest.raises(ValueError, match="n: expected an integer >= 1"):
        checks.positive_integer("n", bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), True, "x"])
def test_positive_numbers(bad: object) -> None:
    with pytest.raises(ValueError, match="x: expected a"):
        checks.positive_number("x", bad)


def test_configurations_name_the_first_bad_frame() -> None:
    x = np.zeros((5, 4, 2))
    assert checks.configurations("x", x, 4, 2).dtype == torch.float64
    x[3, 1, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 5 frames, the first at index 3"):
        checks.configurations("x", x, 4, 2)
    with pytest.raises(ValueError, match=r"expected positions of shape \(n, 4, 3\) in nm"):
        checks.configurations("x", np.zeros((5, 4, 2)), 4, 3)
    with pytest.raises(ValueError, match="at least 10 frames, got 5"):
        checks.configurations("x", np.zeros((5, 4, 2)), 4, 2, minimum=10)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (np.zeros((2, 4, 2)) + 1j, "real numbers, got an array of complex128"),
        (torch.zeros(2, 4, 2, dtype=torch.complex64), "real numbers, got an array of complex64"),
        (np.ma.masked_less(np.zeros((2, 4, 2)), 1.0), "got an array with masked entries"),
        (np.full((2, 4, 2), "here"), "real numbers, got an array of <U4"),
        ([[1.0], [2.0, 3.0]], "real numbers, got setting an array element"),
    ],
)
def test_configurations_are_plain_real_numbers(bad: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"x: expected .*{got}"):
        checks.configurations("x", bad, 4, 2)


def draw(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def test_random_streams_are_reproducible_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    a, b = make_rng(3), make_rng(3)
    assert draw(a) == draw(b) != draw(a)
    assert torch.equal(before, torch.get_rng_state())
    assert make_rng(a) is a
    torch.manual_seed(1)
    c = make_rng(None)
    torch.manual_seed(1)
    assert draw(c) == draw(make_rng(None))


@pytest.mark.parametrize("bad", [-1, 1.5, "seed", True, 2**32])
def test_bad_seeds_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="seed: expected an integer"):
        make_rng(bad)  # type: ignore[arg-type]


def test_several_arrays_or_trajectories_are_to_be_joined() -> None:
    frames = np.random.default_rng(0).normal(size=(6, 3, 3))
    for lengths in ((3, 3), (2, 4)):
        parts = np.split(frames, [lengths[0]])
        with pytest.raises(ValueError, match=r"got 2 of them; join them with numpy\.concatenate"):
            checks.configurations("train", parts, 3, 3)
    assert torch.equal(checks.configurations("train", list(frames), 3, 3), torch.tensor(frames))
    top = md.Topology.from_openmm(placeholder_topology(3))
    parts = [md.Trajectory(part, top) for part in np.split(frames, 2)]
    with pytest.raises(ValueError, match=r"one trajectory, got 2; join them with mdtraj\.join"):
        read_frames("train", parts, Space(3, 3), None)  # type: ignore[arg-type]
    assert len(read_frames("train", md.join(parts), Space(3, 3), None)) == 6


def test_lists_of_quantities_keep_their_unit() -> None:
    frames = np.arange(12.0).reshape(2, 2, 3)
    angstrom = [unit.Quantity(10.0 * frame, unit.angstrom) for frame in frames]
    np.testing.assert_allclose(np.asarray(nanometers(angstrom)), frames)
    np.testing.assert_allclose(np.asarray(nanometers(frames)), frames)


def test_a_view_of_an_array_will_do() -> None:
    x = np.arange(16.0).reshape(2, 4, 2)
    assert checks.configurations("x", x[::-1], 4, 2)[0, 0, 0] == 8.0
    with pytest.raises(ValueError, match="expected a length, got a Quantity in kelvin"):
        nanometers(x * unit.kelvin)
