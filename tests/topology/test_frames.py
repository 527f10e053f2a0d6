"""Trajectories: headers, units and scales that are read, and weighted samples that are no MD."""

from __future__ import annotations

from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from scipy.io import netcdf_file

from openmm_vtdis import WeightedEnsemble
from openmm_vtdis.core.space import Space
from openmm_vtdis.topology import placeholder_topology
from openmm_vtdis.topology.frames import read_frames


# -- trajectories ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n_atoms", [5, 14])
@pytest.mark.parametrize("kind", ["xtc", "trr"])
def test_headers_of_gromacs_files(kind: str, n_atoms: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space, top = Space(n_atoms, 3), md.Topology.from_openmm(placeholder_topology(n_atoms))
    x = rng.normal(size=(6, n_atoms, 3))
    for boxed in (False, True):
        trajectory = md.Trajectory(x, top)
        if boxed:
            trajectory.unitcell_vectors = np.tile(2.0 * np.eye(3), (6, 1, 1))
        path = tmp_path / f"md.{kind}"
        trajectory.save(str(path))
        found = read_frames("train", path, space, None)
        torch.testing.assert_close(found, space.project(torch.tensor(x)), atol=1e-3, rtol=0.0)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"frame 0 of .* has \d+ atoms"):
        read_frames("train", path, Space(n_atoms + 1, 3), None)
    path.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"frame 5 of .* is cut short, as a killed simulation"):
        read_frames("train", path, space, None)
    frame = len(content) // 6 if kind == "trr" or n_atoms < 10 else None
    if frame is not None:
        broken = content[:frame] + b"\0\0\0\1" + content[frame + 4 :]
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"frame 1 of .* is damaged"):
            read_frames("train", path, space, None)


# -- weighted files ----------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_weighted_samples_are_no_md(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    e = WeightedEnsemble(rng.normal(size=(40, 3, 3)), rng.normal(size=40), rng.normal(size=40))
    space = Space(3, 3)
    weighted, raw, pooled = (tmp_path / f"{name}{suffix}" for name in ("a", "b", "c"))
    e.save(weighted)
    e.unweighted().save(raw)
    halves = [part.unweighted() for part in (e[:20], e[20:].with_metadata({"run": 2}))]
    WeightedEnsemble.concatenate(halves).save(pooled)
    copy = tmp_path / "renamed.ncdf"
    copy.write_bytes(weighted.read_bytes())
    for path, what in (
        (weighted, "weighted"),
        (raw, "unweighted"),
        (pooled, "unweighted"),
        ([weighted], "weighted"),
        *([(copy, "weighted")] if suffix == ".nc" else []),
    ):
        message = f"expected frames of MD, got {what} samples of openmm-vtdis"
        if suffix == ".npz":  # which no trajectory reader takes
            message = r"expected a trajectory, got .*WeightedEnsemble.load\(path\)"
        with pytest.raises(ValueError, match=message):
            read_frames("noise", path, space, None)
    if suffix == ".nc":  # control: resampled ones are fair samples, and MD is read as ever
        fair = e.resample(30, seed=0)
        fair.save(tmp_path / "fair.nc")
        found = read_frames("noise", tmp_path / "fair.nc", space, None)
        expected = space.project(torch.tensor(fair.positions))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
        top = md.Topology.from_openmm(placeholder_topology(3))
        md.Trajectory(e.positions, top).save_netcdf(str(tmp_path / "md.nc"))
        assert len(read_frames("noise", tmp_path / "md.nc", space, None)) == 40
    with pytest.raises(ValueError, match="expected an array"):
        read_frames("noise", e, space, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [None, 2.0])
def test_amber_netcdf_is_in_angstrom_times_its_scale(scale: float | None, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 3)).astype(np.float32)
    with netcdf_file(tmp_path / "md.nc", "w", version=2) as file:
        for name, size in (("frame", None), ("atom", 3), ("spatial", 3)):
            file.createDimension(name, size)
        variable = file.createVariable("coordinates", "f4", ("frame", "atom", "spatial"))
        if scale is not None:
            variable.scale_factor = scale
        variable[:] = 10.0 * x / (scale or 1.0)
    space = Space(3, 3)
    found = read_frames("train", tmp_path / "md.nc", space, None)
    torch.testing.assert_close(found, space.project(torch.tensor(x).double()), atol=1e-6, rtol=0.0)
