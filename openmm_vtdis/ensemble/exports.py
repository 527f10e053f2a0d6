"""Ensembles as other packages take them: mdtraj, openmmtools, PLUMED."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import ArrayLike
from openmm import app, unit

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array
from openmm_vtdis.runtime.optional_imports import quiet_pymbar
from openmm_vtdis.storage.atomic import write_atomically
from openmm_vtdis.topology import mdtraj_topology, placeholder_topology


def to_mdtraj(positions: Array, topology: app.Topology | None) -> md.Trajectory:
    """Positions (n, M, D) in nm as float32; without a topology the atoms are argon."""
    n, n_particles, n_dims = positions.shape
    if n_dims > 3:
        raise ValueError(f"to_mdtraj: expected at most 3 dimensions, got {n_dims}")
    if topology is None:
        topology = placeholder_topology(n_particles)
    xyz = np.zeros((n, n_particles, 3), dtype=np.float32)
    with np.errstate(over="ignore"):  # positions of zero weight may be anything
        xyz[..., :n_dims] = positions
    return md.Trajectory(xyz, mdtraj_topology(topology))


def to_sampler_states(positions: Array) -> list[Any]:
    """Positions (n, M, D) in nm as openmmtools SamplerStates."""
    with quiet_pymbar():  # which openmmtools imports
        from openmmtools.states import SamplerState

    n_dims = positions.shape[2]
    if n_dims > 3:
        raise ValueError(f"to_sampler_states: expected at most 3 dimensions, got {n_dims}")
    padded = np.pad(positions, [(0, 0), (0, 0), (0, 3 - n_dims)])
    return [SamplerState(frame * unit.nanometer) for frame in padded]


def write_colvar(
    path: str | os.PathLike[str], log_weights: np.ndarray, columns: Mapping[str, ArrayLike]
) -> Path:
    """Write a PLUMED COLVAR file, atomically.

    Parameters
    ----------
    log_weights
        (n,); written less the largest of them, which no average notices. A sample of weight zero is
        left out.
    columns
        Name to values (n,), in PLUMED's units where PLUMED is to use them (radians for angles).

    Raises
    ------
    ValueError
        For a name that PLUMED cannot read or has taken, another length, or values that are not
        finite.
    """
    alive = np.isfinite(log_weights)
    table = {"time": np.arange(len(log_weights), dtype=float)}
    for name, values in columns.items():
        if not name or name in ("time", "logweight") or any(c.isspace() or c in "#@" for c in name):
            raise ValueError(
                f"columns: expected a name without spaces, # or @, other than time and logweight, "
                f"got {name!r}"
            )
        v = checks.real_array(name, values)
        if v.shape != (len(log_weights),) or not np.isfinite(v[alive]).all():
            raise ValueError(
                f"{name}: expected {len(log_weights)} finite values, one per sample, got shape "
                f"{v.shape}" + ("" if v.shape != (len(log_weights),) else " with NaN or infinity")
            )
        table[name] = v
    table["logweight"] = log_weights - log_weights.max(initial=-np.inf, where=alive)
    lines = [f"#! FIELDS {' '.join(table)}"]
    rows = np.stack(list(table.values()), axis=1)[alive]
    lines += [" ".join(f"{value:.15g}" for value in row) for row in rows]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())
