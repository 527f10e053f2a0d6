"""Topologies: lossless documents, orbits against brute force, labels, trajectory checks."""

from __future__ import annotations

import copy
import itertools
import json

import mdtraj as md
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openmm import Vec3, app, unit
from openmmtools import testsystems

from openmm_vtdis.topology import (
    check_labels,
    check_trajectory_topology,
    identical_labels,
    placeholder_topology,
    symmetry_labels,
    topology_from_json,
    topology_to_json,
)
from openmm_vtdis.topology.symmetry import _refine
from tests.molecules import molecule


def carbons(graph: nx.Graph) -> app.Topology:
    return molecule("C" * len(graph), graph.edges)


@pytest.fixture(scope="module")
def dipeptide() -> app.Topology:
    return testsystems.AlanineDipeptideVacuum(constraints=None).topology


@pytest.fixture
def rich() -> app.Topology:
    """Two chains, insertion codes, a particle without an element, typed bonds, charges, a box."""
    topology = app.Topology()
    first = topology.addResidue("ACE", topology.addChain("A"), "7", "B")
    c = topology.addAtom("C", app.element.carbon, first, "c-1", formalCharge=-1)
    o = topology.addAtom("O", app.element.oxygen, first)
    second = topology.addChain("zz")
    topology.addResidue("EMPTY", second, "8")
    third = topology.addResidue("VIR", second, "9")
    v = topology.addAtom("M", None, third, "17")
    d = topology.addAtom("D", app.element.deuterium, third)
    topology.addBond(c, o, app.Double, 2)
    topology.addBond(v, c)
    topology.addBond(o, d, app.Amide)
    vectors = [Vec3(2.0, 0, 0), Vec3(0.1, 2.0, 0), Vec3(0.2, 0.3, 2.5)]
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    return topology


# -- documents --------------------------------------------------------------------------------
def facts(topology: app.Topology) -> list[object]:
    """All that a Topology knows, gathered independently of topology_to_json."""
    return [
        [(c.index, c.id, len(c)) for c in topology.chains()],
        [(r.index, r.name, r.id, r.insertionCode, r.chain.index) for r in topology.residues()],
        [
            (a.index, a.name, a.element, a.id, a.formalCharge, a.residue.index)
            for a in topology.atoms()
        ],
        [(b[0].index, b[1].index, b.type, b.order) for b in topology.bonds()],
        topology.getPeriodicBoxVectors(),
    ]


def test_the_document_is_lossless(rich: app.Topology, dipeptide: app.Topology) -> None:
    for topology in (rich, dipeptide, placeholder_topology(4), app.Topology()):
        document = json.loads(json.dumps(topology_to_json(topology), allow_nan=False))
        again = topology_from_json(document)
        assert facts(again) == facts(topology)
        assert topology_to_json(again) == document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("chains",), None, "could not read the chains: TypeError"),
        (("chains", 0, "residues", 0, "atoms", 1, "element"), "Qq", "could not read atom 1"),
        (("chains", 0, "residues", 0, "atoms", 0), {"name": "C"}, "atom 0: KeyError: 'element'"),
        (("chains", 1, "residues", 0), {}, "could not read residue 1: KeyError"),
        (("bonds", 2), [0, 9, None, None], "bond 2: ValueError: it joins atoms 0 and 9 of 4"),
        (("bonds", 0), [-1, 1, None, None], "it joins atoms -1 and 1"),
        (("bonds", 0), [0, 1, "Quadruple", 4], "could not read bond 0: KeyError"),
        (("bonds", 0), [0, 1], "not enough values"),
        (("box_vectors",), [[1.0, 0.0, 0.0]], "expected three vectors"),
        (("box_vectors",), [[1, 1, 0], [0, 1, 0], [0, 0, 1]], "must be parallel to x"),
    ],
)
def test_a_malformed_document_is_refused(
    rich: app.Topology, path: tuple[str | int, ...], value: object, message: str
) -> None:
    document = copy.deepcopy(topology_to_json(rich))
    place: object = document
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    with pytest.raises(ValueError, match="expected a document written by") as caught:
        topology_from_json(document)
    assert message in str(caught.value)


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="could not read the chains: KeyError"):
        topology_from_json({})
    with pytest.raises(ValueError, match="could not read the chains: TypeError"):
        topology_from_json([])  # type: ignore[arg-type]


