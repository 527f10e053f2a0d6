"""What a network is told of a molecule besides its labels: elements, and who is bonded to whom."""

from __future__ import annotations

import networkx as nx
import numpy as np
from openmm import app

from openmm_vtdis.topology.atoms import bonded_graph, symbol_of

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
