"""Potentials of users', for PythonForce: importable, as OpenMM's pickles need them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app

BONDS = ((0, 1, 0.0957, 4e5), (0, 2, 0.0957, 4e5), (1, 2, 0.151, 1e5))
"""Of a molecule like water: two particles, length (nm), stiffness (kJ/mol/nm^2)."""


def positions_of(state: openmm.State) -> np.ndarray:
    return np.array(state.getPositions(asNumpy=True)._value)


class Springs:
    """Springs between three atoms, and weights of a network that it does not use."""

    def __init__(self) -> None:
        self.net = torch.nn.Linear(3, 1).double()
        self.table = {"a": np.arange(3.0)}

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        return self.of(positions_of(state))

    def of(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        energy, force = 0.0, np.zeros_like(x)
        for i, j, length, k in BONDS:
            line = x[i] - x[j]
            r = float(np.linalg.norm(line))
            energy += 0.5 * k * (r - length) ** 2
            pull = k * (r - length) * line / r
            force[i] -= pull
            force[j] += pull
        return energy, force


class Keeping(Springs):
    """Keeps its input between two lines, and lets other threads run there."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.zeros(3, 3, dtype=torch.float64)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        self.x.copy_(torch.from_numpy(positions_of(state)))
        time.sleep(1e-4)
        return self.of(self.x.numpy().copy())


class Shared(Springs):
    """The same, in one place for all copies: threads of their own do not help."""

    x = np.zeros((3, 3))

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        x = Shared.x
        x[:] = positions_of(state)
        time.sleep(1e-4)
        return self.of(x.copy())


class Counting(Springs):
    """Another energy at every call."""

    n = 0

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        self.n += 1
        energy, force = super().__call__(state)
        return energy + 10.0 * self.n, force


class Uphill(Springs):
    """Gradients in the place of forces."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, force = super().__call__(state)
        return energy, -force


class Angstrom(Springs):
    """Forces for another unit."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, force = super().__call__(state)
        return energy, 0.1 * force


class Heavy(Springs):
    """With the energy of all electrons, in single precision."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, force = super().__call__(state)
        return float(np.float32(energy - 1.3e6)), force


class HeavyNoise(Heavy):
    """The same, and another energy at every call."""

    n = 0

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        self.n += 1
        energy, force = super().__call__(state)
        return energy + 3.0 * (-1) ** self.n, force


class HeavyEdited(Heavy):
    """The same, of code that changes."""

    factor = 1.0

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, force = super().__call__(state)
        return self.factor * (energy + 1.3e6) - 1.3e6, self.factor * force


class Nothing(Springs):
    """Of which OpenMM dies."""

    def __call__(self, state: openmm.State) -> Any:
        return None, None


class NoNeighbours(Springs):
    """As graph networks with a cutoff: not defined for atoms far apart."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        x = positions_of(state)
        if np.linalg.norm(x[:, None] - x[None], axis=-1).max() > 0.2:
            raise RuntimeError("atom without neighbours")
        return super().__call__(state)


class Diverging(Springs):
    """As a self-consistent field that does not converge where atoms are close."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        x = positions_of(state)
        if min(np.linalg.norm(x[i] - x[j]) for i, j, _, _ in BONDS) < 0.05:
            raise RuntimeError("SCF did not converge")
        return super().__call__(state)


class Edited(Springs):
    """Code that changes while an archive lies on a disk."""

    factor = 1.0

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, force = super().__call__(state)
        return self.factor * energy, self.factor * force


class Cyclic(Springs):
    """Holds itself, as calculators do."""

    def __init__(self) -> None:
        super().__init__()
        self.owner: Any = {"calculator": self}


def water() -> tuple[app.Topology, np.ndarray]:
    """The topology, and one configuration (3, 3) in nm."""
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    atoms = [
        topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
        for name in ("O", "H1", "H2")
    ]
    for hydrogen in atoms[1:]:
        topology.addBond(atoms[0], hydrogen)
    return topology, np.array([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.024, 0.0927, 0.0]])


def system_with(potential: Any, nested: bool = False) -> openmm.System:
    """Three atoms and a PythonForce, or one inside of a CustomCVForce."""
    system = openmm.System()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    force = openmm.PythonForce(potential)
    if nested:
        outer = openmm.CustomCVForce("u")
        outer.addCollectiveVariable("u", force)
        force = outer
    system.addForce(force)
    return system


def frames(n: int = 200, width: float = 0.002) -> np.ndarray:
    """Configurations (n, 3, 3) around the molecule's own."""
    return water()[1] + width * np.random.default_rng(0).normal(size=(n, 3, 3))


SPRING = 500.0
"""kJ/mol/nm^2, of :func:`spring_energy`."""


def spring_energy(x: torch.Tensor) -> torch.Tensor:
    """(B, M, 3) nm -> (B,) kJ/mol: a spring between every two particles."""
    apart = x[:, :, None] - x[:, None]
    return 0.25 * SPRING * apart.square().sum(dim=(1, 2, 3))
