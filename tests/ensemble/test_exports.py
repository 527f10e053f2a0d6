"""Ensembles as PLUMED and openmmtools take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from openmm import unit

from openmm_vtdis.ensemble import WeightedEnsemble
from tests.ensemble.stored import some_molecules, some_particles


@pytest.fixture(scope="module")
def molecules() -> WeightedEnsemble:
    return some_molecules()


@pytest.fixture(scope="module")
def particles() -> WeightedEnsemble:
    return some_particles()


def test_plumed_reads_variables_and_log_weights(
    molecules: WeightedEnsemble, tmp_path: Path
) -> None:
    """By PLUMED's rules: a FIELDS line, then one row of numbers a sample."""
    phi = np.arange(20.0)
    path = molecules.save_colvar(tmp_path / "COLVAR", phi=phi, x=lambda x: x[:, 0, 0])
    first, *rows = path.read_text().splitlines()
    assert first == "#! FIELDS time phi x logweight"
    table = np.array([[float(value) for value in row.split()] for row in rows])
    alive = np.isfinite(molecules.log_weights)
    assert table.shape == (19, 4)
    np.testing.assert_array_equal(table[:, 1], phi[alive])
    assert table[:, 3].max() == 0.0
    weights = np.exp(table[:, 3])
    expected = molecules.expectation(phi).value
    assert (weights * table[:, 1]).sum() / weights.sum() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["time", "logweight", "two words", "@x", ""])
def test_names_that_plumed_cannot_read_are_refused(
    name: str, particles: WeightedEnsemble, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="columns: expected a name"):
        particles.save_colvar(tmp_path / "COLVAR", **{name: np.zeros(7)})
    assert not (tmp_path / "COLVAR").exists()


def test_values_for_plumed_are_checked(particles: WeightedEnsemble, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"phi: expected 7 finite values.*shape \(6,\)"):
        particles.save_colvar(tmp_path / "COLVAR", phi=np.zeros(6))
    with pytest.raises(ValueError, match="with NaN or infinity"):
        particles.save_colvar(tmp_path / "COLVAR", phi=np.full(7, np.nan))
    with pytest.raises(ValueError, match="phi: expected plain numbers, got a Quantity in degree"):
        particles.save_colvar(tmp_path / "COLVAR", phi=np.zeros(7) * unit.degree)


def test_sampler_states_are_fair_samples(particles: WeightedEnsemble) -> None:
    skewed = particles.with_log_weights([0.0, *[-60.0] * 6])
    states = skewed.to_sampler_states(3, seed=0)
    assert [state.positions.shape for state in states] == [(4, 3)] * 3
    for state in states:
        x = np.asarray(state.positions._value)
        np.testing.assert_array_equal(x[:, :2], particles.positions[0])
        np.testing.assert_array_equal(x[:, 2], 0.0)
