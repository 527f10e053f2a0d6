"""Plain OpenMM, one configuration and one Context at a time: what the targets are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import openmm
import torch
from torch import Tensor

RINGS = [(0, 1), (1, 2), (2, 3), (3, 0)]


def system_of(*forces: openmm.Force, n_particles: int = 4) -> openmm.System:
    """A System of particles of 1 dalton with these forces."""
    system = openmm.System()
    for _ in range(n_particles):
        system.addParticle(1.0)
    for force in forces:
        system.addForce(force)
    return system


def bonds(
    source: str,
    pairs: Iterable[tuple[int, int]] = RINGS,
    parameters: Sequence[str] = (),
    values: Sequence[Sequence[float]] | None = None,
) -> openmm.CustomBondForce:
    """A CustomBondForce; ``values`` holds one row per pair."""
    force = openmm.CustomBondForce(source)
    for name in parameters:
        force.addPerBondParameter(name)
    for k, (i, j) in enumerate(pairs):
        force.addBond(i, j, [] if values is None else values[k])
    return force


def all_pairs(source: str, n_particles: int = 4) -> openmm.CustomBondForce:
    """A CustomBondForce over all pairs: identical particles."""
    n = n_particles
    return bonds(source, [(i, j) for i in range(n) for j in range(i + 1, n)])


def external(source: str, n_particles: int = 4) -> openmm.CustomExternalForce:
    """A CustomExternalForce on all particles."""
    force = openmm.CustomExternalForce(source)
    for i in range(n_particles):
        force.addParticle(i, [])
    return force


def many_body() -> openmm.CustomManyParticleForce:
    """Has no batched translation; invariant, and blind to the order of its four particles."""
    force = openmm.CustomManyParticleForce(
        3, "0.1*(distance(p1,p2)+distance(p2,p3)+distance(p1,p3))^2"
    )
    for _ in range(4):
        force.addParticle([])
    return force


def configurations(n: int, n_particles: int = 4, n_dims: int = 3, seed: int = 0) -> Tensor:
    """Gaussian positions (n, M, D), nm, centred."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_particles, n_dims, generator=rng, dtype=torch.float64)
    return x - x.mean(dim=1, keepdim=True)


def by_openmm(system: openmm.System, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, M, 2 or 3) nm -> (B,) kJ/mol, (B, M, 3) kJ/mol/nm."""
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    energies, forces = [], []
    for frame in torch.nn.functional.pad(x, (0, 3 - x.shape[2])).tolist():
        context.setPositions(frame)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append([list(f) for f in state.getForces()._value])
    return torch.tensor(energies, dtype=torch.float64), torch.tensor(forces, dtype=torch.float64)
