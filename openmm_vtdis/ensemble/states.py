"""Energies of configurations in another state: a target of this package, or one of openmmtools."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openmm import app

from openmm_vtdis.targets import OpenMMTarget, energies_of


def check_space(name: str, target: Any, centred: bool | None) -> None:
    """Raise ValueError if a target is centred and samples are not, or the other way round."""
    theirs = getattr(getattr(target, "space", None), "centred", None)
    if None not in (theirs, centred) and theirs != centred:
        kinds = {True: "configurations around their centre", False: "configurations anywhere"}
        raise ValueError(f"{name}: expected a target of {kinds[bool(centred)]}, got another")


def as_target(name: str, state: Any, topology: app.Topology | None, n_dims: int) -> Any:
    """Something with ``reduced_energy``: as it is, or made from a ThermodynamicState.

    Raises
    ------
    ValueError
        If ``state`` is neither, or its Z is infinite.
    """
    if hasattr(state, "reduced_energy"):
        if isinstance(state, OpenMMTarget):
            state.check_bound()
        return state
    if not hasattr(state, "get_system"):
        raise ValueError(
            f"{name}: expected a target with reduced_energy(x), such as OpenMMTarget(system, "
            f"topology, temperature), or an openmmtools ThermodynamicState, got "
            f"{type(state).__name__}"
        )
    system, temperature = state.get_system(remove_thermostat=True), state.temperature
    target = OpenMMTarget(system, topology, temperature=temperature, n_dims=n_dims)
    target.check_bound()
    return target


def state_energies(name: str, target: Any, positions: np.ndarray) -> np.ndarray:
    """u(x) of a target in kT: positions (n, M, D) in nm -> (n,) float64, NaN and inf allowed.

    Raises
    ------
    ValueError
        If the target is of other particles, or gives other than one number a sample.
    """
    _, n_particles, n_dims = positions.shape
    space = getattr(target, "space", None)
    if space is not None and (n_particles, n_dims) != (space.n_particles, space.n_dims):
        raise ValueError(
            f"{name}: expected a target of {n_particles} particles in {n_dims} dimensions, got "
            f"one of {space.n_particles} in {space.n_dims}"
        )
    x = torch.tensor(np.ascontiguousarray(positions), device="cpu")
    try:
        return energies_of(target, x).cpu().numpy()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
