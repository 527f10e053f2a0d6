"""Configurations in the types of other packages."""

from __future__ import annotations

from typing import Any

import mdtraj as md
import numpy as np
from openmm import app, unit

from openmm_vtdis.core.ess import Array
from openmm_vtdis.runtime.optional_imports import quiet_pymbar
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
