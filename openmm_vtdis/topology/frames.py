"""Reading configurations: mdtraj trajectories, files that mdtraj reads, or arrays in nm.

Files of weighted samples (:mod:`~openmm_vtdis.ensemble.files`) are trajectories for mdtraj too,
which drops the weights. They are refused, unless all weights are the same: resampled ensembles are
fair samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import mdtraj as md
import numpy as np
from openmm import app
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.storage.amber_netcdf import AmberTrajectory, read_amber_netcdf
from openmm_vtdis.storage.xdr import check_frames
from openmm_vtdis.topology import check_trajectory_topology, mdtraj_topology, placeholder_topology

Frames = Union[md.Trajectory, str, Path, Sequence[Union[str, Path]], np.ndarray, Tensor]  # noqa: UP007
"""Configurations: an mdtraj trajectory, path(s) that mdtraj reads, or an (n, M, D) array in nm."""


_WITH_TOPOLOGY = (".pdb", ".pdb.gz", ".cif", ".pdbx", ".gro", ".h5", ".lh5", ".mol2")
"""Files that hold atoms of their own, which must be those of the topology."""

_FLAT = 1e-5
"""Coordinates (nm) of a two-dimensional system outside its plane that still count as zero."""


def read_frames(
    name: str,
    traj: Frames,
    space: Space,
    topology: app.Topology | None,
    minimum: int = 1,
    temperature: float | None = None,
) -> Tensor:
    """Read configurations as (n, M, D) float64 in nm, checked and projected onto the space.

    Parameters
    ----------
    name
        Name of the argument in error messages.
    topology
        Topology of the System; a trajectory's own must have the same atoms in the same order.
    minimum
        Least number of frames.
    temperature
        Temperature in kelvin; a file that states another is refused.

    Raises
    ------
    ValueError
        For another molecule or atom order, wrong shapes, too few frames, NaN or infinity.
    """
    if isinstance(traj, str | Path) or (
        isinstance(traj, list | tuple) and traj and isinstance(traj[0], str | Path)
    ):
        paths = [Path(traj)] if isinstance(traj, str | Path) else [Path(path) for path in traj]
        if all(path.suffix == ".npy" for path in paths):
            traj = np.concatenate([_load_array(name, path) for path in paths])
        else:
            traj = _load(name, traj, topology, space.n_particles, temperature)
    if isinstance(traj, list | tuple) and any(isinstance(part, md.Trajectory) for part in traj):
        raise ValueError(
            f"{name}: expected one trajectory, got {len(traj)}; join them with mdtraj.join"
        )
    if isinstance(traj, md.Trajectory):
        if topology is not None:
            check_trajectory_topology(topology, traj.topology)
        check_flat(name, traj.xyz, space.n_dims)
        traj = traj.xyz[..., : space.n_dims]
    x = checks.configurations(name, nanometers(traj), space.n_particles, space.n_dims, minimum)
    return space.project(x)


def check_flat(name: str, positions: np.ndarray, n_dims: int) -> None:
    """Raise ValueError for positions (..., 3) in nm off the plane of a system in 2 dimensions."""
    outside = np.abs(positions[..., n_dims:])
    if outside.size and not float(outside.max()) <= _FLAT:
        raise ValueError(
            f"{name}: expected particles at z = 0 in {n_dims} dimensions, got coordinates of up to "
            f"{float(outside.max()):.3g} nm there"
        )


def split_in_time(frames: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Split frames into the first ones and the last fraction ``held_out``, at least one."""
    n = max(1, int(checks.fraction("held_out", held_out) * len(frames)))
    return frames[:-n], frames[-n:]


def _load_array(name: str, path: Path) -> np.ndarray:
    """Load an array in nm."""
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except ValueError as error:
        raise ValueError(f"{name}: expected an array of positions, got {path}: {error}") from error


def _load(
    name: str, paths: Any, topology: app.Topology | None, n_atoms: int, temperature: float | None
) -> md.Trajectory:
    """Load files of any formats as one trajectory; those without atoms get the topology's."""
    top = mdtraj_topology(topology or placeholder_topology(n_atoms))
    parts = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        own = str(path).lower().endswith(_WITH_TOPOLOGY)
        if str(path).lower().endswith(".npz"):
            raise ValueError(
                f"{name}: expected a trajectory, got {path}; if it is a saved ensemble, give "
                "WeightedEnsemble.load(path).resample().positions"
            )
        try:
            amber = read_amber_netcdf(Path(path))
            check_frames(Path(path), n_atoms)
            if amber is not None:
                check_fair(path, amber, temperature)
                part = md.Trajectory(amber.xyz, top)
            else:
                part = md.load(path) if own else md.load(path, top=top)
        except _Weighted as error:
            raise ValueError(f"{name}: {error}") from None
        except FileNotFoundError:
            raise
        except Exception as error:  # of any kind, from readers of many formats
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{name}: expected a trajectory of {n_atoms} atoms in a format that mdtraj reads, "
                f"got {path}: {said}"
            ) from error
        if topology is not None:
            check_trajectory_topology(topology, part.topology)
        elif part.n_atoms != n_atoms:
            raise ValueError(f"{name}: expected {n_atoms} atoms, got {part.n_atoms} in {path}")
        parts.append(md.Trajectory(part.xyz, top))  # a box, which some may have, does not matter
    return md.join(parts) if len(parts) > 1 else parts[0]


class _Weighted(Exception):
    """Raised for a file of weighted samples that was given as MD."""


def check_fair(path: object, amber: AmberTrajectory, temperature: float | None) -> None:
    """Raise :class:`_Weighted` for samples whose weights differ, or were taken away.

    It is also raised for samples of another temperature (K) than the one asked for.
    """
    log_weights, there = amber.log_weights, amber.temperature
    if log_weights is None:
        return
    if None not in (there, temperature) and not math.isclose(there, temperature, rel_tol=1e-6):  # type: ignore[arg-type]
        raise _Weighted(f"expected frames at {temperature:.6g} K, got {path}, of {there:.6g} K")
    alive = log_weights[np.isfinite(log_weights)]
    unweighted = amber.unweighted
    if not unweighted and 0 < len(alive) == len(log_weights) and np.ptp(alive) == 0.0:
        return
    what = "unweighted" if unweighted else "weighted"
    raise _Weighted(
        f"expected frames of MD, got {what} samples of openmm-vtdis in {path}, whose weights a "
        "trajectory does not have; give WeightedEnsemble.load(path).resample().positions, or "
        "save() the resampled ensemble as .nc"
    )