def test_atoms_out_of_order_and_foreign_bond_types_are_refused() -> None:
    topology = app.Topology()
    first, second = topology.addChain(), topology.addChain()
    topology.addAtom("H", app.element.hydrogen, topology.addResidue("B", second))
    topology.addAtom("O", app.element.oxygen, topology.addResidue("A", first))
    with pytest.raises(ValueError, match=r"expected atoms numbered .* got atom 1 \(O\) in place 0"):
        topology_to_json(topology)
    bonded = molecule("CO", [])
    bonded.addBond(*bonded.atoms(), "triple-ish")
    with pytest.raises(ValueError, match=r"expected bonds of type None, Single, .* 'triple-ish'"):
        topology_to_json(bonded)
    with pytest.raises(ValueError, match=r"expected an openmm\.app\.Topology, got str"):
        topology_to_json("x")


# -- symmetry ---------------------------------------------------------------------------------
def brute_force(elements: str, bonds: set[frozenset[int]]) -> list[int]:
    """Orbits by trying every permutation of the atoms."""
    n = len(elements)
    orbit = list(range(n))
    for p in itertools.permutations(range(n)):
        if all(elements[i] == elements[p[i]] for i in range(n)) and bonds == {
            frozenset(p[i] for i in bond) for bond in bonds
        }:
            orbit = [min(orbit[i], p[i]) for i in range(n)]
    return orbit


@given(
    st.text("CH", min_size=1, max_size=6).flatmap(
        lambda elements: st.tuples(
            st.just(elements),
            st.sets(
                st.sampled_from(
                    [frozenset(pair) for pair in itertools.combinations(range(len(elements)), 2)]
                    or [frozenset()]
                )
            ),
        )
    )
)
def test_labels_are_the_orbits_of_the_automorphism_group(
    case: tuple[str, set[frozenset[int]]],
) -> None:
    elements, edges = case
    bonds = {edge for edge in edges if edge}
    labels = symmetry_labels(molecule(elements, [tuple(sorted(bond)) for bond in bonds]))
    np.testing.assert_array_equal(labels, check_labels(brute_force(elements, bonds), len(elements)))


def test_alanine_dipeptide_has_three_distinct_methyls(dipeptide: app.Topology) -> None:
    labels = symmetry_labels(dipeptide)
    names = [f"{a.residue.name}-{a.name}" for a in dipeptide.atoms()]
    classes = [{names[i] for i in np.flatnonzero(labels == k)} for k in range(labels.max() + 1)]
    assert [c for c in classes if len(c) > 1] == [
        {"ACE-H1", "ACE-H2", "ACE-H3"},
        {"ALA-HB1", "ALA-HB2", "ALA-HB3"},
        {"NME-H1", "NME-H2", "NME-H3"},
    ]
    assert len(classes) == 22 - 6
    assert labels[0] == 0


def test_exchangeable_methyls_share_a_class() -> None:
    ethane = molecule(
        "CCHHHHHH", [(0, 1), *[(0, i) for i in (2, 3, 4)], *[(1, i) for i in (5, 6, 7)]]
    )
    np.testing.assert_array_equal(symmetry_labels(ethane), [0, 0, *[1] * 6])


def test_particles_without_bonds_are_classed_by_element() -> None:
    np.testing.assert_array_equal(symmetry_labels(placeholder_topology(13)), identical_labels(13))
    np.testing.assert_array_equal(symmetry_labels(molecule("OCCOH", [])), [0, 1, 1, 0, 2])
    np.testing.assert_array_equal(symmetry_labels(molecule("CCC", [(0, 2)])), [0, 1, 0])


def test_atoms_of_identical_molecules_correspond() -> None:
    waters = molecule("OHHHOH", [(0, 1), (0, 2), (4, 3), (4, 5)])
    np.testing.assert_array_equal(symmetry_labels(waters), [0, 1, 1, 1, 0, 1])


def two_rings_of_five() -> nx.Graph:
    rings = nx.disjoint_union(nx.cycle_graph(5), nx.cycle_graph(5))
    rings.add_edge(0, 5)
    return rings


def two_rings_of_six() -> nx.Graph:
    ring = nx.cycle_graph(10)
    ring.add_edge(0, 5)
    return ring


def shrikhande() -> nx.Graph:
    """Strongly regular (16, 6, 2, 2), like the rook's graph, and not isomorphic to it."""
    graph = nx.Graph()
    for i, j in itertools.product(range(4), repeat=2):
        graph.add_edges_from(
            (4 * i + j, 4 * ((i + a) % 4) + (j + b) % 4) for a, b in ((1, 0), (0, 1), (1, 1))
        )
    return graph


