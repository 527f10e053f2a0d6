"""Atoms and bonds of a Topology as a graph, for networks and for comparison with trajectories."""

from __future__ import annotations

import copy
from typing import Any

import mdtraj as md
import networkx as nx
import numpy as np
from openmm import app, unit

from openmm_vtdis.core import checks


def ordered_atoms(topology: app.Topology) -> list[app.topology.Atom]:
    """Atoms in the order of their indices, which must be that of their residues and chains."""
    if not isinstance(topology, app.Topology):
        raise ValueError(
            f"topology: expected an openmm.app.Topology, got {type(topology).__name__}"
        )
    atoms = list(topology.atoms())
    for i, atom in enumerate(atoms):
        if atom.index != i:
            raise ValueError(
                "topology: expected atoms numbered residue by residue and chain by chain, got atom "
                f"{atom.index} ({atom.name}) in place {i}"
            )
    return atoms


def bonded_graph(topology: app.Topology) -> nx.Graph:
    """Atoms as nodes, coloured by element ("" for none); bonds as edges."""
    graph = nx.Graph()
    for atom in ordered_atoms(topology):
        graph.add_node(atom.index, colour=symbol_of(atom))
    graph.add_edges_from((a.index, b.index) for a, b in topology.bonds() if a is not b)
    return graph


def symbol_of(atom: Any) -> str:
    """Chemical symbol, or "" for an atom without an element."""
    return "" if atom.element is None else atom.element.symbol


def name_of(atom: Any) -> str:
    """An OpenMM atom for a message, "CA of ALA 2"."""
    return f"{atom.name} of {atom.residue.name} {atom.residue.id}"


def mass_of(element: app.Element) -> float:
    """Mass of an element in dalton; users make some whose mass is a plain number."""
    mass = element.mass
    return float(mass.value_in_unit(unit.dalton) if unit.is_quantity(mass) else mass)


def mdtraj_topology(topology: app.Topology) -> md.Topology:
    """Convert a topology to mdtraj's, in which the user's own elements become virtual sites."""
    if not all(_known_to_mdtraj(atom) for atom in topology.atoms()):
        topology = copy.deepcopy(topology)
        for atom in topology.atoms():
            atom.element = atom.element if _known_to_mdtraj(atom) else None
    return md.Topology.from_openmm(topology)


def _known_to_mdtraj(atom: Any) -> bool:
    return atom.element is None or atom.element.symbol in _MDTRAJ_SYMBOLS


def placeholder_topology(n_particles: int) -> app.Topology:
    """A Topology of argon atoms, one per residue, for particles that came without one."""
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(checks.positive_integer("n_particles", n_particles)):
        topology.addAtom("AR", app.element.argon, topology.addResidue("AR", chain))
    return topology


def check_trajectory_topology(topology: app.Topology, trajectory_topology: md.Topology) -> None:
    """Check that a trajectory holds the atoms of ``topology``, in the same order.

    Elements, atom names, residue names and residue numbering from 0 are compared; residue and atom
    ids, which programs renumber freely, are not.

    Raises
    ------
    ValueError
        If the atom counts differ, or for the first atom that does not match.
    """
    expected = [_signature(atom) for atom in ordered_atoms(topology)]
    got = [_signature(atom) for atom in trajectory_topology.atoms]
    if len(expected) != len(got):
        raise ValueError(
            f"trajectory: expected {len(expected)} atoms as in the topology, got {len(got)}"
        )
    for i, (mine, theirs) in enumerate(zip(expected, got, strict=True)):
        if mine != theirs:
            what = next(k for k in range(len(mine)) if mine[k] != theirs[k])
            raise ValueError(
                f"trajectory: expected the atoms in the order of the topology, but atom {i} "
                f"({mine[1]} of {mine[2]} {mine[3]}) has {_SIGNATURE[what]} {theirs[what]!r} "
                f"instead of {mine[what]!r}; if only names differ, load the trajectory with "
                "top=mdtraj.Topology.from_openmm(topology)"
            )


_FARTHEST = 3
"""Bonds between the ends of a dihedral: beyond them force fields treat atoms as unbonded."""


def element_features(topology: app.Topology) -> np.ndarray:
    """One-hot elements, (M, E) float64, E elements in alphabetical order."""
    symbols = [symbol_of(atom) for atom in topology.atoms()]
    return np.equal.outer(symbols, sorted(set(symbols))).astype(np.float64)


def bond_features(topology: app.Topology) -> np.ndarray:
    """Whether two atoms are 1, 2 or 3 bonds apart: (M, M, 3) one-hot float64, all zero if more."""
    graph = bonded_graph(topology)
    out = np.zeros((len(graph), len(graph), _FARTHEST))
    for i, lengths in nx.all_pairs_shortest_path_length(graph, cutoff=_FARTHEST):
        for j, n_bonds in lengths.items():
            if n_bonds:
                out[i, j, n_bonds - 1] = 1.0
    return out


_MDTRAJ_SYMBOLS = {e.symbol for e in vars(md.element).values() if hasattr(e, "symbol")}
_SIGNATURE = ("element", "name", "residue name", "residue index")


def _signature(atom: Any) -> tuple[str, str, str, int]:
    """Element, name, residue name and residue index of an OpenMM or an mdtraj atom."""
    symbol = "VS" if atom.element is None else atom.element.symbol
    symbol = symbol if symbol in _MDTRAJ_SYMBOLS else "VS"
    return symbol, atom.name, atom.residue.name, atom.residue.index
