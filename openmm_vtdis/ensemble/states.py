"""Energies of configurations in another state: a target of this package, or one of openmmtools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array
from openmm_vtdis.ensemble.contents import Samples
from openmm_vtdis.storage.fingerprint import Identified
from openmm_vtdis.targets import OpenMMTarget, Target, energies_of


@runtime_checkable
class HasEnergy(Protocol):
    """Anything that gives energies of configurations."""

    def reduced_energy(self, x: Tensor) -> Tensor:
        """(n, M, D) nm -> (n,) kT."""
        ...


@runtime_checkable
class HasTemperature(Protocol):
    """Anything that has a temperature."""

    temperature: float | None


@dataclass(frozen=True)
class State:
    """Energies of samples in another state, with its temperature and identity.

    Attributes
    ----------
    reduced_energies
        (n,) kT; NaN and infinity are allowed.
    temperature
        Temperature in K; None for a density without one.
    hamiltonian
        Fingerprint; None: not known.
    """

    reduced_energies: Array
    temperature: float | None
    hamiltonian: str | None

    def log_weights_of(self, samples: Samples) -> Array:
        """Their log weights here, (n,): u_old - u_new is added; -inf stays so."""
        alive = np.isfinite(samples.log_weights) & np.isfinite(self.reduced_energies)
        found = np.full(len(alive), -np.inf)
        change = samples.reduced_energies[alive] - self.reduced_energies[alive]
        found[alive] = samples.log_weights[alive] + change
        return found


def in_another_state(name: str, ensemble: Samples, target: Any) -> State:
    """Samples of an ensemble for another target, ThermodynamicState or temperature.

    Raises
    ------
    ValueError
        If ``target`` is none of these, or of another kind than the samples.
    """
    said = ensemble.provenance
    if isinstance(target, unit.Quantity):
        if ensemble.temperature is None:
            raise ValueError(
                f"{name}: expected samples that have a temperature, got those of a density "
                "without one"
            )
        kelvin = checks.temperature(target)
        u = ensemble.reduced_energies * (ensemble.temperature / kelvin)
        return State(u, kelvin, said.hamiltonian)
    target = as_target(name, target, ensemble.topology, ensemble.positions.shape[2])
    check_space(name, target, said.centred)
    u = state_energies(name, target, ensemble.positions)
    temperature = target.temperature if isinstance(target, HasTemperature) else None
    return State(u, temperature, target.fingerprint if isinstance(target, Identified) else None)


def check_space(name: str, target: Any, centred: bool | None) -> None:
    """Raise ValueError if a target is centred and samples are not, or the other way round."""
    theirs = target.space.centred if isinstance(target, Target) else None
    if None not in (theirs, centred) and theirs != centred:
        kinds = {True: "configurations around their centre", False: "configurations anywhere"}
        raise ValueError(f"{name}: expected a target of {kinds[bool(centred)]}, got another")


def as_target(name: str, state: Any, topology: app.Topology | None, n_dims: int) -> Any:
    """Return something with ``reduced_energy``: ``state`` itself, or made of a ThermodynamicState.

    Raises
    ------
    ValueError
        If ``state`` is neither, or its Z is infinite.
    """
    if isinstance(state, HasEnergy):
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
    space = target.space if isinstance(target, Target) else None
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
