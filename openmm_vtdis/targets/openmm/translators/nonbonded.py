r"""Lennard-Jones and Coulomb energies without a cutoff::

    4 epsilon ((sigma / r)^12 - (sigma / r)^6) + q_1 q_2 / (4 pi epsilon_0 r),
    sigma = (sigma_1 + sigma_2) / 2,   epsilon = sqrt(epsilon_1 epsilon_2)

An exception is a pair with parameters of its own, so that everything is one sum over pairs.
"""

from __future__ import annotations

import numpy as np
import openmm
from torch import Tensor

from openmm_vtdis.targets.openmm.terms import PairSum, Term, Untranslatable, entries, translates

COULOMB = 138.93545764438198
"""1 / (4 pi epsilon_0) in kJ nm / (mol e^2), as OpenMM has it."""


@translates("NonbondedForce")
def nonbonded(force: openmm.NonbondedForce, system: openmm.System) -> Term:
    """Lennard-Jones and Coulomb, with exceptions and parameter offsets."""
    if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
        raise Untranslatable("NonbondedForce", "a cutoff")
    if not force.getIncludeDirectSpace():
        raise Untranslatable("NonbondedForce", "no direct space")
    particles, exceptions = _parameters(force)
    index = [row[:2] for row in entries(force, "Exception")]
    own = {frozenset(pair): row for pair, row in zip(index, exceptions, strict=True)}
    pairs, rows = [], []
    for i in range(len(particles)):
        for j in range(i + 1, len(particles)):
            row = own.get(frozenset((i, j)))
            if row is None:
                (q1, s1, e1), (q2, s2, e2) = particles[i], particles[j]
                row = np.array([q1 * q2, 0.5 * (s1 + s2), np.sqrt(e1 * e2)])
            if row[0] != 0.0 or row[2] != 0.0:
                pairs.append((i, j))
                rows.append(row)
    columns = np.array(rows).reshape(-1, 3).T
    parameters = {
        "charge": COULOMB * columns[0],
        "sigma_squared": columns[1] ** 2,
        "depth": 4.0 * columns[2],
    }
    return PairSum(pairs, _energy, {name: column.tolist() for name, column in parameters.items()})


def _energy(r: Tensor, p: dict[str, Tensor]) -> Tensor:
    inverse = r.reciprocal()
    square = p["sigma_squared"] * inverse.square()
    sixth = square * square * square
    return p["depth"] * sixth * (sixth - 1.0) + p["charge"] * inverse


def _parameters(force: openmm.NonbondedForce) -> tuple[np.ndarray, np.ndarray]:
    """(charge or charge product, sigma, epsilon) of particles and of exceptions, with offsets."""
    default = {
        force.getGlobalParameterName(k): force.getGlobalParameterDefaultValue(k)
        for k in range(force.getNumGlobalParameters())
    }
    particles = np.array([[value._value for value in row] for row in entries(force, "Particle")])
    exceptions = np.array(
        [[value._value for value in row[2:]] for row in entries(force, "Exception")]
    ).reshape(-1, 3)
    for k in range(force.getNumParticleParameterOffsets()):
        name, i, *scales = force.getParticleParameterOffset(k)
        particles[i] += default[name] * np.array(scales)
    for k in range(force.getNumExceptionParameterOffsets()):
        name, i, *scales = force.getExceptionParameterOffset(k)
        exceptions[i] += default[name] * np.array(scales)
    return particles, exceptions
