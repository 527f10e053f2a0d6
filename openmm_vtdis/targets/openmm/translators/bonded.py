r"""The bonded terms of molecular force fields::

bond             1/2 k (r - r_0)^2
angle            1/2 k (theta - theta_0)^2
torsion          k (1 + cos(n phi - phi_0))
Ryckaert-Bellemans   sum_{m=0..5} C_m cos^m(phi - pi)
CMAP             a periodic bicubic spline of two dihedrals
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import openmm
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from openmm_vtdis.targets.openmm.term_geometry import angle, dihedral
from openmm_vtdis.targets.openmm.terms import NoTerm, PairSum, Sum, Term, entries, translates


@translates("CMMotionRemover", "AndersenThermostat")
def no_energy(force: openmm.Force, system: openmm.System) -> Term:
    """Helpers of integrators, which have no energy of their own."""
    return NoTerm()


@translates("HarmonicBondForce")
def harmonic_bond(force: openmm.HarmonicBondForce, system: openmm.System) -> Term:
    """1/2 k (r - r_0)^2."""
    rows = entries(force, "Bond")
    parameters = {"r0": [r0._value for *_, r0, _ in rows], "k": [k._value for *_, k in rows]}

    def energy(r: Tensor, p: dict[str, Tensor]) -> Tensor:
        return 0.5 * p["k"] * (r - p["r0"]).square()

    return PairSum([row[:2] for row in rows], energy, parameters)


@translates("HarmonicAngleForce")
def harmonic_angle(force: openmm.HarmonicAngleForce, system: openmm.System) -> Term:
    """1/2 k (theta - theta_0)^2."""
    rows = entries(force, "Angle")
    parameters = {"theta0": [t._value for *_, t, _ in rows], "k": [k._value for *_, k in rows]}

    def energy(points: Sequence[Tensor], p: dict[str, Tensor]) -> Tensor:
        return 0.5 * p["k"] * (angle(*points) - p["theta0"]).square()

    return Sum([row[:3] for row in rows], energy, parameters)


@translates("PeriodicTorsionForce")
def periodic_torsion(force: openmm.PeriodicTorsionForce, system: openmm.System) -> Term:
    """k (1 + cos(n phi - phi_0))."""
    rows = entries(force, "Torsion")
    parameters = {
        "n": [float(n) for *_, n, _, _ in rows],
        "phi0": [phase._value for *_, phase, _ in rows],
        "k": [k._value for *_, k in rows],
    }

    def energy(points: Sequence[Tensor], p: dict[str, Tensor]) -> Tensor:
        return p["k"] * (1.0 + torch.cos(p["n"] * dihedral(*points) - p["phi0"]))

    return Sum([row[:4] for row in rows], energy, parameters)


@translates("RBTorsionForce")
def ryckaert_bellemans(force: openmm.RBTorsionForce, system: openmm.System) -> Term:
    """sum_m C_m cos^m(phi - pi)."""
    rows = entries(force, "Torsion")
    names = [f"c{m}" for m in range(6)]
    parameters = {name: [row[4 + m]._value for row in rows] for m, name in enumerate(names)}

    def energy(points: Sequence[Tensor], p: dict[str, Tensor]) -> Tensor:
        cosine = -torch.cos(dihedral(*points))
        value = p["c5"]
        for name in reversed(names[:-1]):
            value = value * cosine + p[name]
        return value

    return Sum([row[:4] for row in rows], energy, parameters)


@translates("CMAPTorsionForce")
def cmap(force: openmm.CMAPTorsionForce, system: openmm.System) -> Term:
    """Periodic bicubic splines of two dihedrals."""
    rows = entries(force, "Torsion")
    maps = []
    for k in range(force.getNumMaps()):
        size, values = force.getMapParameters(k)
        maps.append(np.asarray(values._value).reshape(size, size).T)
    return CorrectionMaps([row[1:] for row in rows], [row[0] for row in rows], maps)


class CorrectionMaps(Term):
    """Periodic bicubic splines of pairs of dihedrals.

    Parameters
    ----------
    particles
        Eight indices a torsion pair: those of the first dihedral, then of the second.
    which
        The map of each.
    maps
        Square grids over [0, 2 pi)^2 in kJ/mol, [first dihedral, second dihedral].
    """

    def __init__(
        self, particles: Sequence[Sequence[int]], which: Sequence[int], maps: Sequence[np.ndarray]
    ) -> None:
        super().__init__()
        self.n_terms = 4 * len(particles)
        tables = [torch.from_numpy(bicubic(grid)) for grid in maps]
        for k, table in enumerate(tables):
            self.register_buffer(f"_table_{k}", table)
        rows = torch.tensor([list(row) for row in particles], dtype=torch.int64).reshape(-1, 8)
        of_map = torch.tensor(list(which), dtype=torch.int64)
        self._maps = [k for k in range(len(maps)) if bool((of_map == k).any())]
        for k in self._maps:
            self.register_buffer(f"_particles_{k}", rows[of_map == k].mT.contiguous())

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        total = coordinates.new_zeros(coordinates.shape[2])
        for k in self._maps:
            points = [coordinates.index_select(1, i) for i in self.get_buffer(f"_particles_{k}")]
            phi, psi = dihedral(*points[:4]), dihedral(*points[4:])
            total = total + evaluate_map(self.get_buffer(f"_table_{k}"), phi, psi).sum(dim=0)
        return total


def bicubic(grid: np.ndarray) -> np.ndarray:
    """Coefficients (n, n, 4, 4) of s^i t^j in every cell, of the periodic spline through a grid."""
    n = len(grid)
    knots = np.arange(n + 1.0)
    closed = np.pad(grid, ((0, 1), (0, 1)), mode="wrap")
    along = CubicSpline(knots, closed, axis=0, bc_type="periodic").c[::-1]  # (4, n, n + 1)
    both = CubicSpline(knots, along, axis=2, bc_type="periodic").c[::-1]  # (4, n, 4, n)
    return np.ascontiguousarray(both.transpose(3, 1, 2, 0))


def evaluate_map(table: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
    """The map (n, n, 4, 4) at two angles (P, B) -> (P, B)."""
    n = len(table)
    cells, offsets = [], []
    for theta in (phi, psi):
        position = torch.remainder(theta, 2.0 * math.pi) * (n / (2.0 * math.pi))
        cell = position.detach().nan_to_num(0.0).floor().clamp(0, n - 1)
        cells.append(cell.to(torch.int64))
        offsets.append(position - cell)
    coefficients = table[cells[0], cells[1]]  # (P, B, 4, 4)
    s, t = offsets
    value = torch.zeros_like(s)
    for i in reversed(range(4)):
        row = coefficients[..., i, 3]
        for j in (2, 1, 0):
            row = row * t + coefficients[..., i, j]
        value = value * s + row
    return value
