"""Configurations to try a System with, and the energies of its forces one by one.

Where real positions are given, the configurations are these, perturbed: some potentials are not
defined for any others. Else they are random, of several sizes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.targets.openmm.user_code import copied

logger = logging.getLogger(__name__)

_LENGTH_SCALES = (0.1, 0.3, 1.0, 3.0)
"""Spacings of the random configurations, in nm: from chemical bonds to reduced units."""
_DRAWS = 16
_PER_SCALE = 2
_PROBES = 8
_PERTURBATIONS = (0.002, 0.005, 0.01, 0.03)
"""Sizes of the perturbations of real positions, over the smallest distance in them."""
N_GROUPS = 32
"""Number of force groups, which OpenMM can evaluate one by one."""
SEED = 20_240_607


class ForceProbe:
    """The energy of every single force of a System, by OpenMM's double-precision platform.

    ``names`` holds one label per force group: a force's class and index. (From the 32nd force on
    they share a group, and a label.) Where a force raises an exception the energy is NaN, and
    ``message`` what the first one said.

    Raises
    ------
    ValueError
        If OpenMM cannot make a Context of the System.
    """

    def __init__(self, system: openmm.System) -> None:
        system = copied(system)
        labels: dict[int, list[str]] = {}
        for index, force in enumerate(system.getForces()):
            group = min(index, N_GROUPS - 1)
            force.setForceGroup(group)
            labels.setdefault(group, []).append(f"{type(force).__name__} (force {index})")
        self.names = [" or ".join(labels[group]) for group in sorted(labels)]
        self.message: str | None = None
        try:
            self._context = openmm.Context(
                system,
                openmm.VerletIntegrator(0.001),
                openmm.Platform.getPlatformByName("Reference"),
            )
        except openmm.OpenMMException as error:
            raise ValueError(
                f"system: expected a System that OpenMM can evaluate, got an error of it: {error}"
            ) from error

    def energies(self, x: Tensor) -> Tensor:
        """x (B, M, 3) nm -> (number of groups, B) kJ/mol."""
        table = np.full((len(self.names), len(x)), np.nan)
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            for group in range(len(self.names)):
                state = self._state(energy=True, groups={group})
                if state is not None:
                    table[group, b] = state.getPotentialEnergy()._value
        return torch.from_numpy(table)

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The whole System: x (B, M, 3) nm -> (B,) kJ/mol, (B, M, 3) kJ/mol/nm."""
        energies, forces = np.full(len(x), np.nan), np.full(x.shape, np.nan)
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            state = self._state(energy=True, forces=True)
            if state is not None:
                energies[b] = state.getPotentialEnergy()._value
                forces[b] = state.getForces(asNumpy=True)._value
        return torch.from_numpy(energies), torch.from_numpy(forces)

    def _state(self, **what: Any) -> openmm.State | None:
        try:
            return self._context.getState(**what)
        except openmm.OpenMMException as error:
            self.message = self.message or str(error) or "an exception without a message"
            return None


def probe_configurations(space: Space, positions: object = None) -> Tensor:
    """Configurations (S, M, D) nm, centred, on which a System is tried.

    They are the given positions, (M, D) or (n, M, D) in nm, perturbed a little; random clouds
    without close contacts if there are none.

    Raises
    ------
    ValueError
        For positions of other particles, or of particles that lie in one place.
    """
    if positions is None:
        return random_configurations(space)
    given = nanometers(getattr(positions, "xyz", positions))  # of mdtraj too
    array = checks.real_array("positions", given)
    if array.ndim == 2:
        array = array[None]
    if array.shape[-1] == 3 and space.n_dims == 2 and not np.abs(array[..., 2:]).any():
        array = array[..., :2]
    x = space.project(checks.configurations("positions", array, space.n_particles, space.n_dims))
    x = x[np.linspace(0, len(x) - 1, _PROBES).astype(int)]
    distances = torch.cdist(x, x)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    closest = distances.flatten(1).amin(dim=1)
    if not bool((closest > 0.0).all()):
        raise ValueError("positions: expected particles apart, got some in one place")
    widths = closest * torch.tensor(_PERTURBATIONS, dtype=torch.float64).repeat(_PROBES)[:_PROBES]
    noise = space.standard_normal(_PROBES, make_rng(SEED))
    return x + widths[:, None, None] * noise


def random_configurations(space: Space) -> Tensor:
    """Configurations without close contacts, over several length scales: (S, M, D) nm, centred.

    Of every 16 Gaussian clouds the two with the widest closest pair are kept.
    """
    rng = make_rng(SEED)
    growth = space.n_particles ** (1.0 / space.n_dims)
    kept = []
    for scale in _LENGTH_SCALES:
        clouds = scale * growth * space.standard_normal(_DRAWS, rng)
        distances = torch.cdist(clouds, clouds)
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        best = distances.flatten(1).amin(dim=1).topk(_PER_SCALE).indices
        kept.append(clouds[best])
    return torch.cat(kept)
