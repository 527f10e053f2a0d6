r"""Equivalent atoms of a molecule: those that may be exchanged.

Two atoms of a molecule are *equivalent* if an automorphism of its bonded graph, whose nodes are
coloured by element, maps one onto the other: the three hydrogens of a methyl group are, those of
two different methyl groups in general are not. Equivalent atoms share a label, and labels are what
the network embeds and what a covariance per class is indexed by. A labelling that is too coarse
would force a density symmetry which the molecule does not have; one that is too fine only wastes
capacity.

Colour refinement (Weisfeiler and Leman) finds in polynomial time classes that can only be too
coarse. So every class is then confirmed: atoms a and b are equivalent exactly if there is an
isomorphism between their molecules that maps a onto b. One such test per atom and orbit decides,
and no automorphism group is ever enumerated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from openmm import app

from openmm_vtdis.core import checks
from openmm_vtdis.topology.graph import bonded_graph, name_of


def symmetry_labels(topology: app.Topology) -> np.ndarray:
    """Label equivalent atoms alike: (M,) int, 0 .. K-1 in the order of first appearance.

    Atoms without any bond are equivalent if they are of one element; so are corresponding atoms
    of identical molecules. Bond orders and handedness are ignored.

    >>> from openmm_vtdis.targets import alanine_dipeptide
    >>> labels = symmetry_labels(alanine_dipeptide().topology)
    >>> len(labels), len(set(labels))  # three methyl groups have three hydrogens each
    (22, 16)

    Raises
    ------
    ValueError
        For atoms without an element, which may be anything.
    """
    for atom in topology.atoms():
        if atom.element is None:
            raise ValueError(
                f"topology: expected an element for every atom, got none for atom {atom.index} "
                f"({name_of(atom)}); set it, or say with labels= which atoms are alike"
            )
    graph = bonded_graph(topology)
    return check_labels(_orbits(graph), len(graph))


def exchangeable_pairs(topology: app.Topology, labels: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of atoms with one label and the same neighbours, as in a methyl group.

    Exchanging such a pair, and nothing else, changes neither labels nor bonds: an energy that
    changes contradicts the labels. Each class of such atoms is covered by a chain of pairs.
    """
    graph = bonded_graph(topology)
    twins: dict[tuple[int, frozenset[int]], int] = {}
    pairs = []
    for i in graph:
        key = (labels[i], frozenset(graph.adj[i]))
        if key in twins:
            pairs.append((twins[key], i))
        twins[key] = i
    return pairs


def _orbits(graph: nx.Graph) -> list[int]:
    """Orbits of the colour-preserving automorphisms: for node i, the first node of its orbit.

    An automorphism permutes connected components, so that a and b are in one orbit exactly if
    their components, with a and b marked, are isomorphic.
    """
    component = {}
    for nodes in nx.connected_components(graph):
        subgraph = graph.subgraph(nodes)
        component.update(dict.fromkeys(nodes, subgraph))
    classes: dict[int, list[int]] = {}
    for node, colour in _refine(graph, nx.get_node_attributes(graph, "colour")).items():
        classes.setdefault(colour, []).append(node)
    orbit: dict[int, int] = {}
    for members in classes.values():
        representatives: list[int] = []
        for node in sorted(members):
            for first in representatives:
                if _marked_isomorphic(component[first], first, component[node], node):
                    orbit[node] = first
                    break
            else:
                representatives.append(node)
                orbit[node] = node
    return [orbit[i] for i in range(len(graph))]


def _marked_isomorphic(left: nx.Graph, a: int, right: nx.Graph, b: int) -> bool:
    """Whether an isomorphism of ``left`` onto ``right`` keeps colours and maps a onto b.

    ``left`` and ``right`` are components of one graph: the same one or two apart.
    """
    if left.nodes[a]["colour"] != right.nodes[b]["colour"]:
        return False
    if set(left.adj[a]) - {b} == set(right.adj[b]) - {a}:
        return True  # twins, as the hydrogens of a methyl group, or two lone atoms: exchange them
    if len(left) != len(right) or left.size() != right.size():
        return False
    both = nx.disjoint_union_all([_marked(left, a), _marked(right, b)])
    colours = _refine(both, nx.get_node_attributes(both, "colour"))
    nodes = range(len(both))
    if Counter(colours[i] for i in nodes[: len(left)]) != Counter(
        colours[i] for i in nodes[len(left) :]
    ):
        return False
    nx.set_node_attributes(both, colours, "colour")
    halves = [both.subgraph(part).copy() for part in (nodes[: len(left)], nodes[len(left) :])]
    return bool(nx.is_isomorphic(*halves, node_match=lambda x, y: x["colour"] == y["colour"]))


def _marked(graph: nx.Graph, node: int) -> nx.Graph:
    """A copy in which ``node`` has a colour of its own."""
    copy = nx.Graph()
    copy.add_nodes_from((i, {"colour": (d["colour"], i == node)}) for i, d in graph.nodes.items())
    copy.add_edges_from(graph.edges)
    return copy


def _refine(graph: nx.Graph, colours: Mapping[int, Any]) -> dict[int, int]:
    """The stable colouring: split classes by the colours of neighbours until nothing splits."""
    stable = _numbered(colours)
    while True:
        split = _numbered(
            {i: (stable[i], tuple(sorted(stable[j] for j in graph.adj[i]))) for i in stable}
        )
        if len(set(split.values())) == len(set(stable.values())):
            return split
        stable = split


def _numbered(colours: Mapping[int, Any]) -> dict[int, int]:
    number = {colour: k for k, colour in enumerate(sorted(set(colours.values())))}
    return {node: number[colour] for node, colour in colours.items()}


def identical_labels(n_particles: int) -> np.ndarray:
    """Labels of interchangeable particles: (M,) zeros."""
    return np.zeros(checks.positive_integer("n_particles", n_particles), dtype=np.int64)


def check_labels(labels: Sequence[int] | np.ndarray, n_particles: int) -> np.ndarray:
    """Return labels as (M,) int64, renumbered 0 .. K-1 in the order of first appearance.

    Raises
    ------
    ValueError
        If they are not ``n_particles`` integers.
    """
    array = np.asarray(labels)
    if array.shape != (n_particles,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels: expected {n_particles} integers, one per particle, got an array of shape "
            f"{array.shape} and type {array.dtype}"
        )
    _, first, inverse = np.unique(array, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
