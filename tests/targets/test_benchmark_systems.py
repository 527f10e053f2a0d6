"""The benchmark systems: energies by hand, and by their printed formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_vtdis.core import units
from openmm_vtdis.targets import BenchmarkSystem, double_well, lennard_jones
from openmm_vtdis.testing import check_target
from tests.targets.reference import by_openmm, configurations


def pair_distances(x: Tensor) -> Tensor:
    """(B, M, D) -> (B, M (M - 1) / 2), each pair once."""
    i, j = torch.triu_indices(x.shape[1], x.shape[1], offset=1)
    return (x[:, i] - x[:, j]).norm(dim=2)


def printed_double_well(x: Tensor) -> Tensor:
    d = pair_distances(x) - 4.0
    return (-4.0 * d**2 + 0.9 * d**4).sum(dim=1)


def printed_lennard_jones(x: Tensor) -> Tensor:
    d = pair_distances(x)
    trap = 0.5 * (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return (2.0 * (d**-12 - 2.0 * d**-6)).sum(dim=1) + trap


@pytest.mark.parametrize(
    ("distance", "energy"), [(4.0, 0.0), (5.0, -3.1), (3.0, -3.1), (2.0, -1.6), (7.0, 36.9)]
)
def test_double_well_pair_by_hand(distance: float, energy: float) -> None:
    x = torch.tensor([[[0.0, 0.0], [0.6 * distance, 0.8 * distance]]], dtype=torch.float64)
    u = double_well(2).target().reduced_energy(x)
    assert u.tolist() == pytest.approx([energy], rel=1e-12, abs=1e-12)


def test_double_well_square_by_hand() -> None:
    x = torch.tensor([[[0.0, 0.0], [5.0, 0.0], [5.0, 5.0], [0.0, 5.0]]], dtype=torch.float64)
    diagonal = 5.0 * math.sqrt(2.0) - 4.0
    expected = 4 * -3.1 + 2 * (-4 * diagonal**2 + 0.9 * diagonal**4)
    assert double_well().target().reduced_energy(x).tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize(
    ("distance", "energy"),
    [(1.0, -2.0 + 0.25), (2.0, 2 * (2.0**-12 - 2.0**-5) + 1.0), (0.5, 2 * (4096 - 128) + 0.0625)],
)
def test_lennard_jones_pair_by_hand(distance: float, energy: float) -> None:
    x = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.6, 0.8]]], dtype=torch.float64) * distance
    u = lennard_jones(2).target().reduced_energy(x)
    assert u.tolist() == pytest.approx([energy], rel=1e-12)


@pytest.mark.parametrize("backend", ["batched", "contexts"])
@pytest.mark.parametrize(
    ("system", "printed"),
    [
        (double_well(), printed_double_well),
        (double_well(7), printed_double_well),
        (lennard_jones(), printed_lennard_jones),
        (lennard_jones(5), printed_lennard_jones),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_energy_is_the_printed_formula(system: BenchmarkSystem, printed, backend: str) -> None:
    target = system.target(backend=backend)
    x = 2.0 * configurations(20, target.space.n_particles, system.n_dims)
    assert torch.allclose(target.reduced_energy(x), printed(x), rtol=1e-11, atol=1e-10)
    check_target(target, x, symmetries=("translation", "rotation", "permutation"))


def test_a_single_count_of_the_pairs_is_told_apart() -> None:
    """Negative control: the widely used factor 1 is not the energy of the published data."""
    x = 2.0 * configurations(20, 13)
    half = 0.5 * printed_lennard_jones(x)
    assert not torch.allclose(lennard_jones().target().reduced_energy(x), half, rtol=1e-2)


@pytest.mark.parametrize("system", [double_well(), lennard_jones()], ids=lambda s: s.name)
def test_reduced_units(system: BenchmarkSystem) -> None:
    assert system.temperature == pytest.approx(120.272, abs=1e-3)
    assert units.thermal_energy(system.temperature) == pytest.approx(1.0, rel=1e-14)
    assert system.topology is None
    x = torch.from_numpy(system.positions)[None]
    energy, _ = by_openmm(system.system, x)
    assert torch.allclose(system.target().reduced_energy(x), energy, rtol=1e-12)
    assert bool((pair_distances(x) > 0.9).all())
    assert np.allclose(system.positions.mean(axis=0), 0.0, atol=1e-12)


def test_names_and_sizes() -> None:
    assert (double_well().name, lennard_jones().name) == ("DW-4", "LJ-13")
    assert lennard_jones(38).system.getNumParticles() == 38
    assert lennard_jones().system.getNumForces() == 1


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="n_particles: expected an integer >= 2, got 1"):
        double_well(1)
    with pytest.raises(ValueError, match=r"n_particles: expected an integer >= 2, got 13\.0"):
        lennard_jones(13.0)  # type: ignore[arg-type]
    good = double_well()
    with pytest.raises(ValueError, match=r"positions: expected shape \(4, 3\) for odd"):
        BenchmarkSystem("odd", good.system, None, good.temperature, 3, good.positions)
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        BenchmarkSystem("cold", good.system, None, 0.0, 2, good.positions)