def rook() -> nx.Graph:
    return nx.cartesian_product(nx.complete_graph(4), nx.complete_graph(4))


@pytest.mark.parametrize(
    ("graph", "n_refined", "n_orbits"),
    [
        (nx.frucht_graph(), 1, 12),  # cubic, without any symmetry
        (nx.disjoint_union(nx.cycle_graph(6), nx.cycle_graph(3)), 1, 2),
        (nx.disjoint_union(two_rings_of_five(), two_rings_of_six()), 3, 6),
        (nx.disjoint_union(shrikhande(), rook()), 1, 2),  # merged even with one node marked
        (nx.petersen_graph(), 1, 1),
        (nx.complete_graph(9), 1, 1),
        (nx.dodecahedral_graph(), 1, 1),
    ],
    ids=[
        "Frucht",
        "rings",
        "decalin and bicyclopentyl",
        "strongly regular",
        "Petersen",
        "complete",
        "dodecahedron",
    ],
)
def test_what_colour_refinement_merges_is_caught(
    graph: nx.Graph, n_refined: int, n_orbits: int
) -> None:
    assert len(set(_refine(graph, dict.fromkeys(graph, "C")).values())) == n_refined
    assert len(set(symmetry_labels(carbons(graph)))) == n_orbits


def test_labels_follow_a_renumbering_of_the_atoms(dipeptide: app.Topology) -> None:
    elements = [a.element.symbol for a in dipeptide.atoms()]
    bonds = [(a.index, b.index) for a, b in dipeptide.bonds()]
    p = np.random.default_rng(3).permutation(len(elements))
    place = np.argsort(p)
    shuffled = molecule(
        "".join(elements[i] for i in p), [(int(place[a]), int(place[b])) for a, b in bonds]
    )
    np.testing.assert_array_equal(
        symmetry_labels(shuffled), check_labels(symmetry_labels(dipeptide)[p], len(p))
    )


# -- labels -----------------------------------------------------------------------------------
def test_labels_are_renumbered_by_first_appearance() -> None:
    np.testing.assert_array_equal(check_labels([7, -2, 7, 0], 4), [0, 1, 0, 2])
    assert check_labels(np.array([3], dtype=np.uint8), 1).dtype == np.int64
    np.testing.assert_array_equal(identical_labels(3), [0, 0, 0])


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0, 2.0], [True, False, True], [[0, 1, 2]], []])
def test_bad_labels_are_refused(labels: list[object]) -> None:
    with pytest.raises(ValueError, match="labels: expected 3 integers, one per particle, got"):
        check_labels(labels, 3)  # type: ignore[arg-type]


def test_sizes_must_be_positive() -> None:
    for make in (identical_labels, placeholder_topology):
        with pytest.raises(ValueError, match="n_particles: expected an integer >= 1, got 0"):
            make(0)


# -- trajectories -----------------------------------------------------------------------------
def test_a_topology_matches_itself(rich: app.Topology, dipeptide: app.Topology) -> None:
    for topology in (rich, dipeptide, placeholder_topology(3)):
        check_trajectory_topology(topology, md.Topology.from_openmm(topology))


def test_mismatches_are_named(dipeptide: app.Topology) -> None:
    other = md.Topology.from_openmm(dipeptide)
    other.atom(5).name = "O1"
    with pytest.raises(ValueError, match=r"atom 5 \(O of ACE 0\) has name 'O1' instead of 'O'"):
        check_trajectory_topology(dipeptide, other)
    other = md.Topology.from_openmm(dipeptide)
    other.atom(6).element = md.element.phosphorus
    other.atom(9).name = "X"
    with pytest.raises(ValueError, match=r"atom 6 .* has element 'P' instead of 'N'"):
        check_trajectory_topology(dipeptide, other)
    other = md.Topology.from_openmm(dipeptide)
    other.residue(1).name = "GLY"
    with pytest.raises(ValueError, match=r"atom 6 .* has residue name 'GLY' instead of 'ALA'"):
        check_trajectory_topology(dipeptide, other)
    with pytest.raises(ValueError, match="expected 22 atoms as in the topology, got 3"):
        check_trajectory_topology(dipeptide, md.Topology.from_openmm(placeholder_topology(3)))
    together = app.Topology()
    residue = together.addResidue("AR", together.addChain())
    for _ in range(2):
        together.addAtom("AR", app.element.argon, residue)
    with pytest.raises(ValueError, match=r"atom 1 .* has residue index 0 instead of 1"):
        check_trajectory_topology(placeholder_topology(2), md.Topology.from_openmm(together))
