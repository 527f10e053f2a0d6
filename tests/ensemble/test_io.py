"""Ensembles through files: exact round trips, trajectory readers, damaged and foreign files."""

from __future__ import annotations

from pathlib import Path

import mdtraj as md
import netCDF4
import numpy as np
import pytest

from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.topology import placeholder_topology, topology_to_json

SUFFIXES = pytest.mark.parametrize("suffix", [".nc", ".npz"])


def make(n_dims: int = 3, n: int = 7) -> WeightedEnsemble:
    rng = np.random.default_rng(0)
    lw = rng.normal(size=n) * 1e3
    lw[2] = -np.inf
    return WeightedEnsemble(
        rng.normal(size=(n, 4, n_dims)),
        lw,
        rng.normal(size=n),
        temperature=312.5,
        topology=placeholder_topology(4),
        metadata={"seed": 3, "note": "± ångström"},
    )


@SUFFIXES
@pytest.mark.parametrize("n_dims", [2, 3])
def test_round_trip_is_exact(tmp_path: Path, suffix: str, n_dims: int) -> None:
    ensemble = make(n_dims)
    ensemble.save(tmp_path / f"x{suffix}")
    again = WeightedEnsemble.load(tmp_path / f"x{suffix}")
    for name in ("positions", "log_weights", "reduced_energies"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ensemble, name))
    assert (again.temperature, again.metadata) == (312.5, ensemble.metadata)
    assert again.topology is not None
    assert ensemble.topology is not None
    assert topology_to_json(again.topology) == topology_to_json(ensemble.topology)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]  # nothing temporary left


@pytest.mark.parametrize("n_dims", [2, 3])
def test_mdtraj_reads_the_positions(tmp_path: Path, n_dims: int) -> None:
    ensemble = make(n_dims)
    path = ensemble.save(tmp_path / "x.nc")
    traj = md.load(str(path), top=md.Topology.from_openmm(ensemble.topology))
    np.testing.assert_allclose(traj.xyz[..., :n_dims], ensemble.positions, atol=1e-5)
    assert (traj.xyz[..., n_dims:] == 0.0).all()
    with netCDF4.Dataset(path) as file:
        np.testing.assert_array_equal(file["log_weight"][:], ensemble.log_weights)


@SUFFIXES
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = make(n=200).save(tmp_path / f"x{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="expected an ensemble written by openmm-vtdis, got"):
        WeightedEnsemble.load(path)


@SUFFIXES
def test_foreign_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected an ensemble written by openmm-vtdis, got"):
        WeightedEnsemble.load(path)


def test_trajectories_and_arrays_of_others_are_refused(tmp_path: Path) -> None:
    make().to_mdtraj().save_netcdf(str(tmp_path / "x.nc"))
    with pytest.raises(ValueError, match="a NetCDF file without positions, log_weight"):
        WeightedEnsemble.load(tmp_path / "x.nc")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="an npz file without document"):
        WeightedEnsemble.load(tmp_path / "x.npz")


def test_other_suffixes_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.nc or \.npz, got '\.dcd'"):
        make().save(tmp_path / "x.dcd")
    with pytest.raises(FileNotFoundError, match="no such ensemble"):
        WeightedEnsemble.load(tmp_path / "x.nc")
