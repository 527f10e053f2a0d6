"""Small molecules for the tests."""

from __future__ import annotations

from collections.abc import Iterable

from openmm import app


def molecule(elements: Iterable[str], bonds: Iterable[tuple[int, int]]) -> app.Topology:
    """One residue of these elements, with bonds between pairs of atoms."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(f"{e}{i}", app.Element.getBySymbol(e), residue)
        for i, e in enumerate(elements)
    ]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology
