r"""Topologies: what may be exchanged with what, and how a Topology is stored.

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

import mdtraj as md
import networkx as nx
import numpy as np
import openmm
from openmm import app, unit

from openmm_vtdis import checks

_BOND_TYPES = {
    str(kind): kind for kind in (app.Single, app.Double, app.Triple, app.Aromatic, app.Amide)
}


# -- storage ----------------------------------------------------------------------------------
def topology_to_json(topology: app.Topology) -> dict[str, Any]:
    """Describe a Topology completely by JSON-able values; lengths in nm.

    Raises
    ------
    ValueError
        If the atoms are not numbered in the order of their residues, or a bond has a type that
        OpenMM does not define.
    """
    _ordered_atoms(topology)
    box = topology.getPeriodicBoxVectors()
    return {
        "chains": [
            {
                "id": chain.id,
                "residues": [
                    {
                        "name": residue.name,
                        "id": residue.id,
                        "insertion_code": residue.insertionCode,
                        "atoms": [
                            {
                                "name": atom.name,
                                "element": None if atom.element is None else atom.element.symbol,
                                "id": atom.id,
                                "formal_charge": atom.formalCharge,
                            }
                            for atom in residue.atoms()
                        ],
                    }
                    for residue in chain.residues()
                ],
            }
            for chain in topology.chains()
        ],
        "bonds": [
            [bond[0].index, bond[1].index, _bond_type_name(bond.type), bond.order]
            for bond in topology.bonds()
        ],
        "box_vectors": None
        if box is None
        else [[float(x) for x in row] for row in box.value_in_unit(unit.nanometer)],
    }


def topology_from_json(document: Mapping[str, Any]) -> app.Topology:
    """Make the Topology that :func:`topology_to_json` described.

    Raises
    ------
    ValueError
        If the document is malformed; the message says where.
    """
    topology = app.Topology()
    atoms: list[app.topology.Atom] = []
    where = "the chains"
    try:
        for c, chain_document in enumerate(document["chains"]):
            where = f"chain {c}"
            chain = topology.addChain(chain_document["id"])
            for residue_document in chain_document["residues"]:
                where = f"residue {topology.getNumResidues()}"
                residue = topology.addResidue(
                    residue_document["name"],
                    chain,
                    residue_document["id"],
                    residue_document["insertion_code"],
                )
                for atom in residue_document["atoms"]:
                    where = f"atom {len(atoms)}"
                    symbol = atom["element"]
                    element = None if symbol is None else app.Element.getBySymbol(symbol)
                    atoms.append(
                        topology.addAtom(
                            atom["name"], element, residue, atom["id"], atom["formal_charge"]
                        )
                    )
        where = "the bonds"
        for b, (i, j, kind, order) in enumerate(document["bonds"]):
            where = f"bond {b}"
            if not (0 <= i < len(atoms) and 0 <= j < len(atoms)):
                raise ValueError(f"it joins atoms {i} and {j} of {len(atoms)}")
            bond_type = None if kind is None else _BOND_TYPES[kind]
            topology.addBond(atoms[i], atoms[j], bond_type, order)
        where = "the box vectors"
        if document["box_vectors"] is not None:
            box = np.asarray(document["box_vectors"], dtype=np.float64)
            if box.shape != (3, 3):
                raise ValueError(f"expected three vectors of three numbers, got {box.shape}")
            vectors = [openmm.Vec3(*row) for row in box.tolist()]
            topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "topology: expected a document written by topology_to_json, but could not read "
            f"{where}: {type(error).__name__}: {error}"
        ) from error
    return topology


def _bond_type_name(kind: object) -> str | None:
    if kind is None:
        return None
    name = str(kind)
    if name not in _BOND_TYPES:
        listed = ", ".join(_BOND_TYPES)
        raise ValueError(f"topology: expected bonds of type None, {listed}, got {kind!r}")
    return name


def _ordered_atoms(topology: app.Topology) -> list[app.topology.Atom]:
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


# -- symmetry ---------------------------------------------------------------------------------
def symmetry_labels(topology: app.Topology) -> np.ndarray:
    """Label equivalent atoms alike: (M,) int, 0 .. K-1 in the order of first appearance.

    Atoms without any bond are equivalent if they are of one element; so are corresponding atoms
    of identical molecules. Bond orders and handedness are ignored.
    """
    atoms = _ordered_atoms(topology)
    graph = nx.Graph()
    for atom in atoms:
        graph.add_node(atom.index, colour="" if atom.element is None else atom.element.symbol)
    graph.add_edges_from((a.index, b.index) for a, b in topology.bonds() if a is not b)
    return check_labels(_orbits(graph), len(atoms))


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


# -- trajectories -----------------------------------------------------------------------------
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
    expected = [_signature(atom) for atom in _ordered_atoms(topology)]
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


_SIGNATURE = ("element", "name", "residue name", "residue index")


def _signature(atom: Any) -> tuple[str, str, str, int]:
    """Element, name, residue name and residue index of an OpenMM or an mdtraj atom."""
    symbol = "VS" if atom.element is None else atom.element.symbol
    return symbol, atom.name, atom.residue.name, atom.residue.index
