r"""Benchmark systems: particles with published or easily measured statistics, and a molecule.

The particle systems are ordinary ``openmm.System`` objects in reduced units: kT = 1 kJ/mol (so
T = 120.272 K) and lengths in nm. With d the distance of two particles::

    DW-4      u = sum_{i<j} [ -4 (d - 4)^2 + 0.9 (d - 4)^4 ],              4 particles in 2-D
    LJ-n      u = sum_{i<j} 2 [ d^-12 - 2 d^-6 ] + 1/2 sum_i |x_i - x_com|^2,    n in 3-D

The trap of LJ-n is a sum over pairs too, ``sum_i |x_i - x_com|^2 = sum_{i<j} d^2 / n``, so that one
CustomBondForce holds the whole energy and is visibly invariant under translation. (Its factor 2
is that of the published LJ-13 data sets, in which both ordered pairs count.)

The molecule is alanine dipeptide (ACE-ALA-NME, 22 atoms) in implicit solvent, without constraints,
by default at 800 K, where its backbone is free to turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_vtdis.core import checks, units
from openmm_vtdis.runtime.optional_imports import quiet_pymbar
from openmm_vtdis.targets.openmm.target import OpenMMTarget

_DOUBLE_WELL = "-4*square(r-4)+0.9*square(square(r-4))"
_LENNARD_JONES = "2*s6*(s6-2)+r2/(2*n_particles); s6=cube(recip(r2)); r2=square(r)"


@dataclass(frozen=True)
class BenchmarkSystem:
    """A System with all that is needed to sample it.

    Attributes
    ----------
    name
        Short name, "DW-4".
    system
        The System, which nobody changes.
    topology
        None for identical particles.
    temperature
        Temperature in kelvin.
    n_dims
        2 (particles at z = 0) or 3.
    positions
        One sane configuration, (M, n_dims) in nm, float64.
    """

    name: str
    system: openmm.System
    topology: app.Topology | None
    temperature: float
    n_dims: int
    positions: np.ndarray

    def __post_init__(self) -> None:
        checks.temperature(self.temperature)
        checks.positive_integer("n_dims", self.n_dims)
        expected = (self.system.getNumParticles(), self.n_dims)
        if self.positions.shape != expected:
            raise ValueError(
                f"positions: expected shape {expected} for {self.name}, got {self.positions.shape}"
            )

    def target(self, **kwargs: Any) -> OpenMMTarget:
        """The target of this system; keywords go to :class:`~openmm_vtdis.targets.OpenMMTarget`."""
        return OpenMMTarget(
            self.system, self.topology, self.temperature, n_dims=self.n_dims, **kwargs
        )


def double_well(n_particles: int = 4) -> BenchmarkSystem:
    """DW-n: particles in the plane, every pair in a double well in its distance (n = 4: DW-4)."""
    n = checks.positive_integer("n_particles", n_particles, minimum=2)
    force = openmm.CustomBondForce(_DOUBLE_WELL)
    angles = 2.0 * np.pi * np.arange(n) / n
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    radius = 2.0 / np.sin(np.pi / n)  # neighbours 4 nm apart, at the barrier between the wells
    return _identical(f"DW-{n}", _all_pairs(force, n), 2, radius * ring)


def lennard_jones(n_particles: int = 13) -> BenchmarkSystem:
    """LJ-n: a cluster of Lennard-Jones particles in a weak harmonic trap (n = 13: LJ-13)."""
    n = checks.positive_integer("n_particles", n_particles, minimum=2)
    force = openmm.CustomBondForce(_LENNARD_JONES)
    force.addGlobalParameter("n_particles", float(n))
    side = int(np.ceil(n ** (1.0 / 3.0) - 1e-9))
    grid = np.stack(np.meshgrid(*[np.arange(side, dtype=np.float64)] * 3, indexing="ij"), axis=-1)
    lattice = grid.reshape(-1, 3)
    nearest = np.argsort(((lattice - lattice.mean(axis=0)) ** 2).sum(axis=1), kind="stable")[:n]
    positions = lattice[nearest] - lattice[nearest].mean(axis=0)
    return _identical(f"LJ-{n}", _all_pairs(force, n), 3, positions)


def alanine_dipeptide(temperature: float = 800.0) -> BenchmarkSystem:
    """ALDP: Amber ff96 with the OBC generalized Born solvent, as openmmtools has it."""
    with quiet_pymbar():  # which openmmtools imports; slowly, and it is needed here only
        from openmmtools import testsystems

    source = testsystems.AlanineDipeptideImplicit(constraints=None)
    positions = np.asarray(source.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    kelvin = checks.temperature(temperature)
    return BenchmarkSystem("ALDP", source.system, source.topology, kelvin, 3, positions)


def _all_pairs(force: openmm.CustomBondForce, n: int) -> openmm.CustomBondForce:
    for i in range(n):
        for j in range(i + 1, n):
            force.addBond(i, j, [])
    return force


def _identical(
    name: str, force: openmm.Force, n_dims: int, positions: np.ndarray
) -> BenchmarkSystem:
    system = openmm.System()
    for _ in range(len(positions)):
        system.addParticle(1.0)
    system.addForce(force)
    return BenchmarkSystem(name, system, None, units.temperature_for(1.0), n_dims, positions)
